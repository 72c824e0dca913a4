"""What readers of published files share: the loop that skips and counts, boxes made sound, pictures opened and scaled.

A reader lists entries and reads one at a time; what cannot be read is skipped, counted and listed, and what is not wanted is
counted. What a data set's files look like is in the module of that data set.
"""

import contextlib
import io
import itertools
import tarfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from datamodules.sources.base import Content, EncodedPicture, LeftOut, Source
from scenes import Frame, Scene, SceneError, SceneObject
from scenes import boxes as box_math
from scenes.checks import TOLERANCE
from scenes.json_form import parse_json

UNDER_AREA = "boxes under min_area"
SIDES = ("left", "top", "right", "bottom")


class SampleError(ValueError):
    """A sample that cannot be used; the message is one line `<sample>: <field>: <what>; <way out>`."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture with the bytes it came from.

    Attributes:
        data: The file; empty for what was made of a picture and has none.
        image: The same, decoded.
    """

    data: bytes
    image: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) px."""
        return self.image.height, self.image.width

    def part(self, top: int, left: int, height: int, width: int) -> "Picture":
        """A window of it, in px."""
        return Picture(data=b"", image=self.image.crop((left, top, left + width, top + height)))

    @staticmethod
    def decode(data: bytes, where: str) -> "Picture":
        """Decode a whole picture, so that one that is cut off is noticed here.

        Args:
            data: A file that Pillow can read.
            where: Sample or file, for the message.

        Returns:
            The picture.

        Raises:
            SampleError: It is none, or is cut off.
        """
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            raise SampleError(f"{where}: picture: cannot be decoded ({reason}); fetch it again") from error
        return Picture(data=data, image=image)

    @staticmethod
    def open(path: Path, where: str) -> "Picture":
        """Read and decode a picture's file; as `decode`, and a file that is not there is refused too."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SampleError(f"{where}: picture: {path}: {error.strerror}; fetch it again") from error
        return Picture.decode(data, where)


