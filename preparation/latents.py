"""Latents: the pictures of shards become what a backbone's autoencoder makes of them, once, so that training needs none.

Pictures are made square as training does it, by the same code, and the scenes that are stored are in the frame of that square.
Training reads the result in `datamodules.shards`; which models there are is told in `models.backbones`.

Legend: B pictures, (C, h, w) a latent, K = 2 where the mirrored picture is encoded too, else 1.
"""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
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


class Latents(Stage):
    """Latents in the place of pictures.

    Args:
        backbone: Opens the backbone; only its autoencoder is run and moved. Called when it is needed first.
        model: What decides which autoencoder that is, as JSON values, for the index.
        resolution: Height and width of the pictures that are encoded, px; None takes the backbone's.
        resize: How pictures become square, as in `SceneTransform`; training on latents has no choice any more.
        interpolation: How their pixels are scaled, as there.
        min_area: Objects that cover less than this share of the square go; 0 leaves that to training.
        min_visible: Objects go of whose box the square leaves less than this share.
        store: "moments" stores mean and log-variance, so that training can draw; "mode" the mean alone; "sample" one draw, as
            latents are published, its noise a function of (seed, scene id).
        flipped: Whether the mirrored picture's is stored too, so that training can mirror.
        pictures: Whether the squares that were encoded stay beside their latents, as PNG, for stages that look at pictures.
        dtype: "float16" or "float32", of what is stored.
        precision: "float32", "bfloat16" or "float16": what the autoencoder runs in. SDXL's own overflows in float16.
        seed: Of `store=sample`.
        batch_size: Pictures that are encoded together.
        threads: Pictures that are decoded and made square at a time.

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
        resolution: int | None = None,
        resize: str = "crop",
        interpolation: str = "bilinear",
        min_area: float = 0.0,
        min_visible: float = 0.0,
        store: str = "moments",
        flipped: bool = False,
        pictures: bool = False,
        dtype: str = "float16",
        precision: str = "float32",
        seed: int = 0,
        batch_size: int = 8,
        threads: int = 4,
    ) -> None:
        super().__init__()
        words = {"store": (store, STORES), "dtype": (dtype, DTYPES), "precision": (precision, PRECISIONS)}
        for setting, (word, choices) in words.items():
            if word not in choices:
                raise ValueError(f"stage.{setting}={word}: no such choice; take {', '.join(choices)}")
        for setting, number in (("batch_size", batch_size), ("threads", threads)):
            if number < 1:
                raise ValueError(f"stage.{setting}={number}: give 1 or more")
        # refuses at once what it would refuse later
        self._square = SceneTransform(
            resolution=1, resize=resize, interpolation=interpolation, min_area=min_area, min_visible=min_visible
        )
        self._open, self._model, self._resolution = backbone, dict(model), resolution
        self._store, self._flipped, self._pictures, self._dtype = store, flipped, pictures, dtype
        self._precision, self._seed = precision, seed
        self._batch_size, self._threads = batch_size, threads
        self._device = torch.device("cpu")

    def settings(self) -> dict[str, Any]:
        """As in `Stage`; how many pictures are encoded together decides nothing."""
        return {
            "backbone": self._model,
            "resolution": self.resolution,
            "resize": self._square.resize,
            "interpolation": self._square.interpolation,
            "min_area": self._square.min_area,
            "min_visible": self._square.min_visible,
            "store": self._store,
            "flipped": self._flipped,
            "pictures": self._pictures,
            "dtype": self._dtype,
            "precision": self._precision,
            **({"seed": self._seed} if self._store == "sample" else {}),
        }

    def provides(self, provided: frozenset[str]) -> frozenset[str]:
        """Latents, in place of the picture or beside it, and the rest as it was."""
        return (provided if self._pictures else provided - {"image"}) | {"latents"}

    def latent_form(self, given: LatentForm | None) -> LatentForm:
        """The backbone's latents of pictures of this size; there are none before, since pictures are required."""
        cells = self.resolution // self.backbone.latent_scale
        return LatentForm(
            channels=self.backbone.latent_channels,
            height=cells,
            width=cells,
            scale=self.backbone.latent_scale,
            scaling_factor=self.backbone.latent_factor,
            moments=self._store == "moments",
            flipped=self._flipped,
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
        resolution = backbone.resolution if self._resolution is None else self._resolution
        if resolution < 1 or resolution % backbone.latent_scale:
            raise ValueError(
                f"stage.resolution={resolution}: is no multiple of the {backbone.latent_scale} px of a latent's cell; "
                "give one that is"
            )
        if backbone.autoencoder is not None:
            # torch's own `to`: diffusers' warns of parts that want float32, and this one has none
            nn.Module.to(backbone.autoencoder, PRECISIONS[self._precision])
        return backbone

    @property
    def resolution(self) -> int:
        """Height and width of the pictures that are encoded, px."""
        return self.backbone.resolution if self._resolution is None else self._resolution

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
        """Yields samples with their squares to come, up to two batches of which are under way."""
        square = replace(self._square, resolution=self.resolution).square

        def decode(sample: Sample) -> _Square:
            image, scene, dropped = square(sample.picture(), sample.scene)
            png = _png(image) if self._pictures else None
            return _Square(sample=sample.with_scene(scene), pixels=to_tensor(image), dropped=dropped, png=png)

        waiting: deque[Future[_Square]] = deque()
        for sample in samples:
            waiting.append(pool.submit(decode, sample))
            if len(waiting) > 2 * self._batch_size + self._threads:
                yield waiting.popleft()
        yield from waiting

    def _sound(self, decoded: Iterable[Future[_Square]]) -> Iterator[_Square]:
        """Yields what could be decoded; the rest is told."""
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
        if self._flipped:
            images = torch.cat([images, images.flip(-1)])
        moments = self.backbone.encode_moments(images)
        return moments.unflatten(0, (-1, len(pictures))).transpose(0, 1)

    def _stored(self, squares: list[_Square], moments: Tensor) -> Iterator[Sample]:
        """Yields samples with what is to be stored of their (B, K, 2C, h, w) moments."""
        for square, each in zip(squares, moments.float().cpu().numpy(), strict=True):
            sample = square.sample
            with np.errstate(over="ignore"):  # said below
                latents = self._chosen(each, sample.scene.id).astype(DTYPES[self._dtype])
            if np.isfinite(latents).all():
                flipped = latents[1] if self._flipped else None
                yield sample.with_latent(latents[0], flipped=flipped, picture=square.png)
            else:
                self.left_out.skip(
                    f"sample {sample.key}: scene {sample.scene.id}: its latent, made in {self._precision} and stored in "
                    f"{self._dtype}, is not finite; set both to float32 (stage.precision, stage.dtype), or name an autoencoder "
                    "for half precision as backbone.vae"
                )

    def _chosen(self, moments: np.ndarray, scene_id: str) -> np.ndarray:
        """What `store` names, of (K, 2C, h, w) moments: those, or (K, C, h, w) latents."""
        if self._store == "moments":
            return moments
        return drawn(moments, scene_id, seed=self._seed if self._store == "sample" else None)


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
