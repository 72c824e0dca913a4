"""Checkpoints of a run: adapter, average, optimizer, loop and data position, named by step, written beside and renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class Checkpoint(pl.Callback):
    """Saves every so many optimizer steps and at the end; keeps the newest.

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
        """Saves on the steps that are due, and on the last."""
        step = trainer.global_step
        if step != self._saved_step and (step % self.every == 0 or step == trainer.max_steps):
            self._save(trainer, step)

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        path = self.folder / f"step={step}.ckpt"
        beside = path.with_suffix(".partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            trainer.save_checkpoint(beside)
            if trainer.is_global_zero:
                os.replace(beside, path)
        except OSError:  # disk full: the checkpoints before this one stay whole
            beside.unlink(missing_ok=True)
            raise
        self._saved_step = step
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step=*.ckpt"), key=_step)[: -self.keep]:
                old.unlink()


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))
