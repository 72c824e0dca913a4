"""Real and generated pictures as published: names, arrays, and no mixing of ranks."""

import numpy as np
import pytest

from sampling.pairs import Pairs


def test_a_file_holds_one_picture_of_each_kind(tmp_path):
    real, fake = (np.random.default_rng(n).integers(0, 256, (6, 9, 3), dtype=np.uint8) for n in range(2))
    Pairs(tmp_path, rank=3, ranks=4, scenes=9).write(1, real, fake)
    with np.load(tmp_path / "npz_files_3" / "batch_1.npz") as stored:
        assert sorted(stored.files) == ["fake_images", "real_images"]
        assert np.array_equal(stored["real_images"], real[None])
        assert np.array_equal(stored["fake_images"], fake[None])


def test_pictures_of_two_sizes_are_refused(tmp_path):
    pairs = Pairs(tmp_path, rank=0, ranks=1, scenes=1)
    with pytest.raises(ValueError, match=r"real \(6, 9, 3\) and fake \(6, 8, 3\) differ"):
        pairs.write(0, np.zeros((6, 9, 3), np.uint8), np.zeros((6, 8, 3), np.uint8))
    assert not pairs.path(0).exists()


def test_files_of_another_number_of_ranks_are_refused(tmp_path):
    Pairs(tmp_path, rank=1, ranks=2, scenes=5)
    Pairs(tmp_path, rank=0, ranks=2, scenes=5)
    with pytest.raises(ValueError, match="5 scenes over 2 ranks, asked for are 5 over 3") as caught:
        Pairs(tmp_path, rank=0, ranks=3, scenes=5)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["npz_files.json"]
