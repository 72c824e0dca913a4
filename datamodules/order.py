"""Which sample comes when: their order, the mixing of several orders, and the cut of a global batch over accumulation and ranks.

Everything here is arithmetic on (seed, position), numpy only: nothing is read, counted up or remembered but
for speed, so that a run can be killed anywhere and go on with the same samples, on another number of ranks
too. What a sample holds is in ``shards.py``; loaders are in ``loaders.py``.

Legend: N samples of one epoch; B global batch size; A accumulation steps; R ranks.
"""

import bisect
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SHARDS, _SAMPLES, _FLIPS, _CAPTIONS, _SETS, _LATENTS, _CROPS = range(
    7
)  # what a draw is for; each has its own stream of random numbers
_COINS = 4096  # drawn together
_REMEMBERED = 4  # windows and epochs kept: a batch touches at most a few


def _keys(seed: int, stream: int, *where: int, count: int) -> np.ndarray:
    """`count` random uint64 of (seed, stream, where).

    Raw words of the bit generator, because numpy keeps those the same for ever but not what it makes of them
    (`Generator.permutation` may change with its version).
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, *where))
    return np.random.Philox(sequence).random_raw(count)


def _permutation(seed: int, stream: int, *where: int, count: int) -> np.ndarray:
    """A permutation of range(count), int64."""
    return np.argsort(_keys(seed, stream, *where, count=count), kind="stable")


def flips(seed: int, position: int) -> bool:
    """Whether the sample at a position is mirrored: a fair coin of (seed, position)."""
    block, place = divmod(position, _COINS)
    return bool(_coins(seed, block)[place])


def choice(seed: int, position: int, count: int) -> int:
    """Which of `count` captions the sample at a position has: uniform, a function of (seed, position)."""
    block, place = divmod(position, _COINS)
    return int(_words(seed, block)[place] % np.uint64(count))


def latent_noise(seed: int, position: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 of `shape`, to draw the latent at a position from its distribution: of (seed, position)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_LATENTS, position))
    return np.random.Generator(np.random.Philox(sequence)).standard_normal(tuple(shape), dtype=np.float32)


def crop_draws(seed: int, position: int, count: int) -> list[float]:
    """`count` uniform numbers in [0, 1), for where the sample at a position is cut: of (seed, position)."""
    return ((_keys(seed, _CROPS, position, count=count) >> np.uint64(11)) * 2.0**-53).tolist()


@functools.lru_cache(maxsize=_REMEMBERED)
def _words(seed: int, block: int) -> np.ndarray:
    """The draws of a block of positions, (_COINS,) uint64."""
    return _keys(seed, _CAPTIONS, block, count=_COINS)


@functools.lru_cache(maxsize=_REMEMBERED)
def _coins(seed: int, block: int) -> np.ndarray:
    """The coins of a block of positions, (_COINS,) uint8: drawn one by one they cost more than a picture."""
    words = _keys(seed, _FLIPS, block, count=_COINS // 64)
    return np.unpackbits(words.astype("<u8").view(np.uint8))


@dataclass(frozen=True, eq=False)
class _Epoch:
    """The order of shards in an epoch and where its windows lie."""

    number: int
    shards: np.ndarray  # (S,) int64, shard numbers in their order
    starts: np.ndarray  # (W + 1,) int64, first index of each window in the epoch; the last is N


@dataclass(frozen=True, eq=False)
class _Window:
    """The order of samples in a window; number is (epoch, window)."""

    number: tuple[int, int]
    shards: np.ndarray  # (K,) int64
    rows: np.ndarray  # (K,) int64, row in its shard


class SampleOrder:
    """An endless stream of samples of which N positions from each multiple of N on are an epoch.

    Position p is index p % N of epoch p // N. In an epoch the shards are permuted, then the samples within
    windows of `window` consecutive shards of that order, so that few shards are in use at a time.
    `order[position]` is (shard, row). Only the windows in use are drawn: it takes memory and time of a
    window, not of N. Safe with threads, processes and pickle.

    Args:
        shard_sizes: Samples of each shard.
        seed: Seed of the order, 0 or more.
        window: Shards that are shuffled together.
        left_out: By shard, rows that are no part of the stream, in ascending order; N counts the others.

    Raises:
        ValueError: A shard is empty, there is none, or `seed` or `window` is out of range; or everything is left out.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        window: int,
        left_out: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        stored = np.asarray(shard_sizes, dtype=np.int64)
        if stored.ndim != 1 or stored.size == 0 or stored.min() < 1:
            raise ValueError("shard_sizes: there must be a shard, and a sample at least in each; make the shards again")
        if seed < 0:
            raise ValueError(f"seed={seed}: a seed is 0 or more; choose another")
        if window < 1:
            raise ValueError(f"window={window}: give the number of shards that are shuffled together, 1 or more")
        self.seed = seed
        self.window = window
        self._stored = stored
        self._left_out = {shard: np.asarray(rows, dtype=np.int64) for shard, rows in (left_out or {}).items()}
        self.shard_sizes = stored.copy()  # of the stream
        for shard, rows in self._left_out.items():
            self.shard_sizes[shard] -= rows.size
        self.samples = int(self.shard_sizes.sum())
        if self.samples == 0:
            raise ValueError("left_out: nothing is left of the shards; leave out fewer")
        self.stored = int(stored.sum())
        self._offsets = np.cumsum(stored) - stored
        self._epochs: tuple[_Epoch, ...] = ()
        self._windows: tuple[_Window, ...] = ()

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(shard, row) of the sample at a position, 0 or more."""
        window, place = self._locate(position)
        return int(window.shards[place]), int(window.rows[place])

    def sample_at(self, position: int) -> int:
        """Number of the sample at a position, counted through the shards as they are stored, with those that are left out."""
        shard, row = self[position]
        return int(self._offsets[shard]) + row

    def rows(self, shard: int) -> np.ndarray:
        """The rows of a shard that are in the stream, (K,) int64, ascending."""
        every = np.arange(self._stored[shard])
        left_out = self._left_out.get(shard)
        return every if left_out is None else np.delete(every, left_out)

    def ahead(self, position: int) -> tuple[tuple[int, ...], list[int]]:
        """The window that a position is in, and the shards of the window after it."""
        window, _ = self._locate(position)
        number, place = window.number
        epoch, place = (
            (self._epoch(number), place + 1)
            if place + 2 < self._epoch(number).starts.size
            else (self._epoch(number + 1), 0)
        )
        return window.number, epoch.shards[place * self.window : (place + 1) * self.window].tolist()

    def _locate(self, position: int) -> tuple[_Window, int]:
        if position < 0:
            raise IndexError(f"position {position}: positions start at 0")
        number, index = divmod(int(position), self.samples)
        epoch = self._epoch(number)
        window = int(np.searchsorted(epoch.starts, index, side="right")) - 1
        return self._window(epoch, window), index - int(epoch.starts[window])

    def _epoch(self, number: int) -> _Epoch:
        for epoch in self._epochs:
            if epoch.number == number:
                return epoch
        shards = _permutation(self.seed, _SHARDS, number, count=self.shard_sizes.size)
        sizes = np.add.reduceat(self.shard_sizes[shards], np.arange(0, shards.size, self.window))
        epoch = _Epoch(number=number, shards=shards, starts=np.concatenate([[0], np.cumsum(sizes)]))
        # A new tuple each time, so that threads never see a half-changed memory.
        self._epochs = (epoch, *self._epochs[: _REMEMBERED - 1])
        return epoch

    def _window(self, epoch: _Epoch, window: int) -> _Window:
        number = (epoch.number, window)
        for known in self._windows:
            if known.number == number:
                return known
        members = epoch.shards[window * self.window : (window + 1) * self.window]
        sizes = self.shard_sizes[members]
        count = int(sizes.sum())
        shuffled = _permutation(self.seed, _SAMPLES, *number, count=count)
        shards = np.repeat(members, sizes)[shuffled]
        rows = np.concatenate([self.rows(int(shard)) for shard in members])[shuffled]
        made = _Window(number=number, shards=shards, rows=rows)
        self._windows = (made, *self._windows[: _REMEMBERED - 1])
        return made

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": (), "_windows": ()}


@dataclass(frozen=True, eq=False)
class _Turns:
    """Which set has its turn at each position of a block, and its how manieth turn in the block that is."""

    block: int
    sets: np.ndarray  # (K,) int64
    turns: np.ndarray  # (K,) int64


class MixedOrder:
    """An endless stream that takes its samples from several sets by weight.

    Of every period of sum(weights) positions a set has exactly as many as its weight, shuffled anew in each period. Its
    n-th position in the stream is position n of its own order: nothing of a set is passed over, and a small one comes round
    again in a new order while a large one goes on. `order[position]` is (shard, row), shards being counted through the
    sets as they are given. Safe with threads, processes and pickle.

    Args:
        orders: The order of each set.
        weights: Positions of each set in a period, whole numbers; a common divisor changes nothing.
        seed: Seed of the turns, 0 or more.

    Attributes:
        period: Positions after which the shares are exact again.
        samples: Samples of all sets together.

    Raises:
        ValueError: There are more weights than sets or fewer, or a weight is no whole number from 1 up.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[int], *, seed: int) -> None:
        check_weights(weights, len(orders))
        self.orders = tuple(orders)
        self.weights = tuple(weight // math.gcd(*weights) for weight in weights)
        self.seed = seed
        self.period = sum(self.weights)
        self.samples = sum(order.samples for order in self.orders)
        counts = [order.shard_sizes.size for order in self.orders]
        self._first_shards = [sum(counts[:place]) for place in range(len(counts))]
        self._first_samples = [sum(order.stored for order in self.orders[:place]) for place in range(len(counts))]
        self._periods = max(1, _COINS // self.period)  # drawn together
        self._blocks: tuple[_Turns, ...] = ()

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(shard, row) of the sample at a position, 0 or more."""
        chosen, own = self.locate(position)
        shard, row = self.orders[chosen][own]
        return self._first_shards[chosen] + shard, row

    def sample_at(self, position: int) -> int:
        """Number of the sample at a position, counted through the sets as they are given and stored."""
        chosen, own = self.locate(position)
        return self._first_samples[chosen] + self.orders[chosen].sample_at(own)

    def rows(self, shard: int) -> np.ndarray:
        """As `SampleOrder.rows`, shards being counted through the sets."""
        chosen = bisect.bisect_right(self._first_shards, shard) - 1
        return self.orders[chosen].rows(shard - self._first_shards[chosen])

    def ahead(self, position: int) -> tuple[tuple[int, ...], list[int]]:
        """The window that a position is in, and the shards of the window after it in the same set."""
        chosen, own = self.locate(position)
        window, shards = self.orders[chosen].ahead(own)
        return (chosen, *window), [self._first_shards[chosen] + shard for shard in shards]

    def locate(self, position: int) -> tuple[int, int]:
        """Which set has its turn at a position, and the position in that set's own order."""
        if position < 0:
            raise IndexError(f"position {position}: positions start at 0")
        block, place = divmod(int(position), self._periods * self.period)
        drawn = self._turns(block)
        chosen = int(drawn.sets[place])
        return chosen, block * self._periods * self.weights[chosen] + int(drawn.turns[place])

    def counts(self, positions: int) -> tuple[int, ...]:
        """How many of the first `positions` samples come from each set."""
        block, place = divmod(int(positions), self._periods * self.period)
        within = np.bincount(self._turns(block).sets[:place], minlength=len(self.weights)).tolist()
        return tuple(block * self._periods * weight + n for weight, n in zip(self.weights, within, strict=True))

    def _turns(self, block: int) -> _Turns:
        for known in self._blocks:
            if known.block == block:
                return known
        size = self._periods * self.period
        shuffled = np.argsort(
            _keys(self.seed, _SETS, block, count=size).reshape(-1, self.period), axis=1, kind="stable"
        )
        sets = np.repeat(np.arange(len(self.weights)), self.weights)[shuffled].ravel()
        turns = np.empty_like(sets)
        for chosen in range(len(self.weights)):
            mine = sets == chosen
            turns[mine] = np.arange(int(mine.sum()))
        made = _Turns(block=block, sets=sets, turns=turns)
        self._blocks = (made, *self._blocks[: _REMEMBERED - 1])
        return made

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_blocks": ()}


def check_weights(weights: Sequence[int], sets: int) -> None:
    """Refuse weights by which sets cannot be mixed.

    Args:
        weights: One for each set.
        sets: How many sets there are.

    Raises:
        ValueError: There are more weights than sets or fewer, or a weight is no whole number from 1 up.
    """
    listed = list(weights)
    if len(listed) != sets:
        raise ValueError(
            f"data.weights={listed}: {len(listed)} weights for {sets} folders of shards; give one for each"
        )
    for place, weight in enumerate(listed):
        if not isinstance(weight, int) or isinstance(weight, bool) or weight < 1:
            raise ValueError(
                f"data.weights[{place}]={weight}: give whole numbers from 1 up, such as [1,2]; leave out a folder of which "
                "nothing is to be read"
            )


class GlobalBatches:
    """The cut of the stream of positions into global batches, accumulation steps and ranks.

    Global batch b is positions b*B .. b*B + B - 1; of it, accumulation step a and rank r take the B / (A R)
    positions from b*B + a * B/A + r * B/(A R) on. So the samples of an optimizer step are the same whatever A
    and R are.

    Args:
        batch_size: Samples of one optimizer step over all ranks and accumulation steps.
        ranks: Processes that train together.
        accumulate: Micro-batches of each optimizer step.

    Raises:
        ValueError: A number is below 1, or batch_size is not a multiple of ranks x accumulate.
    """

    def __init__(self, batch_size: int, *, ranks: int = 1, accumulate: int = 1) -> None:
        for name, value in (("batch_size", batch_size), ("ranks", ranks), ("accumulate", accumulate)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be 1 or more")
        parts = ranks * accumulate
        if batch_size % parts:
            nearest = sorted({max(1, batch_size // parts) * parts, (batch_size // parts + 1) * parts})
            raise ValueError(
                f"batch_size={batch_size} (the global one) does not divide by "
                f"ranks={ranks} x accumulate={accumulate}; "
                f"the nearest that do are {' and '.join(f'batch_size={size}' for size in nearest)}"
            )
        self.batch_size = batch_size
        self.ranks = ranks
        self.accumulate = accumulate
        self.per_rank = batch_size // parts

    def positions(self, micro_batch: int, rank: int) -> range:
        """A rank's share of micro-batch m, which is accumulation step m % A of global batch m // A."""
        batch, step = divmod(micro_batch, self.accumulate)
        start = batch * self.batch_size + (step * self.ranks + rank) * self.per_rank
        return range(start, start + self.per_rank)


def held_out_batches(samples: int, batch_size: int, *, ranks: int, rank: int) -> list[range]:
    """A rank's share of every batch of one pass over held-out samples: over all ranks, each exactly once.

    Batches and shares are cut evenly instead of padded, so that no sample counts twice and every rank has the
    same number of batches with one sample at least in each. Of fewer samples than ranks every rank has all, so that the mean
    over all ranks is theirs.

    Args:
        samples: Held-out samples, taken in the order in which they are stored.
        batch_size: Most samples of a batch over all ranks (a share of a single sample may be one more).
        ranks: Processes that validate together.
        rank: Which of them.

    Returns:
        The sample numbers of each batch.

    Raises:
        ValueError: There are fewer samples in a batch than ranks.
    """
    if batch_size < ranks:
        raise ValueError(
            f"validation_batch_size={batch_size} (the global one) is below ranks={ranks}; "
            f"set validation_batch_size={ranks} or more"
        )
    if samples < ranks:
        return [range(samples)]
    # batch_size counts whole shares: floor(batch_size / ranks) of them fill a batch on every rank.
    batches = -(-samples // (batch_size // ranks * ranks))
    batches = min(batches, samples // ranks)
    shares = batches * ranks
    starts = [share * samples // shares for share in range(shares + 1)]
    return [range(starts[share], starts[share + 1]) for share in range(rank, shares, ranks)]
