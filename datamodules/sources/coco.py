"""COCO: instances, captions and, if asked for, stuff, as their JSON files are published.

Boxes are in the frame of the whole picture, and crops are training's. The published choices of pictures are in
``scenes/filters.py``, detections on COCO's pictures in ``gligen_coco.py``.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from datamodules.sources.base import Content, LeftOut
from datamodules.sources.files import FileSource, Picture, SampleError, existing, value_of
from scenes import Frame, Scene, boxes
from scenes.filters import FILTERS
from scenes.json_form import parse_json
from scenes.masks import encode

PERSON = 1  # COCO's category
OUTSIDE = "pictures outside the filter"
OTHER = 183  # "other" of COCO-stuff: whatever is no stuff, which no published system trains on


class Coco(FileSource):
    """COCO's pictures with captions and the boxes of things, phrases being the names of categories.

    The first caption is the scene's; all of them are kept under `captions` in its provenance, so that training may draw
    one (`data.caption=any`), as the published systems do.

    Args:
        root: Folder with `annotations/` and the folders of pictures.
        split: Name of the folder of pictures and end of the names of the annotation files.
        images: Folder of the pictures, if it is not `root/split`.
        filter: "lama", "creatilayout" or "rich_context"; null takes every picture.
        stuff: Whether the boxes of stuff are read too; null as the filter says, and else no.
        crowd: Whether boxes around crowds are kept, marked as such; else they are counted and go.
        masks: Whether the masks are kept.
        min_area: As in `FileSource`; a filter has its own.
        tolerance: As in `FileSource`.
        short_side: As in `FileSource`.

    Raises:
        ValueError: A file is not there or is not COCO's, there is no such filter, or settings contradict it.
    """

    name = "coco"

    def __init__(
        self,
        *,
        root: str,
        split: str = "train2017",
        images: str | None = None,
        filter: str | None = None,
        stuff: bool | None = None,
        crowd: bool = False,
        masks: bool = False,
        min_area: float = 0.0,
        tolerance: float = 0.01,
        short_side: int | None = None,
    ) -> None:
        super().__init__(min_area=min_area, tolerance=tolerance, short_side=short_side)
        if filter is not None and filter not in FILTERS:
            raise ValueError(f"source.filter={filter}: no such filter; choose {', '.join(FILTERS)} or null")
        self._filter = FILTERS[filter] if filter is not None else None
        if self._filter is not None:
            self._refuse_other_rules(filter, stuff=stuff, crowd=crowd)
            self.min_area = self._filter.min_area
            stuff = self._filter.stuff
        self.root, self.split, self.images, self.filter = root, split, images, filter
        self.stuff, self.crowd, self.masks = bool(stuff), crowd, masks
        self.provides = frozenset({"image", "caption", "boxes", "phrases"} | ({"masks"} if masks else set()))
        existing(Path(root), "source.root")
        self._folder = existing(Path(images) if images else Path(root) / split, "source.images")
        self._load()

    def __len__(self) -> int:
        """Pictures that the annotations name."""
        return len(self._pictures)

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yields the annotations' records of pictures, in their order."""
        yield from self._pictures

    def report(self, total: LeftOut) -> list[str]:
        """The pictures that a published filter has left, beside the publishers' number.

        Args:
            total: The account of all pictures.

        Returns:
            A line, where there is a number to compare with.
        """
        published = None if self._filter is None else self._filter.scenes.get(self.split)
        if published is None:
            return []
        kept = len(self._pictures) - total.counts[OUTSIDE] - total.bad
        word = "as published" if kept == published else f"published: {published}, of the whole {self.split}"
        return [f"filter {self.filter}: {kept} pictures ({word})"]

    def read(self, entry: Any) -> tuple[Scene, Content] | str:
        """The sample of a record of a picture.

        Args:
            entry: The record.

        Returns:
            The scene with its picture, or the reason where the filter leaves it out.

        Raises:
            SampleError: The picture or an annotation of it cannot be used.
        """
        file = value_of(entry, "file_name", str, f"picture {entry.get('id')}")
        where = Path(file).stem
        size = value_of(entry, "height", int, where), value_of(entry, "width", int, where)
        items = [self._item(item, where) for item in self._objects.get(entry["id"], ())]
        if not self.crowd:
            self.count("boxes of crowds", sum(item["is_crowd"] for item in items))
            items = [item for item in items if not item["is_crowd"]]
        persons = sum(item["label"] == self._names.get(PERSON) for item in items)
        rows = np.array([item.pop("box") for item in items], np.float64).reshape(-1, 4)
        details = [{"label": item["label"], "is_crowd": item["is_crowd"]} for item in items]
        if self.masks:
            details = [
                {**one, "mask": mask_of(item["segmentation"], size, where)}
                for one, item in zip(details, items, strict=True)
            ]
        placed = boxes.normalise(boxes.to_xyxy(rows, "xywh"), size)
        objects = self.objects(where, [item["label"] for item in items], placed, details=details)
        if self._filter is not None and not self._filter.wants(objects=len(objects), persons=persons):
            return OUTSIDE
        picture = Picture.open(self._folder / file, where)
        if picture.size != size:
            raise SampleError(
                f"{where}: picture: {picture.size} is not the (height, width) {size} of the annotations; fetch it again"
            )
        captions = self._captions.get(entry["id"], [])
        self.count("captions missing", not captions)
        scene = Scene(
            id=where,
            caption=captions[0] if captions else "",
            objects=objects,
            frame=Frame(original=size),
            source=self.name,
            provenance={"captions": captions} if captions else {},
        )
        return self.stored(scene, picture)

    def _item(self, item: dict[str, Any], where: str) -> dict[str, Any]:
        """What is used of an annotation: box xywh px, label, is_crowd, segmentation."""
        category = item.get("category_id")
        if category not in self._names:
            raise SampleError(f"{where}: category_id: {category} is not among the categories; mend the annotations")
        box = value_of(item, "bbox", list, where)
        if len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            raise SampleError(f"{where}: bbox: {box} is not [x, y, width, height]; mend the annotations")
        return {
            "box": box,
            "label": self._names[category],
            "is_crowd": bool(item.get("iscrowd", 0)),
            "segmentation": item.get("segmentation"),
        }

    def _refuse_other_rules(self, name: str, *, stuff: bool | None, crowd: bool) -> None:
        rule = self._filter
        assert rule is not None
        if stuff is not None and stuff != rule.stuff:
            raise ValueError(
                f"source.stuff={str(stuff).lower()}: the filter {name} is published with stuff={str(rule.stuff).lower()}; "
                "leave source.stuff out or set source.filter=null"
            )
        if crowd:
            raise ValueError(f"source.crowd=true: the filter {name} leaves crowds out; set crowd=false or filter=null")
        if self.min_area:
            raise ValueError(
                f"source.min_area={self.min_area}: the filter {name} has its own, {rule.min_area}; "
                "leave source.min_area out or set source.filter=null"
            )

    def _load(self) -> None:
        """Read the annotations; of those, what is not asked for is let go at once."""
        instances = self._json("instances")
        self._pictures: list[dict[str, Any]] = instances["images"]
        self._names: dict[int, str] = {c["id"]: c["name"] for c in instances["categories"]}
        self._objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        annotations = [instances["annotations"]]
        if self.stuff:
            stuff = self._json("stuff")
            self._names |= {c["id"]: c["name"] for c in stuff["categories"] if c["id"] != OTHER}
            annotations.append([item for item in stuff["annotations"] if item["category_id"] != OTHER])
        for item in (item for items in annotations for item in items):
            if not self.masks:
                item.pop("segmentation", None)
            self._objects[item["image_id"]].append(item)
        self._captions: dict[int, list[str]] = defaultdict(list)
        for item in self._json("captions")["annotations"]:
            self._captions[item["image_id"]].append(item["caption"])

    def _json(self, kind: str) -> dict[str, Any]:
        path = existing(Path(self.root) / "annotations" / f"{kind}_{self.split}.json", "source.root")
        needed = ("annotations",) if kind == "captions" else ("images", "annotations", "categories")
        needed = ("annotations", "categories") if kind == "stuff" else needed
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            missing = [key for key in needed if not isinstance(content[key], list)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"source.root: {path} is not COCO's {kind} ({error!r}); fetch it again") from error
        if missing:
            raise ValueError(f"source.root: {path}: {missing[0]} is not a list; fetch it again")
        return content


def mask_of(segmentation: Any, size: Sequence[int], where: str) -> dict[str, Any] | None:
    """COCO's segmentation as compressed run lengths.

    Args:
        segmentation: Polygons in px, run lengths in either form, or None.
        size: (height, width) px of the picture.
        where: The sample, for the message.

    Returns:
        `{"size": [height, width], "counts": text}`; polygons as Pillow fills them. None where there is none.

    Raises:
        SampleError: It has another form.
    """
    height, width = size
    try:
        if not segmentation:
            return None
        if isinstance(segmentation, list):
            canvas = Image.new("1", (width, height))
            draw = ImageDraw.Draw(canvas)
            for polygon in segmentation:
                draw.polygon([(x, y) for x, y in zip(polygon[::2], polygon[1::2], strict=True)], fill=1)
            return encode(np.asarray(canvas, bool))
        if isinstance(segmentation["counts"], str):
            return {"size": list(segmentation["size"]), "counts": segmentation["counts"]}
        runs = segmentation["counts"]
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return encode(flat.reshape(width, height).T)
    except (KeyError, TypeError, ValueError) as error:
        raise SampleError(f"{where}: segmentation: not polygons or run lengths ({error}); set masks=false") from error
