"""The sampler under the names that users of diffusers' GLIGEN pipelines know: `gligen_phrases`, `gligen_boxes` and the rest.

Unlike there, each picture of a batch may have boxes of its own, SD and SDXL are one class, and a UNet that was trained to
inpaint is a choice and no need. Here arguments are checked and turned into scenes; drawing is `models.sampling`.

Legend: B pictures, (C, h, w) a latent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from models.backbones.base import Backbone
from models.backbones.stable_diffusion import StableDiffusion
from models.conditioning.base import Conditioning
from models.conditioning.boxes.adapter import BoxesAdapter
from models.inpainting import as_image
from models.sampling import Sampler, to_uint8
from scenes import Scene, SceneBatch, SceneError, SceneObject

OUTPUTS = ("pil", "np", "pt", "latent")
SETTINGS = {  # the sampler's names, longest first, and the arguments that they are here
    "guidance_rescale": "guidance_rescale",
    "grounding_fraction": "gligen_scheduled_sampling_beta",
    "guidance": "guidance_scale",
    "steps": "num_inference_steps",
    "eta": "eta",
}


class BoxesPipeline:
    """Text and boxes to pictures with GLIGEN's arguments.

    Args:
        backbone: the denoiser; the adapter's modules are put into its slots, so that one pipeline holds it.
        adapter: GLIGEN's layers.
        scheduler: builds a diffusers scheduler from the backbone's scheduler config; by default the class that it names.

    Raises:
        ValueError: a backbone whose slots are taken, or a scheduler config of no diffusers class.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: BoxesAdapter,
        *,
        scheduler: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        name = backbone.scheduler_config.get("_class_name", "")
        if scheduler is None and not hasattr(diffusers, name):
            raise ValueError(
                f"scheduler: the backbone's config names {name!r}, which is no scheduler of diffusers; "
                "give scheduler=DDIMScheduler.from_config or another"
            )
        self.backbone, self.adapter = backbone, adapter.eval()
        self.scheduler = scheduler or getattr(diffusers, name).from_config
        self.conditioning = Conditioning({"boxes": adapter})
        self.conditioning.attach(backbone.unet)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, weights: str | Path | None = None, slots: int = 30, **settings: Any
    ) -> BoxesPipeline:
        """Opens a published pipeline, such as `masterful/gligen-1-4-generation-text-box`.

        Args:
            path: folder in diffusers' layout or hub name of the backbone.
            weights: of the boxes: an adapter file or a gated UNet; by default those in the backbone's own UNet.
            slots: tokens that a scene is padded to; belongs to the weights.
            **settings: of `StableDiffusion.from_folder`.

        Returns:
            The pipeline on the CPU.

        Raises:
            ValueError: what cannot be opened or does not fit.
        """
        backbone = StableDiffusion.from_folder(path, **settings)
        return cls(backbone, BoxesAdapter(backbone, slots=slots, weights=str(weights or path), init="published"))

    def to(self, device: torch.device | str) -> BoxesPipeline:
        """The pipeline, moved to a device."""
        self.backbone.to(device)
        self.adapter.to(device)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        gligen_phrases: Sequence[str] | Sequence[Sequence[str]] = (),
        gligen_boxes: Any = (),
        gligen_scheduled_sampling_beta: float = 0.3,
        gligen_inpaint_image: Image.Image | Sequence[Image.Image] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        paste_back: bool = False,
    ) -> ImagePipelineOutput:
        """Pictures of one prompt or several.

        Whatever is given once serves every picture; whatever is given as a list (of lists, for phrases and boxes) must have
        one entry for each.

        Args:
            prompt: caption, or a list of B.
            gligen_phrases: a list of phrases, or B such lists.
            gligen_boxes: a list of boxes, one for each phrase, or B such lists; a box is (left, top, right, bottom) in
                [0, 1]. Arrays and tensors welcome.
            gligen_scheduled_sampling_beta: share of the steps, from the noisy end, in which the boxes act.
            gligen_inpaint_image: picture, or B, that is kept outside the boxes; cropped about its centre and resized.
            negative_prompt: caption of the unguided half, or B; None as the published pipelines.
            guidance_scale: classifier-free guidance; 1 and less is none.
            guidance_rescale: as `Sampler`.
            num_inference_steps: denoising steps.
            num_images_per_prompt: pictures of each prompt, side by side in the result.
            eta: share of DDIM's noise that is drawn anew at each step.
            height: px; the backbone's resolution by default.
            width: px, likewise.
            generator: of all random numbers: one, or one for each picture, so that a picture does not depend on its batch;
                PyTorch's global one by default.
            latents: (pictures, C, h, w) start latents in place of drawn ones.
            output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1]; or "latent".
            paste_back: give the pixels outside the boxes back as they were.

        Returns:
            A record whose `images` are the pictures.

        Raises:
            ValueError: lists of different lengths, a box that is none, more boxes than slots, or a setting out of range; the
                argument and the sample are named.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: {output_type!r} is unknown; take {', '.join(OUTPUTS)}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt: {num_images_per_prompt} is less than 1; give a positive number")
        columns = {
            "prompt": _column(prompt, str),
            "gligen_phrases": _nested("gligen_phrases", gligen_phrases, _is_phrase),
            "gligen_boxes": _nested("gligen_boxes", gligen_boxes, _is_box),
            "gligen_inpaint_image": _column(gligen_inpaint_image, Image.Image),
            "negative_prompt": _column(negative_prompt, str),
        }
        count = _batch_size(columns)
        rows = {name: values * count if len(values) == 1 else values for name, values in columns.items()}
        rows = {name: [v for v in values for _ in range(num_images_per_prompt)] for name, values in rows.items()}
        scenes = SceneBatch(
            [
                self._scene(*entry, place)
                for place, entry in enumerate(
                    zip(rows["prompt"], rows["gligen_phrases"], rows["gligen_boxes"], strict=True)
                )
            ],
            device=self.backbone.device,
        )
        size = (height or self.backbone.resolution, width or self.backbone.resolution)
        start, generators = self._noise(latents, generator, (len(scenes), *size))
        pictures = rows["gligen_inpaint_image"]
        with _in_their_words():
            sampler = Sampler(
                scheduler=self.scheduler,
                steps=num_inference_steps,
                guidance=max(guidance_scale, 1.0),
                guidance_rescale=guidance_rescale,
                grounding_fraction=gligen_scheduled_sampling_beta,
                eta=eta,
            )
            drawn = sampler(
                self.backbone,
                self.conditioning,
                scenes,
                seed=0,  # without effect: all random numbers are given
                size=size,
                latents=start,
                generators=generators,
                negative_prompts=rows["negative_prompt"],
                inpaint=None if pictures[0] is None else torch.stack([as_image(picture, size) for picture in pictures]),
                paste_back=paste_back,
                decode=output_type != "latent",
            )
        return ImagePipelineOutput(images=_as_output(drawn, output_type))

    def _scene(self, caption: str, phrases: Sequence[str], boxes: Sequence[Any], place: int) -> Scene:
        """One picture's scene; what is wrong with it is said in the caller's words."""
        if len(phrases) != len(boxes):
            raise ValueError(
                f"gligen_phrases[{place}]: {len(phrases)} phrases for {len(boxes)} boxes; give one phrase for each box"
            )
        if len(boxes) > self.adapter.slots and self.adapter.overflow == "refuse":
            raise ValueError(
                f"gligen_boxes[{place}]: {len(boxes)} boxes, but the weights take {self.adapter.slots}; give fewer, or build "
                "the adapter with overflow='largest'"
            )
        try:
            objects = [SceneObject(phrase=phrase, box=box) for phrase, box in zip(phrases, boxes, strict=True)]
            return Scene(id=str(place), caption=caption, objects=tuple(objects))
        except SceneError as error:
            message = re.sub(
                r"^scene '\d+': objects\[(\d+)\]\.(box|phrase)",
                lambda found: f"gligen_{'boxes' if found[2] == 'box' else 'phrases'}[{place}][{found[1]}]",
                str(error),
            )
            raise ValueError(message) from None

    def _noise(
        self,
        latents: Tensor | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        shape: tuple[int, int, int],
    ) -> tuple[Tensor, list[torch.Generator]]:
        """Start latents and a generator for each picture, in the order in which diffusers draws; shape is (B, H, W)."""
        count, height, width = shape
        given = list(generator) if isinstance(generator, Sequence) else generator
        if isinstance(given, list) and len(given) != count:
            raise ValueError(f"generator: {len(given)} for {count} pictures; give one for each, or a single one")
        if latents is None:
            scale = self.backbone.latent_scale
            grid = (count, self.backbone.latent_channels, height // scale, width // scale)
            latents = randn_tensor(grid, generator=given, device=self.backbone.device)
        if given is None:
            seeds = torch.randint(2**31, (count,)).tolist()
            given = [torch.Generator().manual_seed(seed) for seed in seeds]
        return latents, given if isinstance(given, list) else [given] * count


def _column(value: Any, kind: type) -> list[Any]:
    """One entry or a list of them, as a list."""
    return [value] if value is None or isinstance(value, kind) else list(value)


def _nested(name: str, value: Any, is_one: Callable[[Any], bool]) -> list[list[Any]]:
    """A list of phrases or boxes, or a list of such lists, as a list of lists; `is_one` knows a phrase or a box."""
    items = [_plain(item) for item in _listed(name, _plain(value))]
    if all(map(is_one, items)):
        return [items]
    return [_listed(f"{name}[{place}]", item) for place, item in enumerate(items)]


def _listed(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name}: {value!r} is no list; give a list for all pictures, or one list for each")
    return list(value)


def _plain(value: Any) -> Any:
    """An array or tensor as lists, anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_phrase(value: Any) -> bool:
    return isinstance(value, str)


