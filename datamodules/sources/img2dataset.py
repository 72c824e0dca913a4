"""img2dataset: pictures with captions as it fetched them, as trees or tars; CC3M, LAION and others before they are labelled.

It puts a white border around a picture that is not square, which is taken off here. Pictures with labels beside them are read in
``rich_context.py``.
"""

import functools
import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from datamodules.sources.base import Content
from datamodules.sources.files import FileSource, Picture, SampleError, content_of, existing, json_of, opened_tar
from scenes import Frame, Scene

SUFFIXES = (".jpg", ".png", ".webp")
WHITE = 240  # least mean of a border: it is 255, and JPEG spreads the picture's edge into it
CAPTIONS_MISSING = "captions missing"

Window = tuple[int, int, int, int]
"""(top, left, height, width) px."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """The files of one sample: paths, or what a tar holds; None where there is none.

    Attributes:
        key: img2dataset's name of the sample.
        picture: The picture.
        sidecar: The record of it: its caption and its original size.
        text: Its caption alone.
    """

    key: str
    picture: Path | bytes
    sidecar: Path | bytes | None = None
    text: Path | bytes | None = None


class Img2dataset(FileSource):
    """Pictures with a caption, without objects.

    Args:
        root: Folder of the pictures: a tree with `NNNNN/KEY.jpg` and `NNNNN/KEY.json` somewhere in it, or img2dataset's tars.
        tars: Which tars of `root` to read, as a pattern of names; null for a tree.
        border: Whether the border is taken off; false keeps pictures as they are, and needs no `KEY.json`.
        short_side: As in `FileSource`.

    Raises:
        ValueError: A folder, or what it should hold, is not there.
    """

    name = "img2dataset"
    provides = frozenset({"image", "caption"})

    def __init__(
        self, *, root: str, tars: str | None = None, border: bool = True, short_side: int | None = None
    ) -> None:
        super().__init__(short_side=short_side)
        self.root, self.tars, self.border = root, tars, border
        self._root = existing(Path(root), "source.root")
        self._tars = tars_of(self._root, tars)
        if not (any(map(holds_picture, self._tars)) if self._tars else self._files):
            raise ValueError(f"source.root: no pictures in {root}; name the folder above them, or source.tars=PATTERN")

    def __len__(self) -> int:
        """Pictures; of tars all headers are read for it."""
        return sum(map(pictures_in, self._tars)) if self._tars else len(self._files)

    def files(self) -> int | None:
        """The tars, if there are any."""
        return len(self._tars) or None

    def entries(self) -> Iterator[Fetched]:
        """Yields the files of each sample; of those in tars one is in memory at a time."""
        if self._tars:
            yield from super().entries()
        for path in self._files:
            yield Fetched(key=path.stem, picture=path, sidecar=path.with_suffix(".json"), text=path.with_suffix(".txt"))

    @functools.cached_property
    def _files(self) -> list[Path]:
        if self._tars:
            return []
        return sorted(path for path in self._root.rglob("*") if is_picture(path.name) and path.is_file())

    def entries_of(self, file: int, start: int = 0) -> Iterator[Fetched]:
        """Yields the entries of a tar.

        Args:
            file: Number of the tar.
            start: Place of the first entry.

        Yields:
            The files of each sample.
        """
        path = self._tars[file]
        members, fault = members_of(path)
        try:
            with opened_tar(path) as tar:

                def content(name: str) -> bytes | None:
                    file = tar.extractfile(members[name]) if name in members else None
                    return None if file is None else file.read()

                for name in itertools.islice(filter(is_picture, list(members)), start, None):
                    beside = [content(str(PurePosixPath(name).with_suffix(suffix))) for suffix in (".json", ".txt")]
                    picture = content(name) or b""
                    yield Fetched(key=PurePosixPath(name).stem, picture=picture, sidecar=beside[0], text=beside[1])
        except (tarfile.TarError, OSError, EOFError) as error:
            fault = error
        if fault is not None:
            self.left_out.skip(f"{path}: {fault}; fetch it again")

    def read(self, entry: Any) -> tuple[Scene, Content]:
        """The sample of some files.

        Args:
            entry: The files.

        Returns:
            The scene with its picture.

        Raises:
            SampleError: Something of it cannot be used.
        """
        where = entry.key
        picture = (
            Picture.open(entry.picture, where)
            if isinstance(entry.picture, Path)
            else Picture.decode(entry.picture, where)
        )
        frame, inside = Frame(original=picture.size), None
        if self.border:
            frame, inside = without_border(picture, entry.sidecar, where)
        caption = _caption(entry, where)
        self.count(CAPTIONS_MISSING, not caption)
        scene = Scene(id=where, caption=caption, objects=(), frame=frame, source=self.name)
        return self.stored(scene, picture if inside is None else picture.part(*inside))


def tars_of(root: Path, pattern: str | None) -> list[Path]:
    """The tars that a pattern names.

    Args:
        root: Their folder.
        pattern: Of names; None for a tree of files.

    Returns:
        In the order of their names; none for a tree.

    Raises:
        ValueError: The pattern names none.
    """
    found = sorted(root.glob(pattern)) if pattern is not None else []
    if pattern is not None and not found:
        raise ValueError(f"source.tars={pattern}: no such file in {root}; give a pattern of names, such as *.tar")
    return found


def members_of(path: Path) -> tuple[dict[str, tarfile.TarInfo], Exception | None]:
    """The files of a tar by name, and what is wrong with it; of a tar that ends too early those before its end."""
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with opened_tar(path) as tar:
            for member in tar:
                if member.isfile():
                    members[member.name] = member
    except (tarfile.TarError, OSError, EOFError) as error:
        return members, error
    return members, None


def pictures_in(path: Path) -> int:
    """Pictures in a tar, by its headers."""
    return sum(map(is_picture, members_of(path)[0]))


def holds_picture(path: Path) -> bool:
    """Whether there is a picture in a tar; no more of it is read than that takes."""
    try:
        with opened_tar(path) as tar:
            return any(member.isfile() and is_picture(member.name) for member in tar)
    except (tarfile.TarError, OSError, EOFError):
        return False  # told when its pictures are read, if another tar has some


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture."""
    return PurePosixPath(name).suffix in SUFFIXES


