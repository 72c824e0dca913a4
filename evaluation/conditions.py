"""Under which condition the pictures of a split were made, and which of them a metric scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.image_sets import PictureSet
from metrics.base import Metric


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Pictures of all scenes of a split.

    Attributes:
        name: One of `evaluation.report.wording.ARMS`.
        sets: The pictures, a set a seed.
        rows: Folder of what metrics keep of them.
    """

    name: str
    sets: tuple[PictureSet, ...]
    rows: Path

    def scored(self, metric: Metric) -> list[tuple[PictureSet, ...]]:
        """What the metric takes row by row: a set, or two of them."""
        return [self.sets[:2]] if metric.pairs else [(pictures,) for pictures in self.sets]


def measured_arms(metric: Metric, arms: Mapping[str, Arm], wanted: Sequence[str]) -> list[Arm]:
    """The arms of which a metric needs rows: one that compares also of the true pictures, one with pairs of two sets alone.

    One without bounds measures neither the true pictures nor those of other scenes beside the generated ones.
    """
    names = [name for name in arms if name != "ceiling" or "ceiling" in wanted or metric.compares]
    if not (metric.bounds or metric.compares):
        names = [name for name in names if name not in ("ceiling", "floor")]
    return [arms[name] for name in names if not metric.pairs or len(arms[name].sets) > 1]
