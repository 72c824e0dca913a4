"""A line between the ranks of a run: where one ends without a word, the others end too, instead of waiting for it.

A collective over GPUs waits for a process that is gone until its time-out, and a launcher ends only the processes that it
started. Here each rank holds a connection to rank 0, which the system closes when a process ends, however it does.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable

import pytorch_lightning as pl

_TOKEN = 16  # bytes that a caller has to know
_WELCOME, _GOODBYE = b"+", b"-"


class Lifeline(pl.Callback):
    """Ends this process when another rank has died; the launcher then sees it, and ends whatever is left.

    Args:
        grace: s that this process has for ending by itself, of an error that tells more.
        patience: s in which all ranks have to be connected; without the line training goes on, and says so.
    """

    def __init__(self, *, grace: float = 15.0, patience: float = 60.0) -> None:
        self.grace, self.patience = grace, patience
        self._rank = 0
        self._lines: dict[int, socket.socket] = {}
        self._is_over = threading.Event()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connects the ranks of a training; they are there and know one another by now."""
        if stage != "fit" or trainer.world_size == 1:
            return
        self._rank = trainer.global_rank
        server = _server() if self._rank == 0 else None
        port, token = trainer.strategy.broadcast((server and server.getsockname()[1], secrets.token_bytes(_TOKEN)))
        try:
            self._lines = (
                _accepted(server, token, trainer.world_size, self.patience)
                if server is not None
                else {0: _called(os.environ["MASTER_ADDR"], port, token, self._rank, self.patience)}
            )
        except OSError as error:
            warnings.warn(
                f"rank {self._rank}: no line to the other ranks ({error}); one that dies is noticed late", stacklevel=2
            )
        for other, line in self._lines.items():
            threading.Thread(target=self._listen, args=(other, line), daemon=True, name="lifeline").start()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets the others know at once, also where this process is slow to end."""
        self._is_over.set()
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Says goodbye: this rank has done its work."""
        self._is_over.set()
        _dismiss(self._lines.values())
        self._close()

    def _close(self) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)  # closing alone leaves it open where a worker process holds a copy
            line.close()
        self._lines = {}

    def _listen(self, other: int, line: socket.socket) -> None:
        """Waits for what a rank says last; nothing where it died."""
        try:
            said = line.recv(1)
        except OSError:
            said = b""
        if said == _GOODBYE or self._is_over.is_set():
            return
        time.sleep(self.grace)
        if not self._is_over.is_set():
            told = f"rank {self._rank}: rank {other} has ended in the middle of the run, and says itself why; this one ends too"
            print(told, file=sys.stderr, flush=True)
            os._exit(1)


def _server() -> socket.socket:
    """Listens on a free port of every address of this machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _accepted(server: socket.socket, token: bytes, ranks: int, patience: float) -> dict[int, socket.socket]:
    """The lines of ranks 1 and up, once all have called.

    Args:
        server: listens; closed at the end.
        token: what a caller has to know.
        ranks: how many there are, this one included.
        patience: s in which all have to call.

    Returns:
        Rank -> its line.

    Raises:
        OSError: some have not called.
    """
    until, lines = time.monotonic() + patience, {}
    with server:
        try:
            while len(lines) < ranks - 1:
                server.settimeout(max(0.01, until - time.monotonic()))
                line, _ = server.accept()
                line.settimeout(5)
                with contextlib.suppress(OSError):  # a stranger
                    said = line.recv(_TOKEN + 4, socket.MSG_WAITALL)
                    if said[:_TOKEN] == token and len(said) == _TOKEN + 4:
                        line.sendall(_WELCOME)
                        lines[int.from_bytes(said[_TOKEN:])] = _kept(line)
                        continue
                line.close()
        except OSError:
            _dismiss(lines.values())
            raise
    return lines


def _called(host: str, port: int, token: bytes, rank: int, patience: float) -> socket.socket:
    """A rank's line to rank 0.

    Args:
        host: of rank 0.
        port: where it listens.
        token: what it asks for.
        rank: this one.
        patience: s in which it has to answer.

    Returns:
        The line.

    Raises:
        OSError: rank 0 cannot be reached there.
    """
    line = socket.create_connection((host, port), timeout=patience)
    line.sendall(token + rank.to_bytes(4))
    if line.recv(1) != _WELCOME:
        raise OSError(f"{host}:{port} does not answer")
    return _kept(line)


def _kept(line: socket.socket) -> socket.socket:
    """A line that is held as long as both ends live; a machine that has lost its power is noticed after a minute."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # Linux has them
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line


def _dismiss(lines: Iterable[socket.socket]) -> None:
    for line in lines:
        with contextlib.suppress(OSError):
            line.sendall(_GOODBYE)
