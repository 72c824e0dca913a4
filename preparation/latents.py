"""Latents: the pictures of shards become what a backbone's autoencoder makes of them, once, so that training needs none.

Pictures are made square as training does it, by the same code, and the scenes that are stored are in the frame of that square.
Training reads the result in `datamodules.shards`; which models there are is told in `models.backbones`.

Legend: B pictures, (C, h, w) a latent, K = 2 where the mirrored picture is encoded too, else 1.
"""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from datamodules.sources.base import LatentForm, LeftOut
from datamodules.transforms import SceneTransform, to_tensor
from models.backbones.base import Backbone
from models.objectives.draws import scene_generator
from preparation.stage import Sample, Stage

STORES = ("moments", "mode", "sample")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = {"float32": np.float32, "float16": np.float16}
STREAM = 64  # of a scene's random numbers: nobody else's, least of all those that its picture is later sampled from


@dataclass(frozen=True, kw_only=True)
class _Square:
    """A picture as it is encoded.

    Attributes:
        sample: With its scene in the frame of the square.
        pixels: (3, H, W) in [-1, 1].
        dropped: Objects that the square left too little of.
        png: The same as a file, where it is to stay.
    """

    sample: Sample
    pixels: Tensor
    dropped: int
    png: bytes | None


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Settings of making images square, as training does; training on latents has no choice any more.

    Attributes:
        resolution: Height and width of the images that are encoded, px; None takes the backbone's.
        resize: How images become square, as in `SceneTransform`.
        interpolation: How their pixels are scaled, as there.
        min_area: Objects that cover less than this share of the square go; 0 leaves that to training.
        min_visible: Objects go of whose box the square leaves less than this share.

    Raises:
        ValueError: A word that is no choice, or a number out of range.
    """

    resolution: int | None = None
    resize: str = "crop"
    interpolation: str = "bilinear"
    min_area: float = 0.0
    min_visible: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings as `SceneTransform` does."""
        self.at(1)

    def at(self, resolution: int) -> SceneTransform:
        """Return the transform to squares of a height and width, px."""
        return SceneTransform(**{**vars(self), "resolution": resolution})


