"""Average precision and recall of a detector on generated pictures, as COCO's own evaluator counts them.

The boxes that were asked for are the truth, and what a detector finds in the picture is judged by them (GLIGEN's YOLO score).
Here lives what goes into the evaluator and comes out of it; detectors are in `labelling`. The score of the true pictures is
the bound that a detector's mistakes set.

Legend: G asked boxes of a scene, D detections; I pictures, K labels, T thresholds of IoU, R resamples, P recall points.
"""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from labelling.parts import Detections, Detector
from metrics.base import Metric, Row, Value, check_images
from metrics.finding import check_text, find_words, on_device, word_of
from metrics.intervals import draws, interval, mean_over_scenes, scene_places
from scenes import boxes as box_math
from scenes.scene import Scene, SceneObject

AREAS = ("", "_small", "_medium", "_large")  # COCO's, in the evaluator's order
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar", "ar_small", "ar_medium", "ar_large")
_STATS = (0, 1, 2, 3, 4, 5, 8, 9, 10, 11)  # their places in the evaluator's summary
_BLOCK = 4_000_000  # numbers at a time


class Detection(Metric):
    """AP, AP50, AP75 and AR by COCO's evaluator, over a detector's findings; "known", the share of boxes that count.

    Boxes and areas are in px of the picture, so that small (under 32² px), medium and large (over 96² px) depend on its size; an
    area is that of the box. Detections count up to 100 for a picture and label. A label that a closed detector does not know does
    not count, and "known" says how many boxes do; of crowds the evaluator counts nothing, for or against. The average is over the
    labels that some scene asks for. Pictures of several seeds count as one set; intervals come from resampled scenes.

    Args:
        detector: What finds the objects.
        text: What an object is called: "label" (the phrase where there is none) or "phrase".
        resamples: Bootstrap resamples of an interval; each accumulates all of the detections again.
        seed: Seed of the resampling.

    Raises:
        ValueError: There is no such text.

    Source:
        Lin et al. 2014, Microsoft COCO, and its evaluator (pycocotools); Li et al. 2021, Image Synthesis from Layout with
        Locality-Aware Mask Adaption, and Li et al. 2023, GLIGEN, section 5.1 (the YOLO score).
    """

    name = "detection"
    requires = frozenset({"boxes", "phrases"})

    def __init__(
        self,
        *,
        detector: Detector,
        text: Literal["label", "phrase"] = "label",
        resamples: int = 100,
        seed: int = 0,
    ) -> None:
        check_text(text, where="metric.detection")
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
        """The metric with its detector on a torch device; see `Metric.to`."""
        self.detector = on_device(self.detector, device, where="metric.detection")
        return self

    def measure(
        self, images: Sequence[np.ndarray], scenes: Sequence[Scene], *, again: Sequence[np.ndarray] = ()
    ) -> list[Row]:
        """What was asked for and what was found.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.
            scenes: The B Scenes.
            again: Not read.

        Returns:
            B rows: "boxes" (G, 4) float32 xyxy px of the picture, "labels" and "crowd" of them, "unknown" (how many boxes do not
            count), and "found" (D, 4), "scores" (D,), "found_labels".

        Raises:
            ValueError: The pictures have another form, or there are more or fewer of them than Scenes.
        """
        check_images(images, scenes)
        asked = [[item for item in scene.objects if item.box is not None] for scene in scenes]
        words = [[word_of(item, self.text) for item in items] for items in asked]
        found = find_words(self.detector, images, words)
        known = None if self.detector.names is None else {name.lower() for name in self.detector.names}
        return [
            self._row(image, scene, items, names, detections, known)
            for image, scene, items, names, detections in zip(images, scenes, asked, words, found, strict=True)
        ]

    @staticmethod
    def _row(
        image: np.ndarray,
        scene: Scene,
        items: Sequence[SceneObject],
        names: Sequence[str],
        found: Detections,
        known: set[str] | None,
    ) -> Row:
        counts = [known is None or name in known for name in names]
        boxes = np.array([item.box for item, one in zip(items, counts, strict=True) if one], np.float64).reshape(-1, 4)
        size = image.shape[:2]
        return {
            "scene": scene.id,
            "boxes": box_math.denormalise(boxes, size).astype(np.float32),
            "labels": [name for name, one in zip(names, counts, strict=True) if one],
            "crowd": [item.is_crowd for item, one in zip(items, counts, strict=True) if one],
            "unknown": counts.count(False),
            "found": box_math.denormalise(found.boxes.astype(np.float64), size).astype(np.float32),
            "scores": found.scores,
            "found_labels": list(found.labels),
        }

    def compute(self, rows: Sequence[Row], *, true: Sequence[Row] = ()) -> dict[str, Value]:
        """The evaluator's figures over all scenes; a figure that nothing asked for bears on is NaN with count 0.

        Args:
            rows: One for each scene, in the order of the scenes.
            true: Not read.

        Returns:
            "ap", "ap50", "ap75", "ar", of which "_small", "_medium" and "_large", and "known".
        """
        scored = [row for row in rows if "failure" not in row]
        failed = len(rows) - len(scored)
        values = {}
        means, drawn = self._figures(scored)
        scenes = len({row["scene"] for row in scored})
        for name in FIGURES:
            low, high = interval(drawn[name])
            count = 0 if math.isnan(means[name]) else scenes
            values[name] = Value(mean=means[name], low=low, high=high, count=count, failed=failed)
        shares = [[1.0] * len(row["labels"]) + [0.0] * row["unknown"] for row in scored]
        values["known"] = mean_over_scenes(scored, shares, seed=self.seed)
        return values

    def tallies(self, rows: Sequence[Row]) -> dict[str, int]:
        """Boxes that were asked for, and those of them that count.

        Args:
            rows: Rows of this metric.

        Returns:
            "boxes" and "boxes_known".
        """
        known = sum(len(row["labels"]) for row in rows if "failure" not in row)
        return {"boxes": known + sum(row["unknown"] for row in rows if "failure" not in row), "boxes_known": known}

    def _figures(self, rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        evaluator = evaluated(rows)
        if evaluator is None:
            return dict.fromkeys(FIGURES, math.nan), dict.fromkeys(FIGURES, np.zeros(0))
        with contextlib.redirect_stdout(io.StringIO()):  # the evaluator prints what it does
            evaluator.accumulate()
            evaluator.summarize()
        means = {
            name: float(evaluator.stats[place]) if evaluator.stats[place] >= 0 else math.nan  # it says -1 for nothing
            for name, place in zip(FIGURES, _STATS, strict=True)
        }
        # Pictures of one scene, of several seeds, are drawn together.
        scenes = scene_places(rows)
        times = np.concatenate(list(draws(scenes.max() + 1, resamples=self.resamples, seed=self.seed)))
        return means, figures_of(evaluator, times[:, scenes])


def evaluated(rows: Sequence[Row]) -> COCOeval | None:
    """COCO's evaluator with every picture matched, before anything is accumulated; None where nothing is asked for.

    Args:
        rows: Rows of `Detection`.

    Returns:
        The evaluator; its pictures are the places of the rows.
    """
    numbers = {label: number for number, label in enumerate(sorted({label for row in rows for label in row["labels"]}))}
    if not numbers:
        return None
    asked, found = [], []
    for image, row in enumerate(rows):
        for box, label, crowd in zip(row["boxes"], row["labels"], row["crowd"], strict=True):
            asked.append(_annotation(image, numbers[label], box) | {"iscrowd": int(crowd)})
        for box, score, label in zip(row["found"], row["scores"], row["found_labels"], strict=True):
            if label in numbers:  # a label that no scene asks for has no precision
                found.append(_annotation(image, numbers[label], box) | {"score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(_dataset(asked, numbers, len(rows)), _dataset(found, numbers, len(rows)), "bbox")
        evaluator.evaluate()
    return evaluator


def _annotation(image: int, category: int, box: np.ndarray) -> dict[str, Any]:
    left, top, right, bottom = (float(edge) for edge in box)
    width, height = right - left, bottom - top
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": 0,
    }


def _dataset(annotations: list[dict[str, Any]], numbers: dict[str, int], images: int) -> COCO:
    data: Any = COCO()  # its types ask for fields that the evaluator does not read
    data.dataset = {
        "images": [{"id": image} for image in range(images)],
        "categories": [{"id": number, "name": label} for label, number in numbers.items()],
        # The evaluator takes id 0 for "matched with nothing".
        "annotations": [one | {"id": number} for number, one in enumerate(annotations, 1)],
    }
    data.createIndex()
    return data


@dataclass(frozen=True, kw_only=True)
class _Matches:
    """A label's detections of all scenes, the most certain first, as the evaluator matched them for one range of areas.

    Attributes:
        image: (D,) int: the picture of each detection.
        right: (T, D) bool: it matches an asked box.
        wrong: (T, D) bool: it matches none, and counts.
        asked: (I,) float64: asked boxes that count, by picture.
    """

    image: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    asked: np.ndarray


def _matches(evaluator: COCOeval, area: int) -> Iterator[_Matches]:
    """What was matched, label by label."""
    settings = evaluator.params
    images, areas = len(settings.imgIds), len(settings.areaRng)
    for label in range(len(settings.catIds)):
        begin = (label * areas + area) * images
        seen = [(i, one) for i, one in enumerate(evaluator.evalImgs[begin : begin + images]) if one is not None]
        asked = np.zeros(images)
        for image, one in seen:
            asked[image] = np.count_nonzero(np.asarray(one["gtIgnore"]) == 0)
        scores = np.concatenate([np.asarray(one["dtScores"], np.float64) for _, one in seen])
        order = np.argsort(-scores, kind="mergesort")
        places = np.repeat([image for image, _ in seen], [len(one["dtScores"]) for _, one in seen])
        matched = np.concatenate([one["dtMatches"] for _, one in seen], axis=1)[:, order] != 0
        counts = ~np.concatenate([one["dtIgnore"] for _, one in seen], axis=1)[:, order].astype(bool)
        yield _Matches(image=places[order].astype(int), right=matched & counts, wrong=~matched & counts, asked=asked)


def curves(matches: _Matches, times: np.ndarray, recalls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of a label in sets where pictures stand several times or not at all.

    A set with a picture twice has the same curve as one where each of its detections counts twice, so nothing is matched or
    sorted again.

    Args:
        matches: The label's detections.
        times: (R, I): how often each picture stands in each of R sets.
        recalls: (P,): where precision is read.

    Returns:
        Precision averaged over recalls (R, T) and recall (R, T); NaN in a set that asks for none of the label.
    """
    asked = times @ matches.asked
    size = max(1, matches.right.size)
    parts = [
        _curves(matches, times[begin : begin + max(1, _BLOCK // size)], recalls)
        for begin in range(0, len(times), max(1, _BLOCK // size))
    ]
    precision, hits = (np.concatenate(part) for part in zip(*parts, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        recall = hits / asked[:, None]
    precision[asked == 0], recall[asked == 0] = math.nan, math.nan
    return precision, recall


def _curves(matches: _Matches, times: np.ndarray, recalls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision (R, T) and number of matched boxes (R, T)."""
    thresholds, detections = matches.right.shape
    precision = np.zeros((len(times), thresholds))
    if not detections:
        return precision, precision.copy()
    weights = times[:, None, matches.image]
    right, wrong = np.cumsum(weights * matches.right, axis=-1), np.cumsum(weights * matches.wrong, axis=-1)
    height = right / (right + wrong + np.spacing(1))
    height = np.maximum.accumulate(height[..., ::-1], axis=-1)[..., ::-1]
    # How many boxes must be matched for each recall, in whole numbers, so that all curves are searched at once.
    asked = np.maximum(times @ matches.asked, 1)[:, None]
    needed = np.ceil(recalls * asked)
    needed -= (needed - 1) / asked >= recalls
    needed += needed / asked < recalls
    needed = np.broadcast_to(needed[:, None], (*precision.shape, len(recalls)))
    apart = (right.max() + 2) * np.arange(precision.size, dtype=np.float64).reshape(*precision.shape, 1)
    reached = needed <= right[..., -1:]
    at = np.searchsorted((right + apart).ravel(), (needed + apart)[reached])
    read = np.zeros(needed.shape)
    read[reached] = height.ravel()[at]
    return read.mean(axis=-1), right[..., -1]


def figures_of(evaluator: COCOeval, times: np.ndarray) -> dict[str, np.ndarray]:
    """The evaluator's figures on sets where the pictures stand several times or not at all.

    Args:
        evaluator: Pictures matched, as `evaluated` gives it.
        times: (R, I): how often each picture stands in each of R sets.

    Returns:
        By the name of `FIGURES`, (R,): NaN where a set asks for nothing of the kind.
    """
    levels = evaluator.params.iouThrs
    figures: dict[str, np.ndarray] = {}
    for area, suffix in enumerate(AREAS):
        both = [curves(one, times, evaluator.params.recThrs) for one in _matches(evaluator, area)]
        precision, recall = (np.stack(part, axis=-1) for part in zip(*both, strict=True))  # (R, T, K)
        figures[f"ap{suffix}"], figures[f"ar{suffix}"] = _mean(precision), _mean(recall)
        if not suffix:
            figures["ap50"] = _mean(precision[:, np.isclose(levels, 0.5)])
            figures["ap75"] = _mean(precision[:, np.isclose(levels, 0.75)])
    return figures


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean (R,) of what is not NaN in (R, T, K); NaN where all is."""
    count = np.count_nonzero(~np.isnan(values), axis=(1, 2))
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=(1, 2)) / np.where(count, count, math.nan)
