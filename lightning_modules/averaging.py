"""The moving average of what trains: the adapters alone, never the frozen backbone beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(nn.Module):
    """An exponential moving average of a module's parameters, with its own copy of the weights.

    Args:
        module: what trains.
        decay: weight of the past in the long run.
        warmup: raise the decay from 0 as (1 + n) / (10 + n), so that a short run is not averaged with its random start.

    Source:
        The warm-up is that of TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
    """

    def __init__(self, module: nn.Module, *, decay: float, warmup: bool = True) -> None:
        super().__init__()
        self.decay, self.warmup = decay, warmup
        self.average = AveragedModel(module, multi_avg_fn=self._blend)
        self.average.requires_grad_(False)
        self._updates = 0

    def update(self, module: nn.Module) -> None:
        """Take in the module's present weights."""
        self._updates = int(self.average.n_averaged)
        self.average.update_parameters(module)

    @contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """Give the module the averaged weights within the block."""
        trained = [parameter.detach().clone() for parameter in module.parameters()]
        _copy(list(self.average.module.parameters()), module)
        try:
            yield
        finally:
            _copy(trained, module)

    @torch.no_grad()
    def _blend(self, averaged: list[Tensor], present: list[Tensor], _count: int | Tensor) -> None:
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates)) if self.warmup else self.decay
        torch._foreach_lerp_(averaged, present, 1 - decay)


@torch.no_grad()
def _copy(source: list[Tensor], module: nn.Module) -> None:
    for own, other in zip(module.parameters(), source, strict=True):
        own.copy_(other)
