"""Loaders of batches by position: which positions come is a plan, what is at a position a dataset.

The order comes from `order.py`; worker processes only fetch, so their number changes nothing. The plan of a
run belongs to `scene_datamodule.py`.
"""

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import Batch, collate
from datamodules.mixture import HeldOutSet, MixedShards
from datamodules.order import MixedOrder, SampleOrder
from datamodules.shards import Record, SampleUnreadable, ShardSet
from datamodules.transforms import Sample, SceneTransform

GRACE = 60  # s that a worker goes on after it was asked to end, unless the training process ends it first


class PositionDataset(Dataset[Sample]):
    """Samples by position.

    Args:
        shards: Where they are stored.
        transform: What is made of them; of mixed shards there may be one for each folder.
        order: Which one is at a position; without it they come as they are stored.
    """

    def __init__(
        self,
        shards: ShardSet | MixedShards | HeldOutSet,
        transform: SceneTransform | Sequence[SceneTransform],
        *,
        order: SampleOrder | MixedOrder | None = None,
    ) -> None:
        self._shards = shards
        self._transforms = (transform,) if isinstance(transform, SceneTransform) else tuple(transform)
        self._order = order
        self._windows: dict[int, tuple[int, ...]] = {}  # of each set, the one that was come to last

    def __getitem__(self, position: int) -> Sample:
        if self._order is None:
            return self._transforms[0](self._shards[position], position)
        assert not isinstance(self._shards, HeldOutSet)
        shard, row = self._order[position]
        self._fetch_ahead(self._shards, position)
        transform = self._transform_of(shard)
        mirrored = transform.mirrors(position)
        try:
            return transform(self._shards.read(shard, row, mirrored=mirrored), position)
        except SampleUnreadable as error:
            record = _next_readable(self._shards, shard, row, self._order.rows(shard), mirrored=mirrored)
            return replace(transform(record, position), fault=str(error))

    def _transform_of(self, shard: int) -> SceneTransform:
        """The transform of the folder that a shard is in."""
        if len(self._transforms) > 1 and isinstance(self._shards, MixedShards):
            return self._transforms[self._shards.part_of(shard)]
        return self._transforms[0]

    def _fetch_ahead(self, shards: ShardSet | MixedShards, position: int) -> None:
        """Has the shards of the next window fetched, when the first sample of a window comes."""
        if self._order is None or not shards.fetches_ahead:
            return
        window, following = self._order.ahead(position)
        of = window[0] if len(window) > 2 else 0
        if self._windows.get(of) != window:
            self._windows[of] = window
            shards.fetch(following)


def _next_readable(shards: ShardSet | MixedShards, shard: int, row: int, rows: np.ndarray, *, mirrored: bool) -> Record:
    """What stands in for a sample that cannot be read, so that batches stay full: the next of its shard that can.

    Args:
        shards: Where it is stored.
        shard: Number of the shard.
        row: The sample's own row.
        rows: Rows of the shard that are trained on, ascending.
        mirrored: As in `ShardSet.read`.

    Returns:
        Another sample.

    Raises:
        ShardError: No sample of the shard can be read.
    """
    own = int(np.searchsorted(rows, row))
    for other in np.roll(rows, -own)[1:].tolist():
        with contextlib.suppress(SampleUnreadable):
            return shards.read(shard, other, mirrored=mirrored)
    return shards.read(shard, row, mirrored=mirrored)


class PositionLoader:
    """An iterable of batches whose positions are asked for when the first batch is.

    That late because Lightning makes loaders and their iterators before it restores a checkpoint if anything
    asks for `estimated_stepping_batches`, and a torch DataLoader starts its workers at once. `state_dict` and
    `load_state_dict` tell Lightning that the loader can resume; there is nothing to keep, since the plan
    follows from the step.

    Args:
        dataset: Samples by position.
        plan: Gives the positions of each batch, from the next one on.
        length: Batches of the whole run, those included that a resumed run has behind it: Lightning counts
            them too.
        workers: Processes that fetch; 0 fetches in this one.
        pin_memory: Whether batches are put into page-locked memory, for a faster way to a GPU.
    """

    def __init__(
        self,
        dataset: PositionDataset,
        plan: Callable[[], Iterable[Sequence[int]]],
        *,
        length: int,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._dataset = dataset
        self._plan = plan
        self._length = length
        self._workers = workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        yield from DataLoader(
            self._dataset,
            batch_sampler=self._plan(),
            collate_fn=collate,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # of its own: the loader would draw from the global one
        )

    def state_dict(self) -> dict[str, object]:
        """Nothing: the plan follows from the trainer's step."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Nothing to restore."""


def _leave_signals(worker: int) -> None:
    """What asks a run to stop reaches all processes of a job: a worker has to serve until the step is done and saved."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
