"""Rich labels: `label_KEY.json` files in which each box has a tag and a sentence, as the rich-context labelling writes them.

Here is one file of labels, from its bytes to objects, and where such files and their pictures are found. Which pictures
they belong to is in ``rich_context.py`` (img2dataset's, with a border) and ``rc_coco.py`` (COCO's).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.sources.files import FileSource, SampleError, as_boxes, json_of, value_of
from scenes import SceneObject, boxes
from scenes import masks as mask_math

PREFIX = "label_"
WITHOUT_PICTURE = "labels without a picture"
BEYOND = "boxes beyond max_objects"


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a file of labels says of its picture.

    Attributes:
        caption: Of the whole picture; may be empty.
        file_name: The picture, as whoever labelled it called it; may be empty.
        dataset: Name of the data set; may be empty.
        annotations: The boxes as they are written there.
    """

    caption: str
    file_name: str
    dataset: str
    annotations: list[Any]


class RichLabels(FileSource):
    """What readers of rich labels share: the objects of a file of labels.

    The tag becomes phrase and label, the sentence the description.

    Args:
        labelled_at: Long side of the pictures as they were labelled, px; null where that is their own.
        max_objects: Most objects of a scene: the most confident stay, or the first where they have no scores. Null for
            any number.
        masks: Whether the masks are kept.
        min_area: As in `FileSource`.
        tolerance: As in `FileSource`.
        short_side: As in `FileSource`.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        *,
        labelled_at: int | None,
        max_objects: int | None,
        masks: bool,
        min_area: float,
        tolerance: float,
        short_side: int | None,
    ) -> None:
        super().__init__(min_area=min_area, tolerance=tolerance, short_side=short_side)
        if labelled_at is not None and labelled_at < 1:
            raise ValueError(f"source.labelled_at={labelled_at}: give pixels, or null for the pictures' own size")
        if max_objects is not None and max_objects < 1:
            raise ValueError(f"source.max_objects={max_objects}: give 1 or more, or null for any number")
        self.labelled_at, self.max_objects, self.masks = labelled_at, max_objects, masks

    def labelled(
        self, where: str, label: Label, size: tuple[int, int], *, window: Sequence[float] | None = None
    ) -> tuple[SceneObject, ...]:
        """The objects of a file of labels.

        Args:
            where: The sample, for messages.
            label: What the file says.
            size: (height, width) px of the picture that was labelled, at whatever size.
            window: xyxy of the part of that picture that is taken; null for all of it.

        Returns:
            The objects in the order of the file.

        Raises:
            SampleError: A box, a text, a score or a mask is not what the form has.
        """
        scale = 1.0 if self.labelled_at is None else self.labelled_at / max(size)
        frame = size[0] * scale, size[1] * scale
        phrases, rows, details = [], [], []
        for item in label.annotations:
            tag, sentence = (_text(item, key, where) for key in ("category_name", "caption"))
            if not (tag or sentence):
                self.count("boxes without a text")
                continue
            phrases.append(tag or sentence)
            rows.append(value_of(item, "bbox", list, where))
            more = {"label": tag, "description": sentence or tag, "score": _score(item, where)}
            details.append({**more, "mask": self._mask(item, frame, window, where)} if self.masks else more)
        corners = boxes.to_xyxy(as_boxes(rows, where), "xywh") / [frame[1], frame[0], frame[1], frame[0]]
        objects = self.objects(where, phrases, corners, details=details, window=window)
        if self.max_objects is not None and len(objects) > self.max_objects:
            self.count(BEYOND, len(objects) - self.max_objects)
            first = sorted(range(len(objects)), key=lambda place: -(objects[place].score or 0.0))[: self.max_objects]
            objects = tuple(objects[place] for place in sorted(first))
        return objects

    def _mask(
        self, item: Any, frame: tuple[float, float], window: Sequence[float] | None, where: str
    ) -> dict[str, Any] | None:
        """The mask of an annotation in the part of the picture that is taken; None where there is no right one."""
        mask = item.get("mask")
        if not mask:
            self.count("masks missing")
            return None
        try:
            height, width = mask["size"]
            if max(abs(height - frame[0]), abs(width - frame[1])) > 1:
                self.count("masks of another size than the picture")
                return None
            mask = {"size": [height, width], "counts": mask["counts"]}
            return mask if window is None else mask_math.crop(mask, window)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SampleError(f"{where}: mask: not run lengths ({error}); set source.masks=false") from error


def read_label(data: bytes, where: str) -> Label:
    """What a file of labels says.

    Args:
        data: The file.
        where: The sample, for messages.

    Returns:
        The same, with empty texts for what it lacks.

    Raises:
        SampleError: It is not JSON, or not of this form.
    """
    content = json_of(data, where, "label")
    return Label(
        caption=_text(content, "caption", where),
        file_name=_text(content, "file_name", where),
        dataset=_text(content, "dataset_name", where),
        annotations=value_of(content, "annos", list, where),
    )


def key_of(name: str) -> str | None:
    """The picture's key in the name of a file of labels; None for the name of another file."""
    path = PurePosixPath(name)
    is_label = path.name.startswith(PREFIX) and path.suffix == ".json"
    return path.stem.removeprefix(PREFIX) if is_label else None


def label_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields key and path of every file of labels in a tree, by the names of folders and then of files."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if (key := key_of(name)) is not None:
                yield key, Path(place) / name


def found(folder: Path, names: Sequence[str]) -> Path | None:
    """The first file that one of some published names means here.

    Args:
        folder: Where the files lie now.
        names: Paths on the machine of whoever wrote them; empty ones mean nothing.

    Returns:
        The file itself if it is there, else the one that the last three, two or one parts of a name lead to.
    """
    for name in filter(None, names):
        parts = PurePosixPath(name).parts
        for path in (Path(name), *(folder.joinpath(*parts[-most:]) for most in (3, 2, 1))):
            if path.is_file():
                return path
    return None


def _text(content: Any, key: str, where: str) -> str:
    """A text of a mapping, without the space around it; empty where it is missing or null."""
    if isinstance(content, dict) and content.get(key) is None:
        return ""
    return value_of(content, key, str, where).strip()


def _score(item: Any, where: str) -> float | None:
    score = item.get("pred_score")
    return None if score is None else float(value_of(item, "pred_score", int | float, where))