class FileSource(Source):
    """A source that reads published files.

    Args:
        min_area: Objects whose box covers less than this share of the picture go, and are counted. 0 keeps all:
            training drops what is too small after its crop (`data.min_area`).
        tolerance: How far a box may leave the picture, in parts of the picture's sides, to be cut rather than refused.
        short_side: Pictures are scaled down to this short side, px; null stores them as they are. A JPEG that
            stays as it is is stored byte for byte.

    Raises:
        ValueError: A number is out of its range.
    """

    image_format = "jpg"

    def __init__(self, *, min_area: float = 0.0, tolerance: float = 0.05, short_side: int | None = None) -> None:
        if not 0 <= min_area < 1:
            raise ValueError(f"source.min_area={min_area}: give a share of the picture, from 0 to below 1")
        if not tolerance >= 0:
            raise ValueError(f"source.tolerance={tolerance}: give 0 or more, in parts of the picture's sides")
        if short_side is not None and short_side < 1:
            raise ValueError(f"source.short_side={short_side}: give pixels, or null for pictures as they are")
        self.min_area, self.tolerance, self.short_side = min_area, tolerance, short_side
        self.left_out = LeftOut()
        self._of_sample: Counter[str] = Counter()
        self._cursor: _Cursor | None = None

    def entries(self) -> Iterator[Any]:
        """Yields what `read` takes, one for each sample, in a fixed order; never pictures of more than one file."""
        for file in range(self.files() or 0):
            yield from self.entries_of(file)

    def entries_of(self, file: int, start: int = 0) -> Iterator[Any]:
        """Yields the entries of one of the `files` from a place on; those before it are passed over unread where that can be.

        Args:
            file: Number of the file.
            start: Place of the first entry.

        Returns:
            Entries. What the reader of the file tells `left_out` is the same whatever the start.
        """
        raise NotImplementedError

    @abstractmethod
    def read(self, entry: Any) -> tuple[Scene, Content] | str:
        """The sample of an entry.

        Args:
            entry: What `entries` yielded.

        Returns:
            The scene with its picture or latent; for a sample that is not wanted, the reason, to be counted.

        Raises:
            SampleError: It cannot be read.
        """

    def __iter__(self) -> Iterator[tuple[Scene, Content]]:
        """Yields the samples that can be read and are wanted; `left_out` tells of the others."""
        self.expect(range(self.files() or 0))
        self.left_out = LeftOut()
        yield from self._read_all(self.entries())
        self.left_out.notes += self.report(self.left_out)

    def positions(self) -> int:
        """Places of all entries; what seems to be empty has one, for what is wrong with it."""
        return max(1, len(self))

    def span(self, start: int, stop: int) -> Iterator[tuple[Scene, Content]]:
        """As `Source`, for a source without `files`; what is told of all entries belongs to the last place.

        Args:
            start: First place.
            stop: Place behind the last.

        Yields:
            Scene and content.
        """
        yield from self._read_some(0, start, stop if stop < self.positions() else None, is_file=False)

    def span_of(self, file: int, start: int, stop: int) -> Iterator[tuple[Scene, Content]]:
        """As `Source`; what is wrong with a file is told with its last place.

        Args:
            file: Number of the file.
            start: First place in it.
            stop: Place behind the last.

        Yields:
            Scene and content.
        """
        yield from self._read_some(file, start, stop, is_file=True)

    def _read_some(self, file: int, start: int, stop: int | None, *, is_file: bool) -> Iterator[tuple[Scene, Content]]:
        """The samples at some places; the next ones go on from there without opening the file again."""
        cursor, self._cursor = self._cursor, None
        if cursor is None or (cursor.file, cursor.place) != (file, start):
            entries = self.entries_of(file, start) if is_file else itertools.islice(self.entries(), start, None)
            cursor = _Cursor(file, start, entries)
            self._advance(cursor)
        self.left_out = LeftOut()
        yield from self._read_all(self._until(cursor, stop))
        self.is_at_end = cursor.ahead is _END if is_file else stop is None
        if self.is_at_end:
            self.left_out.add(cursor.left_out)
        else:
            self._cursor = cursor

    def _until(self, cursor: "_Cursor", stop: int | None) -> Iterator[Any]:
        """The entries from where a cursor is to a place, or to the end."""
        while cursor.ahead is not _END and (stop is None or cursor.place < stop):
            yield cursor.ahead
            cursor.place += 1
            self._advance(cursor)

    def _advance(self, cursor: "_Cursor") -> None:
        """Look at the next entry; what the file's reader tells is of the file, not of the places that are read now."""
        of_places, self.left_out = self.left_out, cursor.left_out
        try:
            cursor.ahead = next(cursor.entries, _END)
        finally:
            self.left_out = of_places

    def _read_all(self, entries: Iterator[Any]) -> Iterator[tuple[Scene, Content]]:
        """The samples of entries that can be read and are wanted."""
        for entry in entries:
            self._of_sample = Counter()
            try:
                sample = self.read(entry)
            except (SampleError, SceneError) as error:
                self.left_out.skip(error)
                continue
            if isinstance(sample, str):
                self.left_out.counts[sample] += 1
            else:
                self.left_out.counts.update(self._of_sample)
                yield sample

    def count(self, reason: str, number: int = 1) -> None:
        """Count what `read` leaves out of its sample; it counts for nothing if the sample itself goes."""
        if number:
            self._of_sample[reason] += number

    def objects(
        self,
        where: str,
        phrases: Sequence[Any],
        boxes: Any,
        *,
        details: Sequence[Mapping[str, Any]] | None = None,
        window: Sequence[float] | None = None,
    ) -> tuple[SceneObject, ...]:
        """The objects of phrases with boxes; boxes are cut to the picture, and those with too little of it go.

        Args:
            where: The sample, for messages.
            phrases: N texts.
            boxes: (N, 4) xyxy, 1 being the side of the picture, beyond it by up to `tolerance`.
            details: N further fields of `SceneObject`.
            window: xyxy of the part of the picture that is taken, where that is not the whole: boxes are checked
                against the picture and then moved into this part and cut to it.

        Returns:
            At most N objects in the order given.

        Raises:
            SampleError: There are more phrases than boxes or fewer, a phrase is empty, or a box is inverted, not
                finite or too far out.
        """
        boxes = as_boxes(boxes, where)
        if len(phrases) != len(boxes):
            raise SampleError(
                f"{where}: phrases, boxes: {len(phrases)} phrases for {len(boxes)} boxes; give one for each"
            )
        for index, phrase in enumerate(phrases):
            if not isinstance(phrase, str) or not phrase.strip():
                raise SampleError(
                    f"{where}: phrases[{index}]: {phrase!r} is not a phrase; give the object's text or leave it out"
                )
        if len(boxes) and (fault := self._fault(boxes)):
            raise SampleError(f"{where}: {fault}")
        boxes = box_math.clip(boxes if window is None else box_math.crop(boxes, window))
        kept = []
        for index, box in enumerate(boxes.tolist()):
            width, height = box[2] - box[0], box[3] - box[1]
            if min(width, height) <= TOLERANCE:
                self.count("boxes with no area in the picture")
            elif width * height < self.min_area:
                self.count(UNDER_AREA)
            else:
                more = details[index] if details is not None else {}
                kept.append(SceneObject(phrase=str(phrases[index]), box=tuple(box), **more))
        return tuple(kept)

    def _fault(self, boxes: np.ndarray) -> str | None:
        """What is wrong with the first wrong box, if any."""
        finite = np.isfinite(boxes).all(-1)
        ordered = (boxes[:, 2:] >= boxes[:, :2]).all(-1)
        beyond = np.concatenate([-boxes[:, :2], boxes[:, 2:] - 1], -1)
        wrong = np.flatnonzero(~finite | ~ordered | ~(beyond <= self.tolerance).all(-1))
        if not wrong.size:
            return None
        index = int(wrong[0])
        box = f"boxes[{index}]: ({', '.join(f'{v:.6g}' for v in boxes[index])}) as xyxy in parts of the picture"
        if not finite[index]:
            return f"{box} holds a number that is not finite; mend the box or leave the sample out"
        if not ordered[index]:
            return f"{box} is inverted; mend the box, or see whether the file's form of boxes is another"
        side = SIDES[int(beyond[index].argmax())]
        return (
            f"{box} leaves the picture at the {side} by more than {self.tolerance:g}; "
            "mend the box or raise source.tolerance to have it cut"
        )

    def stored(self, scene: Scene, picture: Picture) -> tuple[Scene, Content]:
        """The sample with its picture as it is to be stored.

        Args:
            scene: The scene. Where its frame's target is the picture's size the picture is taken whole, else the frame
                tells the part to take.
            picture: The picture as it lies on the disk.

        Returns:
            The scene in the frame of what is stored, and that.
        """
        frame = scene.frame or Frame(original=picture.size)
        image = picture.image
        is_whole = frame.target == picture.size
        top, left, height, width = (0, 0, *picture.size) if is_whole else frame.crop
        target = (height, width)
        if self.short_side is not None and min(target) > self.short_side:
            factor = self.short_side / min(target)
            target = (round(height * factor), round(width * factor))
        if not is_whole or target != picture.size:
            window = (left, top, left + width, top + height)
            image = image.convert("RGB").resize(target[::-1], Image.Resampling.BICUBIC, box=window)
        scene = replace(scene, frame=replace(frame, target=target))
        if image is picture.image and image.format == "JPEG" and self.image_format == "jpg":
            return scene, EncodedPicture(data=picture.data, height=height, width=width)
        return scene, image


