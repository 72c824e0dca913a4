"""A new run's start from the weights, and on request the optimizer, of another run.

A run that is resumed goes on from its own checkpoint instead; that is the trainer's business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from models.conditioning.adapter_file import load_pickled


class StartFrom(pl.Callback):
    """Load another run's checkpoint before the first step.

    Args:
        checkpoint: the file.
        optimizer: also take the optimizer's state (its moments); learning rate and schedule are this run's.
    """

    def __init__(self, checkpoint: Path, *, optimizer: bool) -> None:
        self.checkpoint = checkpoint
        self.optimizer = optimizer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take the weights and their average; other methods, backbones or shapes are rejected.

        Args:
            trainer: the trainer.
            pl_module: the module that starts.

        Raises:
            ValueError: the checkpoint does not fit; it is named.
        """
        stored = load_pickled(Path(self.checkpoint), "start_from")
        stored.pop("nonfinite", None)  # steps that another run has left out
        try:
            pl_module.on_load_checkpoint(stored)
        except ValueError as error:
            raise ValueError(f"start_from: {self.checkpoint}: {error}") from error
        pl_module.load_state_dict(stored["state_dict"], strict=False)  # on_load_checkpoint has verified the keys
        self._moments = stored["optimizer_states"][0]["state"] if self.optimizer else None
        print(f"starts from {self.checkpoint} (step {stored['global_step']})")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take the optimizer's moments, once there is an optimizer."""
        if self._moments is not None:
            optimizer = trainer.optimizers[0]
            optimizer.load_state_dict({**optimizer.state_dict(), "state": self._moments})
