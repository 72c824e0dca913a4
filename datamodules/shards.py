"""Shards: Scenes and their pictures in tar files of webdataset's form, written once, read at random.

A folder of shards holds `000000.tar`, `000001.tar`, ... and `index.json`; a sample is `<key>.png` or
`<key>.jpg`, or `<key>.latent.npy` in place of a picture (with `<key>.latent_flipped.npy` of the mirrored one),
beside `<key>.scene.json` and what else a stage of preparation wrote. Here are reading by number and
checking; `shard_writer.py` writes, `shard_index.py` knows the index. In which order samples are read is in
`order.py`, what becomes of a picture in `transforms.py`.
"""

import bisect
import contextlib
import functools
import io
import itertools
import logging
import os
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.held_out import EVERY, Lowest, Place, hash_of, lowest_of
from datamodules.shard_cache import ShardCache
from datamodules.shard_index import (
    INDEX,
    LATENT,
    LATENT_FLIPPED,
    MAKE_AGAIN,
    SCENE,
    ShardEntry,
    ShardError,
    Verify,
    fault_of,
    has_shards,
    read_index,
    size_fault,
)
from datamodules.shard_writer import Progress, write_shards
from datamodules.sources.base import LatentForm
from datamodules.storage import folder_at, is_remote, named
from datamodules.tar_members import BLOCK, members
from scenes.json_form import parse_json
from scenes.scene import Scene

__all__ = [
    "Record",
    "SampleUnreadable",
    "ShardCache",
    "ShardError",
    "ShardReport",
    "ShardSet",
    "check_shards",
    "has_shards",
    "write_shards",
]

log = logging.getLogger(__name__)

PICTURES = ("png", "jpg")
_UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, zlib.error)  # Pillow raises all of these
_OPEN_SHARDS = 64  # a data set can have more shards than a process may open files, or want to hold tables of


@dataclass(frozen=True, kw_only=True)
class Record:
    """A sample as stored, with a picture or a latent.

    Attributes:
        scene: The scene in the frame of the picture, or of what the latent was encoded from.
        image: (height, width, 3) uint8 RGB, 0..255; may be written to.
        latent: (C, h, w) float16 or float32 as the denoiser takes it: multiplied by the autoencoder's factor. Where there is a
            log_variance, the mean of the autoencoder's distribution.
        log_variance: (C, h, w) of that distribution, in the same units; None where one latent is stored.
        mirrored: Whether the latent is that of the mirrored picture; the scene is not mirrored.
    """

    scene: Scene
    image: np.ndarray | None = None
    latent: np.ndarray | None = None
    log_variance: np.ndarray | None = None
    mirrored: bool = False


class SampleUnreadable(ShardError):
    """One sample that cannot be read, of a shard that can."""


