"""Rich context: pictures that img2dataset fetched, as trees or tars, with rich labels beside them or in a folder of their own.

Labels were made with the white border that img2dataset puts around pictures, which goes here too (``img2dataset.py``). The labels
themselves are read in ``rich_labels.py``.
"""

import functools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.sources.base import Content
from datamodules.sources.files import Picture, SampleError, content_of, existing, json_of, opened_tar
from datamodules.sources.img2dataset import (
    CAPTIONS_MISSING,
    SUFFIXES,
    holds_picture,
    is_picture,
    members_of,
    pictures_in,
    tars_of,
    without_border,
)
from datamodules.sources.rich_labels import (
    PREFIX,
    WITHOUT_PICTURE,
    Label,
    RichLabels,
    found,
    key_of,
    label_files,
    read_label,
)
from scenes import Frame, Scene


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The files of one sample: paths, or what a tar holds; None where there is none.

    Attributes:
        key: img2dataset's name of the sample.
        label: The file of labels.
        picture: The picture. In a tree it may be known from the labels alone.
        sidecar: img2dataset's record of it.
        image_name: The picture, as a list of pairs calls it.
    """

    key: str
    label: Path | bytes | None
    picture: Path | bytes | None = None
    sidecar: Path | bytes | None = None
    image_name: str = ""


class RichContext(RichLabels):
    """Pictures with a caption, and objects with tag, sentence and score.

    Args:
        root: Folder of the pictures: a tree with `NNNNN/KEY.jpg` and `NNNNN/KEY.json` somewhere in it, or img2dataset's tars.
        labels: Folder in which the files `label_KEY.json` lie, at any depth; `root` if not given, or the tars themselves.
        tars: Which tars of `root` to read, as a pattern of names; null for a tree.
        meta: A published list of pairs [picture, label] to read in its order; null for every file of labels.
        border: Whether the border is taken off; false keeps pictures as they are, and needs no `KEY.json`.
        labelled_at: As in `RichLabels`.
        max_objects: As in `RichLabels`; the publishers take 20.
        masks: As in `RichLabels`.
        min_area: As in `FileSource`.
        tolerance: As in `FileSource`, of the picture with its border; what lies in the border is cut.
        short_side: As in `FileSource`.

    Raises:
        ValueError: A file is not there, or settings contradict each other.
    """

    name = "rich_context"

    def __init__(
        self,
        *,
        root: str,
        labels: str | None = None,
        tars: str | None = None,
        meta: str | None = None,
        border: bool = True,
        labelled_at: int | None = None,
        max_objects: int | None = 20,
        masks: bool = False,
        min_area: float = 0.0,
        tolerance: float = 0.05,
        short_side: int | None = None,
    ) -> None:
        super().__init__(
            labelled_at=labelled_at,
            max_objects=max_objects,
            masks=masks,
            min_area=min_area,
            tolerance=tolerance,
            short_side=short_side,
        )
        self.root, self.labels, self.tars, self.meta, self.border = root, labels, tars, meta, border
        self.provides = frozenset(
            {"image", "caption", "boxes", "phrases", "descriptions", "scores"} | ({"masks"} if masks else set())
        )
        if tars is not None and meta is not None:
            raise ValueError(f"source.meta={meta}: a list names files, not members of tars; leave source.tars out")
        self._root = existing(Path(root), "source.root")
        self._labels = existing(Path(labels) if labels else self._root, "source.labels")
        self._pairs = None if meta is None else _pairs(existing(Path(meta), "source.meta"))
        self._tars = tars_of(self._root, tars)
        if not (any(map(holds_picture, self._tars)) if self._tars else self._count):
            raise ValueError(
                f"source.labels: no {PREFIX}*.json in {self._labels}; name the folder of the labels, "
                "or source.tars=PATTERN where pictures and labels are in tars"
            )

    def __len__(self) -> int:
        """Files of labels, pairs of the list, or pictures in the tars, of which all headers are read for it."""
        return sum(map(pictures_in, self._tars)) if self._tars else self._count

    def files(self) -> int | None:
        """The tars, if there are any."""
        return len(self._tars) or None

    def entries(self) -> Iterator[Entry]:
        """Yields the files of each sample; of those in tars one is in memory at a time."""
        if self._pairs is not None:
            for image, label in self._pairs:
                yield Entry(
                    key=PurePosixPath(image).stem, label=found(self._labels, [label]) or Path(label), image_name=image
                )
        elif self._tars:
            yield from super().entries()
        else:
            yield from (Entry(key=key, label=path) for key, path in label_files(self._labels))

    @functools.cached_property
    def _elsewhere(self) -> dict[str, Path] | None:
        """Files of labels by key, where they are not in the tars."""
        return dict(label_files(self._labels)) if self.labels else None

    def read(self, entry: Any) -> tuple[Scene, Content] | str:
        """The sample of some files.

        Args:
            entry: The files.

        Returns:
            The scene with its picture, or the reason where there is no picture, no label or no object.

        Raises:
            SampleError: Something of it cannot be used.
        """
        where = entry.key
        if entry.label is None:
            return "pictures without labels"
        label = read_label(content_of(entry.label, where, "label"), where)
        place = entry.picture or self._picture_of(entry, label)
        if place is None:
            return WITHOUT_PICTURE
        picture = Picture.open(place, where) if isinstance(place, Path) else Picture.decode(place, where)
        provenance: dict[str, Any] = {"dataset": label.dataset} if label.dataset else {}
        frame, inside, window = Frame(original=picture.size), None, None
        if self.border:
            sidecar = entry.sidecar or (place.with_suffix(".json") if isinstance(place, Path) else None)
            frame, inside = without_border(picture, sidecar, where)
            if inside is not None:
                rows, columns = picture.size
                top, left, height, width = inside
                window = (left / columns, top / rows, (left + width) / columns, (top + height) / rows)
                provenance["padded"] = {"size": [rows, columns], "window": list(inside)}
        objects = self.labelled(where, label, picture.size, window=window)
        if not objects:
            return "pictures without boxes"
        if any(item.score is None for item in objects):
            raise SampleError(f"{where}: pred_score: missing; label the picture again or leave the sample out")
        self.count(CAPTIONS_MISSING, not label.caption)
        scene = Scene(
            id=where,
            caption=label.caption,
            objects=objects,
            frame=frame,
            source=self.name,
            provenance=provenance,
        )
        return self.stored(scene, picture if inside is None else picture.part(*inside))

    @functools.cached_property
    def _count(self) -> int:
        return len(self._pairs) if self._pairs is not None else sum(1 for _ in label_files(self._labels))

    def entries_of(self, file: int, start: int = 0) -> Iterator[Entry]:
        """Yields the entries of a tar, by the order of its pictures; labels may come before or behind them.

        Args:
            file: Number of the tar.
            start: Place of the first entry.

        Yields:
            The files of each sample.
        """
        path, elsewhere = self._tars[file], self._elsewhere
        members, fault = members_of(path)
        labels = {key: name for name in members if (key := key_of(name)) is not None}
        try:
            with opened_tar(path) as tar:

                def content(name: str | None) -> bytes | None:
                    file = tar.extractfile(members[name]) if name in members else None
                    return None if file is None else file.read()

                for place, name in enumerate(filter(is_picture, list(members))):
                    key = PurePosixPath(name).stem
                    inside = labels.pop(key, None)
                    if place < start:
                        continue
                    label = elsewhere.get(key) if elsewhere is not None else content(inside)
                    if label is None:
                        yield Entry(key=key, label=None)
                    else:
                        sidecar = content(str(PurePosixPath(name).with_suffix(".json")))
                        yield Entry(key=key, label=label, picture=content(name), sidecar=sidecar)
        except (tarfile.TarError, OSError, EOFError) as error:
            fault = error
        if fault is not None:
            self.left_out.skip(f"{path}: {fault}; fetch it again")
        if elsewhere is None and labels:
            self.left_out.counts[WITHOUT_PICTURE] += len(labels)

    def _picture_of(self, entry: Entry, label: Label) -> Path | None:
        """The picture of a file of labels in a tree: beside it, where it says, or where img2dataset puts that key."""
        if isinstance(entry.label, bytes):
            return None
        if entry.image_name:
            return found(self._root, [entry.image_name])
        beside = [str(entry.label.with_name(entry.key + suffix)) for suffix in SUFFIXES]
        usual = [f"{entry.key[:-4]}/{entry.key}{suffix}" for suffix in SUFFIXES]
        return found(self._root, [*beside, label.file_name, *usual])


def _pairs(path: Path) -> list[tuple[str, str]]:
    """The pairs [picture, label] of a published list."""
    content = json_of(path.read_bytes(), str(path), "list")
    is_pairs = isinstance(content, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in content)
    if not is_pairs or not all(isinstance(name, str) for pair in content for name in pair):
        raise ValueError(
            f"source.meta: {path} is no list of pairs [picture, label]; give the published list, or leave it out to read "
            "every file of labels"
        )
    return [(image, label) for image, label in content]
