"""The scene: what it refuses and what moves with it."""

import math

import numpy as np
import pytest

from scenes import masks
from scenes.scene import Frame, Relation, Scene, SceneError, SceneObject


def thing(phrase="red circle", box=(0.25, 0.5, 0.5, 0.75), **more) -> SceneObject:
    return SceneObject(phrase=phrase, box=box, **more)


def scene(*objects, relations=(), frame=None, **more) -> Scene:
    return Scene(id="s1", objects=objects, relations=relations, frame=frame, **more)


def relation(subject, predicate, other) -> Relation:
    return Relation(subject=subject, predicate=predicate, object=other)


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((0.1, 0.2, 1.2, 0.5), r"\(0\.1, 0\.2, 1\.2, 0\.5\) leaves \[0, 1\]; .*scenes\.boxes\.clip"),
        ((-0.1, 0.2, 0.9, 0.5), "leaves"),
        ((0.5, 0.2, 0.4, 0.5), r"inverted; .*to_xyxy"),
        ((0.1, 0.6, 0.4, 0.5), "inverted"),
        ((0.1, 0.2, 0.1, 0.5), "has no size"),
        ((0.1, 0.5, 0.4, 0.5 + 1e-8), "has no size"),
        ((0.1, math.nan, 0.4, 0.5), "not finite"),
        ((0.1, 0.2, math.inf, 0.5), "not finite"),
        ((0.1, 0.2, 0.4), "is not a box"),
        (("0.1", "0.2", "0.4", "0.5"), "is not a box"),
        (7, "is not a box"),
        (np.zeros((2, 4)), "is not a box"),
    ],
)
def test_bad_boxes_are_refused_by_name(box, said):
    with pytest.raises(SceneError, match=rf"^scene 's1': objects\[1\]\.box: .*{said}") as caught:
        scene(thing(), thing(box=box))
    assert "\n" not in str(caught.value)


def test_rounding_at_the_border_is_taken_off():
    box = scene(thing(box=(-5e-7, 0.0, 1 + 5e-7, 1.0))).objects[0].box
    assert box == (0.0, 0.0, 1.0, 1.0)


def test_numbers_of_any_library_become_floats():
    item = thing(box=np.array([0.25, 0.5, 0.5, 0.75], np.float32), score=np.float32(0.5), attributes=["red"])
    assert item == thing(score=0.5, attributes=("red",))
    assert all(type(v) is float for v in item.box)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"phrase": ""}, "phrase: '' is not a phrase"),
        ({"phrase": "  "}, "phrase: '  ' is not a phrase"),
        ({"phrase": None}, "phrase: None is not a phrase"),
        ({"label": 3}, "label: 3 is not a text"),
        ({"attributes": "red"}, "attributes: 'red' is not a list"),
        ({"score": math.nan}, "score: nan is not a finite number"),
        ({"is_crowd": 1}, "is_crowd: 1 is not a truth value"),
        ({"mask": {"size": [2, 2], "counts": [4]}}, "mask: .* is not run lengths"),
    ],
)
def test_bad_objects_are_refused_by_name(fields, said):
    with pytest.raises(SceneError, match=rf"^scene 's1': objects\[0\]\.{said}.*; "):
        scene(SceneObject(**{"phrase": "circle", **fields}))


@pytest.mark.parametrize(
    ("relations", "said"),
    [
        ([relation(0, "left of", 2)], r"relations\[0\]\.object: 2 is not an object; the objects are 0 to 1"),
        ([relation(-1, "left of", 1)], r"relations\[0\]\.subject: -1 is not an object"),
        ([relation(True, "left of", 0)], r"relations\[0\]\.subject: True is not an object"),
        ([relation(1, "left of", 1)], r"relations\[0\]: 'left of' relates object 1 to itself"),
        ([relation(0, "", 1)], r"relations\[0\]\.predicate: '' is not a predicate"),
    ],
)
def test_bad_relations_are_refused_by_name(relations, said):
    with pytest.raises(SceneError, match=rf"^scene 's1': {said}"):
        scene(thing(), thing(), relations=relations)


def test_a_pair_may_be_related_several_times_also_in_the_same_words():
    several = (relation(0, "on", 1), relation(0, "near", 1), relation(1, "on", 0), relation(0, "on", 1))
    assert scene(thing(), thing(), relations=several).relations == several


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"id": ""}, "scene: id: ''"),
        ({"caption": None}, "scene 's1': caption: None is of type NoneType; give a str"),
        ({"objects": ("circle",)}, r"objects\[0\]: 'circle' is of type str; give a SceneObject"),
        ({"relations": ((0, "on", 1),)}, r"relations\[0\]: .* give a Relation"),
        ({"frame": (4, 6)}, "frame: .* give a Frame"),
    ],
)
def test_fields_of_a_wrong_type_are_refused(fields, said):
    with pytest.raises(SceneError, match=said):
        Scene(**{"id": "s1", **fields})


