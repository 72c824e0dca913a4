"""Pictures and scenes move together: what a box shows before a transform it shows after."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.order import flips
from datamodules.shards import Record
from datamodules.transforms import SceneTransform, to_tensor
from scenes.masks import decode, encode
from scenes.scene import Frame, Relation, Scene, SceneObject


def record(height, width, boxes, *, frame=True):
    """A black picture in which each box (in pixels, xyxy) is filled with a colour of its own."""
    image = np.zeros((height, width, 3), np.uint8)
    objects = []
    for number, (left, top, right, bottom) in enumerate(boxes):
        image[top:bottom, left:right, number % 3] = 255
        box = (left / width, top / height, right / width, bottom / height)
        objects.append(SceneObject(phrase=f"thing {number}", box=box))
    relations = (Relation(subject=0, predicate="left of", object=1),) if len(boxes) > 1 else ()
    where = Frame(original=(height, width)) if frame else None
    return Record(scene=Scene(id="one", objects=tuple(objects), relations=relations, frame=where), image=image)


def test_values_are_exact_at_the_ends():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    tensor = to_tensor(ramp)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 16, 16)
    assert tensor.min() == -1
    assert tensor.max() == 1
    back = ((tensor + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back, torch.from_numpy(ramp).permute(2, 0, 1))


@pytest.mark.parametrize(("height", "width"), [(48, 96), (90, 60), (33, 47), (64, 64)])
def test_padding_keeps_all_of_a_picture_in_the_upper_left_of_a_white_square(height, width):
    one = record(height, width, [(4, 6, 20, 30)])
    mask = np.zeros((height, width), bool)
    mask[6:30, 4:20] = True
    objects = tuple(replace(item, mask=encode(mask)) for item in one.scene.objects)
    scene = replace(one.scene, objects=objects)
    side = max(height, width)
    transform = SceneTransform(resolution=side, resize="pad", min_area=0)
    square, moved, dropped = transform.square(one.image, scene)
    assert (square.shape, dropped) == ((side, side, 3), 0)
    assert np.array_equal(square[:height, :width], one.image)
    assert np.all(square[height:] == 255)
    assert np.all(square[:, width:] == 255)
    assert np.array(moved.objects[0].box) * side == pytest.approx((4, 6, 20, 30))
    assert np.argwhere(decode(moved.objects[0].mask)).tolist() == np.argwhere(mask).tolist()
    assert decode(moved.objects[0].mask).shape == (side, side)
    assert moved.frame == Frame(original=(side, side))
    assert transform.scene(scene) == moved
    half = replace(transform, resolution=side // 2)
    assert half.scene(scene).objects[0].box == moved.objects[0].box
    assert half.square(one.image, scene)[1].frame.target == (side // 2,) * 2


def test_a_picture_of_the_right_size_stays_as_it_is():
    one = record(32, 32, [(0, 0, 1, 1), (8, 8, 16, 20)])
    sample = SceneTransform(resolution=32, min_area=0)(one, 5)
    assert sample.scene.objects == one.scene.objects
    assert sample.scene.frame is one.scene.frame
    assert sample.position == 5
    assert sample.dropped == 0
    assert torch.equal(sample.image, to_tensor(one.image))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (90, 60), (33, 47), (16, 20)])
def test_boxes_follow_the_picture(height, width):
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    quarter = side // 4
    box = (left + quarter, top + quarter, left + 2 * quarter, top + 3 * quarter)
    image, scene, dropped = SceneTransform(resolution=64).square(*parts(record(height, width, [box])))
    assert image.shape == (64, 64, 3)
    assert dropped == 0
    assert scene.frame.target == (64, 64)
    assert scene.frame.crop == (top, left, side, side)
    x0, y0, x1, y1 = (np.array(scene.objects[0].box) * 64).tolist()
    rows, columns = np.nonzero(image[..., 0] > 127)
    assert (columns.min(), rows.min()) == (pytest.approx(x0, abs=1), pytest.approx(y0, abs=1))
    assert (columns.max() + 1, rows.max() + 1) == (pytest.approx(x1, abs=1), pytest.approx(y1, abs=1))


def parts(one):
    return one.image, one.scene


def test_what_the_crop_leaves_nothing_of_is_counted_and_its_relations_go():
    one = record(32, 96, [(0, 0, 20, 20), (40, 4, 56, 20)])
    sample = SceneTransform(resolution=32)(one, 0)
    assert [item.phrase for item in sample.scene.objects] == ["thing 1"]
    assert sample.scene.relations == ()
    assert sample.dropped == 1


@pytest.mark.parametrize(("height", "width"), [(128, 128), (32, 32), (64, 96)])
def test_small_objects_go_whether_or_not_anything_is_cut(height, width):
    side, left = min(height, width), (width - min(height, width)) // 2
    small, large = round(side * 0.09), round(side * 0.125)  # .81 % and 1.56 % of the square, rounded up at most
    edges = [(left, 0, left + small, small), (left, side - large, left + large, side)]
    one = record(height, width, edges)
    _, scene, dropped = SceneTransform(resolution=32).square(*parts(one))
    assert [item.phrase for item in scene.objects] == ["thing 1"]
    assert scene.relations == ()
    assert dropped == 1
    assert len(SceneTransform(resolution=32, min_area=0).square(*parts(one))[1].objects) == 2


@pytest.mark.parametrize(("height", "width"), [(48, 96), (90, 60), (64, 64)])
def test_squashed_pictures_keep_all_and_boxes_stay(height, width):
    box = (width // 4, height // 3, width // 2, height)
    one = record(height, width, [box])
    image, scene, dropped = SceneTransform(resolution=24, resize="squash").square(*parts(one))
    assert image.shape == (24, 24, 3)
    assert (scene.objects, dropped) == (one.scene.objects, 0)
    assert scene.frame == Frame(original=(height, width), crop=(0, 0, height, width), target=(24, 24))
    rows, columns = np.nonzero(image[..., 0] > 127)
    assert (columns.min(), columns.max() + 1) == (pytest.approx(6, abs=1), pytest.approx(12, abs=1))
    assert (rows.min(), rows.max() + 1) == (pytest.approx(8, abs=1), 24)
    sample = SceneTransform(resolution=24, resize="squash")(one, 0)
    assert torch.equal(sample.image, to_tensor(image))


def test_squashing_drops_what_is_small_and_refuses_another_frame():
    one = record(30, 60, [(0, 0, 2, 2), (10, 10, 40, 25)])
    squash = SceneTransform(resolution=16, resize="squash").square
    _, scene, dropped = squash(*parts(one))
    assert ([item.phrase for item in scene.objects], dropped) == (["thing 1"], 1)
    with pytest.raises(ValueError, match=r"frame: target \(30, 60\)"):
        squash(one.image[:20], one.scene)


def test_relations_are_those_of_the_boxes_that_the_crop_leaves():
    # The square is columns 16 to 48. Of thing 0, which reaches from the left border to column 32, the left half goes.
    one = record(32, 64, [(0, 8, 32, 24), (20, 10, 28, 20), (36, 8, 46, 24), (60, 0, 64, 4)])
    stored = SceneTransform(resolution=32)(one, 0).scene
    assert [(r.subject, r.predicate, r.object) for r in stored.relations] == [(0, "left of", 1)]
    scene = SceneTransform(resolution=32, relations="boxes")(one, 0).scene
    assert [(r.subject, r.predicate, r.object) for r in scene.relations] == [
        (0, "surrounding", 1),
        (0, "left of", 2),
        (1, "left of", 2),
    ]
    few = SceneTransform(resolution=32, relations="boxes", relations_per_object=0)(one, 0).scene
    assert few.relations == ()
    flipped = SceneTransform(resolution=32, relations="boxes", flip=True, seed=9)
    mirrored = next(place for place in range(30) if flips(9, place))
    said = [(r.subject, r.predicate, r.object) for r in flipped(one, mirrored).scene.relations]
    assert said == [(0, "surrounding", 1), (0, "right of", 2), (1, "right of", 2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": "fit"}, "data.resize=fit: no such choice; take crop or squash or pad"),
        ({"relations": "none"}, "data.relations=none: no such choice; take stored or boxes"),
        ({"relations_per_object": -1}, "data.relations_per_object=-1"),
    ],
)
def test_choices_that_there_are_not_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SceneTransform(resolution=32, **settings)


def test_a_scene_without_a_frame_gets_one():
    _, scene, _ = SceneTransform(resolution=20).square(*parts(record(40, 60, [(20, 10, 40, 30)], frame=False)))
    assert scene.frame == Frame(original=(40, 60), crop=(0, 10, 40, 40), target=(20, 20))


def test_a_frame_of_another_size_is_refused():
    one = record(40, 60, [(20, 10, 40, 30)])
    with pytest.raises(ValueError, match=r"frame: target \(40, 60\)") as caught:
        SceneTransform(resolution=20).square(one.image[:30], one.scene)
    assert "\n" not in str(caught.value)


def test_flips_move_picture_and_scene_and_follow_the_position():
    one = record(32, 32, [(2, 4, 10, 20), (20, 4, 30, 12)])
    plain = SceneTransform(resolution=32)(one, 0)
    transform = SceneTransform(resolution=32, flip=True, seed=9)
    for position in range(30):
        sample = transform(one, position)
        if flips(9, position):
            assert torch.equal(sample.image, plain.image.flip(-1))
            assert sample.scene == one.scene.flip()
            assert sample.scene.relations[0].predicate == "right of"
        else:
            assert torch.equal(sample.image, plain.image)
            assert sample.scene == one.scene
    assert 5 < sum(flips(9, position) for position in range(30)) < 25


def test_equal_descriptions_get_endings_once_the_crop_has_left_them():
    left, middle, right = ((0.0, 0.2, 0.2, 0.8), (0.4, 0.2, 0.5, 0.8), (0.5, 0.2, 0.6, 0.8))
    objects = [SceneObject(phrase="dog", description="a dog", box=box) for box in (left, middle, right)]
    scene = Scene(id="dogs", objects=tuple(objects), frame=Frame(original=(32, 64)))
    record = Record(scene=scene, image=np.zeros((32, 64, 3), np.uint8))
    made = {how: SceneTransform(resolution=32, equal_texts=how)(record, 0).scene for how in ("kept", "published")}
    assert [item.description for item in made["kept"].objects] == ["a dog", "a dog"]
    assert [item.description for item in made["published"].objects] == ["a dog_0", "a dog"]
    assert [item.phrase for item in made["published"].objects] == ["dog", "dog"]
