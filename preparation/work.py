"""The seam of making shards: work in pieces that each give shards, how pieces are shared, and the report of what came of them.

Here are interfaces and records alone; `engine.py` runs work, over any number of processes and after kills. What a piece is made
of is in `runner.py` (shards) and `conversion.py` (sources).
"""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datamodules.sources.base import LatentForm, LeftOut
from preparation.stage import Sample


class WorkSplit(Protocol):
    """The split of work between processes, such as `runtime.launch.ranks.Ranks`: the shares of all tile the items."""

    def share(self, items: Sequence[int]) -> list[int]:
        """Return this process's part of the items."""
        ...

    def block(self, items: Sequence[int]) -> list[int]:
        """Return this process's part of the items where neighbours are to stay together."""
        ...


class SingleProcess:
    """The only process."""

    def share(self, items: Sequence[int]) -> list[int]:
        """Return all of them."""
        return list(items)

    block = share


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of the work that one process does, in one run or in several; a run that has ended stays when the next is killed.

    Attributes:
        name: Stem of its files.
        samples: Samples that it takes, for the progress; None where that is not known beforehand.
    """

    name: str
    samples: int | None


class Work(ABC):
    """The work that is to be done in a folder.

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
        """Yield the finished samples of a run of a piece; `taken` is to be called for each one that it is made of."""

    def expect(self, numbers: Sequence[int]) -> None:  # noqa: B027
        """Prepare for the pieces that this process is going to make."""

    def size(self, number: int) -> int | None:
        """Return how many samples a piece takes, after `expect`; None where that is not known."""
        return self.pieces[number].samples

    @abstractmethod
    def index(self, total: LeftOut) -> dict[str, Any]:
        """Return what the index says beside shards and counts: source, provides, stages; `total` may get notes."""

    @abstractmethod
    def seen(self, good: int, bad: int, *, whole: int) -> int | None:
        """Return how many samples `max_bad_fraction` is a share of.

        Args:
            good: Samples so far.
            bad: What could not be read so far.
            whole: Pieces that are whole.

        Returns:
            Those of the whole work, or as it has turned out where all pieces are whole; None where that cannot be said yet.
        """


@dataclass(kw_only=True)
class Report:
    """The outcome of this process's share.

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
        """Return a table with a line for each piece that failed."""
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


def project_version() -> str:
    """Return the version of this checkout."""
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["version"]
