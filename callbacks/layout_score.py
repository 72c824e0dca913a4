"""A layout score during training: control appears suddenly while the loss stays flat, so it is measured and not guessed."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytorch_lightning as pl
import torch

from callbacks.observer import HeldOutObserver, described
from callbacks.sharing import first_fault, shared
from metrics.base import Metric, NotAvailable
from models.sampling import to_uint8

log = logging.getLogger(__name__)


class LayoutScore(HeldOutObserver):
    """Draw held-out scenes every so many steps, from the averaged weights, and log a metric's values for them.

    All ranks draw and measure, each its share, and the values are those of one process. Where a rank lacks what the metric needs,
    training goes on without it.

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
        self._is_off = self._has_told = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the metric's models, or report where their files go."""
        if not trainer.datamodule.validates:  # type: ignore[attr-defined]
            return
        fault = None
        try:
            self.metric = self.metric.to(trainer.strategy.root_device)
        except NotAvailable as error:
            fault = f"callback.layout_score.metric.{error.__cause__ or error}"
        except Exception as error:  # the others wait to hear of it
            fault = described(error)
        fault = first_fault(trainer, fault)
        self._is_off = fault is not None
        if fault is not None and trainer.is_global_zero:
            log.warning("no layout score during training: %s", fault)

    def observe(self, trainer: pl.Trainer, pl_module: Any, step: int) -> None:
        """Draw, score and log; a figure that no scene bears on is not logged."""
        if self._is_off:
            return

        def measured(held_out: Any) -> list[Any]:
            drawn = pl_module.sample(held_out.scenes, seed=self.seed)
            return self.metric.measure(list(to_uint8(drawn)), list(held_out.scenes))

        rows = shared(trainer, pl_module, measured, scenes=self.scenes, at_once=self.at_once)
        tallies = self.metric.tallies(rows)
        if tallies.get("boxes_known") == 0 and not self._has_told and trainer.is_global_zero:
            self._has_told = True
            log.warning(
                "layout score: the detector knows the name of none of %d boxes; give one that can be asked for phrases, such as "
                "detector@callback.layout_score.metric.detector=grounding_dino",
                tallies["boxes"],
            )
        values = {name: value.mean for name, value in self.metric.compute(rows).items()} | tallies
        values = {f"layout/{name}": float(value) for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics({name: value for name, value in values.items() if not math.isnan(value)}, step=step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
