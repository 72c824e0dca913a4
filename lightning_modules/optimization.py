"""Settings of the optimization: optimizer, learning rate, average, and how many steps in a row may be left out.

The optimizers themselves are torch's and other packages'; `conf/optimizer` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_modules.averaging import MovingAverage
from lightning_modules.schedules import learning_rate_factor


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Settings that become objects when it is known what trains, and for how long.

    Attributes:
        optimizer: parameters -> optimizer.
        schedule: arguments of `learning_rate_factor` beside `steps`.
        average: settings of `MovingAverage`; None for no average.
        max_nonfinite: steps in a row that are left out, because a loss or a gradient is not finite, before the run stops.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Mapping[str, Any]
    average: Mapping[str, Any] | None = None
    max_nonfinite: int = 0

    def build(self, trained: nn.Module, *, steps: int) -> dict[str, Any]:
        """Build the optimizer over what trains, its learning rate a function of the optimizer step, as Lightning takes both."""
        optimizer = self.optimizer([parameter for parameter in trained.parameters() if parameter.requires_grad])
        factor = learning_rate_factor(steps=steps, **self.schedule)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def build_average(self, trained: nn.Module) -> MovingAverage | None:
        """Build the moving average of what trains, where there is to be one."""
        return MovingAverage(trained, **self.average) if self.average else None
