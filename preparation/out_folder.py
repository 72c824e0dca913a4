"""The folder that preparation writes to: whose work it holds, its shards one after the other, and what it refuses.

Which shards are written, and when, is decided in `engine.py`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from datamodules.shard_index import ShardEntry, ShardError
from datamodules.shard_writer import HashingFile, tar_writer, written_to
from datamodules.storage import Folder
from preparation.work import Work, project_version
from scenes.json_form import parse_json

MANIFEST = "manifest.json"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_BLOCK, _RECORD = 512, 10240  # of a tar: members are padded to the one, the file to the other


class OutError(ShardError):
    """The folder that is written to cannot take more; `is_full` where its disk is."""

    def __init__(self, message: str, *, is_full: bool) -> None:
        super().__init__(message)
        self.is_full = is_full


@contextlib.contextmanager
def writing_to(out: Folder) -> Iterator[None]:
    """Report in one line what the folder refuses; an error of whoever makes the samples is not explained here."""
    try:
        yield
    except OSError as error:
        raise OutError(
            f"out={out}: {error.strerror or error}; what is whole stays: free some space, or fix the folder, and run it again",
            is_full=error.errno in _DISK_FULL,
        ) from error


def claim(work: Work, out: Folder) -> None:
    """Write down what is made in a folder, or reject one where other work was begun."""
    names = out.names()
    if MANIFEST not in names and not out.has(MANIFEST):
        if names:
            raise ShardError(
                f"out={out}: is there already, and is no unfinished work; choose another folder or remove it first"
            )
        out.write(MANIFEST, json_bytes({**work.manifest, "project": project_version()}))
    try:
        begun = parse_json(out.read(MANIFEST))
        begun.pop("project")
    except (ValueError, KeyError, AttributeError):
        raise ShardError(f"out={out}: its {MANIFEST} cannot be read; remove the folder and begin again") from None
    wanted = parse_json(json_bytes(work.manifest))
    if begun == wanted:
        return
    old, new = dict(_flat(begun)), dict(_flat(wanted))
    changed = [
        f"{name}={_short(old.get(name))} (now {_short(new.get(name))})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    raise ShardError(
        f"out={out}: was begun with {', '.join(changed[:3])}; give the same again, choose another folder or remove this one"
    )


def withdraw(out: Folder) -> None:
    """Take back the claim on a folder in which nothing was made."""
    with contextlib.suppress(OSError):
        if out.names() <= {MANIFEST}:
            out.remove(MANIFEST)
            out.remove_if_empty()


def mark_of(manifest: dict[str, Any]) -> str:
    """Return the mark of files that belong to a manifest."""
    return hashlib.sha256(json_bytes(manifest)).hexdigest()


class RunWriter:
    """The shards of a run: one after the other, each whole before the next begins, numbered on from those of earlier runs."""

    def __init__(self, out: Folder, name: str, most_bytes: int | None, earlier: Sequence[dict[str, Any]]) -> None:
        self.entries = [ShardEntry(**entry) for entry in earlier]
        self._out, self._name, self._most = out, name, most_bytes
        self._stack = contextlib.ExitStack()
        self._tar: Any = None

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._end()
        else:
            self._stack.__exit__(kind, error, trace)

    def write(self, key: str, members: dict[str, bytes]) -> tuple[str, int, range]:
        """Write a sample; return shard, row and bytes."""
        size = sum(_BLOCK + -(-len(content) // _BLOCK) * _BLOCK for content in members.values())
        if self._tar is not None and self._most is not None and _tar_size(self._size + size) > self._most:
            self._end()
        if self._tar is None:
            self._begin()
        with writing_to(self._out):
            span = written_to(self._tar, {"__key__": key, **members})
        self._size += size
        self._count += 1
        return self._shard, self._count - 1, span

    def _begin(self) -> None:
        part = f"-{len(self.entries)}" if self.entries else ""
        self._shard = f"{self._name}{part}.tar"
        self._count = self._size = 0
        with writing_to(self._out):
            self._file = self._stack.enter_context(self._out.writing(self._shard)).open("wb")
        self._hashing = HashingFile(self._file)
        self._tar = tar_writer(self._hashing)
        for stream in (self._file, self._tar):
            self._stack.callback(_close, stream)

    def _end(self) -> None:
        if self._tar is None:
            return
        with writing_to(self._out):
            try:
                self._tar.close()
                self._file.close()
                self._tar = None
            except BaseException:
                self._stack.__exit__(*sys.exc_info())
                raise
            self._stack.close()
        self.entries.append(
            ShardEntry(name=self._shard, count=self._count, bytes=self._hashing.bytes, sha256=self._hashing.sha256)
        )


def _close(stream: Any) -> None:
    """Close what, after a failure, still holds data that it would try to write when collected."""
    with contextlib.suppress(OSError):
        stream.close()


def _tar_size(content: int) -> int:
    """Return the bytes of a tar with members of so many, padding included."""
    return -(-(content + 2 * _BLOCK) // _RECORD) * _RECORD


def json_bytes(value: Any) -> bytes:
    """Return a JSON file's content."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{at}.{key}" if at else str(key))
    else:
        yield at, value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
