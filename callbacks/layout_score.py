"""A layout score during training: control appears suddenly while the loss stays flat, so it is measured and not guessed."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from metrics.base import Metric
from models.sampling import to_uint8


class LayoutScore(pl.Callback):
    """Draws held-out scenes every so many steps, from the averaged weights, and logs what a metric says of them.

    Args:
        metric: scores pictures against scenes.
        every: optimizer steps between scores.
        scenes: how many scenes.
        seed: of the start latents.
    """

    def __init__(self, *, metric: Metric, every: int, scenes: int = 32, seed: int = 0) -> None:
        self.metric, self.every, self.scenes, self.seed = metric, every, scenes, seed

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Scores on the steps that are due."""
        step = trainer.global_step
        due = step % self.every == 0 and trainer.fit_loop.epoch_loop._should_accumulate() is False
        if not (due and trainer.is_global_zero):
            return
        held_out = trainer.datamodule.held_out(self.scenes).to(pl_module.device)
        with pl_module.averaged(), torch.no_grad():
            drawn = pl_module.sample(held_out.scenes, seed=self.seed)
        rows = self.metric.measure(list(to_uint8(drawn)), list(held_out.scenes))
        values = {f"layout/{name}": value.mean for name, value in self.metric.compute(rows).items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
