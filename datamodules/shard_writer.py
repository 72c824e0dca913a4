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

import numpy as np
from webdataset import TarWriter

from datamodules.held_out import Notes
from datamodules.shard_index import FORMAT, INDEX, LATENT, SCENE, VERSION, ShardEntry, ShardError
from datamodules.sources.base import Content, EncodedPicture, LatentForm, LeftOut, Source
from scenes.scene import Scene

Progress = Callable[[int, int], object]
PICTURE_FORMATS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95},
}


class TooManyBad(ShardError):
    """More samples could not be read than was allowed; `skipped` has a line for each."""

    def __init__(self, message: str, *, skipped: list[str]) -> None:
        super().__init__(message)
        self.skipped = skipped


def write_shards(
    source: Source,
    out: str | Path,
    *,
    shard_size: int = 1000,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> Path:
    """Write a source as shards, whole or not at all.

    The same source gives the same bytes, so the checksums tell whether two folders hold the same data.
    Everything goes into a hidden folder beside `out` that is renamed at the end; a second writer of the same
    folder waits for the first.

    Args:
        source: What to write. It may say how: `image_format` is "jpg" (lossy, the default) or "png"; `name`
            and `arguments` are recorded in the index.
        out: The folder to make; it must not be there yet.
        shard_size: Samples of a shard; the last one holds the rest.
        max_bad_fraction: Share of the samples that the source may fail to read; they are left out and listed in
            the index.
        progress: Called with (samples written, samples the source announces) after each sample.

    Returns:
        The folder.

    Raises:
        ShardError: `out` is there already, the disk is full or refuses, the source is empty, or a picture
            does not have the size that its scene's frame says.
        TooManyBad: More than `max_bad_fraction` could not be read.
    """
    out = Path(out)
    picture_format = getattr(source, "image_format", "jpg")
    if shard_size < 1:
        raise ShardError(f"shard_size={shard_size}: give the samples of a shard, 1 or more")
    if picture_format not in PICTURE_FORMATS:
        raise ShardError(f"{type(source).__name__}.image_format={picture_format!r}: choose png or jpg")
    counts: Counter[str] = Counter(dict.fromkeys(("samples", "captions", "objects", "boxes", "relations"), 0))
    entries: list[ShardEntry] = []
    with _whole_or_nothing(out) as folder:
        announced = len(source)
        notes = Notes(announced)
        samples = iter(source)
        for number in itertools.count():
            chunk = itertools.islice(samples, shard_size)
            if (first := next(chunk, None)) is None:
                break
            name = f"{number:06d}.tar"
            with _shard_writer(folder / name, entries, out=out) as write:
                for row, (scene, content) in enumerate(itertools.chain([first], chunk)):
                    # Encoding is not under the guard of the disk: a source's own OSError is not ours to
                    # explain.
                    members = encode_content(scene, content, picture_format, source.latent_form)
                    span = write({"__key__": f"{counts['samples']:09d}", **members, SCENE: scene_bytes(scene)})
                    notes.add(scene.id, name, row, span)
                    count_scene(counts, scene)
                    # Too many of all that may come: no need to read the rest.
                    _refuse_bad(source, counts["samples"], out, most=max_bad_fraction, of=announced)
                    if progress is not None:
                        progress(counts["samples"], announced)
        _refuse_bad(source, counts["samples"], out, most=max_bad_fraction)
        if not entries:
            raise ShardError(
                f"out={out}: the source {type(source).__name__} gave no samples"
                f"{''.join(f', {reason}: {n}' for reason, n in _left_out(source).counts.items())}; "
                "check where it reads from and its filters"
            )
        index = {
            "format": FORMAT,
            "version": VERSION,
            "source": describe(source),
            "provides": sorted(source.provides),
            "members": sorted((picture_format if source.latent_form is None else LATENT, SCENE)),
            **({"latents": asdict(source.latent_form)} if source.latent_form is not None else {}),
            "counts": dict(counts),
            **account_of(_left_out(source)),
            "lowest_hashes": notes.to_json(),
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


def _left_out(source: Source) -> LeftOut:
    return source.left_out or LeftOut()


def _refuse_bad(source: Source, good: int, out: Path, *, most: float, of: int | None = None) -> None:
    """Refuses data of which too much could not be read.

    Args:
        source: Has told what it skipped.
        good: Samples that were written.
        out: Folder of the shards, for the message.
        most: Share of the samples that may be bad.
        of: How many samples there may be; those so far if not given.

    Raises:
        TooManyBad: More are.
    """
    left_out = _left_out(source)
    seen = good + left_out.bad
    if left_out.bad > most * (of or seen):
        raise TooManyBad(
            f"out={out}: {left_out.bad} of {seen} samples could not be read, more than "
            f"max_bad_fraction={most:g}, so nothing was kept; mend them or raise max_bad_fraction "
            f"(the first: {left_out.skipped[0]})",
            skipped=left_out.skipped,
        )


def account_of(left_out: LeftOut) -> dict[str, Any]:
    """What the index says of what is not there; nothing for a source that left nothing out."""
    told = {"left_out": dict(sorted(left_out.counts.items())), "notes": left_out.notes}
    if left_out.bad:
        told["skipped"] = {"samples": left_out.bad, "reasons": left_out.skipped}
    return {key: value for key, value in told.items() if value}


def scene_bytes(scene: Scene) -> bytes:
    """A scene as shards hold it."""
    return json.dumps(scene.to_json(), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def encode_content(scene: Scene, content: Content, picture_format: str, form: LatentForm | None) -> dict[str, bytes]:
    """The members of a sample of a source beside its scene.

    Args:
        scene: Its scene.
        content: Its picture or latent.
        picture_format: How a picture is encoded that is not yet: png, jpg.
        form: The form that a latent must have.

    Returns:
        Content by extension.

    Raises:
        ShardError: The latent has another form, or the scene's frame is not the picture's.
    """
    encoded = io.BytesIO()
    if isinstance(content, np.ndarray):
        if form is None or content.shape != form.stored_shape:
            raise ShardError(
                f"scene {scene.id!r}: latent of shape {content.shape} where the source's latent_form is {form}; "
                "correct the source"
            )
        _check_size(scene, form.pixels)
        np.save(encoded, content, allow_pickle=False)
        return {LATENT: encoded.getvalue()}
    _check_size(scene, (content.height, content.width))
    if isinstance(content, EncodedPicture):
        return {picture_format: content.data}
    content.convert("RGB").save(encoded, **PICTURE_FORMATS[picture_format])
    return {picture_format: encoded.getvalue()}


def _check_size(scene: Scene, size: tuple[int, int]) -> None:
    if scene.frame is not None and scene.frame.target != size:
        raise ShardError(
            f"scene {scene.id!r}: frame: target {scene.frame.target} is not the picture's (height, width) "
            f"{size}; correct the source"
        )


def count_scene(counts: Counter[str], scene: Scene) -> None:
    """Add a sample to the counts of an index."""
    counts["samples"] += 1
    # a source with several captions of a picture keeps them all in the provenance
    counts["captions"] += len(scene.provenance.get("captions") or ()) or bool(scene.caption)
    counts["objects"] += len(scene.objects)
    counts["boxes"] += sum(item.box is not None for item in scene.objects)
    counts["relations"] += len(scene.relations)


def tar_writer(file: "HashingFile") -> TarWriter:
    """What writes samples to a file; owner, mode and time are fixed, so that the bytes depend on the samples alone."""
    return TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)


def written_to(tar: TarWriter, sample: dict[str, Any]) -> range:
    """Writes a sample, and gives the bytes of the file that it takes."""
    begin = tar.tarstream.offset  # of the tar, whatever part of it lies in a buffer
    tar.write(sample)
    return range(begin, tar.tarstream.offset)


class HashingFile:
    """A file that is only written to and knows the size and sha256 of what went into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        """Writes all of the data."""
        self._hash.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._hash.hexdigest()


@contextlib.contextmanager
def _shard_writer(path: Path, entries: list[ShardEntry], *, out: Path) -> Iterator[Callable[[dict[str, Any]], range]]:
    """Gives a function that writes samples to a new shard, and tells where; the shard's entry is appended at the end."""
    count = 0
    with _disk(out):
        file = path.open("wb")
    hashing = HashingFile(file)
    tar = tar_writer(hashing)

    def write(sample: dict[str, Any]) -> range:
        nonlocal count
        with _disk(out):
            span = written_to(tar, sample)
        count += 1
        return span

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
