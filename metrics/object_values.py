"""Values of numbers that a metric gives each object of a picture: over scenes, over objects, and by the objects' sizes.

What an object's number is lives in the metrics that are built on this.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from metrics.base import Row, Value
from metrics.intervals import mean_over_objects, mean_over_scenes
from scenes.scene import Scene

FRAME = 512  # px: longer side of the pictures that sizes are told of
SIDES = (32, 96)  # px of that frame, COCO's: smaller than the first is small, from the second on is large
SIZES = ("small", "medium", "large")


def check_sides(sides: Sequence[float], *, where: str) -> tuple[float, float]:
    """Refuses what does not part objects into three sizes.

    Args:
        sides: Two sides in px of a picture of 512.
        where: The metric's node in the configuration.

    Returns:
        The sides.

    Raises:
        ValueError: They are not two rising numbers.
    """
    if len(sides) != 2 or not 0 < sides[0] < sides[1]:
        raise ValueError(
            f"{where}.sides={list(sides)}: no two rising sides; give such as [32, 96], px of a 512 picture"
        )
    return sides[0], sides[1]


def pixel_boxes(scene: Scene, size: Sequence[int]) -> np.ndarray:
    """The boxes of a scene's objects that have one, cut to whole pixels as the published evaluation does it.

    Args:
        scene: The Scene.
        size: (height, width) of its picture.

    Returns:
        (G, 4) int64 xyxy px; a box thinner than a pixel may have no area.
    """
    height, width = size
    boxes = np.array([item.box for item in scene.objects if item.box is not None], np.float64).reshape(-1, 4)
    # A thousandth of a pixel is rounding of the fractions, not the box.
    return np.floor(boxes * [width, height, width, height] + 1e-3).astype(np.int64)


def areas(scene: Scene) -> np.ndarray:
    """The share of a square over the picture's longer side that each box covers, (G,); without a frame the picture is square."""
    boxes = np.array([item.box for item in scene.objects if item.box is not None], np.float64).reshape(-1, 4)
    height, width = (1, 1) if scene.frame is None else scene.frame.target
    share = height * width / max(height, width) ** 2
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * share


def object_values(
    name: str,
    rows: Sequence[Row],
    *,
    sides: Sequence[float] = SIDES,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Value]:
    """The values of rows with "values" (G,), NaN for an object that does not count, and "areas" (G,), as `areas` gives them.

    Args:
        name: The metric's name, with which every name begins.
        rows: The rows.
        sides: Sides of objects between small, medium and large ones: square roots of their areas, in px of a 512 picture.
        resamples: Bootstrap resamples of an interval.
        seed: Seed of the resampling.

    Returns:
        `name`, the mean over scenes of the mean over a scene's objects, as published; `name`_objects, the mean over all objects;
        and `name`_small, _medium, _large, means over the objects of a size. Intervals are over scenes.
    """
    scored = [row for row in rows if "failure" not in row]
    settings = {"resamples": resamples, "seed": seed}
    values = [np.asarray(row["values"], np.float64) for row in scored]
    found = {
        name: mean_over_scenes(scored, values, **settings),
        f"{name}_objects": mean_over_objects(scored, values, **settings),
    }
    edges = [0.0, *((side / FRAME) ** 2 for side in sides), math.inf]
    for size, least, most in zip(SIZES, edges[:-1], edges[1:], strict=True):
        of_size = [
            one[(np.asarray(row["areas"]) >= least) & (np.asarray(row["areas"]) < most)]
            for row, one in zip(scored, values, strict=True)
        ]
        found[f"{name}_{size}"] = mean_over_objects(scored, of_size, **settings)
    failed = len(rows) - len(scored)
    return {key: replace(value, failed=failed) for key, value in found.items()}
