"""The order of samples and its cut, by mathematics: permutations, windows, tilings."""

import itertools
import pickle
import tracemalloc

import numpy as np
import pytest

from datamodules.order import GlobalBatches, SampleOrder, flips, held_out_batches

SIZES = (5, 3, 7, 1, 4, 6, 2)


def test_each_epoch_is_a_permutation_and_epochs_differ():
    order = SampleOrder(SIZES, seed=3, window=2)
    n = sum(SIZES)
    epochs = [[order.sample_at(p) for p in range(e * n, (e + 1) * n)] for e in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_shard_and_row_are_the_global_number():
    order = SampleOrder(SIZES, seed=3, window=2)
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    for position in range(60):
        shard, row = order[position]
        assert 0 <= row < SIZES[shard]
        assert order.sample_at(position) == offsets[shard] + row


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_a_window_holds_the_samples_of_its_shards_alone(window):
    order = SampleOrder(SIZES, seed=0, window=window)
    n = sum(SIZES)
    for epoch in range(3):
        shards = [order[p][0] for p in range(epoch * n, (epoch + 1) * n)]
        seen, start = [], 0
        while start < n:
            members = set()
            # The window ends where the samples so far fill the shards seen so far and there are `window` of
            # them.
            end = start
            while end < n and (
                len(members) < min(window, len(SIZES) - len(seen)) or end - start < sum(SIZES[s] for s in members)
            ):
                members.add(shards[end])
                end += 1
            assert len(members) == min(window, len(SIZES) - len(seen))
            assert sorted(shards[start:end]) == sorted(s for s in members for _ in range(SIZES[s]))
            seen += members
            start = end
        assert sorted(seen) == list(range(len(SIZES)))


def test_samples_of_a_window_are_mixed():
    order = SampleOrder([100] * 4, seed=1, window=2)
    shards = [order[p][0] for p in range(200)]
    changes = sum(a != b for a, b in itertools.pairwise(shards))
    assert changes > 60  # 100 are expected, 1 where shards come one after the other


def test_order_is_a_function_of_seed_and_position():
    order = SampleOrder(SIZES, seed=5, window=3)
    forward = [order.sample_at(p) for p in range(100)]
    scattered = {p: SampleOrder(SIZES, seed=5, window=3).sample_at(p) for p in (99, 0, 57, 28, 27)}
    assert all(forward[p] == sample for p, sample in scattered.items())
    assert [pickle.loads(pickle.dumps(order)).sample_at(p) for p in range(100)] == forward
    assert [SampleOrder(SIZES, seed=6, window=3).sample_at(p) for p in range(100)] != forward


def test_order_never_changes():
    # A change here means that no run made before can be resumed.
    order = SampleOrder((3, 2, 4), seed=0, window=2)
    assert [order.sample_at(p) for p in range(18)] == [5, 8, 6, 4, 3, 7, 2, 0, 1, 7, 3, 5, 8, 6, 4, 2, 1, 0]
    assert [int(flips(0, p)) for p in range(16)] == [1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0]


def test_first_positions_are_uniform():
    counts = np.zeros(6)
    for seed in range(600):
        counts[SampleOrder([2, 2, 2], seed=seed, window=2).sample_at(0)] += 1
    assert counts.sum() == 600
    assert ((counts - 100) ** 2 / 100).sum() < 20.5  # chi-squared, 5 degrees of freedom, p = 0.001


def test_flips_are_fair_and_differ_by_seed():
    coins = np.array([[flips(seed, p) for p in range(10_000)] for seed in (0, 1)])
    assert np.all(np.abs(coins.mean(axis=1) - 0.5) < 0.02)
    assert abs((coins[0] == coins[1]).mean() - 0.5) < 0.02


def test_many_samples_need_memory_of_a_window():
    sizes = np.full(11_000, 1000)
    tracemalloc.start()
    order = SampleOrder(sizes, seed=0, window=8)
    for position in (0, 5_000_000, 10_999_999, 11_000_000, 25_000_000_000):
        order.sample_at(position)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # 11 million int64 would be 88 MB


@pytest.mark.parametrize(
    ("sizes", "options", "named"),
    [
        ([], {}, "shard_sizes"),
        ([3, 0], {}, "shard_sizes"),
        ([3], {"seed": -1}, "seed=-1"),
        ([3], {"window": 0}, "window=0"),
    ],
)
def test_order_refuses(sizes, options, named):
    with pytest.raises(ValueError, match=named) as caught:
        SampleOrder(sizes, **{"seed": 0, "window": 2, **options})
    assert "\n" not in str(caught.value)


def test_order_has_no_position_before_the_first():
    with pytest.raises(IndexError):
        SampleOrder([3], seed=0, window=1)[-1]


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 2), (3, 4)])
def test_ranks_and_accumulation_tile_the_global_batch(ranks, accumulate):
    size = 24
    batches = GlobalBatches(size, ranks=ranks, accumulate=accumulate)
    for batch in (0, 1, 7):
        shares = [
            batches.positions(batch * accumulate + step, rank) for step in range(accumulate) for rank in range(ranks)
        ]
        assert {len(share) for share in shares} == {batches.per_rank}
        assert list(itertools.chain(*shares)) == list(range(batch * size, (batch + 1) * size))


@pytest.mark.parametrize(
    ("batch_size", "ranks", "accumulate", "nearest"),
    [
        (10, 2, 3, "batch_size=6 and batch_size=12"),
        (4, 2, 3, "batch_size=6"),
        (25, 8, 1, "batch_size=24 and batch_size=32"),
    ],
)
def test_batches_that_do_not_divide_are_refused(batch_size, ranks, accumulate, nearest):
    with pytest.raises(ValueError, match=nearest) as caught:
        GlobalBatches(batch_size, ranks=ranks, accumulate=accumulate)
    message = str(caught.value)
    assert message.startswith(f"batch_size={batch_size} ")
    assert f"ranks={ranks} x accumulate={accumulate}" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["batch_size", "ranks", "accumulate"])
def test_batches_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        GlobalBatches(**{"batch_size": 6, "ranks": 1, "accumulate": 1, name: 0})


@pytest.mark.parametrize("samples", [4, 5, 7, 12, 97])
@pytest.mark.parametrize("batch_size", [4, 6, 50])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_held_out_samples_come_once_over_all_ranks(samples, batch_size, ranks):
    shares = [held_out_batches(samples, batch_size, ranks=ranks, rank=rank) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(itertools.chain(*itertools.chain(*shares))) == list(range(samples))
    lengths = [len(batch) for batch in itertools.chain(*shares)]
    assert min(lengths) >= 1
    assert max(lengths) <= max(2, batch_size // ranks)


def test_of_fewer_held_out_samples_than_ranks_every_rank_has_all():
    assert [held_out_batches(2, 9, ranks=3, rank=rank) for rank in range(3)] == [[range(2)]] * 3


def test_a_batch_of_fewer_held_out_samples_than_ranks_is_refused():
    with pytest.raises(ValueError, match="validation_batch_size=2"):
        held_out_batches(9, 2, ranks=3, rank=0)
