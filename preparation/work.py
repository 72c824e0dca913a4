"""The engine of preparation: pieces of work that each give shards, over any number of processes and after kills.

Here is how a folder of shards comes about piece by piece: what is whole is kept, what is half is made again, and whoever ends
last writes the index. What a piece is made of is in `runner.py` (shards) and `conversion.py` (sources).

In the folder `manifest.json` says what is made there, and comes first; `000000.json` says that the shards of piece 000000 are
whole, and comes after them; of a piece that is made in several runs it is written after each and says where to go on;
`index.json` comes last. All of it depends on the input and the settings alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import sys
import tomllib
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datamodules.held_out import Notes, joined, shortened
from datamodules.shard_index import FORMAT, INDEX, SCENE, VERSION, ShardEntry, ShardError, fault_of
from datamodules.shard_writer import (
    HashingFile,
    Progress,
    TooManyBad,
    account_of,
    count_scene,
    scene_bytes,
    tar_writer,
    written_to,
)
from datamodules.sources.base import LatentForm, LeftOut
from datamodules.storage import Folder
from preparation.stage import Sample
from scenes.json_form import parse_json

MANIFEST = "manifest.json"
_COUNTED = ("samples", "captions", "objects", "boxes", "relations")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_BLOCK, _RECORD = 512, 10240  # of a tar: members are padded to the one, the file to the other


class OutError(ShardError):
    """The folder that is written to refuses; `is_full` where nothing more will go into it."""

    def __init__(self, message: str, *, is_full: bool) -> None:
        super().__init__(message)
        self.is_full = is_full


class Shares(Protocol):
    """What splits work between processes, such as `runtime.launch.ranks.Ranks`: the shares of all tile the items."""

    def share(self, items: Sequence[int]) -> list[int]:
        """This process's part of the items."""
        ...

    def block(self, items: Sequence[int]) -> list[int]:
        """This process's part of the items where neighbours are to stay together."""
        ...


