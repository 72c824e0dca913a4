"""The stage `filter`: objects and scenes that are not wanted go, each counted under the name of its filter.

The filters that published systems apply while they read their own files are in the sources (`source.filter=lama`); here are
those that any shards can pass through, in the same words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datamodules.sources.base import LeftOut
from preparation.stage import Sample, Stage
from scenes.scene import Scene, SceneObject


@dataclass(frozen=True, kw_only=True)
class ObjectLimits:
    """Limits of single objects; None turns one off.

    Attributes:
        min_area: Least share of the image that a box covers.
        max_area: Largest share of the image that a box covers.
        min_score: Least confidence; objects without a score stay.
        labels: Labels that stay; an object without a label goes by its phrase.
        without_labels: Labels that go.
        crowds: Whether boxes around crowds stay.
    """

    min_area: float | None = None
    max_area: float | None = None
    min_score: float | None = None
    labels: Sequence[str] | None = None
    without_labels: Sequence[str] | None = None
    crowds: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("min_area", "max_area"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"stage.objects.{name}={value}: must be a share of the image, from 0 to 1, or null")
        _check_order("objects", self, ("area",))

    def fails(self, item: SceneObject) -> str | None:
        """Return the name of the first limit that an object is beyond, as it is counted; None where it stays."""
        area, label, score = area_of(item), label_of(item), item.score
        beyond = {
            "boxes of crowds": not self.crowds and item.is_crowd,
            "boxes under min_score": _is_under(score, self.min_score),
            "boxes of other labels": self.labels is not None and label not in self.labels,
            "boxes of without_labels": self.without_labels is not None and label in self.without_labels,
            "boxes under min_area": _is_under(area, self.min_area),
            "boxes over max_area": _is_under(self.max_area, area),
        }
        return next((name for name, is_beyond in beyond.items() if is_beyond), None)


@dataclass(frozen=True, kw_only=True)
class SceneLimits:
    """Limits of whole scenes; None turns one off.

    Attributes:
        min_objects: Fewest objects of a scene.
        max_objects: Most objects of a scene.
        most_of_label: Most objects of a label, by label.
        min_relations: Fewest relations of a scene.
        min_caption_words: Fewest words of a caption.
        max_caption_words: Most words of a caption.
        min_side: Least short side of the image, px; scenes without a frame stay.
    """

    min_objects: int | None = None
    max_objects: int | None = None
    most_of_label: Mapping[str, int] | None = None
    min_relations: int | None = None
    min_caption_words: int | None = None
    max_caption_words: int | None = None
    min_side: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 0:
                raise ValueError(f"stage.scenes.{name}={value}: must be at least 0, or null")
        _check_order("scenes", self, ("objects", "caption_words"))

    def fails(self, scene: Scene) -> str | None:
        """Return the name of the first limit that a scene is beyond, as it is counted; None where it stays."""
        objects, words = len(scene.objects), len(scene.caption.split())
        labels = Counter(map(label_of, scene.objects))
        side = None if scene.frame is None else min(scene.frame.target)
        beyond = {
            "scenes under min_objects": _is_under(objects, self.min_objects),
            "scenes over max_objects": _is_under(self.max_objects, objects),
            "scenes over most_of_label": any(labels[name] > most for name, most in (self.most_of_label or {}).items()),
            "scenes under min_relations": _is_under(len(scene.relations), self.min_relations),
            "scenes under min_caption_words": _is_under(words, self.min_caption_words),
            "scenes over max_caption_words": _is_under(self.max_caption_words, words),
            "scenes under min_side": _is_under(side, self.min_side),
        }
        return next((name for name, is_beyond in beyond.items() if is_beyond), None)


class Filter(Stage):
    """Filter of objects, and then of scenes with the objects that are left.

    Args:
        objects: Which objects stay; all, if not given.
        scenes: Which scenes stay; all, if not given.

    Raises:
        ValueError: No limit is set.
    """

    name: ClassVar[str] = "filter"

    def __init__(self, *, objects: ObjectLimits | None = None, scenes: SceneLimits | None = None) -> None:
        super().__init__()
        self._of_objects, self._of_scenes = objects or ObjectLimits(), scenes or SceneLimits()
        given = {**vars(self._of_objects), **vars(self._of_scenes)}
        self._settings = {
            name: sorted(value) if name.endswith("labels") else dict(value) if isinstance(value, Mapping) else value
            for name, value in given.items()
            if value is not None and (name != "crowds" or not value)
        }
        if not self._settings:
            raise ValueError("stage: no limit is set; set one, such as stage.scenes.min_objects=1")
        needed = {"min_area": "boxes", "max_area": "boxes", "min_score": "scores", "min_relations": "relations"}
        needed |= {"min_caption_words": "caption", "max_caption_words": "caption"}
        self.requires = frozenset(needed[name] for name in self._settings if name in needed)

    def settings(self) -> dict[str, Any]:
        """Return the limits that are set, by their names."""
        return self._settings

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples that stay, with the objects that do.

        Args:
            samples: The samples of a shard.

        Yields:
            Those that are left.
        """
        self.left_out = LeftOut()
        for sample in samples:
            scene, gone = self._objects(sample.scene)
            unwanted = self._of_scenes.fails(scene)
            if unwanted is not None:
                self.left_out.counts[unwanted] += 1
                continue
            self.left_out.counts.update(gone)  # of a scene that goes its objects count for nothing
            yield sample if scene is sample.scene else sample.with_scene(scene)

    def _objects(self, scene: Scene) -> tuple[Scene, Counter[str]]:
        """Return the scene with the objects that stay, and how many went by which limit: the first that an object is beyond."""
        gone: Counter[str] = Counter()
        kept = []
        for place, item in enumerate(scene.objects):
            unwanted = self._of_objects.fails(item)
            if unwanted is None:
                kept.append(place)
            else:
                gone[unwanted] += 1
        return (scene.only(kept) if gone else scene), gone


def label_of(item: SceneObject) -> str:
    """Return the noun of an object, its phrase where it has none."""
    return item.label or item.phrase


def area_of(item: SceneObject) -> float | None:
    """Return the share of the image that an object's box covers; None where it has none."""
    return None if item.box is None else (item.box[2] - item.box[0]) * (item.box[3] - item.box[1])


def _is_under(value: float | None, least: float | None) -> bool:
    """Return whether both are known, and the first is less."""
    return value is not None and least is not None and value < least


def _check_order(group: str, limits: Any, kinds: Sequence[str]) -> None:
    for kind in kinds:
        low, high = getattr(limits, f"min_{kind}"), getattr(limits, f"max_{kind}")
        if low is not None and high is not None and low > high:
            raise ValueError(f"stage.{group}.min_{kind}={low}: must not be over stage.{group}.max_{kind}={high}")
