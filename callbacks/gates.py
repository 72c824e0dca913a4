"""Signs that a method has begun to act: each adapter's gates and the norm of its gradient, in the log, with what did not fit."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from callbacks.observer import Observer


class Gates(Observer):
    """Log `gates/<adapter>/<name>`, `left_out/<adapter>/<name>` and `gradient_norm` every so many optimizer steps.

    Args:
        every: optimizer steps between entries.
    """

    def __init__(self, *, every: int) -> None:
        self.every = every

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Log before the gradient is clipped."""
        if trainer.global_step % self.every:
            return
        gradients = [p.grad for p in pl_module.trained.parameters() if p.grad is not None]
        values = {"gradient_norm": float(torch.nn.utils.get_total_norm(gradients))}
        for name, adapter in pl_module.conditioning.adapters.items():
            values |= {f"gates/{name}/{gate}": value for gate, value in adapter.gates().items()}
            values |= {f"left_out/{name}/{what}": float(count) for what, count in adapter.counts().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
