"""Running a source: its places in runs of `shard_size` become shards, without those that could not be read.

A source that reads large files is split by file, each of which one process reads once, and its runs end where a file does; of
any other source the runs are split. Here is what a source is as work; how work is split, survives kills and ends in an index is
in `engine.py`. What a source is, is in `datamodules/sources`; data sets that are made by the training itself go through
`shard_writer.write_shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.shard_index import ShardError
from datamodules.shard_writer import PICTURE_FORMATS, Progress, describe, encode_content
from datamodules.sources.base import LeftOut, Source
from datamodules.storage import folder_at
from preparation.engine import run_work
from preparation.stage import Sample
from preparation.work import Piece, Report, Work, WorkSplit, project_version


def convert_source(
    source: Source,
    out: str | Path,
    *,
    shard_size: int = 1000,
    shard_bytes: int | None = None,
    ranks: WorkSplit | None = None,
    max_bad_fraction: float = 0.01,
    progress: Progress | None = None,
) -> Report:
    """Make shards of a source; killed and run again it resumes, and the folder is the same over any number of processes.

    Args:
        source: What is read. It may say how pictures are encoded, as for `write_shards`.
        out: Folder that is made, a path or an address of fsspec's; one that was begun with the same source is resumed.
        shard_size: Places of the source in a shard, which has fewer samples where some were left out or an input file ends.
        shard_bytes: Most bytes of a shard: where the samples have more, the places of one shard become several,
            `000003.tar`, `000003-1.tar`, ...; one sample of more bytes is a shard by itself.
        ranks: Which share of the shards, or of the input files, is this process's; all of them if not given.
        max_bad_fraction: Share of the samples that may be unreadable: they are skipped, counted and listed.
        progress: Called with (samples written or passed over, places).

    Returns:
        What became of the share.

    Raises:
        ShardError: `out` holds something else, or the source gives nothing.
        TooManyBad: More samples than allowed could not be read.
    """
    work = SourceWork(source, shard_size=shard_size, shard_bytes=shard_bytes)
    return run_work(work, folder_at(out), ranks=ranks, max_bad_fraction=max_bad_fraction, progress=progress)


class SourceWork(Work):
    """A source in runs of places.

    Args:
        source: What is read.
        shard_size: Places of a run.
        shard_bytes: Most bytes of a shard; None for any number.

    Raises:
        ShardError: A setting is out of its range.
    """

    def __init__(self, source: Source, *, shard_size: int, shard_bytes: int | None) -> None:
        self._format = getattr(source, "image_format", "jpg")
        if shard_size < 1:
            raise ShardError(f"shard_size={shard_size}: give the samples of a shard, 1 or more")
        if self._format not in PICTURE_FORMATS:
            raise ShardError(f"{type(source).__name__}.image_format={self._format!r}: choose png or jpg")
        self._source, self._size, self.shard_bytes = source, shard_size, shard_bytes
        files = source.files()
        self.by_file = files is not None
        if files is None:
            self._announced, places = len(source), source.positions()
            self.pieces = [
                Piece(name=f"{number:06d}", samples=min(shard_size, places - start))
                for number, start in enumerate(range(0, places, shard_size))
            ]
        else:
            self._announced, places = None, None
            self.pieces = [Piece(name=f"{number:06d}", samples=None) for number in range(files)]
        self.left_out = LeftOut()
        self._settings = {"shard_size": shard_size, **({} if shard_bytes is None else {"shard_bytes": shard_bytes})}
        extent = {"files": files} if places is None else {"places": places}
        self.manifest = {"task": "convert", "settings": self._settings, "source": describe(source), **extent}

    def expect(self, numbers: Sequence[int]) -> None:
        """As `Work`: the source is told which of its files are read here."""
        if self.by_file:
            self._source.expect(numbers)

    def size(self, number: int) -> int | None:
        """As `Work`: of a file what the source knows of it."""
        return self._source.size_of(number) if self.by_file else self.pieces[number].samples

    def samples(self, number: int, start: int, taken: Callable[[], object]) -> Iterator[Sample]:
        """The samples of a run of places.

        Args:
            number: Which piece.
            start: First place in its file; 0 for a source without files, of which each piece is one run.
            taken: Called for each sample.

        Yields:
            The samples, encoded, each under its number.
        """
        self.left_out = LeftOut()
        source, end = self._source, start + self._size
        first = start if self.by_file else number * self._size
        file = f"{number:06d}-" if self.by_file else ""
        pairs = (
            source.span_of(number, start, end)
            if self.by_file
            else source.span(first, first + (self.pieces[number].samples or 0))
        )
        for place, (scene, content) in enumerate(pairs, start=first):
            self.left_out = source.left_out or self.left_out
            members = encode_content(scene, content, self._format, source.latent_form)
            taken()
            yield Sample(key=f"{file}{place:09d}", scene=scene, members=members)
        self.left_out = source.left_out or self.left_out
        self.latent_form = source.latent_form
        self.next = end if self.by_file and not source.is_at_end else None

    def index(self, total: LeftOut) -> dict[str, Any]:
        """As `Work`.

        Args:
            total: The account of all places; the source's report is added to its notes.

        Returns:
            source, provides, stages.
        """
        total.notes += self._source.report(total)
        return {
            "source": self.manifest["source"],
            "provides": sorted(self._source.provides),
            "stages": [{"name": "convert", "settings": self._settings, "version": project_version()}],
        }

    def seen(self, good: int, bad: int, *, whole: int) -> int | None:
        """As `Work`: what the source announces; of files as many in each as in the whole ones, and at the end what it was."""
        if whole == len(self.pieces):
            return good + bad
        if self._announced is not None:
            return max(self._announced, good + bad)
        return (good + bad) * len(self.pieces) // whole if whole else None
