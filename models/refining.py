"""SDXL's refiner on finished pictures: noised to a part of the schedule, and denoised again under their caption.

The pipeline is diffusers' own. A refined picture is a function of the picture, its caption and (seed, scene id). Which pictures
are refined, and where the ones before stay, is decided elsewhere.

Legend: H W pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError

from models.objectives.draws import noise_generators

if TYPE_CHECKING:
    from scenes import Scene

STREAM = 2  # of the numbers of a scene; the sampler's noise is the first
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Refiner:
    """Refines pictures one at a time, so that it makes no difference which are refined together.

    Args:
        path: folder in diffusers' layout, or the name of a model on the hub: a refiner, or an SDXL that is to act as one.
        revision: commit, tag or branch on the hub.
        variant: suffix of the weight files ("fp16").
        dtype: "float32", "bfloat16" or "float16".
        strength: share of the steps that are done again: 0 would be the picture itself, 1 another picture.
        steps: of the whole schedule.
        guidance: classifier-free guidance scale; 1 is none.
        negative_prompt: caption of the unguided half; None, the empty one.
        aesthetic_score: the score that the refiner is told the picture has, from 0 to 10.
        negative_aesthetic_score: the same of the unguided half.

    Raises:
        ValueError: a setting out of its range, or nothing that opens as such a model.

    Source:
        Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", section 2.5.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        strength: float = 0.3,
        steps: int = 20,
        guidance: float = 5.0,
        negative_prompt: str | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"refiner.dtype: {dtype!r} is unknown; take {', '.join(DTYPES)}")
        if not 0 < strength <= 1:
            raise ValueError(f"refiner.strength: {strength} is no share above 0; leave the refiner out for none")
        if int(strength * steps) < 1:
            raise ValueError(
                f"refiner.steps: {steps} x strength {strength} is no whole step; give {math.ceil(1 / strength)} or more"
            )
        self.settings: dict[str, Any] = {
            "strength": strength,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "negative_prompt": negative_prompt,
            "aesthetic_score": aesthetic_score,
            "negative_aesthetic_score": negative_aesthetic_score,
        }
        self.pipeline = _opened(path, revision=revision, variant=variant, dtype=DTYPES[dtype])
        self.pipeline.set_progress_bar_config(disable=True)

    def to(self, device: torch.device) -> Refiner:
        """Moves it."""
        self.pipeline.to(device)
        return self

    @torch.no_grad()
    def __call__(self, picture: np.ndarray, scene: Scene, *, seed: int) -> np.ndarray:
        """The refined picture.

        Args:
            picture: (H, W, 3) uint8.
            scene: what it shows; its caption and its id are read.
            seed: with the scene's id it decides the noise.

        Returns:
            (H, W, 3) uint8.

        Raises:
            ValueError: sides that are no multiple of the refiner's latent cell.
        """
        cell = self.pipeline.vae_scale_factor
        height, width = picture.shape[:2]
        if height % cell or width % cell:
            raise ValueError(
                f"refiner: a picture of {height} x {width} px is no multiple of its cells of {cell} px; draw it at another size"
            )
        (generator,) = noise_generators(seed, [scene.id], stream=STREAM)
        with _casting_quietly():
            drawn: Any = self.pipeline(
                prompt=scene.caption,
                image=Image.fromarray(picture),
                generator=generator,
                output_type="np",
                **self.settings,
            )
        return (drawn.images[0] * 255).round().astype(np.uint8)


@contextmanager
def _casting_quietly() -> Iterator[None]:
    """The pipeline casts its autoencoder to fp32 and back for every picture, and diffusers then warns of its own doing."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _opened(path: str, **settings: Any) -> Any:
    """The pipeline, on the CPU."""
    try:
        return StableDiffusionXLImg2ImgPipeline.from_pretrained(path, add_watermarker=False, **settings)
    except (OSError, ValueError, HfHubHTTPError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        kind = "folder" if Path(path).is_dir() else "name on the hub, and no folder here,"
        raise ValueError(
            f"refiner.path: {path}: a {kind} that cannot be opened ({reason}); give a whole refiner in diffusers' layout"
        ) from error
