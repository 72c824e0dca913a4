"""The shapes data: pictures are a pure function of (seed, index), and scenes say exactly what they show."""

import itertools
import math
import re

import numpy as np
import pytest

from datamodules.sources.base import PROVIDABLE, Source
from datamodules.sources.shapes import Shapes, caption_of
from scenes.graph import relation_between
from scenes.masks import decode
from scenes.scene import Scene
from scenes.shapes import COLOURS, GROUNDS, PALETTE, PATTERNS, PREDICATES, SHAPES, VOCABULARY, pattern_tone, shape_body


@pytest.fixture(scope="module")
def samples():
    return list(Shapes(count=300, seed=0))


def pixels(box, size=32):
    return [edge * size for edge in box]


def contains(outer, inner):
    return outer[0] < inner[0] and outer[1] < inner[1] and outer[2] > inner[2] and outer[3] > inner[3]


def test_a_sample_depends_on_seed_and_index_alone():
    source = Shapes(count=20, seed=5)
    scene, picture = source.sample(17)
    source.sample(3)
    again, same = source.sample(17)
    shifted, shifted_picture = Shapes(count=4, seed=5, start=15).sample(2)
    assert scene == again == shifted
    assert np.array_equal(picture, same)
    assert np.array_equal(picture, shifted_picture)
    assert not np.array_equal(picture, Shapes(count=20, seed=6).sample(17)[1])


def test_iteration_gives_count_samples_in_order():
    source = Shapes(count=5, seed=0, start=7)
    scenes = [scene for scene, _ in source]
    assert len(source) == len(scenes) == 5
    assert [scene.id for scene in scenes] == [source[i][0].id for i in range(5)]
    assert scenes[0].id == "shapes-0-00000007"


def test_ids_are_unique_across_seeds_and_starts():
    ids = [
        s.id for seed, start in itertools.product((0, 1), (0, 4)) for s, _ in Shapes(count=4, seed=seed, start=start)
    ]
    assert len(set(ids)) == 16


def test_both_sizes_show_the_same_scenes():
    for index in range(20):
        small, picture = Shapes(count=20).sample(index)
        large, large_picture = Shapes(count=20, size=64).sample(index)
        assert (picture.size, large_picture.size) == ((32, 32), (64, 64))
        assert large.frame.target == (64, 64)
        assert [item.box for item in small.objects] == [item.box for item in large.objects]
        assert (small.caption, small.relations) == (large.caption, large.relations)
        enlarged = np.asarray(picture).repeat(2, 0).repeat(2, 1)
        # Bodies are rendered afresh at 64, so that only their outlines differ.
        assert (enlarged == np.asarray(large_picture)).all(-1).mean() > 0.9


def test_scenes_carry_what_the_source_provides(samples):
    assert Shapes.provides == {"image", "caption", "boxes", "phrases", "attributes", "relations", "masks"}
    assert issubclass(Shapes, Source)
    assert Shapes.provides <= PROVIDABLE
    for scene, picture in samples:
        assert picture.mode == "RGB"
        assert scene.frame.original == (32, 32)
        assert Scene.from_json(scene.to_json()) == scene
        for item in scene.objects:
            colour, pattern = item.attributes
            assert item.phrase == f"{colour} {pattern} {item.label}"
            assert (colour in COLOURS, pattern in PATTERNS, item.label in SHAPES) == (True, True, True)


def test_every_count_shape_pattern_colour_ground_and_relation_occurs(samples):
    objects = [item for scene, _ in samples for item in scene.objects]
    assert {len(scene.objects) for scene, _ in samples} == {1, 2, 3, 4}
    assert {item.label for item in objects} == set(SHAPES)
    assert {word for item in objects for word in item.attributes} == set(COLOURS) | set(PATTERNS)
    assert {r.predicate for scene, _ in samples for r in scene.relations} == set(PREDICATES)
    assert {tuple(np.asarray(picture)[0, 0].tolist()) for _, picture in samples} == set(GROUNDS)


def test_number_of_objects_can_be_set():
    assert {len(scene.objects) for scene, _ in Shapes(count=20, min_objects=3, max_objects=3)} == {3}


def test_colours_are_distinct_within_a_scene(samples):
    for scene, _ in samples:
        colours = [item.attributes[0] for item in scene.objects]
        assert len(set(colours)) == len(colours)


def test_boxes_lie_on_pixels_and_objects_are_apart_or_nested(samples):
    for scene, _ in samples:
        boxes = [pixels(item.box) for item in scene.objects]
        assert all(edge == int(edge) for box in boxes for edge in box)
        for box in boxes:
            width, height = box[2] - box[0], box[3] - box[1]
            assert min(width, height) >= 8
            assert max(width, height) <= 24
            assert max(width, height) / min(width, height) <= 4 / 3 + 1e-9
        for one, two in itertools.combinations(boxes, 2):
            gap = max(one[0] - two[2], two[0] - one[2], one[1] - two[3], two[1] - one[3])
            assert gap >= 1 or contains(one, two) or contains(two, one)


