"""SDXL's refiner from a folder: what it depends on, and what it refuses."""

import re
import shutil

import numpy as np
import pytest

from models.objectives.draws import noise_generators
from models.refining import Refiner
from scenes import Scene

SCENE = Scene(id="one", caption="a red circle")
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def refined(tiny_refiner):
    """refined(scene, seed, **settings): what a refiner with these settings makes of the picture."""

    usual = {"steps": 4, "strength": 0.5}
    opened = Refiner(str(tiny_refiner), **usual)

    def make(scene=SCENE, seed=0, picture=PICTURE, **settings):
        refiner = Refiner(str(tiny_refiner), **{**usual, **settings}) if settings else opened
        return refiner(picture, scene, seed=seed)

    return make


def test_a_refined_picture_is_of_the_same_size_and_another(refined):
    picture = refined()
    assert picture.shape == PICTURE.shape
    assert picture.dtype == np.uint8
    assert (picture != PICTURE).any()


def test_seed_scene_caption_and_settings_decide_and_nothing_else(refined, tiny_refiner):
    refined(Scene(id="two", caption="a cat"), seed=5, picture=PICTURE[::-1].copy())  # what came before leaves no trace
    picture = Refiner(str(tiny_refiner), steps=4, strength=0.5)(PICTURE, SCENE, seed=0)
    assert np.array_equal(refined(), picture)
    for other in (
        {"seed": 1},
        {"scene": Scene(id="two", caption="a red circle")},
        {"scene": Scene(id="one", caption="a blue square")},
        {"strength": 1.0},
        {"steps": 6},
        {"guidance": 1.0},
        {"negative_prompt": "a dog"},
        {"aesthetic_score": 2.0},
        {"negative_aesthetic_score": 6.0},
        {"picture": 255 - PICTURE},
    ):
        assert not np.array_equal(refined(**other), picture), other


def test_its_noise_is_not_the_sampler_s():
    first, second = (noise_generators(3, ["one"], stream=stream)[0].initial_seed() for stream in (1, 2))
    assert first != second
    assert noise_generators(3, ["one"])[0].initial_seed() == first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "half"}, "refiner.dtype: 'half' is unknown"),
        ({"strength": 0}, "refiner.strength: 0 is no share above 0"),
        ({"strength": 0.3, "steps": 3}, "refiner.steps: 3 x strength 0.3 is no whole step; give 4 or more"),
        ({"picture": PICTURE[:, :60]}, "a picture of 48 x 60 px is no multiple of its cells of 8 px"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(refined, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        refined(**settings)


def test_what_is_no_refiner_is_refused_in_one_line(tiny_refiner, tmp_path):
    shutil.copytree(tiny_refiner, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "vae")
    for folder in (tmp_path / "broken", tmp_path):
        with pytest.raises(ValueError, match="^refiner.path: .* a folder that cannot be opened") as caught:
            Refiner(str(folder))
        assert "\n" not in str(caught.value)
