"""SA-1B as it is published: tars of pictures, with a table of captions and, if there is one, a folder of boxes with phrases.

SA-1B's own masks have no names, so they are not read: objects come from IGLIGEN's boxes (``igligen.py``), which lie in the
centre square of a picture.
"""

import tarfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.safe_pickle import PickleRefused
from datamodules.sources.base import Content
from datamodules.sources.files import FileSource, Picture, SampleError, centre_window, existing
from datamodules.sources.igligen import WITHOUT_BOXES, Detections, detected_objects, read_detections
from scenes import Frame, Scene
from scenes.json_form import parse_json

PREFIX = "The image features "  # of SAM-LLaVA's captions; the published systems take it off
COLUMNS = ("key", "caption")
_ROWS = 65536  # of a table read at once
Entry = tuple[str, dict[str, bytes], Detections | None]


class Sa1b(FileSource):
    """Pictures of SA-1B with captions, and the objects that a detector found in their centre squares.

    With boxes a picture is cut to its centre square, because nothing outside it was looked at.

    Args:
        root: Folder of the tars.
        tars: Which of them, as a pattern of names.
        captions: Table of captions with the columns key ("sa_1") and caption, `.parquet` or `.jsonl`;
            `root/captions.parquet` if it is there. Without a table the boxes' captions are taken.
        boxes: Folder of IGLIGEN's boxes, `sa_NNNNNN.npy` for `sa_NNNNNN.tar`, with or without sizes.
        min_score: Boxes of lower confidence go; the publishers read from .25 on.
        min_area: As in `FileSource`.
        tolerance: As in `FileSource`; large, because the published boxes leave the centre square by as much as the
            picture goes on beside it, and are published to be cut.
        short_side: As in `FileSource`.

    Raises:
        ValueError: A file is not there, or there are neither captions nor boxes.
    """

    name = "sa1b"

    def __init__(
        self,
        *,
        root: str,
        tars: str = "*.tar",
        captions: str | None = None,
        boxes: str | None = None,
        min_score: float = 0.25,
        min_area: float = 0.0,
        tolerance: float = 1.0,
        short_side: int | None = None,
    ) -> None:
        super().__init__(min_area=min_area, tolerance=tolerance, short_side=short_side)
        self.root, self.tars, self.captions, self.boxes, self.min_score = root, tars, captions, boxes, min_score
        self._paths = sorted(existing(Path(root), "source.root").glob(tars))
        if not self._paths:
            raise ValueError(f"source.tars={tars}: no such file in {root}; give a pattern of names, such as sa_00*.tar")
        self._boxes = existing(Path(boxes), "source.boxes") if boxes else None
        self._table = existing(Path(captions), "source.captions") if captions else Path(root) / "captions.parquet"
        if not self._table.exists():
            if self._boxes is None:
                raise ValueError(
                    f"source.captions: {self._table} is not there; give a table of captions, or source.boxes=DIR whose "
                    "captions are taken"
                )
            self._table = None
        self.provides = frozenset({"image", "caption"} | ({"boxes", "phrases", "scores"} if self._boxes else set()))
        self._keys = [list(_keys(path)) for path in self._paths]
        # only the captions of the tars at hand, because the whole table holds millions
        self._captions = {} if self._table is None else read_captions(self._table, {k for ks in self._keys for k in ks})

    def __len__(self) -> int:
        """Pictures in the tars."""
        return sum(len(keys) for keys in self._keys)

    def entries(self) -> Iterator[Entry]:
        """Yields key, files and detections of each picture; one picture is in memory at a time."""
        for part in range(len(self._paths)):
            yield from self.entries_of(part)

    def parts(self) -> list[int]:
        """Pictures of each tar."""
        return [len(keys) for keys in self._keys]

    def entries_of(self, part: int) -> Iterator[Entry]:
        """Yields the entries of a tar.

        Args:
            part: Number of the tar.

        Yields:
            Key, files and detections.
        """
        path = self._paths[part]
        try:
            found = read_detections(self._boxes / f"{path.stem}.npy") if self._boxes else {}
        except (PickleRefused, SampleError, OSError) as error:
            self.left_out.skip(error, samples=len(self._keys[part]))
            return
        waiting: dict[str, dict[str, bytes]] = {}
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    key, suffix = _name(member)
                    if suffix not in (".jpg", ".json"):
                        continue
                    file = tar.extractfile(member)
                    waiting.setdefault(key, {})[suffix] = file.read() if file is not None else b""
                    if len(waiting[key]) == 2:
                        yield key, waiting.pop(key), found.get(_number(key))
        except (tarfile.TarError, OSError, EOFError) as error:
            self.left_out.skip(f"{path}: {error}; fetch it again")
        yield from ((key, files, found.get(_number(key))) for key, files in waiting.items())

    def read(self, entry: Any) -> tuple[Scene, Content] | str:
        """The sample of a picture.

        Args:
            entry: Its key, the content of its files by suffix, and what was detected in it.

        Returns:
            The scene with its picture, or the reason where it has no caption or no boxes.

        Raises:
            SampleError: Something of it is unsound.
        """
        key, files, found = entry
        if lacking := {".jpg", ".json"} - files.keys():
            raise SampleError(f"{key}: its {lacking.pop()} is missing from the tar; fetch the tar again")
        if self._boxes is not None and found is None:
            return WITHOUT_BOXES
        caption = self._captions.get(key) if self._table is not None else found and found.caption
        if not isinstance(caption, str) or not caption.strip():
            return "pictures without a caption"
        picture = Picture.decode(files[".jpg"], key)
        size = _told_size(files[".json"], key)
        if picture.size != size:
            raise SampleError(
                f"{key}: picture: {picture.size} is not the (height, width) {size} of its .json; fetch the tar again"
            )
        objects, frame = (), Frame(original=size)
        if found is not None:
            objects = detected_objects(self, key, found, min_score=self.min_score)
            frame = Frame(original=size, crop=centre_window(size))
        caption = caption.removeprefix(PREFIX).strip()
        return self.stored(Scene(id=key, caption=caption, objects=objects, frame=frame, source=self.name), picture)


