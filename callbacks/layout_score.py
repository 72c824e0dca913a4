"""A layout score during training: control appears suddenly while the loss stays flat, so it is measured and not guessed."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from callbacks.observer import HeldOutObserver
from callbacks.sharing import shared
from metrics.base import Metric
from models.sampling import to_uint8


class LayoutScore(HeldOutObserver):
    """Draws held-out scenes every so many steps, from the averaged weights, and logs what a metric says of them.

    All ranks draw and measure, each its share, and the values are those of one process.

    Args:
        metric: scores pictures against scenes.
        every: optimizer steps between scores.
        scenes: how many scenes.
        seed: of the start latents.
        at_once: scenes that a rank draws at once.
    """

    def __init__(self, *, metric: Metric, every: int, scenes: int = 32, seed: int = 0, at_once: int = 8) -> None:
        super().__init__(every=every)
        self.metric, self.scenes, self.seed, self.at_once = metric, scenes, seed, at_once

    def observe(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        """Draws, scores and logs."""

        def measured(held_out: Any) -> list[Any]:
            drawn = pl_module.sample(held_out.scenes, seed=self.seed)
            return self.metric.measure(list(to_uint8(drawn)), list(held_out.scenes))

        rows = shared(trainer, pl_module, measured, scenes=self.scenes, at_once=self.at_once)
        values = {f"layout/{name}": value.mean for name, value in self.metric.compute(rows).items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
