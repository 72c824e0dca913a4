"""Training of the shapes backbone, whose hidden states are to keep their positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from datamodules.scene_datamodule import Batch
from lightning_modules.scene_diffusion import SceneDiffusion
from models.backbones.shapes import places
from models.conditioning.slots import block_sites

WEIGHT = 0.02
SCALE = 2.0


class ShapesBase(SceneDiffusion):
    """The shared step, and a loss for hidden states that forget where they lie.

    Captions say nothing of places, so that nothing in the base's own task keeps them: told where its cells lie, it drops them
    within some hundred steps. Here the first two channels of the hidden states that an adapter reads, after a layer
    norm, are drawn to row and column (docs/decisions/0007-shapes-coordinates.md).
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._found: list[Tensor] | None = None  # filled while losses are computed
        for site in block_sites(self.backbone.unet):
            # the input of the second norm is what a slot's modules read
            block = self.backbone.unet.get_submodule(site.path)
            block.get_submodule("norm2").register_forward_pre_hook(self._keep)

    def parts(self, batch: Batch, keys: list[int], *, drop: bool = True) -> dict[str, Tensor]:
        """Return the terms of the losses, the one for places among them."""
        self._found = found = []
        try:
            parts = super().parts(batch, keys, drop=drop)
        finally:
            self._found = None
        away = [_away(hidden) for hidden in found]
        return {**parts, "places": WEIGHT * torch.stack(away).mean(dim=0)}

    def _keep(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        if self._found is not None:
            self._found.append(given[0])


def _away(hidden: Tensor) -> Tensor:
    """Return (B,) mean squared distances between the places that hidden states (B, L, C) say and those where they lie."""
    level = int(hidden.shape[1] ** 0.5)
    where = places(hidden.new_zeros(1, 1, level, level)).flatten(2).transpose(1, 2)
    told = functional.layer_norm(hidden, hidden.shape[-1:])[..., :2]
    return (told - SCALE * where).square().mean(dim=(1, 2))