@dataclass(frozen=True, kw_only=True)
class LatentOutput:
    """Settings of what is stored of each image.

    Attributes:
        store: "moments" stores mean and log-variance, so that training can sample; "mode" the mean alone; "sample" one sample, as
            latents are published, its noise a function of (seed, scene id).
        flipped: Whether the mirrored image's is stored too, so that training can mirror.
        pictures: Whether the squares that were encoded stay beside their latents, as PNG, for stages that look at images.
        dtype: "float16" or "float32".
        seed: Of `store=sample`.

    Raises:
        ValueError: A word that is no choice.
    """

    store: str = "moments"
    flipped: bool = False
    pictures: bool = False
    dtype: str = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the words."""
        _check_choice("output.store", self.store, STORES)
        _check_choice("output.dtype", self.dtype, DTYPES)

    def chosen(self, moments: np.ndarray, scene_id: str) -> np.ndarray:
        """Return what `store` names, of (K, 2C, h, w) moments: those, or (K, C, h, w) latents."""
        if self.store == "moments":
            return moments
        return drawn(moments, scene_id, seed=self.seed if self.store == "sample" else None)


class Latents(Stage):
    """Latents in the place of images.

    Args:
        backbone: Opens the backbone; only its autoencoder is run and moved. Called when it is needed first.
        model: What decides which autoencoder that is, as JSON values, for the index.
        transform: How images become square.
        output: What is stored.
        precision: "float32", "bfloat16" or "float16": what the autoencoder runs in. SDXL's own overflows in float16.
        batch_size: Images that are encoded together.
        threads: Images that are decoded and made square at a time.

    Raises:
        ValueError: A word that is no choice, or a number out of range.
    """

    name: ClassVar[str] = "latents"
    requires: ClassVar[frozenset[str]] = frozenset({"image"})

    def __init__(
        self,
        backbone: Callable[[], Backbone],
        *,
        model: Mapping[str, Any],
        transform: ImageTransform | None = None,
        output: LatentOutput | None = None,
        precision: str = "float32",
        batch_size: int = 8,
        threads: int = 4,
    ) -> None:
        super().__init__()
        _check_choice("precision", precision, PRECISIONS)
        for setting, number in (("batch_size", batch_size), ("threads", threads)):
            if number < 1:
                raise ValueError(f"stage.{setting}={number}: must be at least 1")
        self._open, self._model, self._precision = backbone, dict(model), precision
        self._transform, self._output = transform or ImageTransform(), output or LatentOutput()
        self._batch_size, self._threads = batch_size, threads
        self._device = torch.device("cpu")

    def settings(self) -> dict[str, Any]:
        """As in `Stage`; how many pictures are encoded together decides nothing."""
        return {
            "backbone": self._model,
            "resolution": self.resolution,
            **{name: value for name, value in vars(self._transform).items() if name != "resolution"},
            **{name: value for name, value in vars(self._output).items() if name != "seed"},
            "precision": self._precision,
            **({"seed": self._output.seed} if self._output.store == "sample" else {}),
        }

    def provides(self, provided: frozenset[str]) -> frozenset[str]:
        """Latents, in place of the picture or beside it, and the rest as it was."""
        return (provided if self._output.pictures else provided - {"image"}) | {"latents"}

    def latent_form(self, given: LatentForm | None) -> LatentForm:
        """The backbone's latents of pictures of this size; there are none before, since pictures are required."""
        cells = self.resolution // self.backbone.latent_scale
        return LatentForm(
            channels=self.backbone.latent_channels,
            height=cells,
            width=cells,
            scale=self.backbone.latent_scale,
            scaling_factor=self.backbone.latent_factor,
            moments=self._output.store == "moments",
            flipped=self._output.flipped,
        )

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone, opened when it is first asked for, its autoencoder in the precision that was set.

        Returns:
            It, frozen.

        Raises:
            ValueError: The resolution is no multiple of its cells.
        """
        backbone = self._open()
        resolution = backbone.resolution if self._transform.resolution is None else self._transform.resolution
        if resolution < 1 or resolution % backbone.latent_scale:
            raise ValueError(
                f"stage.transform.resolution={resolution}: must be a multiple of {backbone.latent_scale} px, a latent's cell"
            )
        if backbone.autoencoder is not None:
            # torch's own `to`: diffusers' warns of parts that want float32, and this one has none
            nn.Module.to(backbone.autoencoder, PRECISIONS[self._precision])
        return backbone

    @property
    def resolution(self) -> int:
        """Height and width of the pictures that are encoded, px."""
        return self.backbone.resolution if self._transform.resolution is None else self._transform.resolution

    def to(self, device: Any) -> Self:
        """The stage with the autoencoder, and nothing else of the backbone, on a device."""
        self._device = torch.device(device)
        if self.backbone.autoencoder is not None:
            self.backbone.autoencoder.to(self._device)
        return self

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """As in `Stage`; the next pictures are decoded, and the next batch is queued, while one is encoded."""
        self.left_out = LeftOut()
        with ThreadPoolExecutor(self._threads) as pool:
            squares = self._sound(self._decoded(samples, pool))
            queued: tuple[list[_Square], Tensor] | None = None
            while batch := list(itertools.islice(squares, self._batch_size)):
                following = batch, self._moments([square.pixels for square in batch])
                if queued is not None:
                    yield from self._stored(*queued)
                queued = following
            if queued is not None:
                yield from self._stored(*queued)

    def _decoded(self, samples: Iterable[Sample], pool: ThreadPoolExecutor) -> Iterator[Future[_Square]]:
        """Yield samples with their squares to come, up to two batches of which are under way."""
        square = self._transform.at(self.resolution).square

        def decode(sample: Sample) -> _Square:
            image, scene, dropped = square(sample.picture(), sample.scene)
            png = _png(image) if self._output.pictures else None
            return _Square(sample=sample.with_scene(scene), pixels=to_tensor(image), dropped=dropped, png=png)

        waiting: deque[Future[_Square]] = deque()
        for sample in samples:
            waiting.append(pool.submit(decode, sample))
            if len(waiting) > 2 * self._batch_size + self._threads:
                yield waiting.popleft()
        yield from waiting

    def _sound(self, decoded: Iterable[Future[_Square]]) -> Iterator[_Square]:
        """Yield what could be decoded, and report the rest."""
        for waited in decoded:
            try:
                square = waited.result()
            except ValueError as error:
                self.left_out.skip(error)
                continue
            if square.dropped:
                self.left_out.counts["objects that the square leaves too little of"] += square.dropped
            yield square

    @torch.inference_mode()
    def _moments(self, pictures: list[Tensor]) -> Tensor:
        """(B, K, 2C, h, w) float32 moments on the device, where they may still be under way."""
        images = torch.stack(pictures).to(self._device)
        if self._output.flipped:
            images = torch.cat([images, images.flip(-1)])
        moments = self.backbone.encode_moments(images)
        return moments.unflatten(0, (-1, len(pictures))).transpose(0, 1)

    def _stored(self, squares: list[_Square], moments: Tensor) -> Iterator[Sample]:
        """Yield samples with what is to be stored of their (B, K, 2C, h, w) moments."""
        for square, each in zip(squares, moments.float().cpu().numpy(), strict=True):
            sample = square.sample
            with np.errstate(over="ignore"):  # said below
                latents = self._output.chosen(each, sample.scene.id).astype(DTYPES[self._output.dtype])
            if np.isfinite(latents).all():
                flipped = latents[1] if self._output.flipped else None
                yield sample.with_latent(latents[0], flipped=flipped, picture=square.png)
            else:
                self.left_out.skip(
                    f"sample {sample.key}: scene {sample.scene.id}: its latent, made in {self._precision} and stored in "
                    f"{self._output.dtype}, is not finite; set both to float32 (stage.precision, stage.output.dtype), or name an "
                    "autoencoder for half precision as backbone.vae"
                )


def _check_choice(setting: str, word: str, choices: Collection[str]) -> None:
    if word not in choices:
        raise ValueError(f"stage.{setting}={word}: must be one of {', '.join(choices)}")


def drawn(moments: np.ndarray, scene_id: str, *, seed: int | None) -> np.ndarray:
    """Latents of moments.

    Args:
        moments: (K, 2C, h, w) float32 means, then as many channels of the logarithm of their variance.
        scene_id: The scene, which decides the noise together with the seed.
        seed: None for the mean.

    Returns:
        (K, C, h, w) float32.
    """
    mean, log_variance = np.split(moments, 2, axis=1)
    if seed is None:
        return mean
    # drawn for the picture first, so that its noise is the same with and without the mirrored one
    noise = scene_generator(seed, scene_id, stream=STREAM).standard_normal(mean.shape, dtype=np.float32)
    return mean + np.exp(log_variance / 2) * noise


def _png(picture: np.ndarray) -> bytes:
    """A file of a (H, W, 3) uint8 picture."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
