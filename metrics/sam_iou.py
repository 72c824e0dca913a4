"""SAMIoU: whether what SAM outlines in an asked box fills that box."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from labelling.parts import Segmenter
from metrics.base import Metric, Row, Value, check_images
from metrics.finding import on_device
from metrics.object_values import SIDES, areas, check_sides, object_values, pixel_boxes
from scenes import boxes as box_math
from scenes.scene import Scene

SURE = 0.5  # score of a mask up to which it counts as nothing


class SamIou(Metric):
    """The IoU of each asked box with the bounding box of what a segmenter outlines when prompted with it.

    A mask whose score is 0.5 or less, or that is empty, has IoU 0. Boxes are cut to whole pixels, and a mask's box goes from its
    first to its last row and column, as published, so that a box filled to its rim has an IoU a little below 1. "sam_iou" is the
    published figure, the mean over scenes of the mean over objects; "sam_iou_objects" counts every object alike, and
    "sam_iou_small", "_medium", "_large" those of a size.

    Args:
        segmenter: What outlines the objects; published with SAM ViT-H, one mask for each box.
        sides: Between small and medium, medium and large objects: px of a picture whose longer side is 512.
        resamples: Bootstrap resamples of an interval, over scenes.
        seed: Seed of the resampling.

    Raises:
        ValueError: The sides are not two rising numbers.

    Source:
        Cheng et al. 2024, Rethinking The Training And Evaluation of Rich-Context Layout-to-Image Generation, section 4, and its
        published evaluation (`evaluation.py`).
    """

    name = "sam_iou"
    requires = frozenset({"boxes"})

    def __init__(
        self, *, segmenter: Segmenter, sides: Sequence[float] = SIDES, resamples: int = 1000, seed: int = 0
    ) -> None:
        self.sides = check_sides(sides, where="metric.sam_iou")
        self.segmenter, self.resamples, self.seed = segmenter, resamples, seed

    def settings(self) -> dict[str, Any]:
        """The segmenter's settings, sizes, resamples, seed."""
        return {
            "segmenter": self.segmenter.settings(),
            "sides": list(self.sides),
            "resamples": self.resamples,
            "seed": self.seed,
        }

    def to(self, device: Any) -> Self:
        """The metric with its segmenter on a torch device; see `Metric.to`."""
        self.segmenter = on_device(self.segmenter, device, where="metric.sam_iou")
        return self

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """The IoU of each object.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Not read.

        Returns:
            B rows with a number for each of the G objects that have a box: "values"; "scores", the segmenter's; "areas", as in
            `object_values.areas`.

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        sizes = [image.shape[:2] for image in images]
        boxes = [pixel_boxes(scene, size) for scene, size in zip(scenes, sizes, strict=True)]
        prompts = [box_math.normalise(one.astype(np.float64), size) for one, size in zip(boxes, sizes, strict=True)]
        outlined = self.segmenter.with_scores(images, prompts)
        return [
            {
                "scene": scene.id,
                "values": np.where(scores > SURE, filled(asked, masks), 0.0),
                "scores": scores,
                "areas": areas(scene),
            }
            for scene, asked, (masks, scores) in zip(scenes, boxes, outlined, strict=True)
        ]

    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """The values over all scenes; see the class.

        Args:
            rows: One for each scene, in the order of the scenes.
            true: Not read.

        Returns:
            Values by name.
        """
        return object_values(self.name, rows, sides=self.sides, resamples=self.resamples, seed=self.seed)


def filled(boxes: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The IoU of boxes with the bounding boxes of masks.

    Args:
        boxes: (N, 4) xyxy in whole px.
        masks: (N, H, W) bool.

    Returns:
        (N,) float64; 0 for an empty mask.
    """
    around = np.zeros((len(boxes), 4))
    for place, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if rows.size:
            around[place] = columns[0], rows[0], columns[-1], rows[-1]
    return box_math.pairwise_iou(boxes.astype(np.float64), around)
