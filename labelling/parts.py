"""The seams of labelling: what names things in a picture, finds them, outlines them and describes them.

Here are the interfaces alone; each kind has a file of its own beside this one. Boxes are xyxy in [0, 1] of the picture, so that
no part has to know another's size. Preparation labels pictures with these parts, and metrics judge pictures with them.

Legend: B pictures, N objects of one picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np


class PartMissing(ValueError):
    """A part cannot work here: its package or its weights are not there; the message names them and the way out."""


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Objects that a detector found in one picture, the most certain first.

    Attributes:
        boxes: (N, 4) float32 xyxy in [0, 1] of the picture.
        scores: (N,) float32 in [0, 1].
        labels: N names: words of the detector's own list, or of the asked ones the one that was found.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: tuple[str, ...]


class Part(ABC):
    """Base of all parts: a model that is loaded late, and settings that go into the provenance."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what its answers depend on (model, revision, thresholds), as JSON values; needs no model."""

    @abstractmethod
    def to(self, device: Any) -> Self:
        """The part with its model on a torch device, loaded where it was not yet.

        Args:
            device: Where it is to work; "cpu" frees an accelerator for the next part.

        Returns:
            The part.

        Raises:
            PartMissing: Its package or weights are not there.
        """


class Tagger(Part):
    """Name what is in pictures."""

    @abstractmethod
    def __call__(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[list[str]]:
        """Return the tags of B pictures (H, W, 3) uint8 RGB with their captions, without repetition."""


class Detector(Part):
    """Find objects in pictures: those of its own list, or those that it is asked for."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """The words of a detector with a list of its own; None for one that finds what it is asked for."""
        return None

    @abstractmethod
    def __call__(
        self, pictures: Sequence[np.ndarray], asked: Sequence[Sequence[str]] | None = None
    ) -> list[Detections]:
        """Find objects in B pictures.

        Args:
            pictures: B pictures (H, W, 3) uint8 RGB, of any sizes.
            asked: For each picture what to look for; None for everything that a detector with a list of its own knows.

        Returns:
            B detections.

        Raises:
            ValueError: An open detector was asked for nothing, or a closed one for what it does not know.
        """


class Segmenter(Part):
    """Outline what lies in boxes."""

    @abstractmethod
    def __call__(self, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return masks (N, H, W) bool of the N boxes (N, 4) xyxy in [0, 1] of each of B pictures (H, W, 3) uint8 RGB."""

    def with_scores(
        self, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The masks (N, H, W) of each picture with how good the segmenter thinks them, (N,) in [0, 1]: 1 if it says nothing."""
        return [(masks, np.ones(len(masks), np.float32)) for masks in self(pictures, boxes)]


class Describer(Part):
    """Describe pictures, or parts of them, in a sentence."""

    @abstractmethod
    def __call__(self, pictures: Sequence[np.ndarray], tags: Sequence[str]) -> list[str]:
        """Return a sentence in one line for each of B pictures (H, W, 3) uint8 RGB, with a word for what it shows or ""."""
