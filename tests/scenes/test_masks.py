"""Run lengths: encoding inverts, and the form is COCO's."""

import numpy as np
import pytest

from scenes import masks


def random_mask(height: int, width: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(height, width)) < share


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (60, 83)])
def test_decode_inverts_encode(size, share):
    mask = random_mask(*size, share, seed=sum(size))
    coded = masks.encode(mask)
    assert coded["size"] == list(size)
    assert np.array_equal(masks.decode(coded), mask)
    assert masks.encode(masks.decode(coded)) == coded


def test_text_of_the_published_form():
    # By hand: 20 zeros, 5 ones, 25 zeros of a 10 x 5 mask; 20 and 25 need two groups for the sign bit, 5 one.
    mask = np.zeros((10, 5), bool)
    mask[:5, 2] = True
    assert masks.encode(mask) == {"size": [10, 5], "counts": "d05i0"}
    # A fourth run is written as the difference to the second: 3 - 5 = -2.
    mask[7:, 4] = True
    assert masks.encode(mask)["counts"] == "d05f0N"
    assert np.array_equal(masks.decode({"size": [10, 5], "counts": "d05f0N"}), mask)


def test_flip_mirrors_columns():
    mask = random_mask(9, 14, 0.3, seed=3)
    coded = masks.encode(mask)
    assert np.array_equal(masks.decode(masks.flip(coded)), mask[:, ::-1])
    assert masks.flip(masks.flip(coded)) == coded


def test_crop_cuts_rows_and_columns():
    mask = random_mask(20, 10, 0.5, seed=4)
    cut = masks.crop(masks.encode(mask), (0.2, 0.1, 0.7, 0.9))
    assert np.array_equal(masks.decode(cut), mask[2:18, 2:7])
    assert masks.crop(masks.encode(mask), (0.99, 0.99, 1.0, 1.0))["size"] == [1, 1]


def test_runs_that_do_not_fill_the_size_are_refused():
    coded = masks.encode(np.ones((4, 6), bool))
    with pytest.raises(ValueError, match="runs of 24 pixels"):
        masks.decode({**coded, "size": [4, 7]})
