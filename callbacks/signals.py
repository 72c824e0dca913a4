"""Signals that ask a run to stop: they are noted, and training stops at the end of its step with a checkpoint.

SIGTERM is what a scheduler sends to a job that has to go, SIGUSR1 and SIGUSR2 are what it is asked to send some minutes before a
job's time is up. Lightning's own handlers are not used: they save in the midst of a step, each rank by itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AHEAD = (signal.SIGUSR1, signal.SIGUSR2)
HEARD = (signal.SIGTERM, *AHEAD)
ONE = 5.0  # s within which a second SIGTERM is taken for the first: launchers pass on what a process has had already


class Signals:
    """The signal that this process has received, and when.

    Attributes:
        is_on: this process listens.
        received: the first signal since it does; None while there was none.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.received: signal.Signals | None = None
        self._at = 0.0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Note signals within the block: SIGTERM from `listen` on, as before that there is nothing to save.

        A thread other than the main one cannot listen, and does not.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in HEARD}
        self.is_on, self.received = True, None
        for number in AHEAD:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            self.is_on = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Note signals from now on, whoever listened before; only where this process is to listen."""
        if self.is_on:
            for number in HEARD:
                signal.signal(number, self._note)

    def pass_over(self) -> None:
        """Let no further signal interrupt what is left to do; only where this process listens."""
        if self.is_on:
            for number in HEARD:
                signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number), now
        elif number == signal.SIGTERM and now - self._at > ONE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


SIGNALS = Signals()
"""Of this process, as signals are."""
