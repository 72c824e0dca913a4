"""Settings of the denoiser's execution, which change its speed and its memory and not its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a UNet is computed.

    Attributes:
        channels_last: keep the UNet and its input in channels-last memory.
        compile: compile the UNet in place; keys stay as they are.
        gradient_checkpointing: compute activations of the UNet's blocks again in the backward pass.
    """

    channels_last: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """The format of the UNet's weights and input."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def apply(self, unet: Any) -> None:
        """Set a UNet of diffusers up for it."""
        unet.to(memory_format=self.memory_format)
        if self.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if self.compile:
            unet.compile()