_END = object()


class _Cursor:
    """How far a file has been passed, and the entry that comes next, so that the next span goes on from there."""

    def __init__(self, file: int, place: int, entries: Iterator[Any]) -> None:
        self.file, self.place, self.entries = file, place, entries
        self.ahead: Any = _END
        self.left_out = LeftOut()


@contextlib.contextmanager
def opened_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar of which no more is read than is asked for: members that are passed over cost their headers.

    Args:
        path: The file; one that gzip has packed is unpacked on the way, as far as it is passed.

    Yields:
        The tar.
    """
    with path.open("rb", buffering=0) as file, tarfile.open(fileobj=file) as tar:
        yield tar


def as_boxes(values: Any, where: str) -> np.ndarray:
    """Boxes of a published file as (N, 4) float64.

    Args:
        values: N times four numbers, as lists or an array.
        where: The sample, for the message.

    Returns:
        The same numbers.

    Raises:
        SampleError: They are not.
    """
    try:
        boxes = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        boxes = np.empty(0)
        values = values if isinstance(values, Sequence) else [values]
    if boxes.size == 0 and len(values) == 0:
        return np.empty((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise SampleError(f"{where}: boxes: not four numbers for each object; mend them or leave the sample out")
    return boxes


def value_of(entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A value of a published mapping.

    Args:
        entry: The mapping.
        key: Its key.
        kind: The type, or the types, it must have.
        where: The sample, for the message.

    Returns:
        The value.

    Raises:
        SampleError: It is not there, or of another type.
    """
    if not isinstance(entry, dict) or key not in entry:
        raise SampleError(f"{where}: {key}: missing; mend the sample or leave it out")
    value = entry[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SampleError(f"{where}: {key}: is of type {type(value).__name__}; mend the sample or leave it out")
    return value


def content_of(place: Path | bytes, where: str, what: str) -> bytes:
    """The bytes of a file of a sample.

    Args:
        place: The file, or its bytes as a tar holds them.
        where: The sample, for the message.
        what: What it is, for the message.

    Returns:
        Its bytes.

    Raises:
        SampleError: It is not there.
    """
    try:
        return place.read_bytes() if isinstance(place, Path) else place
    except OSError as error:
        raise SampleError(f"{where}: {what}: {place}: {error.strerror}; fetch it again") from error


def json_of(data: bytes, where: str, what: str) -> Any:
    """The content of a JSON file of a sample; `what` it is, for the message."""
    try:
        return parse_json(data)
    except ValueError as error:
        raise SampleError(f"{where}: {what}: not JSON ({error}); fetch it again") from error


def existing(path: Path, setting: str) -> Path:
    """The path, where there is something at it.

    Args:
        path: A file or folder.
        setting: Which setting it comes from, for the message.

    Returns:
        The same.

    Raises:
        ValueError: There is nothing.
    """
    if not path.exists():
        raise ValueError(f"{setting}: {path} is not there; give the place of the published files")
    return path


def centre_window(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the centre square of a picture of (height, width) px."""
    side = min(size)
    return (size[0] - side) // 2, (size[1] - side) // 2, side, side


def joined(names: Iterable[str], most: int = 3) -> str:
    """The first names of many, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