def _is_box(value: Any) -> bool:
    """Whether a value is numbers, however many, and not a picture's list of boxes."""
    return isinstance(value, Sequence) and len(value) > 0 and all(isinstance(number, Real) for number in value)


@contextmanager
def _in_their_words() -> Iterator[None]:
    """Errors of the sampler's settings under the arguments' own names."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for setting, argument in SETTINGS.items():
            message = message.replace(f"sampler.{setting}", argument)
        raise ValueError(message) from None


def _batch_size(columns: Mapping[str, Sequence[Any]]) -> int:
    """B of arguments that have one entry or B."""
    lengths = {name: len(values) for name, values in columns.items()}
    count = max(lengths.values())
    for name, length in lengths.items():
        if length not in (1, count):
            longest = next(other for other in lengths if lengths[other] == count)
            raise ValueError(
                f"{name}: {length} entries, but {longest} has {count}; give {count}, or one that serves every picture"
            )
    return count


def _as_output(drawn: Tensor, output_type: str) -> Any:
    if output_type == "latent":
        return drawn
    if output_type == "pil":
        return [Image.fromarray(picture) for picture in to_uint8(drawn)]
    unit = (drawn / 2 + 0.5).clamp(0, 1)
    return unit if output_type == "pt" else cast(Tensor, unit).permute(0, 2, 3, 1).cpu().numpy()
