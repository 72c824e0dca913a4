"""`trainer=fsdp`: what is frozen and what only the optimizer needs lies on one rank each, in place of a copy on every rank.

The denoiser's frozen weights are cut up by torch's FSDP2, block by block; a block's are gathered when it is its turn and given
back after it. The optimizer's state is shared out by torch's ZeroRedundancyOptimizer. Adapters, their gradients and their average
stay whole on every rank, under DDP. So checkpoints are those of any other run, and go on under any other strategy. Text encoders
stay whole too: transformers tells their layers apart by their classes, which FSDP changes.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # each is gathered by itself


class SharedOut(DDPStrategy):
    """DDP over what trains, with frozen weights and the optimizer's state shared out; its arguments are DDPStrategy's."""

    def model_to_device(self) -> None:
        """Cuts the frozen weights up before they would be copied whole to the device."""
        module: Any = self.lightning_module
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        share_out(module.backbone.unet, mesh)
        super().model_to_device()

    def _setup_model(self, model: nn.Module) -> Any:
        # DDP would send round what is frozen, which here is another part on every rank
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        return super()._setup_model(model)


def share_out(part: nn.Module, mesh: Any) -> None:
    """Cuts a frozen module's weights up, its blocks each for itself.

    Args:
        part: called by its forward; nothing of it trains.
        mesh: all ranks.

    Raises:
        ValueError: something of it trains.
    """
    if any(parameter.requires_grad for parameter in part.parameters()):
        raise ValueError(
            "trainer.strategy=fsdp: shares out what is frozen, and here the backbone itself trains; take trainer=ddp, or a "
            "method with conditioning=NAME"
        )
    for module in part.modules():
        if type(module).__name__ in BLOCKS:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(part, mesh=mesh, reshard_after_forward=True)
