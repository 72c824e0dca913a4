"""RC-COCO: rich labels of COCO's pictures, one file `label_<picture>.json` for each.

The labels themselves are read in ``rich_labels.py``; COCO's own annotations in ``coco.py``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.sources.base import Content
from datamodules.sources.files import Picture, content_of, existing
from datamodules.sources.rich_labels import (
    PREFIX,
    WITHOUT_PICTURE,
    RichLabels,
    label_files,
    read_label,
)
from scenes import Frame, Scene


class RcCoco(RichLabels):
    """COCO's pictures with the caption of the labels, and objects with tag and sentence.

    Args:
        root: COCO's folder.
        labels: Folder of the files of labels.
        split: Name of the folder of pictures in `root`.
        images: Folder of the pictures, if it is not `root/split`.
        labelled_at: As in `RichLabels`; the published labels were made at 768.
        max_objects: As in `RichLabels`.
        min_area: As in `FileSource`.
        tolerance: As in `FileSource`.
        short_side: As in `FileSource`.

    Raises:
        ValueError: A folder is not there, or holds no labels.
    """

    provides = frozenset({"image", "caption", "boxes", "phrases", "descriptions"})
    name = "rc_coco"

    def __init__(
        self,
        *,
        root: str,
        labels: str,
        split: str = "val2017",
        images: str | None = None,
        labelled_at: int | None = 768,
        max_objects: int | None = None,
        min_area: float = 0.0,
        tolerance: float = 0.01,
        short_side: int | None = None,
    ) -> None:
        super().__init__(
            labelled_at=labelled_at,
            max_objects=max_objects,
            masks=False,
            min_area=min_area,
            tolerance=tolerance,
            short_side=short_side,
        )
        self.root, self.labels, self.split, self.images = root, labels, split, images
        existing(Path(root), "source.root")
        self._folder = existing(Path(images) if images else Path(root) / split, "source.images")
        self._labels = existing(Path(labels), "source.labels")
        self._count = sum(1 for _ in label_files(self._labels))
        if not self._count:
            raise ValueError(f"source.labels={labels}: no {PREFIX}*.json there; name the folder of the labels")

    def __len__(self) -> int:
        """Files of labels."""
        return self._count

    def entries(self) -> Iterator[tuple[str, Path]]:
        """Yields the picture's name and the path of every file of labels."""
        yield from label_files(self._labels)

    def read(self, entry: Any) -> tuple[Scene, Content] | str:
        """The sample of a file of labels.

        Args:
            entry: The picture's name, and the file.

        Returns:
            The scene with its picture, or the reason where there is no picture or no object.
        """
        where, path = entry
        label = read_label(content_of(path, where, "label"), where)
        if not (file := self._folder / f"{where}.jpg").is_file():
            return WITHOUT_PICTURE
        picture = Picture.open(file, where)
        objects = self.labelled(where, label, picture.size)
        if not objects:
            return "pictures without boxes"
        self.count("captions missing", not label.caption)
        scene = Scene(
            id=where,
            caption=label.caption,
            objects=objects,
            frame=Frame(original=picture.size),
            source=self.name,
        )
        return self.stored(scene, picture)