def test_the_frame_fills_what_is_left_out():
    frame = Frame(original=(480, 640))
    assert frame.crop == (0, 0, 480, 640)
    assert frame.target == (480, 640)
    assert Frame(original=[480, 640], crop=[10, 20, 100, 200]).target == (100, 200)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"original": (0, 640)}, "original: .* has no area"),
        (
            {"original": (480, 640), "crop": (400, 0, 100, 640)},
            r"crop: .* leaves the picture of \(480, 640\)",
        ),
        ({"original": (480.5, 640)}, "original: .* is not 2 whole numbers"),
        ({"original": (480, 640), "target": (1, 2, 3)}, "target: .* is not 2 whole numbers"),
    ],
)
def test_bad_frames_are_refused_by_name(fields, said):
    with pytest.raises(SceneError, match=rf"^frame: {said}"):
        Frame(**fields)


def full_scene() -> Scene:
    mask = np.zeros((40, 80), bool)
    mask[20:30, 20:40] = True
    return scene(
        thing(mask=masks.encode(mask)),
        thing("blue square", (0.75, 0.25, 1.0, 0.5)),
        SceneObject(phrase="sky"),
        relations=(
            relation(0, "left of", 1),
            relation(1, "to the right side of", 0),
            relation(2, "above", 0),
        ),
        frame=Frame(original=(400, 1000), crop=(0, 100, 400, 800), target=(40, 80)),
        caption="a red circle",
        provenance={"tool": "hand"},
    )


def test_flip_twice_is_the_same_scene():
    assert full_scene().flip().flip() == full_scene()


def test_flip_mirrors_everything_that_has_a_side():
    flipped = full_scene().flip()
    assert flipped.objects[0].box == (0.5, 0.5, 0.75, 0.75)
    assert flipped.objects[2].box is None
    assert [r.predicate for r in flipped.relations] == ["right of", "to the left side of", "above"]
    assert flipped.frame.crop == (0, 100, 400, 800)
    assert masks.decode(flipped.objects[0].mask)[25, 40:60].all()
    assert flipped.caption == "a red circle"


def test_flip_leaves_verbs_alone():
    pair = scene(thing(), thing(), relations=(relation(0, "left behind by", 1),))
    assert pair.flip().relations[0].predicate == "left behind by"


def test_crop_moves_boxes_and_masks_and_frame():
    cut, gone = full_scene().crop(10, 20, 20, 40)
    assert gone == 1  # the blue square lies to the right of the window
    assert [item.phrase for item in cut.objects] == ["red circle", "sky"]
    assert cut.objects[0].box == pytest.approx((0.0, 0.5, 0.5, 1.0))
    assert masks.decode(cut.objects[0].mask).shape == (20, 40)
    assert masks.decode(cut.objects[0].mask)[10:20, :20].all()
    assert cut.relations == (relation(1, "above", 0),)
    assert cut.frame == Frame(original=(400, 1000), crop=(100, 300, 200, 400), target=(20, 40))


def test_crop_to_the_whole_is_the_same_scene():
    assert full_scene().crop(0, 0, 40, 80) == (full_scene(), 0)


def test_crops_compose():
    whole = scene(thing(box=(0.3, 0.4, 0.6, 0.9)), frame=Frame(original=(60, 90)))
    once, _ = whole.crop(12, 16, 35, 55)
    twice, _ = whole.crop(5, 10, 50, 70)[0].crop(7, 6, 35, 55)
    assert once.frame == twice.frame
    assert once.objects[0].box == pytest.approx(twice.objects[0].box)


def test_crop_drops_by_area_of_the_window():
    near = scene(thing(box=(0.0, 0.0, 0.5, 0.12)), frame=Frame(original=(100, 200)))
    assert near.crop(10, 0, 50, 100, min_area=0.05)[1] == 1  # 2 of 50 rows are left, 4 % of the window
    assert near.crop(10, 0, 50, 100, min_area=0.03)[1] == 0
    assert near.crop(12, 0, 50, 100, min_area=0.0)[1] == 1  # nothing is left of it


def test_crop_needs_a_frame_and_a_window_inside_it():
    with pytest.raises(SceneError, match=r"scene 's1': frame: None.*give the scene a Frame"):
        scene(thing()).crop(0, 0, 1, 1)
    with pytest.raises(SceneError, match=r"leaves the target of \(40, 80\)"):
        full_scene().crop(30, 0, 20, 20)


def test_crops_of_an_upscaled_picture_stay_inside_it():
    small = scene(frame=Frame(original=(7, 5), target=(512, 384)))
    for top, left in ((0, 0), (511, 383), (255, 100)):
        cut, _ = small.crop(top, left, 1, 1)
        assert cut.frame.crop[2:] == (1, 1)


def test_the_null_scene_keeps_what_is_not_layout():
    null = full_scene().without_layout()
    assert null.objects == ()
    assert null.relations == ()
    assert (null.id, null.caption, null.frame) == ("s1", "a red circle", full_scene().frame)


def test_scenes_are_values():
    assert hash(full_scene()) == hash(full_scene())
    with pytest.raises(AttributeError):
        full_scene().caption = "other"
