"""The exact scorer: perfect on true pictures, low on others', and steady under blur, noise and casts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from datamodules.sources.shapes import Shapes
from metrics.shapes_scorer import COLUMNS, ShapesScorer, ceiling_and_floor, find_objects, oklab, score_picture
from scenes.scene import Relation, Scene, SceneObject
from scenes.shapes import COLOURS, GROUNDS, PALETTE, PATTERNS, SHAPES, pattern_tone, shape_body

GREY = GROUNDS[1]


@pytest.fixture(scope="module")
def samples():
    return [(scene, np.asarray(picture)) for scene, picture in Shapes(count=80, seed=11)]


def draw(image, colour, shape, pattern, box):
    left, top, right, bottom = box
    body = shape_body(shape, right - left, bottom - top)
    tones = np.array(PALETTE[colour], np.uint8)[pattern_tone(pattern, right - left, bottom - top).astype(int)]
    image[top:bottom, left:right][body] = tones[body]


def picture_of(*objects, ground=GREY):
    image = np.empty((32, 32, 3), np.uint8)
    image[:] = ground
    for item in objects:
        draw(image, *item)
    return image


def scene_of(*objects, relations=()):
    items = tuple(
        SceneObject(
            phrase=f"{colour} {pattern} {shape}",
            label=shape,
            attributes=(colour, pattern),
            box=tuple(edge / 32 for edge in box),
        )
        for colour, shape, pattern, box in objects
    )
    return Scene(id="x", objects=items, relations=tuple(relations))


def means(samples, spoil):
    scorer = ShapesScorer(resamples=10)
    images = [np.clip(spoil(image.astype(float)), 0, 255).round().astype(np.uint8) for _, image in samples]
    rows = scorer.measure(images, [scene for scene, _ in samples])
    return {name: value.mean for name, value in scorer.compute(rows).items()}


RED = ("red", "circle", "plain", (2, 2, 12, 12))
BLUE = ("blue", "square", "striped", (18, 3, 28, 13))


def test_ceiling_is_one_and_floor_is_low():
    bounds = ceiling_and_floor(Shapes(count=150, seed=1), range(150))
    ceiling, floor = bounds["ceiling"], bounds["floor"]
    assert set(ceiling) == set(floor) == set(COLUMNS)
    assert ceiling["layout_iou"].mean >= 0.99
    assert ceiling["relations"].mean >= 0.997
    assert min(value.mean for value in ceiling.values()) >= 0.99
    assert floor["layout_iou"].mean < 0.1
    assert 0.2 < floor["colour"].mean < 0.5
    assert floor["relations"].mean < 0.1
    assert ceiling["relations"].count < ceiling["colour"].count == 150


def test_large_pictures_are_read_as_well():
    ceiling = ceiling_and_floor(Shapes(count=40, size=64, seed=1), range(40))["ceiling"]
    assert min(value.mean for value in ceiling.values()) >= 0.99


def test_the_floor_needs_two_scenes():
    with pytest.raises(ValueError, match="at least 2"):
        ceiling_and_floor(Shapes(count=3), [1])


@pytest.mark.parametrize(("colour", "ground"), list(itertools.product(COLOURS, GROUNDS)))
def test_every_look_is_read_on_every_ground(colour, ground):
    for shape, pattern, (width, height) in itertools.product(SHAPES, PATTERNS, ((8, 8), (9, 11), (18, 15))):
        box = (5, 4, 5 + width, 4 + height)
        found = find_objects(picture_of((colour, shape, pattern, box), ground=ground))
        assert list(found) == [colour]
        assert found[colour].box == tuple(edge / 32 for edge in box)
        assert (found[colour].shape, found[colour].pattern) == (shape, pattern)


def test_palette_entries_stay_apart():
    tones = oklab(np.array([PALETTE[colour] for colour in COLOURS], np.uint8))
    groups = [np.concatenate([pair, pair.mean(0, keepdims=True)]) for pair in tones]
    groups += [oklab(np.array([ground], np.uint8)) for ground in GROUNDS]
    for one, two in itertools.combinations(groups, 2):
        assert np.linalg.norm(one[:, None] - two[None], axis=-1).min() >= 0.12


def test_oklab_of_known_colours():
    known = oklab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], np.uint8))
    assert known == pytest.approx(np.array([[1, 0, 0], [0, 0, 0], [0.62796, 0.22486, 0.12585]]), abs=1e-4)


def test_a_missing_object_counts_as_nothing():
    relation = Relation(subject=0, predicate="left of", object=1)
    scene = scene_of(RED, BLUE, relations=[relation])
    assert score_picture(picture_of(RED, BLUE), scene) == dict.fromkeys(COLUMNS, 1.0)
    expected = dict.fromkeys(COLUMNS, 0.5) | {"relations": 0.0}
    assert score_picture(picture_of(RED), scene) == expected
    assert score_picture(picture_of(), scene) == dict.fromkeys(COLUMNS, 0.0)


def test_each_column_sees_its_own_mistake():
    scene = scene_of(RED, BLUE, relations=[Relation(subject=0, predicate="left of", object=1)])
    right = dict.fromkeys(COLUMNS, 1.0)
    wrong_shape = ("red", "square", "plain", RED[3])
    assert score_picture(picture_of(wrong_shape, BLUE), scene) == right | {"shape": 0.5}
    wrong_pattern = ("red", "circle", "checked", RED[3])
    assert score_picture(picture_of(wrong_pattern, BLUE), scene) == right | {"pattern": 0.5}
    moved = ("red", "circle", "plain", (7, 2, 17, 12))
    assert score_picture(picture_of(moved, BLUE), scene) == right | {"layout_iou": pytest.approx((1 + 1 / 3) / 2)}
    below = ("red", "circle", "plain", (18, 20, 28, 30))
    assert score_picture(picture_of(below, BLUE), scene) == right | {"layout_iou": 0.5, "relations": 0.0}


def test_an_inner_object_hides_part_of_the_outer():
    outer, inner = ("green", "circle", "checked", (3, 3, 27, 27)), ("pink", "diamond", "plain", (9, 9, 20, 20))
    scene = scene_of(outer, inner, relations=[Relation(subject=1, predicate="inside", object=0)])
    assert score_picture(picture_of(outer, inner), scene) == dict.fromkeys(COLUMNS, 1.0)
    beside = ("pink", "diamond", "plain", (21, 9, 32, 20))
    assert score_picture(picture_of(outer, beside), scene)["relations"] == 0.0


def test_the_largest_region_of_a_colour_counts():
    image = picture_of(RED)
    image[28:30, 28:30] = PALETTE["red"][0]
    assert find_objects(image)["red"].box == tuple(edge / 32 for edge in RED[3])


def test_specks_and_thin_lines_are_no_objects():
    image = picture_of()
    image[4:7, 4:7] = PALETTE["blue"][0]
    image[20, 2:30] = PALETTE["red"][0]
    assert find_objects(image) == {}


def test_colours_far_from_the_palette_are_no_objects():
    assert find_objects(np.full((32, 32, 3), (128, 128, 128), np.uint8)) == {}
    assert find_objects(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)) == {}


def test_only_asked_colours_are_returned():
    assert set(find_objects(picture_of(RED, BLUE), ["blue", "pink"])) == {"blue"}


def test_what_is_not_asked_does_not_count():
    scene = scene_of(RED)
    loose = replace(scene, objects=(SceneObject(phrase="red thing"),))
    expected = {"layout_iou": None, "colour": 1.0, "shape": None, "pattern": None, "relations": None}
    assert score_picture(picture_of(RED), loose) == expected
    assert score_picture(picture_of(RED), scene.without_layout()) == dict.fromkeys(COLUMNS)
    assert score_picture(picture_of(RED), scene)["relations"] is None


def test_scenes_of_other_data_are_refused():
    scene = Scene(id="street", objects=(SceneObject(phrase="a dog"),))
    with pytest.raises(ValueError, match="street.*a dog"):
        score_picture(picture_of(), scene)


def test_orange_is_not_read_as_red_from_a_phrase():
    scene = scene_of(("orange", "circle", "plain", RED[3]))
    assert score_picture(picture_of(RED), scene)["colour"] == 0.0


@pytest.mark.parametrize(
    ("spoil", "least"),
    [
        pytest.param(lambda x: x + np.random.default_rng(0).normal(0, 8, x.shape), 0.99, id="noise"),
        pytest.param(lambda x: ndimage.gaussian_filter(x, (0.5, 0.5, 0)), 0.97, id="blur"),
        pytest.param(lambda x: x * [1.05, 0.95, 0.9] + [0, 6, 10], 0.99, id="cast"),
        pytest.param(lambda x: (x - 128) * 0.85 + 128, 0.99, id="contrast"),
        pytest.param(
            lambda x: (
                ndimage.gaussian_filter(x, (0.5, 0.5, 0)) * [0.95, 0.97, 1.05]
                + np.random.default_rng(0).normal(4, 8, x.shape)
            ),
            0.95,
            id="all",
        ),
    ],
)
def test_imperfect_pictures_are_still_read(samples, spoil, least):
    assert min(means(samples, spoil).values()) >= least


def test_strong_noise_and_blur_lower_scores_gradually(samples):
    noisy = means(samples, lambda x: x + np.random.default_rng(0).normal(0, 20, x.shape))
    assert min(noisy.values()) >= 0.9
    blurred = means(samples, lambda x: ndimage.gaussian_filter(x, (0.8, 0.8, 0)))
    assert min(blurred["colour"], blurred["relations"]) >= 0.95
    assert blurred["layout_iou"] >= 0.85


def test_rows_say_what_each_scene_scored(samples):
    scorer = ShapesScorer(resamples=50)
    rows = scorer.measure([image for _, image in samples[:6]], [scene for scene, _ in samples[:6]])
    assert [row["scene"] for row in rows] == [scene.id for scene, _ in samples[:6]]
    assert set(rows[0]) == {"scene", *COLUMNS}


def test_scorer_needs_nothing_that_shapes_lacks():
    assert ShapesScorer.requires <= Shapes.provides