@pytest.mark.parametrize("size", [32, 64])
def test_mask_is_exactly_the_visible_pixels(size):
    for scene, picture in Shapes(count=60, size=size, seed=2):
        image = np.asarray(picture)
        covered = np.zeros((size, size), dtype=int)
        for item in scene.objects:
            mask = decode(item.mask)
            tones = [np.array(tone) for tone in PALETTE[item.attributes[0]]]
            of_colour = (image == tones[0]).all(-1) | (image == tones[1]).all(-1)
            assert np.array_equal(mask, of_colour)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert found == pixels(item.box, size)
            covered += mask
        assert covered.max() == 1
        assert len(np.unique(image[covered == 0], axis=0)) == 1


def test_two_pixels_of_the_outer_object_show_around_an_inner_one(samples):
    nested = 0
    for scene, _ in samples:
        for relation in scene.relations:
            if relation.predicate == "inside":
                inner, outer = (decode(scene.objects[i].mask) for i in (relation.subject, relation.object))
                padded = np.pad(inner, 2)
                grown = np.any([np.roll(padded, s, (0, 1)) for s in itertools.product(range(-2, 3), repeat=2)], axis=0)
                assert (outer | inner)[grown[2:-2, 2:-2]].all()
                nested += 1
    assert nested > 30


def test_one_unambiguous_relation_for_each_pair(samples):
    for scene, _ in samples:
        pairs = [frozenset((r.subject, r.object)) for r in scene.relations]
        assert len(set(pairs)) == len(pairs) == math.comb(len(scene.objects), 2)
        for relation in scene.relations:
            one, two = scene.objects[relation.subject].box, scene.objects[relation.object].box
            assert relation_between(one, two) == relation.predicate
            assert contains(two, one) == (relation.predicate == "inside")
            if relation.predicate != "inside":
                assert relation.subject < relation.object
                angle = math.degrees(math.atan2(one[1] + one[3] - two[1] - two[3], one[0] + one[2] - two[0] - two[2]))
                assert abs(abs(angle) % 90 - 45) >= 8 - 1e-6


def test_caption_names_objects_in_any_order_and_nothing_else(samples):
    orders = set()
    for scene, _ in samples:
        words = re.findall(r"\w+|,", scene.caption)
        assert set(words) <= set(VOCABULARY) - {"left", "right", "of", "above", "below", "inside", "surrounding"}
        named = re.split(r", | and ", scene.caption)
        phrases = [item.phrase for item in scene.objects]
        assert sorted(part.split(" ", 1)[1] for part in named) == sorted(phrases)
        orders.add(named[0].split(" ", 1)[1] == phrases[0])
    assert orders == {True, False}


def test_caption_grammar():
    assert caption_of(["red plain circle"]) == "a red plain circle"
    assert caption_of(["orange plain circle", "red plain square"]) == "an orange plain circle and a red plain square"
    assert caption_of(["a1", "b", "c"]) == "an a1, a b and a c"


def test_vocabulary_covers_predicates_once_each():
    assert {word for predicate in PREDICATES for word in predicate.split()} <= set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 26


@pytest.mark.parametrize("shape", SHAPES)
def test_body_touches_all_sides_of_its_box(shape):
    for width, height in itertools.product(range(8, 25), repeat=2):
        if 3 * width <= 4 * height <= 16 / 3 * width:
            body = shape_body(shape, width, height)
            assert body.shape == (height, width)
            assert body[0].any()
            assert body[-1].any()
            assert body[:, 0].any()
            assert body[:, -1].any()
            assert np.array_equal(body, body[:, ::-1])


def test_patterns():
    assert not pattern_tone("plain", 9, 8).any()
    striped = pattern_tone("striped", 9, 8)
    assert striped[:, 0].tolist() == [False, False, True, True] * 2
    assert (striped == striped[:, :1]).all()
    checked = pattern_tone("checked", 8, 12)
    assert checked[0].tolist() == [False, False, True, True] * 2
    assert np.array_equal(checked[2:4], ~checked[:2])
    assert np.array_equal(checked[:, 2:4], ~checked[:, :2])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size": 48}, "size"),
        ({"count": -1}, "count"),
        ({"seed": -1}, "seed"),
        ({"start": -3}, "start"),
        ({"min_objects": 0}, "min_objects"),
        ({"min_objects": 3, "max_objects": 2}, "max_objects"),
        ({"max_objects": 5}, "max_objects"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        Shapes(**{"count": 4, **settings})


@pytest.mark.parametrize("index", [-1, 4])
def test_indices_outside_are_refused(index):
    with pytest.raises(IndexError, match="outside 0..3"):
        Shapes(count=4).sample(index)


def test_unknown_shape_and_pattern_are_refused():
    with pytest.raises(ValueError, match="hexagon"):
        shape_body("hexagon", 8, 8)
    with pytest.raises(ValueError, match="dotted"):
        pattern_tone("dotted", 8, 8)


def test_source_compares_what_it_provides_with_what_is_required():
    assert Shapes(count=1).missing({"boxes", "phrases"}) == frozenset()
    assert Shapes(count=1).missing(["boxes", "descriptions"]) == {"descriptions"}
    with pytest.raises(ValueError, match="smells"):
        type("Odd", (Source,), {"provides": frozenset({"smells"})})
