"""Bootstrap intervals of figures that are no means over scenes: means over objects, figures of a whole set.

What is drawn again is always the scene, with all of its objects, because the objects of a picture are not independent. Means over
scenes are in `base.py`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from metrics.base import Value

_BLOCK = 4_000_000  # numbers at a time


def draws(scenes: int, *, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each scene is drawn, block by block: (R, scenes) float64, each row a resample.

    Args:
        scenes: Number of scenes, at least 1.
        resamples: Number of resamples of all blocks together.
        seed: Seed of the draws: the same gives the same.

    Yields:
        Blocks of resamples.
    """
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // scenes)
    for begin in range(0, resamples, block):
        rows = min(block, resamples - begin)
        places = generator.integers(scenes, size=(rows, scenes)) + scenes * np.arange(rows)[:, None]
        yield np.bincount(places.ravel(), minlength=rows * scenes).reshape(rows, scenes).astype(np.float64)


def interval(figures: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled figures (R,); NaN ones, of resamples without an object, do not count."""
    figures = figures[~np.isnan(figures)]
    if not figures.size:
        return math.nan, math.nan
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_over_objects(values: Iterable[Sequence[float] | np.ndarray], *, resamples: int = 1000, seed: int = 0) -> Value:
    """The mean over the objects of all scenes, each object counting alike, with an interval over scenes.

    Args:
        values: For each scene the values of its objects; NaN for an object that does not count.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The value; its count is the number of scenes that have an object that counts.

    Source:
        Cochran 1977, Sampling Techniques, section 2.11 (ratio of two means over sampled clusters).
    """
    scenes = [kept for one in values if (kept := _numbers(one)).size]
    if not scenes:
        return Value(mean=math.nan, low=math.nan, high=math.nan, count=0)
    sums, counts = np.array([one.sum() for one in scenes]), np.array([float(one.size) for one in scenes])
    figures = np.concatenate(
        [(times @ sums) / (times @ counts) for times in draws(len(scenes), resamples=resamples, seed=seed)]
    )
    low, high = interval(figures)
    return Value(mean=float(sums.sum() / counts.sum()), low=low, high=high, count=len(scenes))


def _numbers(values: Sequence[float] | np.ndarray) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    return numbers[~np.isnan(numbers)]
