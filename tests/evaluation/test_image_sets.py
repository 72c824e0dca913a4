"""Pictures of scenes read from a folder, by the names that they are written under and by those of others."""

import numpy as np
import pytest
from PIL import Image

from evaluation.image_sets import Folder


def test_pictures_are_found_by_the_names_of_the_manifest_and_by_bare_ids(tmp_path):
    for value, name in enumerate(("a%2Fb.jpg", "100%.png", "7.png", "7.jpg")):
        Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(tmp_path / name)
    pictures = Folder(tmp_path, ["a/b", "100%", "7"])
    assert [int(pictures.read(place)[0, 0, 0]) for place in range(3)] == [0, 1, 2]
    before = pictures.stamp(2)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "7.png")
    assert pictures.stamp(2) != before
    with pytest.raises(ValueError, match=r"1 of 2 scenes have no picture, first 8\.png"):
        Folder(tmp_path, ["7", "8"])
