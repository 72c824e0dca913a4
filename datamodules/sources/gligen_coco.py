"""GLIGEN-COCO: detections with phrases on COCO's pictures, as one pickled list (`coco_train2017.pth` of Hzzone).

Its phrase embeddings are not read: a backbone makes its own. COCO's own annotations are in ``coco.py``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.safe_pickle import load_pth
from datamodules.sources.base import Content
from datamodules.sources.files import FileSource, Picture, as_boxes, existing, value_of
from scenes import Frame, Scene, boxes


class GligenCoco(FileSource):
    """Pictures with all their captions, and boxes with the captions of their crops as phrases.

    As in `coco.Coco`, the first caption is the scene's and all are kept in its provenance.

    Args:
        root: Folder with the list, or the list itself.
        images: Folder that the list's paths are relative to; `root/train2017` if not given.
        file: Name of the list in `root`.
        min_area: As in `FileSource`.
        tolerance: As in `FileSource`.
        short_side: As in `FileSource`.

    Raises:
        ValueError: A file is not there, is no list, or asks for what its format does not need.
    """

    provides = frozenset({"image", "caption", "boxes", "phrases"})
    name = "gligen_coco"

    def __init__(
        self,
        *,
        root: str,
        images: str | None = None,
        file: str = "coco_train2017.pth",
        min_area: float = 0.0,
        tolerance: float = 0.05,
        short_side: int | None = None,
    ) -> None:
        super().__init__(min_area=min_area, tolerance=tolerance, short_side=short_side)
        self.root, self.images, self.file = root, images, file
        path = existing(Path(root), "source.root")
        if path.is_dir():
            path = existing(path / file, "source.root")
        self._folder = existing(Path(images) if images else path.parent / "train2017", "source.images")
        self._list = load_pth(path)
        if not isinstance(self._list, list):
            raise ValueError(f"source.root: {path} holds a {type(self._list).__name__}, not a list; fetch it again")

    def __len__(self) -> int:
        """Entries of the list."""
        return len(self._list)

    def entries(self) -> Iterator[tuple[int, Any]]:
        """Yields the entries with their places."""
        yield from enumerate(self._list)

    def read(self, entry: Any) -> tuple[Scene, Content] | str:
        """The sample of an entry.

        Args:
            entry: Its place, and what the list has there.

        Returns:
            The scene with its picture.
        """
        place, item = entry
        file = value_of(item, "file_path", str, f"entry {place}")
        where = Path(file).stem
        annotations = value_of(item, "annos", list, where)
        captions = value_of({"captions": [], **item}, "captions", list, where)  # its publisher's README lacks them
        self.count("captions missing", not captions)
        phrases = [value_of(one, "caption", str, where) for one in annotations]
        corners = as_boxes([value_of(one, "bbox", list | tuple, where) for one in annotations], where)
        picture = Picture.open(self._folder / file, where)
        scene = Scene(
            id=where,
            caption=captions[0] if captions else "",
            objects=self.objects(where, phrases, boxes.normalise(corners, picture.size)),
            frame=Frame(original=picture.size),
            source=self.name,
            provenance={"captions": captions} if captions else {},
        )
        return self.stored(scene, picture)
