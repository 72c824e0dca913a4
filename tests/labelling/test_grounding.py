"""Open detectors of transformers' own classes with random weights: what is asked comes back, thresholds hold, batches do not matter."""

import numpy as np
import pytest
import torch

from labelling.grounding import GroundingDino, _owners
from labelling.parts import PartMissing


def same(one, other):
    assert one.labels == other.labels
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-5)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


ASKED = [["red circle", "Dogs"], ["cat"], ["hot dog", "dog", "blue square"], ["a cat sits on the dog."]]


def test_every_box_stands_for_what_was_asked(grounding_dino, pictures):
    part = GroundingDino(model=grounding_dino, box_threshold=0.0, text_threshold=0.0, nms=None)
    found = part(pictures, ASKED)
    assert len(found) == 4
    for each, asked in zip(found, ASKED, strict=True):
        assert len(each.labels) == len(each.boxes) == len(each.scores) > 0
        assert set(each.labels) <= set(asked)
        assert each.boxes.dtype == each.scores.dtype == np.float32
        assert ((each.boxes >= 0) & (each.boxes <= 1)).all()
        assert (each.boxes[:, 2:] > each.boxes[:, :2]).all()
        assert ((each.scores >= 0) & (each.scores <= 1)).all()
        assert (np.diff(each.scores) <= 0).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_together_is_as_one_by_one(grounding_dino, pictures, batch_size):
    part = GroundingDino(model=grounding_dino, box_threshold=0.3, batch_size=batch_size)
    together = part(pictures, ASKED)
    for each, picture, asked in zip(together, pictures, ASKED, strict=True):
        same(each, part([picture], [asked])[0])