class _OpenShard:
    """An open shard and where its members lie; closed when its last user, of any thread, lets go."""

    def __init__(self, file: int, entry: ShardEntry, extensions: list[str], *, place: str | Path) -> None:
        self.file = file
        try:
            self.table = _offsets(self.file, entry, extensions)  # (count, members, 2) int64: offset and size
        except ValueError as error:
            raise ShardError(f"shards={place}: {entry.name}: {error}; {MAKE_AGAIN}") from None

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.file)

    @property
    def is_there(self) -> bool:
        """Whether the file has a name still; a copy that had to make room has none."""
        return os.fstat(self.file).st_nlink > 0

    def content(self, row: int, member: int) -> bytes:
        """The bytes of a member of a row; `pread` shares no position with threads and forks."""
        offset, size = self.table[row, member].tolist()
        return os.pread(self.file, size, offset)

    def span(self, row: int) -> tuple[int, int]:
        """The bytes of a row, from the first member's header to the end of the last one's padding."""
        (first, _), (last, size) = self.table[row, 0].tolist(), self.table[row, -1].tolist()
        return first - BLOCK, last + -(-size // BLOCK) * BLOCK


def _offsets(file: int, entry: ShardEntry, extensions: list[str]) -> np.ndarray:
    """Where the members of each sample lie.

    Args:
        file: Descriptor of the open shard.
        entry: What the index says of it.
        extensions: Members of a sample, in their order.

    Returns:
        (count, len(extensions), 2) int64: offset and size.

    Raises:
        ValueError: The file is no tar, holds another number of samples, or a sample has other members.
    """
    found = list(members(functools.partial(os.pread, file), entry.bytes))
    names = [member.name.partition(".") for member in found]
    if [name[2] for name in names] != extensions * entry.count:
        raise ValueError(f"does not hold {entry.count} samples of {' and '.join(extensions)} as {INDEX} says")
    keys = [name[0] for name in names]
    for place in range(1, len(extensions)):
        if keys[place :: len(extensions)] != keys[:: len(extensions)]:
            raise ValueError("members of a sample have different keys")
    return np.array([member[1:] for member in found], dtype=np.int64).reshape(entry.count, len(extensions), 2)


def _array(content: bytes) -> np.ndarray:
    """What `numpy.load` gives for the bytes of a `.npy` file, which may be written to; pickles are refused."""
    if content[6:8] != b"\x01\x00":  # all that numpy writes of plain arrays is of this version
        return np.load(io.BytesIO(content), allow_pickle=False)
    end = 10 + int.from_bytes(content[8:10], "little")
    dtype, shape, is_fortran = _npy_header(content[:end])
    numbers = np.frombuffer(content, dtype, offset=end).copy()
    return numbers.reshape(shape, order="F" if is_fortran else "C")


@functools.lru_cache(maxsize=64)
def _npy_header(head: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Type, shape and order; the same head stands before each latent of a folder, and reading it takes as long as the numbers."""
    stream = io.BytesIO(head)
    np.lib.format.read_magic(stream)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    return dtype, shape, is_fortran


class ShardSet:
    """The samples of a folder of shards, by number; safe with threads, processes and pickle.

    Args:
        path: The folder, or its address.
        verify: "size" compares the size of each shard with the index, "sha256" reads all of it.
        cache: Where copies of shards behind an address are kept; they are compared with the index when they are made.

    Attributes:
        path: The folder, or its address.
        provides: What its scenes carry, in the words of `sources.base.PROVIDABLE`.
        latents: The form of the latents; None where there are pictures.
        index: The content of `index.json`.
        entries: Name, count, size and checksum of each shard.
        has_room_ahead: Whether `fetch` may be asked for shards that are not needed yet.

    Raises:
        ShardError: There are no shards, or one is missing, truncated or changed; or they are remote and there is no cache.
    """

    def __init__(self, path: str | Path, *, verify: Verify = "size", cache: ShardCache | None = None) -> None:
        self.path = named(path)
        if cache is None and is_remote(path):
            raise ShardError(
                f"shards={path}: remote shards are read through copies; set data.cache=DIR, on a local disk"
            )
        self._cache, self.has_room_ahead = cache, False
        self.index = read_index(self.path)
        self.entries = tuple(ShardEntry(**entry) for entry in self.index["shards"])
        self.provides = frozenset(self.index["provides"])
        self.latents = LatentForm(**self.index["latents"]) if "latents" in self.index else None
        self.sizes = tuple(entry.count for entry in self.entries)
        self._ends = list(itertools.accumulate(self.sizes))
        self._members: list[str] = self.index["members"]
        self._open: dict[int, _OpenShard] = {}
        folder = folder_at(self.path)
        sizes = folder.sizes()  # a question for each of ten thousand shards would take minutes over a network
        for entry in self.entries:
            fault = None if sizes is None else size_fault(entry, sizes.get(entry.name))
            if fault is None and verify == "sha256":
                fault = fault_of(folder, entry, verify)
            if fault is not None:
                raise ShardError(f"shards={self.path}: {fault}; copy it again or {MAKE_AGAIN}")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Record:
        return self.read(*self._place(number))

    def scene(self, number: int) -> Scene:
        """The scene of a sample, without its picture.

        Args:
            number: Number of the sample.

        Returns:
            The scene in the frame of the picture.

        Raises:
            SampleUnreadable: What is stored there is no scene.
        """
        shard, row = self._place(number)
        content = self._opened(shard).content(row, self._members.index(SCENE))
        try:
            return Scene.from_json(parse_json(content))
        except ValueError as error:
            raise self._unreadable(shard, row, error) from error

    def stamp(self, number: int) -> str:
        """What tells a stored sample from every other, without reading it: checksum of its shard, and its row."""
        shard, row = self._place(number)
        return f"{self.entries[shard].sha256}:{row}"

    def read(self, shard: int, row: int, *, mirrored: bool = False) -> Record:
        """The sample in a row of a shard.

        Args:
            shard: Number of the shard.
            row: Number of the sample in it.
            mirrored: Whether it is wanted mirrored: of latents the mirrored picture's is then read, where there is one.

        Returns:
            The sample; a picture as it is stored.

        Raises:
            SampleUnreadable: What is stored there is no picture, no latent or no scene.
            ShardError: Nothing of the shard can be read.
        """
        opened = self._opened(shard)
        mirrored = mirrored and LATENT_FLIPPED in self._members
        held = LATENT_FLIPPED if mirrored else self._held
        text, content = (opened.content(row, self._members.index(name)) for name in (SCENE, held))
        try:
            return self._record(text, content, mirrored=mirrored)
        except _UNREADABLE as error:
            raise self._unreadable(shard, row, error) from error

    def at(self, place: Place) -> Record:
        """A sample whose place is known: its bytes are read and nothing else, of a remote shard too.

        Args:
            place: Of this folder.

        Returns:
            The sample.

        Raises:
            SampleUnreadable: What is stored there is no picture, no latent or no scene, or another scene than was noted.
        """
        content = self._part(place)
        try:
            found = {
                one.name.partition(".")[2]: content[one.offset : one.offset + one.size]
                for one in members(lambda size, at: content[at : at + size], len(content))
            }
            record = self._record(found[SCENE], found[self._held], mirrored=False)
            if hash_of(record.scene.id) != place.hash:
                raise ValueError(f"scene {record.scene.id} is not the one that {INDEX} notes there")
            return record
        except (*_UNREADABLE, KeyError) as error:
            raise self._unreadable(place.shard, place.row, error) from error

    def lowest(self) -> Lowest | None:
        """Where the samples with the lowest hashes lie, as the index notes them; None where it is from before."""
        return lowest_of(self.index)

    def all_places(self) -> Lowest:
        """Where every sample lies, after reading all ids; a scene that cannot be read is left out.

        Returns:
            All samples.

        Raises:
            ShardError: They are remote: all bytes of all shards would be fetched.
        """
        if not isinstance(self.path, Path):
            noted = self.lowest()
            known = "no hashes of its scenes" if noted is None else f"the hashes of {len(noted.places)} scenes"
            raise ShardError(
                f"data.validation_samples: {self.path}: its {INDEX} has {known}; lower data.validation_samples, give "
                f"data.validation_shards=DIR, or {MAKE_AGAIN}"
            )
        log.warning("%s: the ids of its %d scenes are read, to hold some out", self.path, len(self))
        places = []
        for shard, entry in enumerate(self.entries):
            opened = self._opened(shard)
            for row in range(entry.count):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    text = opened.content(row, self._members.index(SCENE))
                    begin, end = opened.span(row)
                    value = hash_of(parse_json(text)["id"])
                    places.append(Place(hash=value, shard=shard, row=row, offset=begin, bytes=end - begin))
        return Lowest(below=EVERY, places=tuple(places))

    @property
    def _held(self) -> str:
        """The member that is not the scene: a picture or a latent."""
        return next(name for name in (LATENT, *PICTURES) if name in self._members)

    def _record(self, text: bytes, content: bytes, *, mirrored: bool) -> Record:
        """A sample of the bytes of its scene and of its picture or latent."""
        scene = Scene.from_json(parse_json(text))
        if self.latents is not None:
            latent, log_variance = self._halves(_array(content))
            return Record(scene=scene, latent=latent, log_variance=log_variance, mirrored=mirrored)
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            return Record(scene=scene, image=np.array(image if image.mode == "RGB" else image.convert("RGB")))

    def _part(self, place: Place) -> bytes:
        """The bytes of a sample in its shard."""
        entry = self.entries[place.shard]
        if not isinstance(self.path, Path):
            assert self._cache is not None
            return self._cache.part(self.path, entry, place.offset, place.bytes)
        file = os.open(self.path / entry.name, os.O_RDONLY)
        try:
            return os.pread(file, place.bytes, place.offset)
        finally:
            os.close(file)

    @property
    def fetches_ahead(self) -> bool:
        """Whether shards are remote, and there is room for those of a window before they are needed."""
        return self.has_room_ahead and not isinstance(self.path, Path)

    def fetch(self, shards: Sequence[int]) -> None:
        """Has copies of remote shards made beside whatever else is done; what goes wrong is said when they are read."""
        if self.fetches_ahead:
            threading.Thread(target=self._fetch, args=(tuple(shards),), daemon=True, name="shards ahead").start()

    def _fetch(self, shards: Sequence[int]) -> None:
        first = os.getpid() % len(shards)  # each process begins with another one
        for shard in (*shards[first:], *shards[:first]):
            with contextlib.suppress(OSError, ShardError):
                os.close(self._file(shard))

    def _halves(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """A stored latent by itself, or mean and log-variance of moments; refused where it is not of the form that was said."""
        assert self.latents is not None
        if stored.shape != self.latents.stored_shape:
            raise ValueError(f"a latent of shape {stored.shape} where {INDEX} says {self.latents.stored_shape}")
        channels = self.latents.channels
        return (stored[:channels], stored[channels:]) if self.latents.moments else (stored, None)

    def _place(self, number: int) -> tuple[int, int]:
        """Shard and row of a sample."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number}: {self.path} holds 0 to {len(self) - 1}")
        shard = bisect.bisect_right(self._ends, number)
        return shard, number - (self._ends[shard] - self.sizes[shard])

    def _unreadable(self, shard: int, row: int, error: Exception) -> SampleUnreadable:
        where = f"shards={self.path}: {self.entries[shard].name} row {row}"
        return SampleUnreadable(f"{where}: {error}; run `python prepare.py task=check shards={self.path}`")

    def _opened(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened is None:
            opened = _OpenShard(self._file(shard), self.entries[shard], self._members, place=self.path)
            kept = list(self._open.items())[max(0, len(self._open) - _OPEN_SHARDS + 1) :]
            if self._cache is not None:  # a copy that went takes its place on the disk until it is closed
                kept = [(number, other) for number, other in kept if other.is_there]
            # A new dictionary each time, so that threads never see a half-changed one.
            self._open = {**dict(kept), shard: opened}
        return opened

    def _file(self, shard: int) -> int:
        """A shard, or its copy, opened."""
        entry = self.entries[shard]
        if isinstance(self.path, Path):
            return os.open(self.path / entry.name, os.O_RDONLY)
        assert self._cache is not None
        return self._cache.open(self.path, entry)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a full check found: `faults` has a line for each shard that is not as the index says."""

    path: Path
    shards: int
    samples: int
    bytes: int
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is as the index says."""
        return not self.faults

    def __str__(self) -> str:
        size = f"{self.shards} shards, {self.samples} samples, {self.bytes / 1e6:.1f} MB"
        if self.ok:
            return f"{self.path}: {size}, all as {INDEX} says"
        return "\n".join([f"{self.path}: {size}, {len(self.faults)} faults:", *self.faults])


def check_shards(path: str | Path, *, progress: Progress | None = None) -> ShardReport:
    """Read every byte of a folder of shards and compare it with the index.

    Args:
        path: The folder.
        progress: Called with (shards read, shards) after each shard.

    Returns:
        What was found; faults are told, not raised.

    Raises:
        ShardError: There is no folder or no index to compare with.
    """
    path = Path(path)
    index = read_index(path)
    entries = [ShardEntry(**entry) for entry in index["shards"]]
    faults = []
    for done, entry in enumerate(entries, start=1):
        fault = fault_of(path, entry, "sha256")
        if fault is None:
            try:
                _OpenShard(os.open(path / entry.name, os.O_RDONLY), entry, index["members"], place=path)
            except ShardError as error:
                fault = str(error)
        if fault is not None:
            faults.append(fault)
        if progress is not None:
            progress(done, len(entries))
    strays = {file.name for file in path.glob("*.tar")} - {entry.name for entry in entries}
    faults += [f"{name} is not in {INDEX}" for name in sorted(strays)]
    samples, size = sum(entry.count for entry in entries), sum(entry.bytes for entry in entries)
    return ShardReport(path=path, shards=len(entries), samples=samples, bytes=size, faults=tuple(faults))
