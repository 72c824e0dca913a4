"""SA-1B as it is published: tars of pictures, with a table of captions and, if there is one, a folder of boxes with phrases.

SA-1B's own masks have no names, so they are not read: objects come from IGLIGEN's boxes (``igligen.py``), which lie in the
centre square of a picture.
"""

import itertools
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.safe_pickle import PickleRefused
from datamodules.sources.base import Content
from datamodules.sources.files import FileSource, Picture, SampleError, centre_window, existing, opened_tar
from datamodules.sources.igligen import TAR, WITHOUT_BOXES, Detections, detected_objects, read_detections
from scenes import Frame, Scene
from scenes.json_form import parse_json

PREFIX = "The image features "  # of SAM-LLaVA's captions; the published systems take it off
COLUMNS = ("key", "caption")
_ROWS = 65536  # of a table read at once
Entry = tuple[str, str, dict[str, bytes], Detections | None]


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
        self._keys: dict[int, list[str]] = {}  # of the tars whose headers were read
        self._captions: dict[str, str] = {}
        self._captioned: set[int] = set()  # the tars whose captions were read

    def __len__(self) -> int:
        """Pictures in the tars, of which all headers are read for it."""
        return sum(len(self._keys_of(file)) for file in range(self.files()))

    def files(self) -> int:
        """The tars."""
        return len(self._paths)

    def size_of(self, file: int) -> int | None:
        """Pictures of a tar whose headers were read already."""
        return len(self._keys[file]) if file in self._keys else None

    def expect(self, files: Sequence[int]) -> None:
        """Reads the captions of some tars and of no others, because the whole table holds millions."""
        if self._table is not None and not self._captioned.issuperset(files):
            self._captions = read_captions(self._table, {key for file in files for key in self._keys_of(file)})
            self._captioned = set(files)

    def _keys_of(self, file: int) -> list[str]:
        """Keys of the pictures of a tar."""
        if file not in self._keys:
            self._keys[file] = list(_keys(self._paths[file]))
        return self._keys[file]

    def entries_of(self, file: int, start: int = 0) -> Iterator[Entry]:
        """Yields the entries of a tar; one picture is in memory at a time.

        Args:
            file: Number of the tar.
            start: Place of the first entry.

        Yields:
            Name of the tar; key, files and detections of a picture.
        """
        self.expect([file])
        path = self._paths[file]
        try:
            found = read_detections(self._boxes / f"{path.stem}.npy") if self._boxes else {}
        except (PickleRefused, SampleError, OSError) as error:
            self.left_out.skip(error, samples=len(self._keys_of(file)))
            return
        waiting: dict[str, dict[str, Any]] = {}
        place = 0  # behind the pictures that are whole
        try:
            with opened_tar(path) as tar:
                for member in tar:
                    key, suffix = _name(member)
                    if suffix not in (".jpg", ".json"):
                        continue
                    waiting.setdefault(key, {})[suffix] = member if place < start else _content(tar, member)
                    if len(waiting[key]) == 2:
                        files, place = waiting.pop(key), place + 1
                        if place > start:
                            read = {name: _content(tar, file) for name, file in files.items()}
                            yield path.stem, key, read, found.get(_number(key))
        except (tarfile.TarError, OSError, EOFError) as error:
            self.left_out.skip(f"{path}: {error}; fetch it again")
        for key, files in itertools.islice(waiting.items(), max(0, start - place), None):
            yield path.stem, key, files, found.get(_number(key))

    def read(self, entry: Any) -> tuple[Scene, Content] | str:
        """The sample of a picture.

        Args:
            entry: Its tar and key, the content of its files by suffix, and what was detected in it.

        Returns:
            The scene with its picture, or the reason where it has no caption or no boxes.

        Raises:
            SampleError: Something of it is unsound.
        """
        tar, key, files, found = entry
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
        scene = Scene(id=key, caption=caption, objects=objects, frame=frame, source=self.name, provenance={TAR: tar})
        return self.stored(scene, picture)


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
    rows = _parquet_rows(path, wanted) if path.suffix == ".parquet" else _json_rows(path)
    try:
        return {key: caption for key, caption in rows if key in wanted}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"source.captions: {path}: no table of the columns {' and '.join(COLUMNS)} "
            f"({' '.join(str(error).split())}); fetch it again"
        ) from error


def _parquet_rows(path: Path, wanted: set[str]) -> Iterator[tuple[Any, Any]]:
    """The rows of those groups that have a wanted key; of the others the keys alone are read."""
    from pyarrow import parquet  # here, because nothing else needs it

    with parquet.ParquetFile(path) as table:
        for group in range(table.num_row_groups):
            pieces = table.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[COLUMNS[0]])
            if all(wanted.isdisjoint(piece.to_pydict()[COLUMNS[0]]) for piece in pieces):
                continue
            for piece in table.iter_batches(batch_size=_ROWS, row_groups=[group], columns=list(COLUMNS)):
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
        with opened_tar(path) as tar:
            for member in tar:
                key, suffix = _name(member)
                if suffix == ".jpg":
                    yield key
    except (tarfile.TarError, OSError, EOFError):
        return  # told when its pictures are read


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo | bytes) -> bytes:
    """What a file of a tar holds, if that is not there already."""
    if isinstance(member, bytes):
        return member
    file = tar.extractfile(member)
    return file.read() if file is not None else b""


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
