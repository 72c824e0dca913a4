"""Checking shards: every byte against the index, and every sample by itself.

Against the index: sizes, checksums, numbers of samples, members, counts. By itself: the scene's keys and ranges, a picture
that can be decoded and has the size that the scene's frame says, a latent of the form that the index says.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.shard_index import INDEX, LATENT, LATENT_FLIPPED, SCENE, ShardEntry, ShardError, read_index
from datamodules.shard_writer import Progress, count_scene
from datamodules.sources.base import PROVIDABLE, LatentForm
from datamodules.storage import Folder, folder_at
from preparation.runner import read_samples
from preparation.stage import PICTURES, Sample
from preparation.work import SingleProcess, WorkSplit


@dataclass(kw_only=True)
class Check:
    """Outcome of a check.

    Attributes:
        place: The folder.
        shards: Shards that were looked at.
        samples: Samples that the index says are in them.
        bytes: Their size.
        faults: A line for each thing that is wrong.
    """

    place: str
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        size = f"{self.shards} shards, {self.samples} samples, {self.bytes / 1e6:.1f} MB"
        if not self.faults:
            return f"{self.place}: {size}, all as {INDEX} says, every scene and picture sound"
        return "\n".join([f"{self.place}: {size}, {len(self.faults)} faults:", *self.faults])


def check_folder(shards: str | Path, *, ranks: WorkSplit | None = None, progress: Progress | None = None) -> Check:
    """Read every sample of a folder of shards.

    Args:
        shards: A path or an address of fsspec's.
        ranks: Which share of the shards is this process's; what concerns all of them is looked at where all are.
        progress: Called with (samples read, samples).

    Returns:
        What was found; faults are told, not raised.

    Raises:
        ShardError: There is no index to compare with.
    """
    folder = folder_at(shards)
    index = read_index(folder)
    entries = [ShardEntry(**entry) for entry in index["shards"]]
    share = (ranks or SingleProcess()).share(range(len(entries)))
    total, done = sum(entries[number].count for number in share), 0
    check, counts = Check(place=str(shards)), Counter(dict.fromkeys(index["counts"], 0))
    for number in share:
        entry = entries[number]
        check.shards, check.samples, check.bytes = (
            check.shards + 1,
            check.samples + entry.count,
            check.bytes + entry.bytes,
        )
        try:
            for sample in read_samples(folder, entry):
                done += 1
                if isinstance(sample, Sample):
                    count_scene(counts, sample.scene)
                    check.faults += [f"{entry.name} {fault}" for fault in faults_of(sample, index)]
                else:
                    check.faults.append(sample)
                if progress is not None:
                    progress(done, total)
        except ShardError as error:
            check.faults.append(str(error))
    if len(share) == len(entries):
        check.faults += _faults_of_all(folder, index, entries, counts, has_faults=bool(check.faults))
    return check


def faults_of(sample: Sample, index: dict[str, Any]) -> list[str]:
    """Return what is wrong with a sample whose scene could be read.

    Args:
        sample: The sample.
        index: Of its shards.

    Returns:
        A line for each thing.
    """
    where = f"sample {sample.key}: scene {sample.scene.id}"
    members = sorted([*sample.members, SCENE])
    if members != sorted(index["members"]):
        return [f"{where}: has {', '.join(members)} where {INDEX} says {', '.join(index['members'])}"]
    return [f"{where}: {fault}" for fault in _content_faults(sample, index)]


def _content_faults(sample: Sample, index: dict[str, Any]) -> list[str]:
    frame = sample.scene.frame
    if LATENT in sample.members:
        form = LatentForm(**index["latents"])
        for name, word in ((LATENT, "latent"), (LATENT_FLIPPED, "latent of the mirrored picture")):
            if name in sample.members and (fault := _latent_fault(sample.members[name], form)) is not None:
                return [f"{word}: {fault}"]
        size = form.pixels
    elif any(name in sample.members for name in PICTURES):
        try:
            picture = sample.picture()
        except ShardError as error:
            return [str(error).partition(f"scene {sample.scene.id}: ")[2] or str(error)]
        size = (picture.height, picture.width)
    else:
        return []
    if frame is not None and frame.target != size:
        return [f"frame: target {frame.target} is not the picture's (height, width) {size}"]
    return []


def _latent_fault(content: bytes, form: LatentForm) -> str | None:
    """Return what is wrong with a stored latent, if anything."""
    try:
        latent = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        return " ".join(str(error).split())
    if latent.shape != form.stored_shape or latent.dtype not in (np.float16, np.float32):
        return f"{latent.shape} {latent.dtype} where {INDEX} says {form.stored_shape}"
    return None if np.isfinite(latent).all() else "holds numbers that are not finite"


def _faults_of_all(
    folder: Folder, index: dict[str, Any], entries: list[ShardEntry], counts: Counter[str], *, has_faults: bool
) -> list[str]:
    """Return what is wrong with the folder as a whole."""
    faults = []
    strays = {name for name in folder.names() if name.endswith(".tar")} - {entry.name for entry in entries}
    faults += [f"{name} is not in {INDEX}" for name in sorted(strays)]
    if unknown := sorted(set(index["provides"]) - PROVIDABLE):
        faults.append(f"{INDEX}: provides {', '.join(unknown)}, which no shards can")
    if not has_faults:  # else they cannot agree
        faults += [
            f"{INDEX}: counts: {number} {name} where the shards hold {counts[name]}"
            for name, number in index["counts"].items()
            if counts[name] != number
        ]
    return faults
