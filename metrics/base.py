"""The seam between pictures and numbers: metrics compare pictures with Scenes and give values with intervals.

Here live the interface, the value with its bootstrap interval, and the shared part of metrics that are means over
scenes. What a particular metric looks at lives beside this file; reports live in `evaluation`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from scenes.scene import Scene

Row = dict[str, Any]  # "scene": its id; each column: float | None

_BLOCK = 4_000_000  # draws at a time: keeps the bootstrap of a large set within tens of MB


@dataclass(frozen=True, kw_only=True)
class Value:
    """A mean over scenes.

    Attributes:
        mean: The mean; NaN where count is 0.
        low: Lower end of the 95 % bootstrap interval over scenes.
        high: Upper end of it.
        count: Number of scenes that the mean is over.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.count})"


def bootstrap_interval(
    values: Iterable[float | None], *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Value:
    """The mean of per-scene values with a percentile bootstrap interval.

    Args:
        values: One value per scene; None and NaN mean that the scene does not count.
        resamples: Number of bootstrap resamples, drawn over scenes.
        level: Probability that the interval is to cover.
        seed: Seed of the resampling: equal values give equal intervals.

    Returns:
        The value; all NaN with count 0 where no scene counts.

    Raises:
        ValueError: resamples is below 1, or level is not between 0 and 1.

    Source:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3 (percentile intervals).
    """
    if resamples < 1:
        raise ValueError(f"resamples: {resamples} is too few; give 1 or more (1000 is customary)")
    if not 0 < level < 1:
        raise ValueError(f"level: {level} is no probability; give a number between 0 and 1, such as 0.95")
    sample = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    sample = sample[~np.isnan(sample)]
    if sample.size == 0:
        return Value(mean=math.nan, low=math.nan, high=math.nan, count=0)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // sample.size)
    means = np.concatenate(
        [
            sample[generator.integers(sample.size, size=(min(block, resamples - begin), sample.size))].mean(axis=1)
            for begin in range(0, resamples, block)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Value(mean=float(sample.mean()), low=float(low), high=float(high), count=int(sample.size))


class Metric(ABC):
    """Compares pictures with the Scenes they were made for, in batches of any size.

    Attributes:
        name: The metric's name in reports and log keys.
        requires: What Scenes must carry, in the words of `datamodules.sources.base.PROVIDABLE`.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def update(self, images: np.ndarray, scenes: Sequence[Scene]) -> None:
        """Takes in a batch.

        Args:
            images: (B, H, W, 3) uint8 RGB.
            scenes: The B Scenes.
        """

    @abstractmethod
    def compute(self) -> dict[str, Value]:
        """The values over everything since the last reset."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything taken in."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of pictures taken in."""


class SceneMetric(Metric):
    """A metric that scores each picture by itself; its values are means over scenes.

    Rows are kept, one per picture, so that a report can show the best and the worst, and so that ranks can put
    their parts together: `extend` with the rows of the others.

    Args:
        resamples: Bootstrap resamples of an interval.
        seed: Seed of the resampling.
    """

    columns: ClassVar[tuple[str, ...]]

    def __init__(self, *, resamples: int = 1000, seed: int = 0) -> None:
        self.resamples, self.seed = resamples, seed
        self._rows: list[Row] = []

    @abstractmethod
    def score(self, image: np.ndarray, scene: Scene) -> Mapping[str, float | None]:
        """The value of each column for one picture, None where the scene does not count for it.

        Args:
            image: (H, W, 3) uint8 RGB.
            scene: Its Scene.

        Returns:
            The values by column.
        """

    @property
    def rows(self) -> list[Row]:
        """One row per picture, in the order of `update`: "scene" (its id) and the columns."""
        return self._rows

    @property
    def count(self) -> int:
        """Number of pictures taken in."""
        return len(self._rows)

    def update(self, images: np.ndarray, scenes: Sequence[Scene]) -> None:
        """Scores a batch.

        Args:
            images: (B, H, W, 3) uint8 RGB.
            scenes: The B Scenes.

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        self.extend(
            {"scene": scene.id, **self.score(image, scene)} for image, scene in zip(images, scenes, strict=True)
        )

    def extend(self, rows: Iterable[Row]) -> None:
        """Takes in rows that another instance (another rank) has scored."""
        self._rows.extend(rows)

    def compute(self) -> dict[str, Value]:
        """The mean of each column with its interval, over the scenes that count for it."""
        return {
            column: bootstrap_interval((row[column] for row in self._rows), resamples=self.resamples, seed=self.seed)
            for column in self.columns
        }

    def reset(self) -> None:
        """Forgets all rows."""
        self._rows = []


def check_images(images: np.ndarray, scenes: Sequence[Scene]) -> None:
    """Refuses pictures that are not (B, H, W, 3) uint8, or not as many as the Scenes.

    Args:
        images: What is to be (B, H, W, 3) uint8.
        scenes: The B Scenes.

    Raises:
        ValueError: They are not.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images: {images.dtype} {images.shape} cannot be scored; give (B, H, W, 3) uint8 RGB in 0..255"
        )
    if len(images) != len(scenes):
        raise ValueError(f"images: {len(images)} pictures for {len(scenes)} scenes; give one for each scene")
