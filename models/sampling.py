"""One batched sampler for every backbone and method: a different scene per picture, guidance, scheduled sampling.

Schedulers are diffusers' own. A picture is a function of (seed, scene id) and the settings, whatever the batch.

Legend: B pictures, (C, h, w) a latent.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models.backbones.base import INPAINTS, check_size_ids
from models.conditioning.base import Conditioning
from models.conditioning.slots import DenoiserInputs
from models.inpainting import Inpainting
from models.objectives.draws import noise_generators, start_latents

if TYPE_CHECKING:
    from models.backbones.base import Backbone
    from scenes import SceneBatch

SIZE_IDS = ("target", "scene")


class Sampler:
    """Draws pictures for scenes.

    Args:
        scheduler: builds a diffusers scheduler from the backbone's scheduler config, e.g. `DDIMScheduler.from_config`.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 is no guidance (and half the work).
        guidance_rescale: how far the guided prediction is brought back to the deviation of the one with the scene: 0 not
            at all, 1 wholly.
        grounding_fraction: the scene acts in this first share of the steps, rounded down, the bare backbone in the rest
            (GLIGEN's scheduled sampling, beta).
        negative_prompt: the caption of the unguided half; None is what the published pipelines do: zero tokens and a zero
            pooled vector where the backbone has one (SDXL), else the encoded "".
        eta: share of DDIM's noise that is drawn anew at each step; 0 is deterministic.
        size_ids: what a backbone that takes size ids is given: "target", the size of the image that is drawn as original and as
            target, uncropped; "scene", those of `Backbone.size_ids`, which for a scene of a data set say the size of its real
            image; or six numbers: original height and width, crop top and left, target height and width. None is "target".

    Raises:
        ValueError: a setting out of its range.

    Source:
        Ho & Salimans 2022, eq. 6 (guidance); Li et al. 2023 (GLIGEN), eq. 10 (scheduled sampling); Lin et al. 2023,
        "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4 (rescale).
    """

    def __init__(
        self,
        *,
        scheduler: Callable[[Mapping[str, Any]], Any],
        steps: int = 25,
        guidance: float = 3.0,
        guidance_rescale: float = 0.0,
        grounding_fraction: float = 1.0,
        negative_prompt: str | None = None,
        eta: float = 0.0,
        size_ids: str | Sequence[float] | None = "target",
    ) -> None:
        if steps < 1:
            raise ValueError(f"sampler.steps: {steps} is less than 1; give a positive number")
        if not 0 <= guidance < math.inf:
            raise ValueError(f"sampler.guidance: {guidance} is not a number from 0 up; take 1 for no guidance")
        fractions = {"guidance_rescale": guidance_rescale, "grounding_fraction": grounding_fraction, "eta": eta}
        for name, value in fractions.items():
            if not 0 <= value <= 1:
                raise ValueError(f"sampler.{name}: {value} is outside [0, 1]; give a share")
        self.scheduler = scheduler
        self.steps, self.eta = steps, eta
        self.guidance, self.guidance_rescale = guidance, guidance_rescale
        self.grounding_fraction = grounding_fraction
        self.negative_prompt = negative_prompt
        if isinstance(size_ids, str) and size_ids not in SIZE_IDS:
            raise ValueError(f"sampler.size_ids: {size_ids!r} is unknown; take {', '.join(SIZE_IDS)} or six numbers")
        self.size_ids = size_ids if isinstance(size_ids, str) else check_size_ids("sampler", size_ids) or "target"

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
        generators: Sequence[torch.Generator] | None = None,
        negative_prompts: Sequence[str | None] | None = None,
        inpaint: Tensor | None = None,
        paste_back: bool = False,
        decode: bool = True,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of B scenes.

        Args:
            backbone: the denoiser, its slots attached to `conditioning`.
            conditioning: the adapters.
            scenes: B scenes; each is drawn under its own caption.
            seed: with a scene's id it decides the start latents and the noise of its steps.
            size: (H, W) px; the backbone's resolution by default.
            latents: (B, C, h, w) start latents in place of drawn ones.
            generators: B, of the noise of each picture's steps, in place of those that the seed decides.
            negative_prompts: B, in place of the setting.
            inpaint: (B, 3, H, W) pictures in [-1, 1] that are kept outside the scenes' boxes; None paints everything.
            paste_back: give the kept pixels back as they were, where decoding would alter them.
            decode: False gives the latents.

        Returns:
            (B, 3, H, W) float images, clamped, on the backbone's device; (B, C, h, w) latents without `decode`.

        Raises:
            ValueError: a size, latents or lists that do not fit, pictures missing for a UNet that was trained to inpaint,
                or a setting that the scheduler or the backbone lacks.
        """
        size = size or (backbone.resolution, backbone.resolution)
        self._check_backbone(backbone, size, has_picture=inpaint is not None)
        shape = (backbone.latent_channels, *(side // backbone.latent_scale for side in size))
        negatives = negative_prompts or [self.negative_prompt] * len(scenes)
        given = {"latents": latents, "generators": generators, "negative_prompts": negatives, "inpaint": inpaint}
        _check_given(given, (len(scenes), *shape), size)
        if paste_back and inpaint is None:
            raise ValueError("paste_back: true, but there is no picture; give inpaint, or leave paste_back away")

        ids = [scene.id for scene in scenes]
        if latents is None:
            latents = start_latents(seed, ids, shape)
        generators = list(generators or noise_generators(seed, ids))
        held = None if inpaint is None else Inpainting.of(backbone, inpaint, scenes, generators)
        schedule, extra = self._schedule(backbone, generators)
        grounded = int(self.grounding_fraction * len(schedule.timesteps))
        bare = Conditioning({})
        inputs_of = partial(self._inputs, backbone, scenes, negatives, size, held)
        inputs = inputs_of(conditioning if grounded else bare)
        state: Tensor = latents.to(backbone.device) * schedule.init_noise_sigma
        for index, time in enumerate(schedule.timesteps):
            if 0 < index == grounded:
                inputs = inputs_of(bare)
            if held is not None:
                state = held.hold(state, schedule, time, generators)
            prediction = self._predict(backbone, schedule.scale_model_input(state, time), time, inputs)
            state = schedule.step(prediction, time, state, return_dict=False, **extra)[0]
        if not decode:
            return state
        images = backbone.decode(state)
        return held.paste(images) if held is not None and paste_back else images

    @property
    def _halves(self) -> int:
        return 1 if self.guidance == 1 else 2

    def _check_backbone(self, backbone: Backbone, size: tuple[int, int], *, has_picture: bool) -> None:
        """Refuses what does not fit the backbone."""
        if any(side % backbone.latent_scale or side < 1 for side in size):
            raise ValueError(
                f"size: {size[0]} x {size[1]} px is not a multiple of the backbone's {backbone.latent_scale} px; round it"
            )
        if backbone.inpaints and not has_picture:
            raise ValueError(f"inpaint: None, but {INPAINTS}")
        if not isinstance(self.size_ids, str):
            check_size_ids("sampler", self.size_ids, is_taken=backbone.has_size_ids)

    def _schedule(self, backbone: Backbone, generators: list[torch.Generator]) -> tuple[Any, dict[str, Any]]:
        """The scheduler, its steps set, and what its `step` takes beside prediction, time and latents."""
        schedule = self.scheduler(backbone.scheduler_config)
        levels = schedule.config.num_train_timesteps
        if self.steps > levels:
            raise ValueError(f"sampler.steps: {self.steps} is more than the schedule's {levels} levels; give fewer")
        schedule.set_timesteps(self.steps)
        if hasattr(schedule, "set_begin_index"):
            schedule.set_begin_index(0)  # else some look their place up by time, which may stand there twice
        takes = inspect.signature(schedule.step).parameters
        if self.eta and "eta" not in takes:
            raise ValueError(
                f"sampler.eta: {self.eta} means nothing to {type(schedule).__name__}; set it to 0, or take sampler=ddim"
            )
        extra = {"eta": self.eta, "generator": generators}
        return schedule, {name: value for name, value in extra.items() if name in takes}

    def _inputs(
        self,
        backbone: Backbone,
        scenes: SceneBatch,
        negatives: Sequence[str | None],
        size: tuple[int, int],
        held: Inpainting | None,
        conditioning: Conditioning,
    ) -> DenoiserInputs:
        """The conditioned half, followed by the unguided half (null scene, negative prompt) where guidance needs it."""
        captions, grid = scenes.captions, (size[0] // backbone.latent_scale, size[1] // backbone.latent_scale)
        if self._halves == 1:
            inputs = conditioning(backbone, scenes, captions, grid, size=size)
        else:
            null = scenes.drop(torch.zeros(len(scenes), dtype=torch.bool))
            both = type(scenes)([*scenes.scenes, *null.scenes], device=scenes.device)
            captions = [*captions, *(negative or "" for negative in negatives)]
            given = torch.tensor([True] * len(scenes) + [negative is not None for negative in negatives])
            kept = given if backbone.has_pooled else None
            inputs = conditioning(backbone, both, captions, grid, size=size, kept=kept)
        if self.size_ids != "scene" and inputs.size_ids is not None:
            numbers = [*size, 0, 0, *size] if self.size_ids == "target" else self.size_ids
            size_ids = torch.tensor(numbers, device=inputs.size_ids.device, dtype=torch.float32)
            inputs = replace(inputs, size_ids=size_ids.expand_as(inputs.size_ids))
        if held is not None and backbone.inpaints:
            inputs = replace(inputs, inpainting=torch.cat([held.channels] * self._halves))
        return inputs

    def _predict(self, backbone: Backbone, latents: Tensor, time: Tensor, inputs: DenoiserInputs) -> Tensor:
        times = time.to(latents.device).expand(self._halves * len(latents))
        prediction = backbone.denoise(torch.cat([latents] * self._halves), times, inputs).float()
        if self._halves == 1:
            return prediction
        with_scene, without = prediction.chunk(2)
        guided = without + self.guidance * (with_scene - without)
        if not self.guidance_rescale:
            return guided
        deviations = [part.std(dim=(1, 2, 3), keepdim=True) for part in (with_scene, guided)]
        rescaled = guided * (deviations[0] / deviations[1])
        return self.guidance_rescale * rescaled + (1 - self.guidance_rescale) * guided


def _check_given(given: Mapping[str, Any], latent_shape: tuple[int, ...], size: tuple[int, int]) -> None:
    """Refuses what does not fit B scenes drawn at `size`."""
    shapes = {"latents": latent_shape, "inpaint": (latent_shape[0], 3, *size)}
    for name, value in given.items():
        if value is None:
            continue
        if name in shapes and tuple(value.shape) != shapes[name]:
            raise ValueError(f"{name}: {tuple(value.shape)} does not fit scenes and size; give {shapes[name]}")
        if len(value) != latent_shape[0]:
            raise ValueError(f"{name}: {len(value)} for {latent_shape[0]} scenes; give one for each")


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8 pictures of images (B, 3, H, W) in [-1, 1]."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
