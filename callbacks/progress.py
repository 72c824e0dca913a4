"""The progress bar and its rates: loss, samples per second over all ranks, and the share of time spent waiting for data."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from callbacks.observer import Observer


class Progress(TQDMProgressBar, Observer):
    """Show loss, samples/s and data wait, and log the last two.

    Args:
        every: optimizer steps between refreshes and log entries.
    """

    def __init__(self, *, every: int = 10) -> None:
        super().__init__(refresh_rate=every)
        self.every = every
        self._rates: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._restart(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """End the wait for data."""
        super().on_train_batch_start(trainer, *args, **kwargs)
        self._waited += time.perf_counter() - self._batch_ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count samples; every so many steps bring the rates up to date."""
        self._samples += len(batch) * trainer.world_size
        if trainer.global_step >= self._began_step + self.every:
            seconds = time.perf_counter() - self._began
            self._rates = {
                "samples_per_second": self._samples / seconds,
                "data_wait": self._waited / seconds,
            }
            for logger in trainer.loggers:
                logger.log_metrics({f"speed/{k}": v for k, v in self._rates.items()}, step=trainer.global_step)
            self._restart(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._batch_ended = time.perf_counter()

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return loss, samples/s and data wait for the bar."""
        items: dict[str, Any] = {}
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            items["loss"] = f"{float(loss):.4f}"
        if self._rates:
            items["samples/s"] = f"{self._rates['samples_per_second']:.0f}"
            items["data wait"] = f"{self._rates['data_wait']:.0%}"
        return items

    def _restart(self, trainer: pl.Trainer) -> None:
        self._began = self._batch_ended = time.perf_counter()
        self._began_step, self._samples, self._waited = trainer.global_step, 0, 0.0
