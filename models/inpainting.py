"""Inpainting: a picture outside the boxes is kept, what the boxes cover is painted anew.

Two ways share this file. Any denoiser: before each step the kept cells are set to the picture's latents, noised to that
step. A denoiser that was trained to inpaint also reads the picture and the mask as further input channels. The loop over
steps lives in `models.sampling`.

Legend: B pictures, H W pixels, (C, h, w) a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from scenes import SceneBatch


@dataclass(frozen=True, kw_only=True)
class Inpainting:
    """B pictures and what is kept of them.

    Attributes:
        images: (B, 3, H, W) in [-1, 1].
        latents: (B, C, h, w) of the images.
        kept: (B, 1, h, w) float, 1 where a cell is kept, 0 where the boxes are.
    """

    images: Tensor
    latents: Tensor
    kept: Tensor

    @staticmethod
    def of(backbone: Backbone, images: Tensor, scenes: SceneBatch, generators: Sequence[torch.Generator]) -> Inpainting:
        """Encodes the pictures and draws the masks.

        Args:
            backbone: encodes the pictures.
            images: (B, 3, H, W) in [-1, 1].
            scenes: B scenes; their boxes are painted anew.
            generators: B, each draws its picture's sample of the posterior, as published.

        Returns:
            The pictures with their masks, on the backbone's device.

        Raises:
            ValueError: a scene whose boxes cover no cell.
        """
        images = images.to(backbone.device)
        latents = backbone.encode_images(images, generator=list(generators))
        kept = kept_cells(scenes, (latents.shape[-2], latents.shape[-1])).to(latents)
        for scene, whole in zip(scenes, kept.flatten(1).all(dim=1).tolist(), strict=True):
            if whole:
                raise ValueError(
                    f"scene {scene.id}: objects: their boxes cover no whole cell of {backbone.latent_scale} px, so there is "
                    "nothing to paint; give larger boxes, or leave inpaint away"
                )
        return Inpainting(images=images, latents=latents, kept=kept)

    @property
    def channels(self) -> Tensor:
        """(B, C + 1, h, w) what an inpainting UNet reads beside the noised latents: the kept latents, then the mask."""
        return torch.cat([self.latents * self.kept, self.kept], dim=1)

    def hold(self, state: Tensor, schedule: Any, time: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents (B, C, h, w) whose kept cells are the pictures', noised to a step.

        Args:
            state: (B, C, h, w) latents at that step.
            schedule: the diffusers scheduler.
            time: scalar, the step's time.
            generators: B, each draws its picture's noise.

        Returns:
            (B, C, h, w).
        """
        noise = randn_tensor(self.latents.shape, generator=list(generators), device=state.device, dtype=state.dtype)
        noised = schedule.add_noise(self.latents, noise, time[None])
        return noised * self.kept + state * (1 - self.kept)

    def paste(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) whose pixels in kept cells are the given pictures' own."""
        scale = images.shape[-1] // self.kept.shape[-1]
        kept = self.kept.bool().repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
        return torch.where(kept, self.images.to(images.dtype), images)


def kept_cells(scenes: SceneBatch, size: tuple[int, int]) -> Tensor:
    """(B, 1, h, w) float, 0 in the cells of each scene's boxes and 1 elsewhere; size is (h, w).

    A box's edges are cut to whole cells towards the picture's top left, as diffusers' GLIGEN pipeline does.
    """
    kept = torch.ones(len(scenes), 1, *size)
    height, width = size
    for row, scene in enumerate(scenes):
        for x0, y0, x1, y1 in (item.box for item in scene.objects if item.box is not None):
            kept[row, :, int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)] = 0
    return kept


def as_image(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """(3, H, W) float32 in [-1, 1]: the largest centred window of a picture that has the shape of `size`, resized to it.

    Args:
        picture: of any mode and size.
        size: (H, W) px.

    Returns:
        (3, H, W).
    """
    height, width = size
    picture = picture.convert("RGB")
    if picture.size != (width, height):
        across, down = picture.size
        window = (min(across, down * width / height), min(down, across * height / width))
        left, top = (across - window[0]) / 2, (down - window[1]) / 2
        cut = picture.crop((left, top, (across + window[0]) / 2, (down + window[1]) / 2))  # type: ignore[arg-type]
        picture = cut.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    return pixels / 255 * 2 - 1