def read_captions(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """The captions of some keys, read in pieces.

    Args:
        path: `.parquet` or `.jsonl` with the columns key and caption.
        keys: Which rows to keep.

    Returns:
        Caption by key.

    Raises:
        ValueError: The table has no such columns, or cannot be read.
    """
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(
            f"source.captions: {path}: parquet needs pyarrow, which requirements.txt pins; install that, "
            "or give the table as .jsonl"
        )
    wanted = set(keys)
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    try:
        return {key: caption for key, caption in rows if key in wanted}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"source.captions: {path}: no table of the columns {' and '.join(COLUMNS)} "
            f"({' '.join(str(error).split())}); fetch it again"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[Any, Any]]:
    from pyarrow import parquet  # here, because nothing else needs it

    with parquet.ParquetFile(path) as table:
        for piece in table.iter_batches(batch_size=_ROWS, columns=list(COLUMNS)):
            columns = piece.to_pydict()
            yield from zip(*(columns[name] for name in COLUMNS), strict=True)


def _json_rows(path: Path) -> Iterator[tuple[Any, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                row = parse_json(line)
                yield row["key"], row["caption"]


def _keys(path: Path) -> Iterator[str]:
    """Keys of the pictures in a tar, by its headers; of a tar that ends too early those before its end."""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = _name(member)
                if suffix == ".jpg":
                    yield key
    except (tarfile.TarError, OSError, EOFError):
        return  # told when its pictures are read


def _name(member: tarfile.TarInfo) -> tuple[str, str]:
    path = PurePosixPath(member.name)
    return path.stem, path.suffix if member.isfile() else ""


def _number(key: str) -> int:
    digits = key.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else -1


def _told_size(data: bytes, key: str) -> tuple[int, int]:
    try:
        image = parse_json(data)["image"]
        return int(image["height"]), int(image["width"])
    except (ValueError, KeyError, TypeError) as error:
        raise SampleError(f"{key}: its .json is not SA-1B's ({error!r}); fetch the tar again") from error
