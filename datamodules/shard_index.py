"""`index.json` of a folder of shards: its form, and what can be wrong between it and the files beside it.

It is written last and names every shard with its samples, size and checksum, so a folder that has one is
whole. The shards themselves are written in `shard_writer.py` and read in `shards.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.storage import Folder, LocalFolder, folder_at
from scenes.json_form import parse_json

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
    return folder_at(path).has(INDEX)


def read_index(path: str | Path | Folder) -> dict[str, Any]:
    """The content of a folder's `index.json`.

    Args:
        path: The folder, or its address.

    Returns:
        The index as JSON values.

    Raises:
        ShardError: There is no such folder, no index in it, or one that this version cannot read.
    """
    folder = path if isinstance(path, Folder) else folder_at(path)
    how = f"make shards with `python prepare.py source=NAME source.root=PATH out={folder}`"
    if isinstance(folder, LocalFolder) and not folder.path.is_dir():
        raise ShardError(f"shards={folder}: no such folder; give a folder of shards or {how}")
    if not folder.has(INDEX):
        raise ShardError(f"shards={folder}: the folder has no {INDEX}; {how}")
    try:
        index = parse_json(folder.read(INDEX))
        found = index["format"], index["version"]
    except (ValueError, KeyError, TypeError):
        raise ShardError(f"shards={folder}: {INDEX} is not an index of shards; {MAKE_AGAIN}") from None
    if found != (FORMAT, VERSION):
        raise ShardError(f"shards={folder}: {INDEX} is of format {found}, this is {(FORMAT, VERSION)}; {MAKE_AGAIN}")
    return index


def fault_of(path: Path | Folder, entry: ShardEntry, verify: Verify) -> str | None:
    """What is wrong with a shard, if anything."""
    folder = path if isinstance(path, Folder) else LocalFolder(path)
    if (fault := size_fault(entry, folder.size(entry.name) if folder.has(entry.name) else None)) is not None:
        return fault
    if verify == "sha256" and folder.sha256(entry.name) != entry.sha256:
        return f"{entry.name} has changed: its sha256 is not the one in {INDEX}"
    return None


def size_fault(entry: ShardEntry, size: int | None) -> str | None:
    """What is wrong with a shard of `size` bytes, None for one that is not there, if anything."""
    if size is None:
        return f"{entry.name} is missing"
    if size == entry.bytes:
        return None
    how = "truncated" if size < entry.bytes else "not the one that was written"
    return f"{entry.name} is {how}: {size} bytes where {INDEX} says {entry.bytes}"
