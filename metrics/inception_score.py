"""Inception Score: whether single pictures look like some class, and all of them like many.

Here are the metric and its formula; the network is `metrics.inception` in the form of TensorFlow, whose classifier of 1008
outputs without bias is the one that Salimans et al. and torch-fidelity take. Figures of torchvision's Inception, of 1000
classes, are other figures. The rich-context paper's are published without code: which network they are of is not established.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from metrics.base import Metric, Row, Value, check_images
from metrics.distances import half_width
from metrics.feature_cache import FeatureCache
from metrics.inception import Inception
from scenes.scene import Scene


def inception_score(probabilities: np.ndarray) -> float:
    """The exponential of the mean divergence of the pictures' classes from those of all pictures.

    Args:
        probabilities: (N, K), rows sum to 1.

    Returns:
        From 1, all alike, to K, every class as often and without doubt.

    Source:
        Salimans et al. 2016, Improved Techniques for Training GANs, section 4.
    """
    single = probabilities.astype(np.float64).clip(np.finfo(np.float64).tiny)
    return float(np.exp((single * (np.log(single) - np.log(single.mean(axis=0)))).sum(axis=1).mean()))


def split_score(probabilities: np.ndarray, splits: int) -> float:
    """The mean of the scores of consecutive parts of the pictures, as the published figure is made.

    Args:
        probabilities: (N, K), N at least `splits`.
        splits: How many parts.

    Returns:
        The mean.
    """
    return float(np.mean([inception_score(part) for part in np.array_split(probabilities, splits)]))


class InceptionScore(Metric):
    """The score over parts of the pictures in an order of chance, `inception_score`.

    It falls with fewer pictures in a part; compare figures of equal numbers. The interval is that of
    `metrics.distances.half_width`, not the spread of the parts that papers put behind the figure.

    Args:
        weights: The network's file; None for where clean-fid keeps it.
        splits: Parts that the figure is the mean of.
        subsets: Random halves that the interval is made of.
        batch_size: Pictures that go through the network at once.
        cache: Folder where the classes' probabilities are kept; None keeps none.
        seed: Of the order and of the halves.

    Raises:
        ValueError: Numbers that make no figure.
    """

    name = "inception_score"

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        splits: int = 10,
        subsets: int = 20,
        batch_size: int = 32,
        cache: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if splits < 1 or subsets < 2:
            raise ValueError(
                f"splits: {splits}, subsets: {subsets}; give 1 or more splits (10) and 2 or more subsets (20)"
            )
        self.inception = Inception(
            "legacy_tensorflow", weights=weights, batch_size=batch_size, setting="metric.inception_score.weights"
        )
        self.splits, self.subsets, self.cache, self.seed = splits, subsets, cache, seed

    def settings(self) -> dict[str, Any]:
        """The network by name and hash, splits, subsets, seed."""
        return {**self.inception.settings(), "splits": self.splits, "subsets": self.subsets, "seed": self.seed}

    def to(self, device: Any) -> Self:
        """The metric with its network on a torch device.

        Args:
            device: Where it is to work.

        Returns:
            The metric.

        Raises:
            NotAvailable: The weights are not there.
        """
        self.inception.to(device)
        return self

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """The probabilities of the classes for B pictures.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Not read.

        Returns:
            B rows: "scene" and "probabilities", (1008,) float32.

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        cache = FeatureCache(self.cache, {**self.inception.settings(), "of": "probabilities"})
        rows = zip(scenes, cache(images, self.inception.probabilities), strict=True)
        return [{"scene": scene.id, "probabilities": row} for scene, row in rows]

    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """The score of all pictures; NaN of fewer than two for each split of a half.

        Args:
            rows: One for each scene.
            true: Not read.

        Returns:
            "inception_score".
        """
        kept = sorted((row for row in rows if "probabilities" in row), key=lambda row: row["scene"])
        failed = sum("failure" in row for row in rows)
        if len(kept) < 4 * self.splits:
            nothing = Value(mean=math.nan, low=math.nan, high=math.nan, count=0, failed=failed)
            return {"inception_score": nothing}
        order = np.random.default_rng(self.seed).permutation(len(kept))  # the split's own order may be one of subjects
        classes = np.stack([np.asarray(kept[place]["probabilities"]) for place in order])
        score = split_score(classes, self.splits)
        half = half_width(
            lambda places: split_score(classes[places], self.splits), len(kept), subsets=self.subsets, seed=self.seed
        )
        value = Value(mean=score, low=score - half, high=score + half, count=len(kept), failed=failed)
        return {"inception_score": value}
