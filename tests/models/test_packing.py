"""How strings are laid into rows, and the record of what is read."""

import random

import pytest
import torch

from models.packing import Tokens, pack


def seen(packing):
    """The ids that each token of each string sees, in order of their positions."""
    length, rows = packing.ids.shape[1], []
    for place in packing.places.tolist():
        row, column = divmod(place, length)
        open_places = packing.mask[row, 0, column].nonzero().flatten().tolist()
        open_places.sort(key=lambda each: packing.positions[row, each])
        rows.append(packing.ids[row, open_places].tolist())
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_a_token_sees_what_stands_before_it_in_its_string_and_itself(seed):
    draws = random.Random(seed)
    strings = [[7, *(draws.randrange(3) for _ in range(draws.randrange(9))), 9] for _ in range(30)]
    packing = pack(strings, length=12)
    assert packing.ids.shape[1] <= 12
    assert seen(packing) == [string[: place + 1] for string in strings for place in range(len(string))]
    length = packing.ids.shape[1]
    assert packing.positions.flatten()[packing.places].tolist() == [p for string in strings for p in range(len(string))]
    assert packing.mask.any(dim=-1).all()  # no row of the attention is empty
    assert packing.mask.shape == (len(packing.ids), 1, length, length)


def test_common_beginnings_lie_in_a_row_once():
    packing = pack([[1, 2, 3, 9], [1, 2, 9], [1, 2, 3, 9], [1, 4, 9]], length=10)
    assert packing.ids.tolist() == [[1, 2, 3, 9, 9, 4, 9]]
    assert packing.places.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 1, 2, 3, 0, 5, 6]


def test_short_strings_fill_the_rows_of_long_ones():
    packing = pack([[1, 2], [1, 3, 4, 5, 6, 7], [1, 8]], length=8)
    assert packing.ids.tolist() == [[1, 3, 4, 5, 6, 7, 2, 8]]


def test_nothing_and_a_row_that_is_just_full():
    assert pack([], length=4).places.tolist() == []
    assert pack([[1, 2, 3, 4], [1, 2, 3, 5]], length=4).ids.tolist() == [[1, 2, 3, 4], [1, 2, 3, 5]]


def test_a_padded_string_repeats_its_end_token():
    tokens = Tokens(
        hidden=torch.arange(14.0).view(7, 2),
        pooled=torch.tensor([[1.0], [2.0]]),
        spans={"a": (0, 3), "b c": (3, 7)},
        cut={},
    )
    padded, pooled = tokens.padded(["b c", "a", "b c"], length=5)
    rows = [[3, 4, 5, 6, 6], [0, 1, 2, 2, 2], [3, 4, 5, 6, 6]]
    assert torch.equal(padded, tokens.hidden[torch.tensor(rows)])
    assert pooled.flatten().tolist() == [2.0, 1.0, 2.0]
    assert list(tokens.inner("b c")) == [4, 5]
    assert tokens.end("a") == 2
    assert Tokens.nothing().hidden.shape[0] == 0
