"""One batched sampler for every backbone and method: a different scene per picture, guidance, scheduled sampling.

Schedulers are diffusers' own. A picture is a function of (seed, scene id) and the settings, whatever the batch.

Legend: B pictures, (C, h, w) a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models.conditioning.slots import DenoiserInputs
from models.objectives.draws import start_latents

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from models.conditioning.base import Conditioning
    from scenes import SceneBatch


class Sampler:
    """Draws pictures for scenes.

    Args:
        scheduler: builds a diffusers scheduler from the backbone's scheduler config, e.g. `DDIMScheduler.from_config`.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 is no guidance (and half the work).
        grounding_fraction: the scene acts in this first share of the steps, the bare backbone in the rest (GLIGEN's
            scheduled sampling, beta).
        negative_prompt: the caption of the unguided half.

    Raises:
        ValueError: a setting out of its range.

    Source:
        Ho & Salimans 2022, eq. 6 (guidance); Li et al. 2023 (GLIGEN), eq. 10 (scheduled sampling).
    """

    def __init__(
        self,
        *,
        scheduler: Callable[[Mapping[str, Any]], Any],
        steps: int = 25,
        guidance: float = 3.0,
        grounding_fraction: float = 1.0,
        negative_prompt: str = "",
    ) -> None:
        if steps < 1:
            raise ValueError(f"sampler.steps: {steps} is less than 1; give a positive number")
        if not 0 <= grounding_fraction <= 1:
            raise ValueError(f"sampler.grounding_fraction: {grounding_fraction} is outside [0, 1]")
        self.scheduler = scheduler
        self.steps = steps
        self.guidance = guidance
        self.grounding_fraction = grounding_fraction
        self.negative_prompt = negative_prompt

    @torch.no_grad()
    def __call__(
        self,
        backbone: Backbone,
        conditioning: Conditioning,
        scenes: SceneBatch,
        *,
        seed: int,
        size: tuple[int, int] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of B scenes.

        Args:
            backbone: the denoiser, its slots attached to `conditioning`.
            conditioning: the adapters.
            scenes: B scenes; each is drawn under its own caption.
            seed: with a scene's id it decides the start latents.
            size: (H, W) px; the backbone's resolution by default.
            latents: (B, C, h, w) start latents in place of drawn ones.

        Returns:
            (B, 3, H, W) float images, clamped, on the backbone's device.
        """
        height, width = size or (backbone.resolution, backbone.resolution)
        grid = (height // backbone.latent_scale, width // backbone.latent_scale)
        if latents is None:
            latents = start_latents(seed, [scene.id for scene in scenes], (backbone.latent_channels, *grid))
        schedule = self.scheduler(backbone.scheduler_config)
        schedule.set_timesteps(self.steps)
        inputs = self._inputs(backbone, conditioning, scenes, (height, width))
        bare = inputs.without_slots()
        grounded = round(self.grounding_fraction * len(schedule.timesteps))
        state: Tensor = latents.to(backbone.device) * schedule.init_noise_sigma
        for index, time in enumerate(schedule.timesteps):
            prediction = self._predict(
                backbone,
                schedule.scale_model_input(state, time),
                time,
                inputs if index < grounded else bare,
            )
            state = schedule.step(prediction, time, state, return_dict=False)[0]
        return backbone.decode(state)

    def _inputs(
        self, backbone: Backbone, conditioning: Conditioning, scenes: SceneBatch, size: tuple[int, int]
    ) -> DenoiserInputs:
        """The conditioned half, followed by the unguided half (null scene, negative prompt) where guidance needs it."""
        captions, grid = scenes.captions, (size[0] // backbone.latent_scale, size[1] // backbone.latent_scale)
        if self.guidance == 1:
            return conditioning(backbone, scenes, captions, grid, size=size)
        null = scenes.drop(torch.zeros(len(scenes), dtype=torch.bool))
        both = type(scenes)([*scenes.scenes, *null.scenes], device=scenes.device)
        return conditioning(backbone, both, [*captions, *[self.negative_prompt] * len(scenes)], grid, size=size)

    def _predict(self, backbone: Backbone, latents: Tensor, time: Tensor, inputs: DenoiserInputs) -> Tensor:
        halves = 1 if self.guidance == 1 else 2
        times = time.to(latents.device).expand(halves * len(latents))
        prediction = backbone.denoise(torch.cat([latents] * halves), times, inputs).float()
        if halves == 1:
            return prediction
        with_scene, without = prediction.chunk(2)
        return without + self.guidance * (with_scene - without)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8 pictures of images (B, 3, H, W) in [-1, 1]."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
