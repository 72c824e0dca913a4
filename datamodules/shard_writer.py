"""Writing a source as shards: deterministic bytes, whole or not at all.

Here is what makes the files; their layout is told in `shards.py`, the form of the index in `shard_index.py`.
"""

import contextlib
import fcntl
import hashlib
import inspect
import io
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from webdataset import TarWriter

from datamodules.shard_index import FORMAT, INDEX, SCENE, VERSION, ShardEntry, ShardError
from datamodules.sources.base import Source
from scenes.scene import Scene

Progress = Callable[[int, int], object]
_PICTURE_FORMATS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95},
}


def write_shards(source: Source, out: str | Path, *, shard_size: int = 1000, progress: Progress | None = None) -> Path:
    """Write a source as shards, whole or not at all.

    The same source gives the same bytes, so the checksums tell whether two folders hold the same data.
    Everything goes into a hidden folder beside `out` that is renamed at the end; a second writer of the same
    folder waits for the first.

    Args:
        source: What to write. It may say how: `image_format` is "jpg" (lossy, the default) or "png"; `name`
            and `arguments` are recorded in the index.
        out: The folder to make; it must not be there yet.
        shard_size: Samples of a shard; the last one holds the rest.
        progress: Called with (samples written, samples the source announces) after each sample.

    Returns:
        The folder.

    Raises:
        ShardError: `out` is there already, the disk is full or refuses, the source is empty, or a picture
            does not have the size that its scene's frame says.
    """
    out = Path(out)
    picture_format = getattr(source, "image_format", "jpg")
    if shard_size < 1:
        raise ShardError(f"shard_size={shard_size}: give the samples of a shard, 1 or more")
    if picture_format not in _PICTURE_FORMATS:
        raise ShardError(f"{type(source).__name__}.image_format={picture_format!r}: choose png or jpg")
    counts: Counter[str] = Counter(dict.fromkeys(("samples", "objects", "boxes", "relations"), 0))
    entries: list[ShardEntry] = []
    with _whole_or_nothing(out) as folder:
        samples = iter(source)
        for number in itertools.count():
            chunk = itertools.islice(samples, shard_size)
            if (first := next(chunk, None)) is None:
                break
            with _shard_writer(folder / f"{number:06d}.tar", entries, out=out) as write:
                for scene, picture in itertools.chain([first], chunk):
                    # Encoding is not under the guard of the disk: a source's own OSError is not ours to
                    # explain.
                    sample = _encode(scene, picture, picture_format)
                    write({"__key__": f"{counts['samples']:09d}", **sample})
                    _count(counts, scene)
                    if progress is not None:
                        progress(counts["samples"], len(source))
        if not entries:
            raise ShardError(
                f"out={out}: the source {type(source).__name__} gave no samples; check where it reads from"
            )
        index = {
            "format": FORMAT,
            "version": VERSION,
            "source": describe(source),
            "provides": sorted(source.provides),
            "members": sorted((picture_format, SCENE)),
            "counts": dict(counts),
            "shards": [asdict(entry) for entry in entries],
        }
        with _disk(out), (folder / INDEX).open("w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=1, ensure_ascii=False) + "\n")
            _sync(file)
    return out


def describe(source: Source) -> dict[str, Any]:
    """What the index says of a source: its name and its constructor's arguments, in JSON's values.

    The arguments are the attributes of the same names; a source that keeps them otherwise has `arguments` of
    its own.
    """
    arguments = getattr(source, "arguments", None)
    if arguments is None:
        names = inspect.signature(type(source)).parameters
        values = {name: getattr(source, name, None) for name in names}
        arguments = {name: _plain(value) for name, value in values.items() if value is not None}
    return {"name": getattr(source, "name", type(source).__name__), "arguments": arguments}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain(item) for item in value]
        return sorted(items) if isinstance(value, (set, frozenset)) else items
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _encode(scene: Scene, picture: Image.Image, picture_format: str) -> dict[str, bytes]:
    if scene.frame is not None and scene.frame.target != (picture.height, picture.width):
        raise ShardError(
            f"scene {scene.id!r}: frame: target {scene.frame.target} is not the picture's (height, width) "
            f"{(picture.height, picture.width)}; correct the source"
        )
    encoded = io.BytesIO()
    picture.convert("RGB").save(encoded, **_PICTURE_FORMATS[picture_format])
    text = json.dumps(scene.to_json(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return {picture_format: encoded.getvalue(), SCENE: text.encode()}


def _count(counts: Counter[str], scene: Scene) -> None:
    counts["samples"] += 1
    counts["objects"] += len(scene.objects)
    counts["boxes"] += sum(item.box is not None for item in scene.objects)
    counts["relations"] += len(scene.relations)


class _HashingFile:
    """A file that is only written to and knows the size and sha256 of what went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@contextlib.contextmanager
def _shard_writer(path: Path, entries: list[ShardEntry], *, out: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function that writes samples to a new shard, whose entry is appended at the end."""
    count = 0
    with _disk(out):
        file = path.open("wb")
    hashing = _HashingFile(file)
    # Fixed owner, mode and time: the bytes depend on the samples alone.
    tar = TarWriter(hashing, user="", group="", mode=0o644, mtime=0, encoder=False)

    def write(sample: dict[str, Any]) -> None:
        nonlocal count
        with _disk(out):
            tar.write(sample)
        count += 1

    try:
        yield write
        with _disk(out):
            tar.close()
            _sync(file)
            file.close()
    finally:
        # After a failure both still hold data that they would try to write when collected.
        for stream in (tar, file):
            with contextlib.suppress(OSError):
                stream.close()
    entries.append(ShardEntry(name=path.name, count=count, bytes=hashing.bytes, sha256=hashing.sha256))


def _sync(file: Any) -> None:
    """Hand a file to the disk: some file systems report a full disk no sooner."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ShardError(
            f"out={out}: {error.strerror or error}; nothing was left behind: free some space or choose another folder"
        ) from error


@contextlib.contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and is gone when it does not.

    Its name is fixed and it is locked while in use: what a killed writer left is found and cleared by the
    next one.
    """
    partial = out.with_name(f".{out.name}.partial")
    with _disk(out):
        lock = _lock(partial, out)
    try:
        yield partial
        with _disk(out):
            os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock(partial: Path, out: Path) -> int:
    """Make `partial` an empty folder of this process alone; gives the descriptor that holds the lock."""
    while True:
        _refuse_existing(out)
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Whoever held the lock may have renamed or removed the folder by now.
            if partial.exists() and os.path.samestat(partial.stat(), os.fstat(lock)):
                if out.exists():
                    partial.rmdir()
                _refuse_existing(out)
                for left in partial.iterdir():
                    left.unlink()
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _refuse_existing(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ShardError(f"out={out}: is there already; choose another folder or remove it first")
