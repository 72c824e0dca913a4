"""The stage `label`: a tagger names, a detector finds, a segmenter outlines and a describer describes what pictures show.

Here is the chain and how it becomes scenes; the parts are in `labelling/`. Every scene keeps what it was made with. Labels as
published files are in ``export_labels.py``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from datamodules.shard_index import ShardError
from datamodules.sources.files import centre_window
from labelling.opening import batches, versions
from labelling.parts import Describer, Detections, Detector, Part, Segmenter, Tagger
from preparation.stage import PICTURES, Sample, Stage
from preparation.work import project_version
from scenes import Frame, Scene, SceneObject
from scenes import masks as mask_math
from scenes.checks import TOLERANCE

MEMORY = ("one", "all")
PHRASES = ("tag", "description")
WITHOUT_BOXES = "pictures without boxes"
WITHOUT_TAGS = "pictures without tags"
SMALL_CROPS = "crops under min_crop, which keep their tag"
REPLACED = "objects replaced"
_FORMATS: dict[str, dict[str, Any]] = {"jpg": {"format": "JPEG", "quality": 95}, "png": {"format": "PNG"}}


@dataclass(kw_only=True)
class _Work:
    """A sample on its way through the chain.

    Attributes:
        sample: With the picture that its boxes will be in.
        size: (height, width) px of that picture.
        square: Px to which the square is brought for tagger and detector; None for the picture as it is.
        keeps: Whether the picture is kept decoded until the chain ends.
        tags: What the tagger named.
        found: What the detector found.
        masks: N run lengths.
        descriptions: N sentences.
    """

    sample: Sample
    size: tuple[int, int]
    square: int | None
    keeps: bool
    tags: list[str] = field(default_factory=list)
    found: Detections | None = None
    masks: list[dict[str, Any] | None] = field(default_factory=list)
    descriptions: list[str] = field(default_factory=list)
    kept: np.ndarray | None = None

    def picture(self) -> np.ndarray:
        """The picture (H, W, 3) uint8."""
        picture = self.kept if self.kept is not None else np.asarray(self.sample.picture())
        self.kept = picture if self.keeps else None
        return picture

    def seen(self) -> np.ndarray:
        """The picture as tagger and detector see it."""
        picture = self.picture()
        if self.square is None or picture.shape[0] == self.square:
            return picture
        size = (self.square, self.square)
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))


class Label(Stage):
    """Scenes with the objects that a chain of models finds, in place of those they had.

    Args:
        detector: Finds what is in a picture.
        tagger: Names what is to be found; null for a detector with a list of its own.
        segmenter: Outlines it; null for no masks.
        describer: Describes each box's part of the picture; null for no descriptions.
        memory: "one": each part in turn works on the whole shard, alone on the device; "all": all parts are on the device at
            once, and a few pictures go through the whole chain.
        batch_size: Pictures that are decoded at once; each part takes as many together as its own setting says.
        square: Px of the square that pictures are labelled at: each is cut to its centre square, as IGLIGEN's were, which
            tagger and detector see at this size; null for whole pictures at their own size.
        phrase: What becomes an object's phrase: its "tag", or its "description".
        min_crop: A box of less than this times this px keeps its tag for a description.
        short_side: Px to which the short side of a box's part of the picture is brought for the describer; null for as it is.
        keep_empty: Whether pictures in which nothing was found are passed on, without objects.

    Raises:
        ValueError: There is no detector, or a setting is out of its range or contradicts another.
    """

    name: ClassVar[str] = "label"
    requires: ClassVar[frozenset[str]] = frozenset({"image"})

    def __init__(
        self,
        *,
        detector: Detector | None,
        tagger: Tagger | None = None,
        segmenter: Segmenter | None = None,
        describer: Describer | None = None,
        memory: str = "one",
        batch_size: int = 16,
        square: int | None = None,
        phrase: str = "tag",
        min_crop: int = 32,
        short_side: int | None = 512,
        keep_empty: bool = False,
    ) -> None:
        super().__init__()
        if detector is None:
            raise ValueError("detector: none is chosen; name one, such as detector=grounding_dino")
        for setting, value, known in (("memory", memory, MEMORY), ("phrase", phrase, PHRASES)):
            if value not in known:
                raise ValueError(f"stage.{setting}={value}: must be one of {', '.join(known)}")
        for setting, value in {"batch_size": batch_size, "square": square, "short_side": short_side}.items():
            if value is not None and value < 1:
                raise ValueError(f"stage.{setting}={value}: must be at least 1")
        if min_crop < 0:
            raise ValueError(f"stage.min_crop={min_crop}: give pixels, 0 or more")
        if phrase == "description" and describer is None:
            raise ValueError("stage.phrase=description: nothing describes; name one, such as describer=blip2")
        self.tagger, self.detector, self.segmenter, self.describer = tagger, detector, segmenter, describer
        self.memory, self.batch_size, self.square, self.phrase = memory, batch_size, square, phrase
        self.min_crop, self.short_side, self.keep_empty = min_crop, short_side, keep_empty
        self._device: Any = "cpu"

    @property
    def parts(self) -> dict[str, Part]:
        """The chain's parts by their kind, in their order."""
        each = {
            "tagger": self.tagger,
            "detector": self.detector,
            "segmenter": self.segmenter,
            "describer": self.describer,
        }
        return {kind: part for kind, part in each.items() if part is not None}

    def settings(self) -> dict[str, Any]:
        """Every part's settings, and how they are put together."""
        return {
            **{kind: part.settings() for kind, part in self.parts.items()},
            "square": self.square,
            "phrase": self.phrase,
            "min_crop": self.min_crop,
            "short_side": self.short_side,
            "keep_empty": self.keep_empty,
        }

    def provides(self, provided: frozenset[str]) -> frozenset[str]:
        """Boxes with phrases and scores, and masks and descriptions by the parts; what objects had before is gone."""
        of_picture = provided & {"image", "latents", "caption"}
        more = {"segmenter": "masks", "describer": "descriptions"}
        return of_picture | {"boxes", "phrases", "scores"} | {more[kind] for kind in self.parts if kind in more}

    def to(self, device: Any) -> Self:
        """The stage working on a device; with `memory=all` its parts go there now, else each at its turn."""
        self._device = device
        if self.memory == "all":
            for part in self.parts.values():
                part.to(device)
        return self

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """As in `Stage`."""
        if self.memory == "all":
            for few in batches(samples, self.batch_size):
                yield from self._chain(few)
        else:
            yield from self._chain(samples)

    def _chain(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Samples through all parts."""
        works = [work for sample in samples if (work := self._begun(sample)) is not None]
        if self.tagger is not None:
            self._each(self.tagger, works, self._tag)
        asked = [work for work in works if self.tagger is None or work.tags]
        self._each(self.detector, asked, self._detect)
        found = [work for work in works if work.found is not None and len(work.found.boxes)]
        if self.segmenter is not None:
            self._each(self.segmenter, found, self._outline)
        if self.describer is not None:
            self._each(self.describer, found, self._describe)
        made_with = self._provenance()
        for work in works:
            if not self.keep_empty and (work.found is None or not len(work.found.boxes)):
                no_tags = self.tagger is not None and not work.tags
                self._count(WITHOUT_TAGS if no_tags else WITHOUT_BOXES, 1)
                continue
            yield work.sample.with_scene(self._scene(work, made_with))
            work.kept = None

    def _each(self, part: Part, works: Sequence[_Work], step: Callable[[list[_Work]], None]) -> None:
        """A part's step over few pictures at a time, with the part on the device."""
        with self._on_device(part):
            for few in batches(works, self.batch_size):
                step(few)
        counts = getattr(part, "counts", {})
        for reason, number in counts.items():
            self._count(reason, number)
        counts.clear()

    @contextmanager
    def _on_device(self, part: Part) -> Iterator[None]:
        part.to(self._device)
        yield
        if self.memory == "one":
            part.to("cpu")

    def _begun(self, sample: Sample) -> _Work | None:
        """A sample with its picture as it is to be labelled; None for one that has no readable one."""
        try:
            picture = sample.picture()
        except ShardError as error:
            self.left_out.skip(error)
            return None
        self._count(REPLACED, len(sample.scene.objects))
        frame = sample.scene.frame or Frame(original=(picture.height, picture.width))
        sample = sample.with_scene(replace(sample.scene.without_layout(), frame=frame))
        if self.square is not None and picture.height != picture.width:
            sample, picture = _cut_to_square(sample, picture)
        keeps = self.memory == "all"
        return _Work(
            sample=sample,
            size=(picture.height, picture.width),
            square=self.square,
            keeps=keeps,
            kept=np.asarray(picture) if keeps else None,
        )

    def _count(self, reason: str, number: int) -> None:
        if number:
            self.left_out.counts[reason] += number

    def _tag(self, works: list[_Work]) -> None:
        assert self.tagger is not None
        tags = self.tagger([work.seen() for work in works], [work.sample.scene.caption for work in works])
        for work, each in zip(works, tags, strict=True):
            work.tags = list(each)

    def _detect(self, works: list[_Work]) -> None:
        asked = None if self.tagger is None else [work.tags for work in works]
        for work, found in zip(works, self.detector([work.seen() for work in works], asked), strict=True):
            boxes = np.asarray(found.boxes, np.float64).reshape(-1, 4).clip(0, 1)
            solid = ((boxes[:, 2:] - boxes[:, :2]) > TOLERANCE).all(-1)
            named = np.array([bool(label.strip()) for label in found.labels], bool)
            self._count("boxes without an area", int((~solid).sum()))
            self._count("boxes without a text", int((solid & ~named).sum()))
            kept = np.flatnonzero(solid & named)
            labels = tuple(found.labels[place] for place in kept)
            work.found = Detections(boxes=boxes[kept], scores=np.asarray(found.scores)[kept], labels=labels)

    def _outline(self, works: list[_Work]) -> None:
        assert self.segmenter is not None
        boxes = [_found(work).boxes for work in works]
        for work, masks in zip(works, self.segmenter([work.picture() for work in works], boxes), strict=True):
            self._count("masks without a pixel", int((~masks.any((1, 2))).sum()))
            work.masks = [mask_math.encode(mask) if mask.any() else None for mask in masks]

    def _describe(self, works: list[_Work]) -> None:
        """Descriptions of all crops of some pictures, in one go."""
        assert self.describer is not None
        crops, tags, places = [], [], []
        for work in works:
            found, picture = _found(work), work.picture()
            work.descriptions = list(found.labels)
            for place, box in enumerate(found.boxes):
                left, top, right, bottom = _pixels(box, work.size)
                if (right - left) * (bottom - top) < self.min_crop**2:
                    self._count(SMALL_CROPS, 1)
                    continue
                crops.append(self._crop(picture[top:bottom, left:right]))
                tags.append(found.labels[place])
                places.append((work, place))
        if crops:
            for (work, place), text in zip(places, self.describer(crops, tags), strict=True):
                work.descriptions[place] = text.strip() or work.descriptions[place]

    def _crop(self, picture: np.ndarray) -> np.ndarray:
        """A box's part of the picture with its short side as it is to be."""
        if self.short_side is None:
            return picture
        factor = self.short_side / min(picture.shape[:2])
        size = [max(self.short_side, round(side * factor)) for side in (picture.shape[1], picture.shape[0])]
        return np.asarray(Image.fromarray(picture).resize((size[0], size[1]), Image.Resampling.BICUBIC))

    def _scene(self, work: _Work, made_with: dict[str, Any]) -> Scene:
        """The scene with what was found in it."""
        found = work.found or Detections(boxes=np.zeros((0, 4)), scores=np.zeros(0), labels=())
        objects = []
        for place, tag in enumerate(found.labels):
            description = work.descriptions[place] if work.descriptions else ""
            objects.append(
                SceneObject(
                    phrase=description if self.phrase == "description" else tag,
                    label=tag,
                    box=tuple(found.boxes[place].tolist()),
                    description=description,
                    score=float(found.scores[place]),
                    mask=work.masks[place] if work.masks else None,
                )
            )
        scene = work.sample.scene
        provenance = {**scene.provenance, "labelling": made_with}
        return replace(scene, objects=tuple(objects), relations=(), provenance=provenance)

    def _provenance(self) -> dict[str, Any]:
        """The stage's settings, the commits that were opened and the versions that ran them."""
        made_with = self.settings()
        for kind, part in self.parts.items():
            if commit := getattr(part, "commit", None):
                made_with[kind] = {**made_with[kind], "commit": commit}
        packages = sorted({name for part in self.parts.values() if (name := getattr(part, "package", None))})
        return {**made_with, "versions": {"scenograph": project_version(), **versions(*packages)}}


def _found(work: _Work) -> Detections:
    assert work.found is not None
    return work.found


def _cut_to_square(sample: Sample, picture: Image.Image) -> tuple[Sample, Image.Image]:
    """The sample with the centre square of its picture, at the picture's own resolution."""
    top, left, height, width = centre_window((picture.height, picture.width))
    cut = picture.crop((left, top, left + width, top + height))
    name = next(name for name in PICTURES if name in sample.members)
    encoded = io.BytesIO()
    cut.save(encoded, **_FORMATS[name])
    scene, _ = sample.scene.crop(top, left, height, width)
    return replace(sample, scene=scene, members={**sample.members, name: encoded.getvalue()}), cut


def _pixels(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) px of the pixels that a box touches, at least one each way."""
    height, width = size
    left, top = min(int(box[0] * width), width - 1), min(int(box[1] * height), height - 1)
    right, bottom = round(float(box[2] * width)), round(float(box[3] * height))
    return left, top, max(left + 1, right), max(top + 1, bottom)
