"""The engine of preparation: a folder of shards comes about piece by piece, over any number of processes and after kills.

What is whole is kept, what is half is made again, and whoever ends last writes the index. In the folder `manifest.json` says what
is made there, and comes first; `000000.json` says that the shards of piece 000000 are whole, and comes after them, or after each
run of a piece that is made in several, and then says where to go on; `index.json` comes last. All of it depends on the input and
the settings alone. Work is described in `work.py`; the writing itself is in `out_folder.py`.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from datamodules.held_out import Notes, joined, shortened
from datamodules.shard_index import FORMAT, INDEX, SCENE, VERSION, ShardEntry, ShardError, fault_of
from datamodules.shard_writer import Progress, TooManyBad, account_of, count_scene, scene_bytes
from datamodules.sources.base import LeftOut
from datamodules.storage import Folder
from preparation.out_folder import OutError, RunWriter, claim, json_bytes, mark_of, withdraw, writing_to
from preparation.work import Report, SingleProcess, Work, WorkSplit
from scenes.json_form import parse_json

_COUNTED = ("samples", "captions", "objects", "boxes", "relations")


def run_work(
    work: Work,
    out: Folder,
    *,
    ranks: WorkSplit | None = None,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> Report:
    """Make what is not yet whole of this process's share; with the last piece of all, the index.

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
    with writing_to(out):
        claim(work, out)
    engine = _Engine(work, out, max_bad_fraction)
    report = Report(pieces=len(work.pieces), kind="files" if work.by_file else "shards")
    split = ranks or SingleProcess()
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
            withdraw(out)
    return report


class _Engine:
    """One process at work on a folder."""

    def __init__(self, work: Work, out: Folder, max_bad_fraction: float) -> None:
        self.work, self.out, self.most = work, out, max_bad_fraction
        self.mark = mark_of(work.manifest)
        self.begun: dict[str, dict[str, Any]] = {}
        self.records = self.read_records()

    def read_records(self) -> dict[str, dict[str, Any]]:
        """Read what the folder says of pieces that were whole once, by name; of those that are not yet, into `begun`."""
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
        """Return the pieces of a share that are not whole, and take back what the folder says of them."""
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
            with writing_to(self.out):
                if len(todo) == 1:
                    self.out.remove(INDEX)
                if record is not None and not is_sound:
                    self.records.pop(name, None)
                    self.begun.pop(name, None)
                    self.out.remove(f"{name}.json")
        return todo

    def make(self, todo: Sequence[int], report: Report, progress: Progress | None) -> None:
        """Make pieces, one after the other; one that fails is reported, and the others are made."""
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
        """Make a piece: the shards of each run, and then the file that says that they are whole."""
        name = self.work.pieces[number].name
        record = self.begun.pop(name, {})
        while not record or "next" in record:
            record = self.make_run(number, record, taken)
            with writing_to(self.out):
                self.out.write(f"{name}.json", json_bytes(record))
        return record

    def make_run(self, number: int, begun: dict[str, Any], taken: Callable[[], object]) -> dict[str, Any]:
        """Make the shards of one run; return the record of all runs of the piece up to this one."""
        work, piece = self.work, self.work.pieces[number]
        total, counts = _summed([begun] if begun else [])
        others = self.records.values()
        known = sum(record.get("skipped", {}).get("samples", 0) for record in others) + total.bad
        good = sum(record["counts"]["samples"] for record in others)
        members = set(begun.get("members", ())) or None
        sizes = [one.samples for one in work.pieces if one.samples is not None]
        notes = Notes(sum(sizes) if len(sizes) == len(work.pieces) else 0)
        with RunWriter(self.out, piece.name, work.shard_bytes, begun.get("shards", ())) as shards:
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
        """Reject input of which too much could not be read; `begun` lists what could not be of the piece before its last run."""
        seen = self.work.seen(good, bad, whole=len(self.records))
        if seen is None or bad <= self.most * seen:
            return
        is_all = len(self.records) == len(self.work.pieces)
        skipped = [line for record in self.records.values() for line in record.get("skipped", {}).get("reasons", ())]
        skipped += [] if is_all else [*begun, *self.work.left_out.skipped]
        raise TooManyBad(
            f"out={self.out}: {bad} of {good + bad} samples could not be read, more than max_bad_fraction={self.most:g}, so "
            f"there is no index; fix them, or raise max_bad_fraction and run it again (the first: {skipped[0]})",
            skipped=skipped,
        )

    def fold(self) -> dict[str, Any]:
        """Write the index of all pieces, which are whole."""
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
        content = json_bytes(index)
        with writing_to(self.out):
            if not (self.out.has(INDEX) and self.out.read(INDEX) == content):
                self.out.write(INDEX, content)
            self.out.sweep()
        return index


def _summed(records: Sequence[dict[str, Any]]) -> tuple[LeftOut, Counter[str]]:
    """Return the accounts of all pieces as one, and their counts."""
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


def _reason(error: Exception) -> str:
    """Return an error in one line, with its kind where it is not of the project's own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ShardError) else f"{type(error).__name__}: {text}"
