"""How well a picture keeps to its layout, by a detector and as two benchmarks count it: COCO-MIG and OverLayBench.

Both measure the IoU of asked and found boxes and differ in how they pair them, in what a failure costs and in what is
averaged; each class says it exactly. Average precision is in `detection.py`.

Legend: G asked boxes of a scene, D detections, P pairs of overlapping asked boxes.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np

from labelling.parts import Detections, Detector, Segmenter
from metrics.base import Metric, Row, Value, check_images
from metrics.colours import COLOURS, share_of_colour
from metrics.finding import check_text, find_words, on_device, word_of
from metrics.intervals import mean_over_objects, mean_over_scenes
from scenes import boxes as box_math
from scenes.scene import Scene, SceneObject

SUCCESS = 0.5  # IoU from which an object stands where it was asked for
COLOURED = 0.2  # share of an object's pixels from which it has a colour


class _Layout(Metric):
    """What both have in common: scenes with boxes, a detector, rows over objects."""

    requires = frozenset({"boxes", "phrases"})

    def __init__(self, *, detector: Detector, text: str, resamples: int, seed: int) -> None:
        check_text(text, where=f"metric.{self.name}")
        self.detector, self.text, self.resamples, self.seed = detector, text, resamples, seed

    def settings(self) -> dict[str, Any]:
        """The detector's settings, the text and the resamples."""
        return {
            "detector": self.detector.settings(),
            "text": self.text,
            "resamples": self.resamples,
            "seed": self.seed,
        }

    def to(self, device: Any) -> Self:
        """The metric with its models on a torch device; see `Metric.to`."""
        self.detector = on_device(self.detector, device, where=f"metric.{self.name}")
        return self

    def _value(self, rows: Sequence[Row], column: str, *, over: Literal["objects", "scenes"]) -> Value:
        mean = mean_over_objects if over == "objects" else mean_over_scenes
        return mean(rows, [row[column] for row in rows], resamples=self.resamples, seed=self.seed)


