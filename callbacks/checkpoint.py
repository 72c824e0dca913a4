"""Checkpoints of a run: adapter, average, optimizer, loop and data position, named by step, written beside and renamed.

Also where a run stops before its end: when it was asked to by a signal, or its time is up. All ranks save and stop at the
same step.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.trainer.states import TrainerFn

from callbacks.checkpoint_files import LATER, CheckpointFiles
from callbacks.observer import PassedOver
from callbacks.signals import SIGNALS
from files.atomic import write_atomically

BEST = "best.json"


class Stopped(Exception):
    """A run that has stopped before its end, with a checkpoint.

    Args:
        step: optimizer steps done, all of them in the checkpoint.
        asked_by: the signal; None where its time was up.
    """

    def __init__(self, step: int, asked_by: signal.Signals | None) -> None:
        super().__init__(f"stopped at step {step}")
        self.step, self.signal = step, asked_by


class Checkpoint(pl.Callback):
    """Save every so many optimizer steps and minutes, when a run has to stop, and at its end; keep the newest and the best.

    A step's checkpoint is written when its figures are logged, before its validation, or when the next step begins; images and
    scores come after it. So nothing of these can cost training, and since a run that goes on begins with the validation, images
    and scores that are due at its step, a kill in between loses none of them, but at the very last step. Whether a
    checkpoint is due by the clock, or asked for by a signal to any rank, the ranks find out together.

    Args:
        folder: where `step=<step>.ckpt` go.
        every: optimizer steps between checkpoints.
        keep: how many stay.
        minutes: between checkpoints, by rank 0's clock; None: only steps count.
        hours: after which the run saves and stops; None: never. Counted from when this object is made.
        best: a figure by which `KeepBest` has the best checkpoint kept beside the newest, such as layout/layout_iou; one is
            then written at each step that is better than all before. Of a name that ends in "loss" the lowest is best, else the
            highest.
    """

    def __init__(
        self,
        *,
        folder: str,
        every: int,
        keep: int = 3,
        minutes: float | None = None,
        hours: float | None = None,
        best: str | None = None,
    ) -> None:
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.minutes, self.hours, self.best = minutes, hours, best
        self._began = self._saved_at = time.monotonic()
        self._saved_step = self._taken_step = self._seen_step = -1
        self._measured: Any = None
        self._has_validated = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the checkpoint which a run resumes from is there already; listen for signals in Lightning's place."""
        self._saved_step = self._seen_step = trainer.global_step
        self._taken_step = -1
        self._saved_at = time.monotonic()
        SIGNALS.listen()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save the steps before this batch, where that is due; raise `Stopped` where the run has to stop after them."""
        step = trainer.global_step
        if step == self._seen_step:
            return
        asked, late = self._save_due(trainer)
        self._seen_step = step
        if asked or late:
            for logger in trainer.loggers:
                logger.finalize("success")  # the attempt ends in order; Lightning would call it failed
            raise Stopped(step, signal.Signals(asked) if asked else None)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what is due before the step is validated."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._save_due(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the state after the last step, while Lightning counts it as one to resume from."""
        if trainer.global_step == trainer.max_steps != self._saved_step:
            self._take(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it where no validation came after it."""
        if self._taken_step == trainer.global_step:
            self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that there are figures to choose the best by from now on."""
        self._has_validated = not trainer.sanity_checking

    def keep_best(self, trainer: pl.Trainer, *, may_be_missing: bool) -> None:
        """Keep the checkpoint of the step that has just been measured, if it is the best; all ranks call this.

        Args:
            trainer: its figures are looked at.
            may_be_missing: the figure need not be there, since what would have logged it has failed.

        Raises:
            ValueError: nothing has logged the figure by now.
        """
        if self._has_validated and self.best not in (have := trainer.callback_metrics) and not may_be_missing:
            names = ", ".join(sorted(name for name in have if name.startswith(("layout/", "validation/"))))
            raise ValueError(
                f"trainer.keep_best={self.best}: no such figure is logged (have: {names}); name one of them"
            )
        (better,) = _largest(trainer, [trainer.is_global_zero and self._is_best(trainer)])
        if better:
            self._write(trainer, better=True)

    def _save_due(self, trainer: pl.Trainer) -> tuple[int, bool]:
        """Save if this step is due and not saved; return the signal (0: none) and if time is up, on every rank the same."""
        step = trainer.global_step
        asked, late, due = self._agreed(trainer)
        if step != self._saved_step and (asked or late or due or step % self.every == 0 or step == trainer.max_steps):
            self._write(trainer)
        return asked, late

    def _agreed(self, trainer: pl.Trainer) -> tuple[int, bool, bool]:
        """Return, the same on every rank, the signal that any has had (0: none), and of rank 0 if hours and if minutes are up."""
        now, flags = time.monotonic(), [int(SIGNALS.received or 0), 0, 0]
        if trainer.is_global_zero:
            flags[1] = self.hours is not None and now - self._began >= self.hours * 3600
            flags[2] = self.minutes is not None and now - self._saved_at >= self.minutes * 60
        asked, late, due = _largest(trainer, flags)
        return asked, bool(late), bool(due)

    def _is_best(self, trainer: pl.Trainer) -> bool:
        """Return True if the figure was measured anew at this step and is better than all before."""
        value = trainer.callback_metrics.get(self.best) if self.best is not None else None
        if value is None or value is self._measured or math.isnan(float(value)):
            return False
        self._measured = value
        step, best = self._best()
        lower = str(self.best).endswith("loss")
        return step < 0 or (float(value) < best if lower else float(value) > best)

    def _best(self) -> tuple[int, float]:
        """Return step and figure of the best checkpoint; step -1 where there is none of that figure."""
        file = self.folder / BEST
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return (said["step"], said["value"]) if said and said["name"] == self.best else (-1, 0.0)

    def _take(self, trainer: pl.Trainer) -> None:
        """Bring the state of all ranks together on rank 0; every rank calls it."""
        path = self.folder / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False, storage_options=LATER)
        self._taken_step = trainer.global_step

    def _write(self, trainer: pl.Trainer, *, better: bool = False) -> None:
        """Write on rank 0, unless it is there; the others wait, and end with it where it fails."""
        step, files = trainer.global_step, _files(trainer)
        if step not in (self._saved_step, self._taken_step):
            self._take(trainer)
        self._taken_step = -1
        error: OSError | None = None
        if trainer.is_global_zero:
            try:
                if step != self._saved_step:
                    files.write()
                self._tidy(step, better=better)
            except OSError as full:  # disk full: the checkpoints before this one stay whole
                what = f"{full.strerror or full}; nothing was left behind: make room and give the same command again"
                error = OSError(full.errno, what, str(self.folder / f"step={step}.ckpt"))
        is_written = trainer.strategy.broadcast(error is None)
        if error is not None:
            raise error
        if not is_written:
            time.sleep(1)  # rank 0 says why, and ends first
            sys.exit(2)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _tidy(self, step: int, *, better: bool) -> None:
        """Note the best, and remove all but that and the newest."""
        if better:
            note = json.dumps({"name": self.best, "step": step, "value": float(self._measured)}) + "\n"
            write_atomically(self.folder / BEST, note.encode())
        best, _ = self._best()
        for old in sorted(self.folder.glob("step=*.ckpt"), key=_step)[: -self.keep]:
            if _step(old) != best:
                old.unlink()


