"""The seam between pictures and numbers: metrics compare pictures with Scenes and give values with intervals.

Here live the interface, the value with its bootstrap interval, and the shared part of metrics that are means over
scenes. What a particular metric looks at lives beside this file; reports live in `evaluation`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from scenes.scene import Scene

Row = dict[str, Any]  # "scene": its id; "failure": why there is nothing else; what the metric keeps of a picture

_BLOCK = 4_000_000  # draws at a time: keeps the bootstrap of a large set within tens of MB


@dataclass(frozen=True, kw_only=True)
class Value:
    """A mean over scenes, or another figure of all of them such as a distance.

    Attributes:
        mean: The figure; NaN where count is 0.
        low: Lower end of the 95 % bootstrap interval over scenes.
        high: Upper end of it.
        count: Number of scenes that the mean is over.
        failed: Number of scenes that could not be scored.
    """

    mean: float
    low: float
    high: float
    count: int
    failed: int = 0

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


class NotAvailable(ValueError):
    """A metric cannot be measured here: what it needs is not there; the message names the file and the way out.

    An evaluation reports it and goes on with the other metrics.
    """


class Metric(ABC):
    """Compares pictures with the Scenes they were made for, in two parts: a row for each picture, values of all rows.

    A row depends on its picture and scene alone. So rows can be made in batches of any size, by any number of processes, be kept
    on disk and taken up again after a kill; and values, made from all of them in the order of the scenes, are the same
    whoever made them.

    Attributes:
        name: The metric's name in reports and log keys.
        requires: What Scenes must carry, in the words of `datamodules.sources.base.PROVIDABLE`.
        compares: Its values need the rows of the true pictures beside those of the generated ones.
        pairs: A row needs two pictures of its scene, drawn from two seeds.
        bounds: Real and shuffled images are measured too, beside the generated ones, as its upper bound and chance level.
        references: It can keep statistics of true pictures in a file and compare with that: it has `save_reference`.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    compares: ClassVar[bool] = False
    pairs: ClassVar[bool] = False
    bounds: bool = True
    references: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """What rows and values depend on beside pictures and scenes (models by name and hash, thresholds), as JSON values."""
        return {}

    def to(self, device: Any) -> Self:
        """The metric with its models on a torch device.

        Args:
            device: Where they are to work.

        Returns:
            The metric.

        Raises:
            NotAvailable: A model's files are not there.
        """
        return self

    def save_reference(self, path: str | Path, rows: Sequence[Row], *, split: str) -> None:
        """Keeps the statistics of true pictures for later evaluations.

        Args:
            path: The file.
            rows: The rows of the true pictures.
            split: What pictures these are, such as "coco val2017".

        Raises:
            NotImplementedError: The metric has none.
        """
        raise NotImplementedError(f"{self.name}: compares with pictures, not with their statistics")

    @abstractmethod
    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """A row for each picture.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Of a metric with `pairs`, B pictures of the same Scenes from another seed.

        Returns:
            B rows: "scene", the scene's id, and what the metric keeps of a picture: numbers, arrays, JSON values. A picture
            that could not be scored has "failure", the reason in a line.
        """

    @abstractmethod
    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """The values over all scenes.

        Args:
            rows: One for each scene, in the order of the scenes; where pictures were drawn from several seeds, seed after seed.
            true: Of a metric with `compares`, the rows of the true pictures in the same order, as many.

        Returns:
            Values by name.
        """

    def tallies(self, rows: Sequence[Row]) -> dict[str, int]:
        """Numbers that tell how much the values say, for the log of a training; none unless the metric has some.

        Args:
            rows: As for `compute`.

        Returns:
            Numbers by name.
        """
        return {}


class SceneMetric(Metric):
    """A metric that scores each picture by itself; its values are the means of its columns over scenes.

    Args:
        resamples: Bootstrap resamples of an interval.
        seed: Seed of the resampling.
    """

    columns: ClassVar[tuple[str, ...]]

    def __init__(self, *, resamples: int = 1000, seed: int = 0) -> None:
        self.resamples, self.seed = resamples, seed

    @abstractmethod
    def score(self, image: np.ndarray, scene: Scene) -> Mapping[str, float | None]:
        """The value of each column for one picture, None where the scene does not count for it.

        Args:
            image: (H, W, 3) uint8 RGB.
            scene: Its Scene.

        Returns:
            The values by column.
        """

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """Scores B pictures.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Not read.

        Returns:
            B rows: "scene" and the columns.

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        return [{"scene": scene.id, **self.score(image, scene)} for image, scene in zip(images, scenes, strict=True)]

    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """The mean of each column with its interval, over the scenes that count for it."""
        return {column: self.mean(rows, column) for column in self.columns}

    def mean(self, rows: Sequence[Row], column: str) -> Value:
        """The mean of a column with its interval, and how many rows failed; of several rows of a scene their mean counts."""
        scores: dict[Any, list[float]] = {}
        for place, row in enumerate(rows):
            kept = scores.setdefault(row.get("scene", place), [])
            if (score := row.get(column)) is not None and not math.isnan(score):
                kept.append(score)
        means = (sum(kept) / len(kept) if kept else None for kept in scores.values())
        value = bootstrap_interval(means, resamples=self.resamples, seed=self.seed)
        return replace(value, failed=sum("failure" in row for row in rows))


def check_images(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> None:
    """Refuses pictures that are not (H, W, 3) uint8, or not as many as the Scenes.

    Args:
        images: What are to be (H, W, 3) uint8 RGB.
        scenes: The Scenes.

    Raises:
        ValueError: They are not.
    """
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(
                f"images: {image.dtype} {image.shape} cannot be scored; give pictures (H, W, 3) uint8 RGB in 0..255"
            )
    if len(images) != len(scenes):
        raise ValueError(f"images: {len(images)} pictures for {len(scenes)} scenes; give one for each scene")
