"""Which scenes the report shows, and that boxes can be laid over any picture of a scene."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from evaluation.report.images import PictureRow, choose, data_uri, overlay
from scenes.draw import draw_boxes
from scenes.scene import Scene, SceneObject

SCENE = Scene(
    id="a",
    objects=(
        SceneObject(phrase="red circle", box=(0.1, 0.2, 0.5, 0.9)),
        SceneObject(phrase="blue square", box=(0.4, 0.1, 0.95, 0.6)),
    ),
)


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_best_and_worst_are_ranked():
    scores = {f"s{place:02d}": place / 40 for place in range(40)}
    choice = choose(scores, fixed=5, extremes=3)
    assert choice.best == ("s39", "s38", "s37")
    assert choice.worst == ("s00", "s01", "s02")
    assert len(set(choice.fixed)) == 5


def test_the_lot_does_not_look_at_scores_or_order():
    names = [f"s{place}" for place in range(40)]
    one = choose({name: place / 40 for place, name in enumerate(names)}, fixed=7)
    other = choose({name: None if place % 3 else 1.0 for place, name in enumerate(reversed(names))}, fixed=7)
    assert one.fixed == other.fixed


def test_choosing_among_the_chosen_changes_nothing():
    rng = np.random.default_rng(0)
    scores = {f"s{place}": float(score) for place, score in enumerate(rng.random(300))}
    choice = choose(scores)
    chosen = {*choice.fixed, *choice.best, *choice.worst}
    assert choose({name: scores[name] for name in sorted(chosen)}) == choice


def test_scenes_without_a_score_are_not_ranked_and_ranks_do_not_meet():
    choice = choose({"a": 0.1, "b": None, "c": 0.9, "d": 0.5}, fixed=9, extremes=12)
    assert (choice.best, choice.worst) == (("c",), ("a",))
    assert sorted(choice.fixed) == list("abcd")
    assert choose({}) == choose({}, fixed=0)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 33)])
def test_an_overlay_on_a_picture_is_the_picture_with_boxes(height, width):
    picture = noise(height, width)
    expected = draw_boxes(picture, SCENE)
    layer = overlay(SCENE, size=picture.size)
    assert layer.size == expected.size
    below = picture.resize(layer.size, Image.Resampling.NEAREST).convert("RGBA")
    laid = np.asarray(Image.alpha_composite(below, layer).convert("RGB"), dtype=int)
    assert abs(laid - np.asarray(expected, dtype=int)).max() <= 3
    assert np.asarray(layer)[..., 3].min() == 0


def test_a_scene_without_boxes_hides_nothing():
    assert not np.asarray(overlay(Scene(id="empty"), size=(32, 32)))[..., 3].any()


def test_small_pictures_keep_every_pixel_and_photographs_are_jpeg():
    assert np.array_equal(np.asarray(opened(data_uri(noise(32, 20)))), np.asarray(noise(32, 20)))
    assert data_uri(noise(256, 200)).startswith("data:image/jpeg;base64,")
    assert opened(data_uri(overlay(SCENE, size=(32, 32)))).mode == "RGBA"


def test_scores_of_a_row_are_flat_or_by_arm():
    pictures = {"true": None, "picture": noise(8, 8), "without_scene": noise(8, 8, 1)}
    flat = PictureRow(scene=SCENE, scores={"layout_iou": 0.5}, **pictures)
    by_arm = PictureRow(
        scene=SCENE,
        scores={"with_scene": {"layout_iou": 0.5}, "without_scene": {"layout_iou": 0.1}},
        **pictures,
    )
    assert flat.score("layout_iou") == by_arm.score("layout_iou") == 0.5
    assert by_arm.score("layout_iou", arm="without_scene") == 0.1
    assert flat.score("layout_iou", arm="without_scene") is None
    assert flat.score("colour") is None