class KeepBest(pl.Callback):
    """Keep the best checkpoint, once everything is measured: this comes after all callbacks that measure.

    Args:
        checkpoint: what saves.
        passed_over: what has failed to measure.
    """

    def __init__(self, checkpoint: Checkpoint, passed_over: PassedOver) -> None:
        self.checkpoint, self.passed_over = checkpoint, passed_over
        self._seen = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look again at the step that a run resumes from: it may have been measured without being kept."""
        self._seen = -1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the figures of the steps before this batch."""
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.checkpoint.keep_best(trainer, may_be_missing=bool(self.passed_over.counts))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at those of the last step."""
        self.checkpoint.keep_best(trainer, may_be_missing=bool(self.passed_over.counts))


def _largest(trainer: pl.Trainer, flags: list[Any]) -> list[int]:
    """Return of each flag the largest of any rank, on every rank."""
    if trainer.world_size == 1:
        return [int(flag) for flag in flags]
    on_gpu = dist.get_backend() == "nccl"
    shared = torch.tensor(flags, dtype=torch.int32, device=trainer.strategy.root_device if on_gpu else "cpu")
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def _files(trainer: pl.Trainer) -> CheckpointFiles:
    files = trainer.strategy.checkpoint_io
    if not isinstance(files, CheckpointFiles):
        raise ValueError(
            f"callback.checkpoint: the trainer writes by {type(files).__name__}; give it CheckpointFiles()"
        )
    return files


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))
