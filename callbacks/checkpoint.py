"""Checkpoints of a run: adapter, average, optimizer, loop and data position, named by step, written beside and renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn


class Checkpoint(pl.Callback):
    """Saves every so many optimizer steps and at the end; keeps the newest.

    Where a validation is due at the same step, it comes first: Lightning does not make up for one that a kill cut short
    when the run goes on from that step.

    Args:
        folder: where `step=<step>.ckpt` go.
        every: optimizer steps between checkpoints.
        keep: how many stay.
    """

    def __init__(self, *, folder: str, every: int, keep: int = 3) -> None:
        self.folder, self.every, self.keep = Path(folder), every, keep
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The checkpoint that a run goes on from need not be written again."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves on the steps that are due, and on the last, unless a validation follows."""
        if self._is_due(trainer) and not _validates(trainer):
            self._save(trainer, trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after the validation of a step that is due."""
        if trainer.state.fn == TrainerFn.FITTING and self._is_due(trainer):
            self._save(trainer, trainer.global_step)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        return step != self._saved_step and (step % self.every == 0 or step == trainer.max_steps)

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        path = self.folder / f"step={step}.ckpt"
        beside = path.with_suffix(".partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            trainer.save_checkpoint(beside)
            if trainer.is_global_zero:
                os.replace(beside, path)
        except OSError as error:  # disk full: the checkpoints before this one stay whole
            beside.unlink(missing_ok=True)
            what = f"{error.strerror or error}; nothing was left behind: make room and give the same command again"
            raise OSError(error.errno, what, str(path)) from error
        self._saved_step = step
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step=*.ckpt"), key=_step)[: -self.keep]:
                old.unlink()


def _validates(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the step that has just ended."""
    batches = trainer.global_step * trainer.accumulate_grad_batches
    return trainer.enable_validation and sum(trainer.num_val_batches) > 0 and batches % trainer.val_check_batch == 0


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))
