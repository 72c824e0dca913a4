"""What published forms share as they are written: samples by their ids, pictures byte for byte, a folder that is whole or absent.

The forms are in `export_labels.py`, `export_igligen.py` and `export_laion_sg.py`, one family each.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datamodules.shard_index import ShardEntry, ShardError
from datamodules.storage import folder_at
from preparation.runner import read_samples
from preparation.stage import PICTURES, Sample
from scenes import Scene

WITHOUT_BOX = "objects without a box"
_PARTS = {  # what a form may have no place for, and how many of it a scene has
    "relations": lambda scene: len(scene.relations),
    "boxes": lambda scene: sum(item.box is not None for item in scene.objects),
    "scores": lambda scene: sum(item.score is not None for item in scene.objects),
    "masks": lambda scene: sum(item.mask is not None for item in scene.objects),
    "attributes": lambda scene: sum(len(item.attributes) for item in scene.objects),
    "descriptions": lambda scene: sum(bool(item.description) for item in scene.objects),
}


def named_samples(shards: str | Path, index: dict[str, Any], counts: Counter[str]) -> Iterator[tuple[str, Sample]]:
    """Yield shard and sample of every scene; what cannot be read is counted.

    Args:
        shards: The shards.
        index: Their index.
        counts: The account.

    Yields:
        Name of the shard without its suffix, and the sample.

    Raises:
        ShardError: Two scenes have one id, or an id cannot be the name of a file.
    """
    seen: set[str] = set()
    folder = folder_at(shards)
    for entry in (ShardEntry(**entry) for entry in index["shards"]):
        for sample in read_samples(folder, entry):
            if isinstance(sample, str):
                counts["samples that cannot be read"] += 1
                continue
            name = sample.scene.id
            if name in seen or not is_file_name(name):
                fault = "is there twice" if name in seen else "cannot be the name of a file"
                raise ShardError(f"scene {name}: {fault}; give scenes ids that are names, each its own")
            seen.add(name)
            yield entry.name.removesuffix(".tar"), sample


def count_untold(scene: Scene, kinds: Sequence[str], counts: Counter[str]) -> None:
    """Count what a scene has of kinds that a form has no place for: relations, boxes, scores, masks, attributes, descriptions."""
    for kind in kinds:
        if number := _PARTS[kind](scene):
            counts[f"{kind} that the form does not hold"] += number


def is_file_name(name: str) -> bool:
    """Return whether a text can be the name of a file in a folder, and of none that is hidden."""
    return Path(name).name == name and not name.startswith(".")


def picture_kind(sample: Sample) -> str:
    """Return the format that its picture is stored in, jpg or png; jpg where it has none."""
    return next((name for name in PICTURES if name in sample.members), "jpg")


def picture_bytes(sample: Sample) -> bytes:
    """Return its picture as it is stored.

    Args:
        sample: The sample.

    Returns:
        The file.

    Raises:
        ShardError: It has none.
    """
    content = sample.members.get(picture_kind(sample))
    if content is None:
        raise ShardError(f"scene {sample.scene.id}: has no picture; set export.pictures=false")
    return content


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well.

    Args:
        out: The folder to make.

    Yields:
        Where to write.

    Raises:
        ShardError: `out` is there already, or the disk refuses.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ShardError(f"out={out}: is there already; choose another folder or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ShardError(f"out={out}: {error.strerror or error}; free some space or choose another folder") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