def without_border(picture: Picture, sidecar: Path | bytes | None, where: str) -> tuple[Frame, Window | None]:
    """What to take of a picture, so that its border goes.

    Args:
        picture: As it lies on the disk.
        sidecar: img2dataset's record, which has the original size.
        where: The sample, for messages.

    Returns:
        The frame of what is inside, and where that is; None where there is no border.

    Raises:
        SampleError: The record is not there, or there is something where the border would be.
    """
    original = _original_size(sidecar, where)
    inside = content_window(picture.size, original)
    frame = Frame(original=original, target=inside[2:])
    if inside[2:] == picture.size:
        return frame, None
    _refuse_coloured_border(picture.image, inside, where)
    return frame, inside


def content_window(padded: tuple[int, int], original: tuple[int, int]) -> Window:
    """Where img2dataset has put a picture in its border, by the rounding that it uses.

    Args:
        padded: (height, width) px of the picture on the disk.
        original: (height, width) px of the picture as it was fetched.

    Returns:
        (top, left, height, width) px; all of it where there is no border, which is where it is not square.
    """
    side = padded[0]
    if padded != (side, side):
        return (0, 0, *padded)
    height, width = (max(1, round(length * side / max(original))) for length in original)
    return (side - height) // 2, (side - width) // 2, height, width


def _refuse_coloured_border(image: Image.Image, inside: Window, where: str) -> None:
    """Refuses a picture that has something where its border would be: it was cut, not padded."""
    top, left, height, width = inside
    pixels = np.asarray(image.convert("L"))
    strips = (pixels[:top], pixels[top + height :], pixels[:, :left], pixels[:, left + width :])
    border = np.concatenate([strip.ravel() for strip in strips])
    if border.mean() < WHITE:
        raise SampleError(
            f"{where}: picture: no white border where its original size says one is (mean {border.mean():.0f} of 255); "
            "if img2dataset cut pictures instead of padding them, set source.border=false"
        )


def _original_size(sidecar: Path | bytes | None, where: str) -> tuple[int, int]:
    """(height, width) px of the picture as it was fetched."""
    way_out = "fetch it with the picture, or set source.border=false where pictures have no border"
    if not _is_there(sidecar):
        raise SampleError(f"{where}: {where}.json: is not there to tell the border; {way_out}")
    record = json_of(content_of(sidecar, where, "sidecar"), where, "sidecar")
    sides = [record.get(f"original_{side}") if isinstance(record, dict) else None for side in ("height", "width")]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise SampleError(f"{where}: original_height, original_width: {sides} are no pixels; {way_out}")
    return sides[0], sides[1]  # type: ignore[return-value]


def _caption(entry: Fetched, where: str) -> str:
    """What the record says, else the text beside it; empty where neither does."""
    if _is_there(entry.sidecar):
        record = json_of(content_of(entry.sidecar, where, "sidecar"), where, "sidecar")
        if isinstance(record, dict) and isinstance(record.get("caption"), str):
            return record["caption"].strip()
    if _is_there(entry.text):
        return content_of(entry.text, where, "text").decode("utf-8", "replace").strip()
    return ""


def _is_there(place: Path | bytes | None) -> bool:
    return place.is_file() if isinstance(place, Path) else place is not None
