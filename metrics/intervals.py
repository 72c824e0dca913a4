"""Bootstrap intervals of figures over objects, of which a row holds several, and the draws for any figure of a set.

What is drawn again is always the scene, with all of its pictures and objects, because those are not independent. Means of one
number a scene are in `base.py`.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from metrics.base import Row, Value, bootstrap_interval

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


def scene_places(rows: Sequence[Row]) -> np.ndarray:
    """Which scene each row is of, (rows,) int: scenes are numbered as they first appear; several seeds give several rows."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(row["scene"], len(numbers)) for row in rows], dtype=int)


def mean_over_objects(
    rows: Sequence[Row], values: Sequence[Sequence[float] | np.ndarray], *, resamples: int = 1000, seed: int = 0
) -> Value:
    """The mean over the objects of all pictures, each object counting alike, with an interval over scenes.

    Args:
        rows: The rows that the values are of.
        values: For each row the values of its objects; NaN for an object that does not count.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The value; its count is the number of scenes that have an object that counts.

    Source:
        Cochran 1977, Sampling Techniques, section 2.11 (ratio of two means over sampled clusters).
    """
    numbers = [_numbers(one) for one in values]
    places = scene_places(rows)
    scenes = int(places.max(initial=-1)) + 1
    sums = np.bincount(places, weights=[one.sum() for one in numbers], minlength=scenes)
    counts = np.bincount(places, weights=[one.size for one in numbers], minlength=scenes)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not counts.size:
        return Value(mean=math.nan, low=math.nan, high=math.nan, count=0)
    figures = np.concatenate(
        [(times @ sums) / (times @ counts) for times in draws(counts.size, resamples=resamples, seed=seed)]
    )
    low, high = interval(figures)
    return Value(mean=float(sums.sum() / counts.sum()), low=low, high=high, count=int(counts.size))


def mean_over_scenes(
    rows: Sequence[Row], values: Sequence[Sequence[float] | np.ndarray], *, resamples: int = 1000, seed: int = 0
) -> Value:
    """The mean over scenes of the mean over the objects of a picture, each scene counting alike.

    Args:
        rows: The rows that the values are of.
        values: As in `mean_over_objects`.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The value, over the scenes that have an object that counts; of several pictures of a scene the mean counts.
    """
    means: dict[str, list[float]] = {}
    for row, one in zip(rows, values, strict=True):
        if (numbers := _numbers(one)).size:
            means.setdefault(row["scene"], []).append(float(numbers.mean()))
    return bootstrap_interval((sum(one) / len(one) for one in means.values()), resamples=resamples, seed=seed)


def _numbers(values: Sequence[float] | np.ndarray) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    return numbers[~np.isnan(numbers)]
