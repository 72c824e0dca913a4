"""The seam of preparation: a stage takes the samples of a shard and gives samples for the shard of the same number.

Here live the sample as stages see it and the interface. The stages are beside this file, one each; what runs them over many
shards, on many machines and after a kill is in `runner.py`.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from datamodules.shard_index import LATENT, LATENT_FLIPPED, ShardError
from datamodules.sources.base import LatentForm, LeftOut
from scenes.scene import Scene

PICTURES = ("png", "jpg")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sample of a shard.

    Attributes:
        key: Its key, the same in every shard that is made of it.
        scene: Its scene.
        members: Everything beside the scene as stored, by extension: "png" or "jpg", "latent.npy", and what stages add.
    """

    key: str
    scene: Scene
    members: dict[str, bytes]

    def picture(self) -> Image.Image:
        """Its picture, RGB.

        Returns:
            The picture.

        Raises:
            ShardError: It has none, or one that cannot be decoded.
        """
        content = next((self.members[name] for name in PICTURES if name in self.members), None)
        if content is None:
            raise ShardError(f"sample {self.key}: scene {self.scene.id}: has no picture; give shards with pictures")
        try:
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as picture:
                return picture.convert("RGB")
        except (OSError, ValueError) as error:
            raise ShardError(f"sample {self.key}: scene {self.scene.id}: picture: {error}") from None

    def with_scene(self, scene: Scene) -> Self:
        """The same sample with another scene."""
        return replace(self, scene=scene)

    def with_latent(
        self, latent: np.ndarray, *, flipped: np.ndarray | None = None, picture: bytes | None = None
    ) -> Self:
        """The same sample with a latent in its picture's place, and the mirrored picture's if there is one.

        Args:
            latent: (C, h, w) latent, or (2C, h, w) moments.
            flipped: The same of the mirrored picture.
            picture: PNG of the picture that was encoded, to stay beside it.

        Returns:
            The sample.
        """
        gone = {*PICTURES, LATENT, LATENT_FLIPPED}
        kept = {name: content for name, content in self.members.items() if name not in gone}
        made = {LATENT: _encoded(latent)}
        if flipped is not None:
            made[LATENT_FLIPPED] = _encoded(flipped)
        if picture is not None:
            made["png"] = picture
        return replace(self, members={**kept, **made})


def _encoded(numbers: np.ndarray) -> bytes:
    """The content of an .npy file."""
    file = io.BytesIO()
    np.save(file, numbers, allow_pickle=False)
    return file.getvalue()


class Stage(ABC):
    """One step of preparation, from samples to samples; what it gives depends on its samples and its settings alone.

    Attributes:
        name: The word behind `task=`.
        requires: What samples must carry, in the words of `sources.base.PROVIDABLE`.
        left_out: What the latest call of `__call__` did not pass on, and why: sample by sample.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        self.left_out = LeftOut()

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return all that decides what comes out (models by name and revision, sizes, thresholds), as JSON values.

        The index keeps them, and shards that were made with others are not taken for done.
        """

    def provides(self, provided: frozenset[str]) -> frozenset[str]:
        """Return what its samples carry, of samples that carry `provided`."""
        return provided

    def latent_form(self, given: LatentForm | None) -> LatentForm | None:
        """The form of its samples' latents, of samples whose latents have the form `given`; None for pictures."""
        return given

    def to(self, device: Any) -> Self:
        """The stage with its models on a torch device."""
        return self

    def pictured(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Image.Image]]:
        """Samples with their pictures, RGB; one whose picture cannot be decoded is told to `left_out` and not passed on.

        Args:
            samples: The samples of a shard.

        Yields:
            Each sample that has a picture, and that.
        """
        for sample in samples:
            try:
                picture = sample.picture()
            except ShardError as error:
                self.left_out.skip(error)
                continue
            yield sample, picture

    def report(self, total: LeftOut) -> list[str]:
        """Lines about all shards, for whoever prepares the data; `total` is their account."""
        return []

    @abstractmethod
    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples of one shard, made from those of another, in the same order.

        It batches as it likes, within the shard. A sample that cannot be used is told to `left_out` and not passed on.

        Args:
            samples: The samples of a shard.

        Yields:
            The samples of the new shard.
        """
