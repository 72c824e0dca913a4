"""SAM and SAM 2 of transformers' own classes with random weights: a mask of the picture's size for each box."""

import numpy as np
import pytest

from labelling.segmenters import Sam
from scenes.masks import decode, encode

BOXES = [
    np.array([[0.1, 0.1, 0.6, 0.9], [0, 0, 1, 1], [0.5, 0.2, 0.7, 0.4]], np.float32),
    np.zeros((0, 4), np.float32),
    np.array([[0.2, 0.3, 0.9, 0.8]], np.float32),
    np.array([[0.2, 0.3, 0.9, 0.8], [0.6, 0.6, 0.7, 0.9]], np.float32),
]


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_every_box_has_its_mask(tiny_model, pictures, name):
    part = Sam(model=tiny_model(name), batch_size=2)
    masks = part(pictures, BOXES)
    for picture, boxes, each in zip(pictures, BOXES, masks, strict=True):
        assert each.dtype == bool
        assert each.shape == (len(boxes), *picture.shape[:2])
        for place in range(len(boxes)):
            alone = part([picture], [boxes[place : place + 1]])[0][0]
            assert (alone == each[place]).mean() > 0.995
            np.testing.assert_array_equal(decode(encode(each[place])), each[place])
    assert any(0 < mask.mean() < 1 for each in masks for mask in each)


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_the_threshold_is_applied(tiny_model, pictures, name):
    folder = tiny_model(name)
    sizes = [Sam(model=folder, mask_threshold=limit)(pictures[:1], BOXES[:1])[0].mean() for limit in (-1e9, 0.0, 1e9)]
    assert sizes[0] == 1 > sizes[1] > sizes[2] == 0
