"""Pictures of scenes read from a folder, by the names that they are written under and by those of others."""

import numpy as np
import pytest
from PIL import Image

from evaluation.generation import read_folder
from scenes import Scene


def test_pictures_are_found_by_the_names_of_the_manifest_and_by_bare_ids(tmp_path):
    for value, name in enumerate(("a%2Fb.jpg", "100%.png", "7.png", "7.jpg")):
        Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(tmp_path / name)
    scenes = [Scene(id=name) for name in ("a/b", "100%", "7")]
    assert [int(picture[0, 0, 0]) for picture in read_folder(tmp_path, scenes)] == [0, 1, 2]
    with pytest.raises(ValueError, match="1 of 2 scenes have no picture, first 8.png"):
        list(read_folder(tmp_path, [*scenes[:1], Scene(id="8")]))