class CocoMig(_Layout):
    """COCO-MIG's mIoU and success rates.

    Each label of a scene is asked for by itself. An object's IoU is the largest of its box with any box found under its label; a
    found box may serve several objects. It succeeds where that is 0.5 or more and, with a segmenter and where one of seven
    colours is asked for, the colour is right: 20 % or more of the pixels of the mask in its asked box lie in the colour's
    range of HSV. An object in place but of a wrong colour has IoU 0; one out of place keeps its IoU, and its colour is not
    looked at. "coco_mig_miou" and "coco_mig_success" (the instance success rate) are over objects, all scenes together, and so
    are those of a level, which is the number of a scene's objects; "coco_mig_placed" is the success rate without colours, and
    "coco_mig_scene_success" the share of scenes all of whose objects succeed.

    Published with GroundingDINO Swin-T (thresholds 0.25, NMS 0.8) and SAM ViT-H on pictures brought to 512 px, taking the best of
    SAM's three masks; here the segmenter gives one mask, and pictures stay at their size.

    Args:
        detector: What finds the objects.
        segmenter: What outlines them, for their colours; null leaves colours out.
        text: What an object is called: "label" (the phrase, without its colour, where there is none) or "phrase".
        resamples: Bootstrap resamples of an interval.
        seed: Seed of the resampling.

    Raises:
        ValueError: There is no such text.

    Source:
        Zhou et al. 2024, MIGC: Multi-Instance Generation Controller for Text-to-Image Synthesis, section 4.1, and its benchmark's
        evaluation (MIG_Bench, `eval_mig.py`).
    """

    name = "coco_mig"

    def __init__(
        self,
        *,
        detector: Detector,
        segmenter: Segmenter | None = None,
        text: Literal["label", "phrase"] = "label",
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(detector=detector, text=text, resamples=resamples, seed=seed)
        self.segmenter = segmenter

    def settings(self) -> dict[str, Any]:
        """The detector's and the segmenter's settings, the text and the resamples."""
        return {**super().settings(), "segmenter": None if self.segmenter is None else self.segmenter.settings()}

    def to(self, device: Any) -> Self:
        """The metric with its models on a torch device; see `Metric.to`."""
        if self.segmenter is not None:
            self.segmenter = on_device(self.segmenter, device, where=f"metric.{self.name}")
        return super().to(device)

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """What stands where it was asked for.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Not read.

        Returns:
            B rows with a number for each of the G objects that have a box: "iou"; "placed" and "success", 0 or 1; "colour", 0
            or 1, NaN where it is not looked at; "miou", the IoU that counts; and "all", whether all succeed.

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        asked = [[item for item in scene.objects if item.box is not None] for scene in scenes]
        words = [[self._word(item) for item in items] for items in asked]
        found = find_words(self.detector, images, words, singly=True)
        return [self._row(*one) for one in zip(images, scenes, asked, words, found, strict=True)]

    def _word(self, item: SceneObject) -> str:
        word = word_of(item, self.text)
        first, _, rest = word.partition(" ")
        return rest if self.text == "label" and not item.label and rest and first in COLOURS else word

    def _row(
        self, image: np.ndarray, scene: Scene, items: Sequence[SceneObject], words: Sequence[str], found: Detections
    ) -> Row:
        iou = best_overlaps(box_array(items), words, found)
        placed = iou >= SUCCESS
        colour = self._colours(image, items, placed)
        success = placed & (colour != 0)
        return {
            "scene": scene.id,
            "iou": iou,
            "placed": placed.astype(float),
            "colour": colour,
            "success": success.astype(float),
            "miou": np.where(placed & ~success, 0.0, iou),
            "all": [float(success.all())] if items else [],
        }

    def _colours(self, image: np.ndarray, items: Sequence[SceneObject], placed: np.ndarray) -> np.ndarray:
        """Whether each object has its colour, (G,) 1 or 0; NaN where none is asked for or it is out of place."""
        colours = np.full(len(items), math.nan)
        asked = {place: colour for place, item in enumerate(items) if placed[place] and (colour := colour_of(item))}
        if self.segmenter is not None and asked:
            masks = self.segmenter([image], [box_array([items[place] for place in asked])])[0]
            for (place, colour), mask in zip(asked.items(), masks, strict=True):
                colours[place] = float(share_of_colour(image, mask, colour) >= COLOURED)
        return colours

    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """The values over all scenes, and of each level that scenes have.

        Args:
            rows: One for each scene, in the order of the scenes.
            true: Not read.

        Returns:
            "coco_mig_miou", "coco_mig_success", "coco_mig_placed", "coco_mig_scene_success", and "coco_mig_miou_2",
            "coco_mig_success_2", … for scenes of 2, … objects.
        """
        scored = [row for row in rows if "failure" not in row]
        values = {
            "coco_mig_miou": self._value(scored, "miou", over="objects"),
            "coco_mig_success": self._value(scored, "success", over="objects"),
            "coco_mig_placed": self._value(scored, "placed", over="objects"),
            "coco_mig_scene_success": self._value(scored, "all", over="scenes"),
        }
        for level in sorted({len(row["iou"]) for row in scored} - {0}):
            of_level = [row for row in scored if len(row["iou"]) == level]
            values[f"coco_mig_miou_{level}"] = self._value(of_level, "miou", over="objects")
            values[f"coco_mig_success_{level}"] = self._value(of_level, "success", over="objects")
        return with_failures(values, rows)


class OverLayBench(_Layout):
    """OverLayBench's mIoU and o-mIoU, and the share of objects in place.

    All labels of a scene are asked for at once. Asked and found boxes of a label are paired one to one, greedily from the largest
    IoU down; an object without a partner has IoU 0. "overlay_miou" is the mean over scenes of the mean over a scene's objects.
    "overlay_o_miou" compares overlaps: for each pair of asked boxes that overlap, the rectangle that both cover with the
    rectangle that their partners both cover (0 where one has no partner or they do not meet); the mean over pairs, then over
    scenes with one. "overlay_success" is the share of objects, over all scenes, with an IoU of 0.5 or more.

    Published with Qwen2.5-VL-32B as the detector, boxes in whole pixels at 1024 px, and the pairs that the benchmark's
    annotations list; here any detector, boxes as they are, and pairs by their IoU.

    Args:
        detector: What finds the objects.
        text: What an object is called: "label" (the phrase where there is none) or "phrase".
        overlap: A pair counts where the IoU of its asked boxes is above this.
        resamples: Bootstrap resamples of an interval.
        seed: Seed of the resampling.

    Raises:
        ValueError: There is no such text, or overlap is no IoU.

    Source:
        Li et al. 2025, OverLayBench: A Benchmark for Layout-to-Image Generation with Dense Overlaps, and its evaluation
        (`overlaybenchpytools/utils.py`).
    """

    name = "overlaybench"

    def __init__(
        self,
        *,
        detector: Detector,
        text: Literal["label", "phrase"] = "label",
        overlap: float = 0.0,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__(detector=detector, text=text, resamples=resamples, seed=seed)
        if not 0 <= overlap < 1:
            raise ValueError(f"metric.overlaybench.overlap={overlap}: no IoU; give a number from 0, below 1")
        self.overlap = overlap

    def settings(self) -> dict[str, Any]:
        """The detector's settings, the text, which pairs count and the resamples."""
        return {**super().settings(), "overlap": self.overlap}

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """The IoU of each object with its partner, and of overlaps.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Not read.

        Returns:
            B rows: "iou" and "placed" (0 or 1) of the G objects that have a box, "overlap_iou" (P,).

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        asked = [[item for item in scene.objects if item.box is not None] for scene in scenes]
        words = [[word_of(item, self.text) for item in items] for items in asked]
        found = find_words(self.detector, images, words)
        rows = []
        for scene, items, names, detections in zip(scenes, asked, words, found, strict=True):
            boxes = box_array(items)
            iou, partners = paired(boxes, names, detections)
            overlaps = overlap_ious(boxes, partners, least=self.overlap)
            rows.append(
                {"scene": scene.id, "iou": iou, "placed": (iou >= SUCCESS).astype(float), "overlap_iou": overlaps}
            )
        return rows

    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """The values over all scenes.

        Args:
            rows: One for each scene, in the order of the scenes.
            true: Not read.

        Returns:
            "overlay_miou", "overlay_o_miou", "overlay_success".
        """
        scored = [row for row in rows if "failure" not in row]
        values = {
            "overlay_miou": self._value(scored, "iou", over="scenes"),
            "overlay_o_miou": self._value(scored, "overlap_iou", over="scenes"),
            "overlay_success": self._value(scored, "placed", over="objects"),
        }
        return with_failures(values, rows)


def box_array(items: Sequence[SceneObject]) -> np.ndarray:
    """The boxes of objects that have one, (G, 4) float64 xyxy in [0, 1]."""
    return np.array([item.box for item in items], np.float64).reshape(-1, 4)


def colour_of(item: SceneObject) -> str | None:
    """Which of the seven colours an object is asked to have: an attribute, or else the first word of its phrase."""
    words = [*(attribute.lower() for attribute in item.attributes), item.phrase.lower().split()[0]]
    return next((word for word in words if word in COLOURS), None)


def best_overlaps(boxes: np.ndarray, words: Sequence[str], found: Detections) -> np.ndarray:
    """The largest IoU of each box (G, 4) with what was found under its word, (G,); 0 where nothing was."""
    iou = box_math.iou(boxes, found.boxes.astype(np.float64)) * _same(words, found)
    return iou.max(axis=1, initial=0.0)


def paired(boxes: np.ndarray, words: Sequence[str], found: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Pairs asked and found boxes of a word one to one, greedily from the largest IoU down.

    Args:
        boxes: (G, 4) xyxy in [0, 1].
        words: G words.
        found: What was found.

    Returns:
        IoU with the partner (G,), 0 without one, and partners (G, 4) xyxy, NaN without one. A partner may have IoU 0.
    """
    candidates = found.boxes.astype(np.float64)
    same = _same(words, found)
    iou = box_math.iou(boxes, candidates)
    overlaps, partners = np.zeros(len(boxes)), np.full((len(boxes), 4), math.nan)
    taken: set[int] = set()
    for flat in np.argsort(-iou.ravel(), kind="stable"):
        mine, theirs = np.unravel_index(flat, iou.shape)
        if same[mine, theirs] and np.isnan(partners[mine, 0]) and theirs not in taken:
            overlaps[mine], partners[mine] = iou[mine, theirs], candidates[theirs]
            taken.add(int(theirs))
    return overlaps, partners


def overlap_ious(boxes: np.ndarray, partners: np.ndarray, *, least: float = 0.0) -> np.ndarray:
    """For each pair of boxes that overlap, the IoU of what they share with what their partners share.

    Args:
        boxes: (G, 4) xyxy.
        partners: (G, 4) xyxy; NaN where there is none.
        least: IoU of the boxes of a pair above which it counts.

    Returns:
        (P,) in the order of the pairs (0, 1), (0, 2), …, (1, 2), …; 0 where the partners share nothing.
    """
    first, second = np.triu_indices(len(boxes), 1)
    meet = box_math.pairwise_iou(boxes[first], boxes[second]) > least
    first, second = first[meet], second[meet]
    wanted, got = _shared(boxes[first], boxes[second]), _shared(partners[first], partners[second])
    something = np.all(got[:, 2:] > got[:, :2], axis=-1)  # NaN is not
    overlaps = np.zeros(len(first))
    overlaps[something] = box_math.pairwise_iou(wanted[something], got[something])
    return overlaps


def with_failures(values: dict[str, Value], rows: Sequence[Row]) -> dict[str, Value]:
    """The values, each saying how many rows failed."""
    failed = sum("failure" in row for row in rows)
    return {
        name: Value(mean=one.mean, low=one.low, high=one.high, count=one.count, failed=failed)
        for name, one in values.items()
    }


def _same(words: Sequence[str], found: Detections) -> np.ndarray:
    """Whether a box was found under the word, (G, D) bool."""
    return np.array([[word == label for label in found.labels] for word in words], bool).reshape(
        len(words), len(found.labels)
    )


def _shared(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The rectangles that both boxes (P, 4) cover, inverted where they do not meet."""
    return np.concatenate([np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])], axis=1)
