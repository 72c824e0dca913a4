"""Callbacks that only show or measure, and cost no training: what they or a logger raise is reported, counted and passed over.

Here are the kinds of such callbacks and the one place that catches. A checkpoint that cannot be written, data that cannot be read
and losses that are not finite end a run as before: they are none of these.
"""

from __future__ import annotations

import functools
import logging
import time
import traceback
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed

log = logging.getLogger(__name__)

LOGGING = (
    "rewind",
    "log_metrics",
    "log_hyperparams",
    "log_graph",
    "log_image",
    "save",
    "finalize",
    "after_save_checkpoint",
)
HOOKS = tuple(name for name in dir(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown"))
REST = (
    10  # times as long as a logger took to fail it is left alone: one that times out costs a tenth of the time at most
)
_ROOT = Path(__file__).resolve().parent.parent


class Observer(pl.Callback):
    """A callback that only shows or measures, by which no rank waits for another but in `callbacks.sharing`."""


class HeldOutObserver(Observer):
    """An observer that works on held-out scenes every so many steps, after the checkpoint of the step and its validation.

    A run that goes on from a step on which it is due begins with it: the attempt before may have been cut short in it.

    Args:
        every: optimizer steps between.
    """

    def __init__(self, *, every: int) -> None:
        self.every = every
        self._seen = 0

    @abstractmethod
    def observe(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        """Do what is due after a step; all ranks call this."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that nothing is done yet."""
        self._seen = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Observe the steps before this batch, where that is due."""
        self._observe_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Observe the last step, where that is due."""
        self._observe_due(trainer, pl_module)

    def _observe_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step in (0, self._seen) or step % self.every:
            return
        self._seen = step
        if trainer.datamodule.validates:  # type: ignore[attr-defined]
            self.observe(trainer, module, step)


class RankFailed(RuntimeError):
    """A failure of one rank in work that all share; the message says which rank and why."""


class PassedOver(pl.Callback):
    """Catch what observers and loggers raise, and count it.

    Attributes:
        counts: how often each has failed.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._trainer: pl.Trainer | None = None
        self._told: dict[str, str] = {}
        self._is_logging = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note where to log."""
        self._trainer = trainer

    def watch(self, name: str, callback: Observer) -> None:
        """Pass over what any hook of an observer raises from now on."""
        hooks = [hook for hook in HOOKS if getattr(type(callback), hook) is not getattr(pl.Callback, hook)]
        self._guard(name, callback, hooks, rest=0)

    def watch_logger(self, name: str, logger: Any) -> None:
        """Pass over what a logger raises from now on; one that was slow to fail is left alone for a while."""
        self._guard(f"{name} logger", logger, [call for call in LOGGING if hasattr(logger, call)], rest=REST)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what was passed over, on any rank."""
        if trainer.world_size > 1:
            every: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(every, (self.counts, self._told))
            for counts, told in every:
                self.counts |= counts  # the larger of two: what all ranks share has failed on all of them
                self._told = told | self._told
        self._conclude(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Report what this rank has passed over, where the run ends otherwise."""
        self._conclude(trainer)

    def report(self, name: str, error: Exception) -> None:
        """Count a failure, log the count, and report a cause that is new.

        Args:
            name: what has failed.
            error: why.
        """
        self.counts[name] += 1
        step = 0 if self._trainer is None else self._trainer.global_step
        cause = described(error)
        if self._told.get(name) != cause:
            self._told[name] = cause
            log.warning("%s: passed over at step %d, training goes on: %s", name, step, cause)
        if self._trainer is None or self._is_logging:
            return
        self._is_logging = True  # a logger that fails at this is not reported to itself
        try:
            for logger in self._trainer.loggers:
                logger.log_metrics({f"passed_over/{name.replace(' ', '_')}": float(self.counts[name])}, step=step)
        finally:
            self._is_logging = False

    def _guard(self, name: str, thing: Any, calls: Iterable[str], *, rest: float) -> None:
        again = [0.0]
        for call in calls:
            setattr(thing, call, self._passing(name, getattr(thing, call), again, rest))

    def _passing(self, name: str, call: Callable[..., Any], again: list[float], rest: float) -> Callable[..., Any]:
        @functools.wraps(call)
        def passed(*given: Any, **named: Any) -> Any:
            began = time.monotonic()
            if began < again[0]:
                self.counts[name] += 1
                return None
            try:
                return call(*given, **named)
            except Exception as error:  # not KeyboardInterrupt, not SystemExit
                again[0] = time.monotonic() + rest * (time.monotonic() - began)
                self.report(name, error)
                return None

        return passed

    def _conclude(self, trainer: pl.Trainer) -> None:
        if self.counts and trainer.is_global_zero:
            told = "; ".join(
                f"{name} {count} times (the last: {self._told[name]})" for name, count in sorted(self.counts.items())
            )
            log.warning("passed over: %s", told)


def described(error: BaseException) -> str:
    """Return class and message of an error in a line, and where in this project it came up."""
    if isinstance(error, RankFailed):
        return str(error)
    message = " ".join(str(error).split())[:300]
    frames = [
        (Path(frame.filename), frame)
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_ROOT) and ".venv" not in Path(frame.filename).parts
    ]
    where = [f"{file.relative_to(_ROOT)}:{frame.lineno}, {frame.name}" for file, frame in frames]
    kind = type(error).__name__
    return f"{kind}: {message} ({where[-1]})" if where else f"{kind}: {message}"