class Alone:
    """The only process."""

    def share(self, items: Sequence[int]) -> list[int]:
        """All of them."""
        return list(items)

    block = share


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one process does; it is made in one run or in several, and of two runs the first stays when the second is killed.

    Attributes:
        name: Stem of its files.
        samples: Samples that it takes, for the progress; None where that is not known beforehand.
    """

    name: str
    samples: int | None


class Work(ABC):
    """What is to be made in a folder.

    Attributes:
        manifest: All that decides what comes out, as JSON values.
        pieces: The work, in the order of the index.
        left_out: The account of the piece that was made last.
        latent_form: The form of the latents, known at the latest when a piece was made; None for pictures.
        shard_bytes: Most bytes of a shard; a run of more gives several. None for one shard whatever its size.
        by_file: Whether pieces are input files: of these each process takes neighbours.
        next: Where the next run of the piece begins that was worked on last; None where it is whole.
    """

    manifest: dict[str, Any]
    pieces: list[Piece]
    left_out: LeftOut
    latent_form: LatentForm | None = None
    shard_bytes: int | None = None
    by_file: bool = False
    next: int | None = None

    @abstractmethod
    def samples(self, number: int, start: int, taken: Callable[[], object]) -> Iterator[Sample]:
        """The samples of a run of a piece, finished; `taken` is to be called for each one that it is made of."""

    def expect(self, numbers: Sequence[int]) -> None:  # noqa: B027
        """Prepare for the pieces that this process is going to make."""

    def size(self, number: int) -> int | None:
        """Samples that a piece takes, after `expect`; None where that is not known."""
        return self.pieces[number].samples

    @abstractmethod
    def index(self, total: LeftOut) -> dict[str, Any]:
        """What the index says beside the shards and what was counted: source, provides, stages; `total` may get notes."""

    @abstractmethod
    def seen(self, good: int, bad: int, *, whole: int) -> int | None:
        """Samples that `max_bad_fraction` is a share of.

        Args:
            good: Samples so far.
            bad: What could not be read so far.
            whole: Pieces that are whole.

        Returns:
            Those of the whole work, or as it has turned out where all pieces are whole; None where that cannot be said yet.
        """


@dataclass(kw_only=True)
class Report:
    """What became of this process's share.

    Attributes:
        pieces: Pieces of the whole work.
        kind: What they are called: "shards", or "files" where a piece is an input file.
        done: Names of those made now.
        whole: Names of those that were whole already.
        failed: Name and reason of those that could not be made.
        not_begun: Names of those that were given up.
        elsewhere: Names of those in other processes' shares that are not whole yet.
        index: The index, where all is whole.
    """

    pieces: int
    kind: str = "shards"
    done: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    not_begun: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    index: dict[str, Any] | None = None

    def __str__(self) -> str:
        """A table with a line for each piece that failed."""
        rows = [
            ("done", len(self.done)),
            ("skipped, were whole", len(self.whole)),
            ("failed", len(self.failed)),
            *([("not begun", len(self.not_begun))] if self.not_begun else []),
            *([("of other processes", len(self.elsewhere))] if self.elsewhere else []),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {number:>8}" for name, number in rows]
        return "\n".join(
            [f"{self.kind:<{width}}  {self.pieces:>8}", *lines, *(f"  {n}: {why}" for n, why in self.failed)]
        )


def run_work(
    work: Work,
    out: Folder,
    *,
    ranks: Shares | None = None,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> Report:
    """Makes what is not yet whole of this process's share; with the last piece of all, the index.

    Args:
        work: What is to be made.
        out: Where. What is there must have been begun as the same work.
        ranks: Which share is this process's; all of it if not given.
        max_bad_fraction: Share of the samples that may be unreadable.
        progress: Called with (samples taken, samples to take) of the pieces that are not whole yet.

    Returns:
        What became of the share. Pieces that failed are told there, and the others are made.

    Raises:
        ShardError: `out` was begun as other work, or cannot be written to; or nothing at all has come out.
        TooManyBad: More than `max_bad_fraction` could not be read; the whole shards stay for another attempt.
    """
    with _writing_to(out):
        _claim(work, out)
    engine = _Engine(work, out, max_bad_fraction)
    report = Report(pieces=len(work.pieces), kind="files" if work.by_file else "shards")
    split = ranks or Alone()
    share = (split.block if work.by_file else split.share)(range(len(work.pieces)))
    is_alone = len(share) == len(work.pieces)
    try:
        todo = engine.verify(share, report)
        if todo:
            work.expect(todo)
        engine.make(todo, report, progress)
        engine.records = engine.read_records()
        mine = {*report.whole, *report.done, *report.not_begun, *(name for name, _ in report.failed)}
        missing = [piece.name for piece in work.pieces if piece.name not in engine.records]
        report.elsewhere = [name for name in missing if name not in mine]
        if not missing:
            report.index = engine.fold()
    finally:
        if is_alone and not engine.records:
            _withdraw(out)
    return report


class _Engine:
    """One process at work on a folder."""

    def __init__(self, work: Work, out: Folder, max_bad_fraction: float) -> None:
        self.work, self.out, self.most = work, out, max_bad_fraction
        self.mark = _mark(work.manifest)
        self.begun: dict[str, dict[str, Any]] = {}
        self.records = self.read_records()

    def read_records(self) -> dict[str, dict[str, Any]]:
        """What the folder says of pieces that were whole once, by name; of those that are not yet, `begun` has it."""
        names = self.out.names()
        found = {}
        for piece in self.work.pieces:
            if f"{piece.name}.json" in names:
                with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError):
                    record = parse_json(self.out.read(f"{piece.name}.json"))
                    if record["work"] == self.mark:
                        (self.begun if "next" in record else found)[piece.name] = record
        return found

    def verify(self, share: Sequence[int], report: Report) -> list[int]:
        """The pieces of a share that are not whole; what the folder says of them is taken back."""
        todo = []
        for number in share:
            name = self.work.pieces[number].name
            record = self.records.get(name) or self.begun.get(name)
            entries = [ShardEntry(**entry) for entry in (record or {}).get("shards", ())]
            is_sound = not any(fault_of(self.out, entry, "sha256") for entry in entries)
            if name in self.records and is_sound:
                report.whole.append(name)
                continue
            todo.append(number)
            with _writing_to(self.out):
                if len(todo) == 1:
                    self.out.remove(INDEX)
                if record is not None and not is_sound:
                    self.records.pop(name, None)
                    self.begun.pop(name, None)
                    self.out.remove(f"{name}.json")
        return todo

    def make(self, todo: Sequence[int], report: Report, progress: Progress | None) -> None:
        """Makes pieces, one after the other; one that fails is told, and the others are made."""
        sizes = {number: self.work.size(number) for number in todo}
        for number, size in sizes.items():
            if size is not None:
                sizes[number] = max(0, size - self.begun.get(self.work.pieces[number].name, {}).get("next", 0))
        known = [size for size in sizes.values() if size is not None]
        total, taken = (sum(known) if len(known) == len(sizes) else 0), 0

        def one_taken() -> None:
            nonlocal taken
            taken += 1
            if progress is not None:
                progress(taken, total and max(total, taken))

        told_of_defect = False
        before = 0
        for place, number in enumerate(todo):
            piece = self.work.pieces[number]
            try:
                self.records[piece.name] = self.make_piece(number, one_taken)
                report.done.append(piece.name)
            except TooManyBad:
                raise
            except Exception as error:
                if not isinstance(error, ValueError | OSError) and not told_of_defect:
                    traceback.print_exc(file=sys.stderr)
                    told_of_defect = True
                report.failed.append((piece.name, _reason(error)))
                if isinstance(error, OutError) and error.is_full:
                    report.not_begun += [self.work.pieces[later].name for later in todo[place + 1 :]]
                    return
            before += sizes[number] or 0
            if progress is not None and total and taken != before:  # some were left out on the way
                taken = before
                progress(taken, max(total, taken))

    def make_piece(self, number: int, taken: Callable[[], object]) -> dict[str, Any]:
        """Makes a piece: the shards of each run, and then the file that says that they are whole."""
        name = self.work.pieces[number].name
        record = self.begun.pop(name, {})
        while not record or "next" in record:
            record = self.make_run(number, record, taken)
            with _writing_to(self.out):
                self.out.write(f"{name}.json", _json(record))
        return record

    def make_run(self, number: int, begun: dict[str, Any], taken: Callable[[], object]) -> dict[str, Any]:
        """Makes the shards of one run; gives what is to be said of all runs of the piece up to this one."""
        work, piece = self.work, self.work.pieces[number]
        total, counts = _summed([begun] if begun else [])
        others = self.records.values()
        known = sum(record.get("skipped", {}).get("samples", 0) for record in others) + total.bad
        good = sum(record["counts"]["samples"] for record in others)
        members = set(begun.get("members", ())) or None
        sizes = [one.samples for one in work.pieces if one.samples is not None]
        notes = Notes(sum(sizes) if len(sizes) == len(work.pieces) else 0)
        with _Shards(self.out, piece.name, work.shard_bytes, begun.get("shards", ())) as shards:
            for sample in work.samples(number, begun.get("next", 0), taken):
                content = {**sample.members, SCENE: scene_bytes(sample.scene)}
                if members is not None and members != content.keys():
                    raise ShardError(
                        f"sample {sample.key}: has {', '.join(sorted(content))} where the samples before have "
                        f"{', '.join(sorted(members))}; give all of them the same"
                    )
                members = set(content)
                notes.add(sample.scene.id, *shards.write(sample.key, content))
                count_scene(counts, sample.scene)
                self.refuse_bad(good + counts["samples"], known + work.left_out.bad, total.skipped)
        self.refuse_bad(good + counts["samples"], known + work.left_out.bad, total.skipped)
        total.add(work.left_out)
        noted = joined([*([begun["lowest_hashes"]] if begun else []), notes.to_json()])
        if work.by_file and noted is not None:
            noted = shortened(noted)
        return {
            "work": self.mark,
            "counts": dict(counts),
            "members": sorted(members or ()),
            **({"latents": asdict(work.latent_form)} if work.latent_form is not None and members else {}),
            **account_of(total),
            **({"tallies": dict(sorted(total.tallies.items()))} if total.tallies else {}),
            "lowest_hashes": noted,
            "shards": [asdict(entry) for entry in shards.entries],
            **({"next": work.next} if work.next is not None else {}),
        }

    def refuse_bad(self, good: int, bad: int, begun: Sequence[str] = ()) -> None:
        """Refuses input of which too much could not be read; `begun` lists what could not be of the piece before its last run."""
        seen = self.work.seen(good, bad, whole=len(self.records))
        if seen is None or bad <= self.most * seen:
            return
        is_all = len(self.records) == len(self.work.pieces)
        skipped = [line for record in self.records.values() for line in record.get("skipped", {}).get("reasons", ())]
        skipped += [] if is_all else [*begun, *self.work.left_out.skipped]
        raise TooManyBad(
            f"out={self.out}: {bad} of {good + bad} samples could not be read, more than max_bad_fraction={self.most:g}, so "
            f"there is no index; mend them, or raise max_bad_fraction and run it again (the first: {skipped[0]})",
            skipped=skipped,
        )

    def fold(self) -> dict[str, Any]:
        """Writes the index of all pieces, which are whole."""
        records = [self.records[piece.name] for piece in self.work.pieces]
        total, counts = _summed(records)
        self.refuse_bad(counts["samples"], total.bad)
        shards = [entry for record in records for entry in record["shards"]]
        members = {tuple(record["members"]) for record in records if record["members"]}
        latents = [record["latents"] for record in records if "latents" in record]
        notes = joined([record.get("lowest_hashes") for record in records])
        if notes is not None:
            notes = shortened(notes, of=counts["samples"])
        whole = self.work.index(total)
        if not shards:
            reasons = "".join(f", {reason}: {number}" for reason, number in sorted(total.counts.items()))
            raise ShardError(
                f"out={self.out}: {whole['source']['name']} gave no samples{reasons}; check where it reads from and its "
                "filters"
            )
        if len(members) != 1 or any(form != latents[0] for form in latents):
            raise ShardError(
                f"out={self.out}: shards hold samples of different form; remove the folder and make it again"
            )
        index = {
            "format": FORMAT,
            "version": VERSION,
            "source": whole["source"],
            "provides": whole["provides"],
            "members": list(members.pop()),
            **({"latents": latents[0]} if latents else {}),
            "counts": dict(counts),
            **account_of(total),
            "stages": whole["stages"],
            **({"lowest_hashes": notes} if notes is not None else {}),
            "shards": shards,
        }
        content = _json(index)
        with _writing_to(self.out):
            if not (self.out.has(INDEX) and self.out.read(INDEX) == content):
                self.out.write(INDEX, content)
            self.out.sweep()
        return index


class _Shards:
    """The shards of a run: one after the other, each whole before the next begins, numbered on from those of earlier runs."""

    def __init__(self, out: Folder, name: str, most_bytes: int | None, earlier: Sequence[dict[str, Any]]) -> None:
        self.entries = [ShardEntry(**entry) for entry in earlier]
        self._out, self._name, self._most = out, name, most_bytes
        self._stack = contextlib.ExitStack()
        self._tar: Any = None

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._end()
        else:
            self._stack.__exit__(kind, error, trace)

    def write(self, key: str, members: dict[str, bytes]) -> tuple[str, int, range]:
        """Writes a sample; tells shard, row and bytes."""
        size = sum(_BLOCK + -(-len(content) // _BLOCK) * _BLOCK for content in members.values())
        if self._tar is not None and self._most is not None and _tar_size(self._size + size) > self._most:
            self._end()
        if self._tar is None:
            self._begin()
        with _writing_to(self._out):
            span = written_to(self._tar, {"__key__": key, **members})
        self._size += size
        self._count += 1
        return self._shard, self._count - 1, span

    def _begin(self) -> None:
        part = f"-{len(self.entries)}" if self.entries else ""
        self._shard = f"{self._name}{part}.tar"
        self._count = self._size = 0
        with _writing_to(self._out):
            self._file = self._stack.enter_context(self._out.writing(self._shard)).open("wb")
        self._hashing = HashingFile(self._file)
        self._tar = tar_writer(self._hashing)
        for stream in (self._file, self._tar):
            self._stack.callback(_close, stream)

    def _end(self) -> None:
        if self._tar is None:
            return
        with _writing_to(self._out):
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
    """Closes what, after a failure, still holds data that it would try to write when collected."""
    with contextlib.suppress(OSError):
        stream.close()


def _tar_size(content: int) -> int:
    """Bytes of a tar with members of so many, padding included."""
    return -(-(content + 2 * _BLOCK) // _RECORD) * _RECORD


def _claim(work: Work, out: Folder) -> None:
    """Says what is made in a folder, or refuses one where other work was begun."""
    names = out.names()
    if MANIFEST not in names and not out.has(MANIFEST):
        if names:
            raise ShardError(
                f"out={out}: is there already, and is no unfinished work; choose another folder or remove it first"
            )
        out.write(MANIFEST, _json({**work.manifest, "project": project_version()}))
    try:
        begun = parse_json(out.read(MANIFEST))
        begun.pop("project")
    except (ValueError, KeyError, AttributeError):
        raise ShardError(f"out={out}: its {MANIFEST} cannot be read; remove the folder and begin again") from None
    wanted = parse_json(_json(work.manifest))
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


def _withdraw(out: Folder) -> None:
    """Takes back the claim on a folder in which nothing was made."""
    with contextlib.suppress(OSError):
        if out.names() <= {MANIFEST}:
            out.remove(MANIFEST)
            out.remove_if_empty()


def project_version() -> str:
    """The version of this checkout."""
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["version"]


def _mark(manifest: dict[str, Any]) -> str:
    """What tells that a file belongs to a manifest."""
    return hashlib.sha256(_json(manifest)).hexdigest()


def _summed(records: Sequence[dict[str, Any]]) -> tuple[LeftOut, Counter[str]]:
    """The accounts of all pieces as one, and their counts."""
    total, counts = LeftOut(), Counter(dict.fromkeys(_COUNTED, 0))
    for record in records:
        counts.update(record["counts"])
        skipped = record.get("skipped", {"samples": 0, "reasons": []})
        part = LeftOut()
        part.counts.update(record.get("left_out", {}))
        part.tallies.update(record.get("tallies", {}))
        part.bad, part.skipped, part.notes = skipped["samples"], skipped["reasons"], record.get("notes", [])
        total.add(part)
    return total, counts


@contextlib.contextmanager
def _writing_to(out: Folder) -> Iterator[None]:
    """Makes what the folder refuses one line; an error of whoever makes the samples is not ours to explain."""
    try:
        yield
    except OSError as error:
        raise OutError(
            f"out={out}: {error.strerror or error}; what is whole stays: free some space, or mend the folder, and run it again",
            is_full=error.errno in _DISK_FULL,
        ) from error


def _json(value: Any) -> bytes:
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


def _reason(error: Exception) -> str:
    """An error in one line; the kind where it is no refusal of the project's."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ShardError) else f"{type(error).__name__}: {text}"
