"""Several folders of shards as one, and what is held out of them: what is stored, not in which order it is read.

A sample is (shard, row) as in one folder, shards being counted through the folders as they are listed. Which comes when, and
how often each folder has its turn, is `order.MixedOrder`.
"""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

from datamodules.held_out import HeldOut
from datamodules.shards import Record, ShardError, ShardSet
from datamodules.storage import named


class MixedShards:
    """The samples of several folders, by number or by shard and row.

    Args:
        parts: The folders, opened.

    Attributes:
        provides: What the scenes of every folder carry.
        latents: The form of the latents, the same in all; None where there are pictures.
        sizes: Samples of each shard.

    Raises:
        ShardError: Some hold pictures and others latents, or latents of another form.
    """

    def __init__(self, parts: Sequence[ShardSet]) -> None:
        self.parts = tuple(parts)
        self.provides = frozenset.intersection(*(part.provides for part in self.parts))
        self.latents = self.parts[0].latents
        self.sizes = tuple(size for part in self.parts for size in part.sizes)
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))
        self._shard_ends = list(itertools.accumulate(len(part.sizes) for part in self.parts))
        for part in self.parts:
            if part.latents != self.latents:
                raise ShardError(
                    f"data.shards: {self.parts[0].path} holds {_content(self.parts[0])} and {part.path} {_content(part)}; "
                    "mix folders of one form"
                )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number}: the {len(self.parts)} folders hold 0 to {len(self) - 1}")
        place = bisect.bisect_right(self._ends, number)
        return self.parts[place][number - (self._ends[place] - len(self.parts[place]))]

    def read(self, shard: int, row: int, *, mirrored: bool = False) -> Record:
        """The sample in a row of a shard, as `ShardSet.read`."""
        place = self.part_of(shard)
        part = self.parts[place]
        return part.read(shard - (self._shard_ends[place] - len(part.sizes)), row, mirrored=mirrored)

    def part_of(self, shard: int) -> int:
        """Place of the folder that a shard is in."""
        return bisect.bisect_right(self._shard_ends, shard)

    @property
    def fetches_ahead(self) -> bool:
        """As `ShardSet.fetches_ahead`, of any folder."""
        return any(part.fetches_ahead for part in self.parts)

    def fetch(self, shards: Sequence[int]) -> None:
        """As `ShardSet.fetch`, of shards of one folder."""
        place = self.part_of(shards[0])
        part = self.parts[place]
        part.fetch([shard - (self._shard_ends[place] - len(part.sizes)) for shard in shards])


class HeldOutSet:
    """The samples that are held out of folders of shards, by number.

    Args:
        parts: The folders, opened.
        held_out: Which samples they are.
    """

    def __init__(self, parts: Sequence[ShardSet], held_out: HeldOut) -> None:
        self.parts, self._samples = tuple(parts), held_out.samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Record:
        part, place = self._samples[number]
        return self.parts[part].at(place)

    def counts(self) -> list[int]:
        """How many lie in each folder."""
        return [sum(own == part for own, _ in self._samples) for part in range(len(self.parts))]


def folders_of(shards: str | Path | Sequence[str]) -> tuple[str | Path, ...]:
    """The folders that `data.shards` names.

    Args:
        shards: One folder, or a list of them.

    Returns:
        At least one, none twice: a path, or an address.

    Raises:
        ValueError: The list is empty, or names a folder twice.
    """
    names = (shards,) if isinstance(shards, str | Path) else tuple(shards)
    folders = tuple(named(name) for name in names)
    if not folders:
        raise ValueError("data.shards=[]: names no folder; give [DIR1,DIR2]")
    real = [folder.resolve() if isinstance(folder, Path) else folder for folder in folders]
    for place, folder in enumerate(real):
        if folder in real[:place]:
            raise ValueError(f"data.shards: {folders[place]} is named twice; name it once with a larger weight")
    return folders


def _content(part: ShardSet) -> str:
    form = part.latents
    if form is None:
        return "pictures"
    kind = f"{'moments of ' if form.moments else ''}latents{', mirrored ones too,' if form.flipped else ''}"
    return f"{kind} {form.shape} of factor {form.scaling_factor}"
