"""`index.json` of a folder of shards: its form, and what can be wrong between it and the files beside it.

It is written last and names every shard with its samples, size and checksum, so a folder that has one is
whole. The shards themselves are written in `shard_writer.py` and read in `shards.py`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FORMAT = "scenograph-shards"
VERSION = 1
INDEX = "index.json"
SCENE = "scene.json"
LATENT = "latent.npy"
LATENT_FLIPPED = "latent_flipped.npy"  # of the mirrored picture
MAKE_AGAIN = "make the shards again with prepare.py"

Verify = Literal["size", "sha256"]


class ShardError(ValueError):
    """Shards that cannot be written or read; the message is one line with the folder and the way out."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What `index.json` says of a shard."""

    name: str
    count: int
    bytes: int
    sha256: str


def has_shards(path: str | Path) -> bool:
    """Whether a folder holds shards: an index is written last, so they are whole if it is there."""
    return (Path(path) / INDEX).is_file()


def read_index(path: str | Path) -> dict[str, Any]:
    """The content of a folder's `index.json`.

    Args:
        path: The folder.

    Returns:
        The index as JSON values.

    Raises:
        ShardError: There is no such folder, no index in it, or one that this version cannot read.
    """
    path = Path(path)
    how = f"make shards with `python prepare.py source=NAME source.root=PATH out={path}`"
    if not path.is_dir():
        raise ShardError(f"shards={path}: no such folder; give a folder of shards or {how}")
    if not has_shards(path):
        raise ShardError(f"shards={path}: the folder has no {INDEX}; {how}")
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        found = index["format"], index["version"]
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"shards={path}: {INDEX} is not an index of shards; {MAKE_AGAIN}") from None
    if found != (FORMAT, VERSION):
        raise ShardError(f"shards={path}: {INDEX} is of format {found}, this is {(FORMAT, VERSION)}; {MAKE_AGAIN}")
    return index


def fault_of(path: Path, entry: ShardEntry, verify: Verify) -> str | None:
    """What is wrong with a shard, if anything."""
    file = path / entry.name
    if not file.is_file():
        return f"{entry.name} is missing"
    size = file.stat().st_size
    if size != entry.bytes:
        how = "truncated" if size < entry.bytes else "not the one that was written"
        return f"{entry.name} is {how}: {size} bytes where {INDEX} says {entry.bytes}"
    if verify == "sha256":
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                return f"{entry.name} has changed: its sha256 is not the one in {INDEX}"
    return None
