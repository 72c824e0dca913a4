"""Running a stage over a folder of shards: every shard gives a shard of the same name, or nothing where no sample is left.

Here is what a stage over shards is as work; how work is split, survives kills and ends in an index is in `engine.py`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datamodules.shard_index import INDEX, MAKE_AGAIN, SCENE, ShardEntry, ShardError, fault_of, read_index
from datamodules.shard_writer import Progress
from datamodules.sources.base import LatentForm, LeftOut
from datamodules.storage import Folder, folder_at
from datamodules.tar_members import members
from preparation.engine import run_work
from preparation.stage import Sample, Stage
from preparation.work import Piece, Report, Work, WorkSplit, project_version
from scenes.json_form import parse_json
from scenes.scene import Scene

ACCOUNT = ("left_out", "skipped", "notes")  # what an index says of the latest step; of earlier ones `stages` has it


def run_stage(
    stage: Stage,
    shards: str | Path,
    out: str | Path,
    *,
    ranks: WorkSplit | None = None,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> Report:
    """Make shards of shards.

    Killed and run again it goes on: at most one shard is made twice. Over any number of processes the folder is the same, byte
    for byte.

    Args:
        stage: What is done to the samples.
        shards: Folder that is read, a path or an address of fsspec's.
        out: Folder that is made, likewise; one that was begun with the same stage and shards is resumed.
        ranks: Which share of the shards is this process's; all of them if not given.
        max_bad_fraction: Share of the samples that may be unreadable: they are skipped, counted and listed.
        progress: Called with (samples taken, samples to take).

    Returns:
        What became of the share: shards that cannot be read or written are told there, and the others are made.

    Raises:
        ShardError: The shards lack what the stage requires, or `out` holds something else.
        TooManyBad: More samples than allowed could not be read.
    """
    source, target = folder_at(shards), folder_at(out)
    if _same(source, target):
        raise ShardError(f"out={out}: is the folder that is read, shards={shards}; choose another")
    return run_work(StageWork(stage, source), target, ranks=ranks, max_bad_fraction=max_bad_fraction, progress=progress)


class StageWork(Work):
    """A stage over the shards of a folder.

    Args:
        stage: What is done to the samples.
        folder: The shards.

    Raises:
        ShardError: There is no index, or the shards lack what the stage requires.
    """

    def __init__(self, stage: Stage, folder: Folder) -> None:
        self._stage, self._folder = stage, folder
        self._index = read_index(folder)
        self._sha256 = hashlib.sha256(folder.read(INDEX)).hexdigest()
        self._entries = [ShardEntry(**entry) for entry in self._index["shards"]]
        provided = frozenset(self._index["provides"])
        check_requires(stage, provided, folder)
        form = LatentForm(**self._index["latents"]) if "latents" in self._index else None
        self.latent_form = stage.latent_form(form)
        self.pieces = [Piece(name=_stem(entry.name), samples=entry.count) for entry in self._entries]
        self.left_out = LeftOut()
        self.manifest = {
            "task": stage.name,
            "settings": stage.settings(),
            "input": self._sha256,
            "provides": sorted(stage.provides(provided)),
            **({"latents": asdict(self.latent_form)} if self.latent_form is not None else {}),
        }

    def samples(self, number: int, start: int, taken: Callable[[], object]) -> Iterator[Sample]:
        """The samples that the stage makes of a shard's, in one run.

        Args:
            number: Which shard.
            start: 0.
            taken: Called for each sample that is read.

        Yields:
            The samples.
        """
        own = self._stage.left_out = self.left_out = LeftOut()
        entry = self._entries[number]

        def read() -> Iterator[Sample]:
            # a stage may begin its account anew; what is unreadable here goes into the same one
            for sample in read_samples(self._folder, entry):
                taken()
                if isinstance(sample, Sample):
                    yield sample
                else:
                    own.skip(sample)

        for sample in self._stage(read()):
            self.left_out = self._joined(own)
            yield sample
        self.left_out = self._joined(own)

    def _joined(self, own: LeftOut) -> LeftOut:
        """Return what the stage left out, and what could not even be read."""
        told = self._stage.left_out
        if told is own or not own.skipped:
            return told
        joined = LeftOut()
        joined.add(own)
        joined.add(told)
        return joined

    def index(self, total: LeftOut) -> dict[str, Any]:
        """As `Work`: the source of the shards that were read, and their stages with this one behind.

        Args:
            total: The account of all shards.

        Returns:
            source, provides, stages.
        """
        total.notes += self._stage.report(total)
        return {
            "source": self._index["source"],
            "provides": self.manifest["provides"],
            "stages": [
                *stages_of(self._index),
                {
                    "name": self._stage.name,
                    "settings": self._stage.settings(),
                    "version": project_version(),
                    "input": self._sha256,
                },
            ],
        }

    def seen(self, good: int, bad: int, *, whole: int) -> int:
        """As `Work`: the samples of all shards that are read."""
        return sum(entry.count for entry in self._entries)


def check_requires(stage: Stage, provided: frozenset[str], shards: Any) -> None:
    """Reject shards that lack what a stage requires.

    Args:
        stage: The stage.
        provided: What the shards carry.
        shards: Their folder, for the message.

    Raises:
        ShardError: Something is missing; both are named.
    """
    if missing := sorted(stage.requires - provided):
        raise ShardError(
            f"task={stage.name} requires {', '.join(missing)}, but shards={shards} provide only "
            f"{', '.join(sorted(provided))}; give other shards or run the task first that adds it"
        )


def stages_of(index: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps that shards went through, each with its account.

    Args:
        index: Of the shards.

    Returns:
        Name, settings, version and input of each step, the first having no input; the last one's account with it.
    """
    stages = index.get("stages") or [{"name": "convert"}]
    account = {key: index[key] for key in ACCOUNT if key in index}
    return [*stages[:-1], {**stages[-1], **account}]


