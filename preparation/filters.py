"""The stage `filter`: objects and scenes that are not wanted go, each counted under the name of its filter.

The filters that published systems apply while they read their own files are in the sources (`source.filter=lama`); here are
those that any shards can pass through, in the same words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from datamodules.sources.base import LeftOut
from preparation.stage import Sample, Stage
from scenes.scene import Scene, SceneObject

_Wanted = Callable[[Any], bool]


class Filter(Stage):
    """Objects are looked at first, then scenes with the objects that are left; None turns a filter off.

    Args:
        min_area: Least share of the picture that a box covers.
        max_area: Largest share of the picture that a box covers.
        min_score: Least confidence; objects without a score stay.
        labels: Labels that stay; an object without a label goes by its phrase.
        without_labels: Labels that go.
        crowds: Whether boxes around crowds stay.
        min_objects: Fewest objects of a scene.
        max_objects: Most objects of a scene.
        most_of_label: Most objects of a label, by label.
        min_relations: Fewest relations of a scene.
        min_caption_words: Fewest words of a caption.
        max_caption_words: Most words of a caption.
        min_side: Least short side of the picture, px; scenes without a frame stay.

    Raises:
        ValueError: No filter is on, or a number is out of its range.
    """

    name: ClassVar[str] = "filter"

    def __init__(
        self,
        *,
        min_area: float | None = None,
        max_area: float | None = None,
        min_score: float | None = None,
        labels: Sequence[str] | None = None,
        without_labels: Sequence[str] | None = None,
        crowds: bool = True,
        min_objects: int | None = None,
        max_objects: int | None = None,
        most_of_label: Mapping[str, int] | None = None,
        min_relations: int | None = None,
        min_caption_words: int | None = None,
        max_caption_words: int | None = None,
        min_side: int | None = None,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        for name in ("min_area", "max_area"):
            if given[name] is not None and not 0 <= given[name] <= 1:
                raise ValueError(f"stage.{name}={given[name]}: give a share of the picture, from 0 to 1, or null")
        for name, value in given.items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 0:
                raise ValueError(f"stage.{name}={value}: give 0 or more, or null")
        for kind in ("area", "objects", "caption_words"):
            low, high = given[f"min_{kind}"], given[f"max_{kind}"]
            if low is not None and high is not None and low > high:
                raise ValueError(f"stage.min_{kind}={low}: is over stage.max_{kind}={high}, so that nothing stays")
        self._settings = {
            name: sorted(value) if name.endswith("labels") else dict(value) if isinstance(value, Mapping) else value
            for name, value in given.items()
            if value is not None and (name != "crowds" or not value)
        }
        if not self._settings:
            raise ValueError("stage: no filter is on; set one, such as stage.min_objects=1")
        needed = {"min_area": "boxes", "max_area": "boxes", "min_score": "scores", "min_relations": "relations"}
        needed |= {"min_caption_words": "caption", "max_caption_words": "caption"}
        self.requires = frozenset(needed[name] for name in self._settings if name in needed)
        self._of_objects, self._of_scenes = _object_filters(self._settings), _scene_filters(self._settings)

    def settings(self) -> dict[str, Any]:
        """The filters that are on."""
        return self._settings

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples that are wanted, with the objects that are.

        Args:
            samples: The samples of a shard.

        Yields:
            Those that are left.
        """
        self.left_out = LeftOut()
        for sample in samples:
            scene, gone = self._objects(sample.scene)
            unwanted = next((name for name, wanted in self._of_scenes.items() if not wanted(scene)), None)
            if unwanted is not None:
                self.left_out.counts[unwanted] += 1
                continue
            self.left_out.counts.update(gone)  # of a scene that goes its objects count for nothing
            yield sample if scene is sample.scene else sample.with_scene(scene)

    def _objects(self, scene: Scene) -> tuple[Scene, Counter[str]]:
        """The scene with the objects that are wanted, and how many went by which filter: the first that an object fails."""
        gone: Counter[str] = Counter()
        kept = []
        for place, item in enumerate(scene.objects):
            unwanted = next((name for name, wanted in self._of_objects.items() if not wanted(item)), None)
            if unwanted is None:
                kept.append(place)
            else:
                gone[unwanted] += 1
        return (scene.only(kept) if gone else scene), gone


def label_of(item: SceneObject) -> str:
    """The noun of an object, its phrase where it has none."""
    return item.label or item.phrase


def area_of(item: SceneObject) -> float | None:
    """Share of the picture that an object's box covers; None where it has none."""
    return None if item.box is None else (item.box[2] - item.box[0]) * (item.box[3] - item.box[1])


def _object_filters(on: Mapping[str, Any]) -> dict[str, _Wanted]:
    """Filters of objects by the name that they are counted under."""

    def covers(item: SceneObject) -> bool:
        return item.box is None or area_of(item) >= on["min_area"]

    def is_small(item: SceneObject) -> bool:
        return item.box is None or area_of(item) <= on["max_area"]

    every: dict[str, tuple[str, _Wanted]] = {
        "crowds": ("boxes of crowds", lambda item: not item.is_crowd),
        "min_score": ("boxes under min_score", lambda item: item.score is None or item.score >= on["min_score"]),
        "labels": ("boxes of other labels", lambda item: label_of(item) in on["labels"]),
        "without_labels": ("boxes of without_labels", lambda item: label_of(item) not in on["without_labels"]),
        "min_area": ("boxes under min_area", covers),
        "max_area": ("boxes over max_area", is_small),
    }
    return dict(filter_ for name, filter_ in every.items() if name in on)


def _scene_filters(on: Mapping[str, Any]) -> dict[str, _Wanted]:
    """Filters of scenes by the name that they are counted under."""

    def few_of_each(scene: Scene) -> bool:
        found = Counter(map(label_of, scene.objects))
        return all(found[label] <= most for label, most in on["most_of_label"].items())

    every: dict[str, tuple[str, _Wanted]] = {
        "min_objects": ("scenes under min_objects", lambda scene: len(scene.objects) >= on["min_objects"]),
        "max_objects": ("scenes over max_objects", lambda scene: len(scene.objects) <= on["max_objects"]),
        "most_of_label": ("scenes over most_of_label", few_of_each),
        "min_relations": ("scenes under min_relations", lambda scene: len(scene.relations) >= on["min_relations"]),
        "min_caption_words": (
            "scenes under min_caption_words",
            lambda scene: len(scene.caption.split()) >= on["min_caption_words"],
        ),
        "max_caption_words": (
            "scenes over max_caption_words",
            lambda scene: len(scene.caption.split()) <= on["max_caption_words"],
        ),
        "min_side": (
            "scenes under min_side",
            lambda scene: scene.frame is None or min(scene.frame.target) >= on["min_side"],
        ),
    }
    return dict(filter_ for name, filter_ in every.items() if name in on)
