"""Copies of remote shards on this machine, no more of them than there is room for; processes of a machine share them.

A copy is named by the checksum that the index gives, so that what lies there under a name is that shard whole, whoever fetched it
and when. It is fetched beside, compared with the index and renamed; the one that was opened longest ago goes first. Who still
reads a copy that has gone reads on: the system keeps it until it is closed. How a shard is read is in `shards.py`.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from datamodules.shard_index import ShardEntry, ShardError, size_fault
from datamodules.storage import PARTIAL, RemoteFolder, is_stale

_TRIES = 5
_FETCHING, _ROOM = (
    ".fetching",
    ".room",
)  # lock files: of the first each shard has a byte, the second who makes room holds
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardCache:
    """A folder of copies.

    Args:
        folder: On a disk of this machine, for any number of data sets and runs.
        limit: Most bytes in it.
        pause: Seconds before a fetch that failed is tried a second time; each further try waits twice as long.
    """

    def __init__(self, folder: str | Path, *, limit: float, pause: float = 1.0) -> None:
        self.folder = Path(folder)
        self.limit = int(limit)
        self.pause = pause

    def open(self, place: str, entry: ShardEntry) -> int:
        """A shard's copy, opened; it is fetched if it is not there.

        Args:
            place: Address of the folder of shards.
            entry: What its index says of the shard.

        Returns:
            A descriptor to read from, the caller's to close.

        Raises:
            ShardError: It cannot be fetched, or is not the one of the index.
            OSError: The disk of the copies is full.
        """
        path = self.folder / f"{entry.sha256}.tar"
        with contextlib.suppress(FileNotFoundError):
            return _used(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._held(f"{_FETCHING}{entry.sha256[:2]}"):  # the others of this machine wait for one fetch
            with contextlib.suppress(FileNotFoundError):
                return _used(path)
            return self._fetched(place, entry, path)

    def part(self, place: str, entry: ShardEntry, offset: int, size: int) -> bytes:
        """Some bytes of a shard: of its copy if there is one, else fetched by themselves, and not kept.

        Args:
            place: Address of the folder of shards.
            entry: What its index says of the shard.
            offset: The first byte.
            size: How many.

        Returns:
            The bytes.

        Raises:
            ShardError: They cannot be fetched.
        """
        with contextlib.suppress(FileNotFoundError):
            file = _used(self.folder / f"{entry.sha256}.tar")
            try:
                return os.pread(file, size, offset)
            finally:
                os.close(file)
        fault = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return _remote(place, os.getpid()).part(entry.name, offset, size)
            except FileNotFoundError:
                fault = f"{entry.name} is missing"
                break
            except Exception as error:  # each protocol has errors of its own for a network that is away
                fault = f"{entry.name} cannot be fetched ({' '.join(str(error).split())})"
        raise ShardError(f"shards={place}: {fault}; run `python prepare.py task=check shards={place}`")

    def _fetched(self, place: str, entry: ShardEntry, path: Path) -> int:
        process = f"{threading.get_ident()}.{socket.gethostname()}-{os.getpid()}"
        draft = self.folder / f".{entry.sha256}.{entry.bytes}.{process}{PARTIAL}"
        while not self._has_reserved(entry.bytes, draft):
            time.sleep(0.05)  # others are fetching as much as there is room for
        try:
            self._fetch(_remote(place, os.getpid()), entry, draft)
            file = os.open(draft, os.O_RDONLY)
            os.replace(draft, path)
            return file
        finally:
            draft.unlink(missing_ok=True)

    def _has_reserved(self, size: int, draft: Path) -> bool:
        """Makes room for a shard; the draft's name says how much it will take."""
        with self._held(_ROOM):
            kept, taken = [], size
            for entry in os.scandir(self.folder):
                if entry.name.endswith(PARTIAL):
                    if is_stale(Path(entry.path)):
                        Path(entry.path).unlink(missing_ok=True)
                    else:
                        taken += int(entry.name.split(".")[2])
                elif entry.name.endswith(".tar"):
                    found = entry.stat()
                    kept.append((found.st_mtime_ns, found.st_size, entry.path))
                    taken += found.st_size
            for _, freed, oldest in sorted(kept):
                if taken <= self.limit:
                    break
                Path(oldest).unlink(missing_ok=True)
                taken -= freed
            if taken > self.limit:
                return False
            draft.touch()
            return True

    def _fetch(self, folder: RemoteFolder, entry: ShardEntry, draft: Path) -> None:
        """Copies a shard and compares it with the index, several times if need be."""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                folder.fetch(entry.name, draft)
            except FileNotFoundError:
                fault = f"{entry.name} is missing"
                break
            except Exception as error:  # each protocol has errors of its own for a network that is away
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise OSError(
                        error.errno, f"{os.strerror(error.errno)}; lower data.cache_bytes", str(draft)
                    ) from error
                fault = f"{entry.name} cannot be fetched ({' '.join(str(error).split())})"
                continue
            fault = size_fault(entry, draft.stat().st_size)
            with draft.open("rb") as file:
                if fault is None and hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    fault = f"{entry.name} has changed: its sha256 is not the one in its index"
            if fault is None:
                return
        raise ShardError(f"shards={folder}: {fault}; run `python prepare.py task=check shards={folder}`")

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[None]:
        """Holds a lock file, as no other process or thread does then."""
        with (self.folder / name).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _used(path: Path) -> int:
    """A copy opened, and marked as the one that was opened last."""
    file = os.open(path, os.O_RDONLY)
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
    return file


@functools.lru_cache(maxsize=8)
def _remote(place: str, process: int) -> RemoteFolder:
    """The folder, opened anew in each process: connections do not survive a fork."""
    return RemoteFolder(place)