def read_samples(folder: Folder, entry: ShardEntry) -> Iterator[Sample | str]:
    """The samples of a shard, which is compared with its checksum first.

    Args:
        folder: The shards.
        entry: What the index says of the shard.

    Yields:
        Each sample; for one whose scene cannot be read the reason.

    Raises:
        ShardError: The shard is missing, truncated or changed, or holds other samples than the index says.
    """
    with _whole(folder, entry) as path:
        count = 0
        for key, content in _members(path, f"shards={folder}: {entry.name}"):
            count += 1
            where = f"{entry.name} sample {key}"
            scene = content.pop(SCENE, b"")
            try:
                yield Sample(key=key, scene=Scene.from_json(parse_json(scene), where=where), members=content)
            except (ValueError, UnicodeDecodeError) as error:
                text = "is empty" if not scene.strip() else str(error)
                yield text if text.startswith(where) else f"{where}: {SCENE}: {text}"
    if count != entry.count:
        raise ShardError(
            f"shards={folder}: {entry.name}: holds {count} samples where {INDEX} says {entry.count}; {MAKE_AGAIN}"
        )


def read_scenes(folder: Folder, entry: ShardEntry) -> Iterator[Scene]:
    """The scenes of a shard; of a local one nothing else is read.

    Args:
        folder: The shards.
        entry: What the index says of the shard.

    Yields:
        Each scene.

    Raises:
        ShardError: The shard is missing or truncated, or a scene cannot be read.
    """
    if (fault := fault_of(folder, entry, "size")) is not None:
        raise ShardError(f"shards={folder}: {fault}; copy it again or {MAKE_AGAIN}")
    with folder.reading(entry.name) as path:
        for key, content in _members(path, f"shards={folder}: {entry.name}", only=SCENE):
            where = f"shards={folder}: {entry.name} sample {key}"
            try:
                yield Scene.from_json(parse_json(content[SCENE]), where=where)
            except (ValueError, KeyError) as error:
                raise ShardError(
                    f"{where}: {SCENE}: {error}; run `python prepare.py task=check shards={folder}`"
                ) from None


@contextlib.contextmanager
def _whole(folder: Folder, entry: ShardEntry) -> Iterator[Path]:
    """A shard that is as the index says."""
    problem = fault_of(folder, entry, "size")
    if problem is None:
        with folder.reading(entry.name) as path:
            with path.open("rb") as file:
                is_same = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
            if is_same:
                yield path
                return
        problem = f"{entry.name} has changed: its sha256 is not the one in {INDEX}"
    raise ShardError(f"shards={folder}: {problem}; copy it again or {MAKE_AGAIN}")


def _members(path: Path, where: str, *, only: str | None = None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each sample of a tar."""
    file = os.open(path, os.O_RDONLY)
    try:
        key, content = None, {}
        for member in members(functools.partial(os.pread, file), os.fstat(file).st_size):
            stem, _, extension = member.name.partition(".")
            if stem != key:
                if key is not None:
                    yield key, content
                key, content = stem, {}
            if only in (None, extension):
                content[extension] = os.pread(file, member.size, member.offset)
        if key is not None:
            yield key, content
    except ValueError as error:
        raise ShardError(f"{where}: {error}; {MAKE_AGAIN}") from None
    finally:
        os.close(file)


def _stem(name: str) -> str:
    return name.removesuffix(".tar")


def _same(one: Folder, other: Folder) -> bool:
    places = [folder.place if "://" in folder.place else str(Path(folder.place).resolve()) for folder in (one, other)]
    return places[0] == places[1]
