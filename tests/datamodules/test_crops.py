"""Where images are cut: windows by (seed, position) alone, and objects, masks and frames exactly where the pixels went."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.crops import center_window, random_resized_window, random_window
from datamodules.order import flips
from datamodules.shards import Record
from datamodules.transforms import SceneTransform, to_tensor
from scenes.masks import decode, encode
from scenes.scene import Frame, Scene, SceneObject

PUBLISHED = {"scale": (0.8, 1.1), "ratio": (0.95, 1.05)}  # COCO-stuff's, of the rich-context system
SIZES = [(40, 64), (64, 40), (48, 48), (33, 50)]


def record(height, width, *boxes):
    """An image of noise below 128 in which each box (px, xyxy) is filled with 255, with masks of the same pixels."""
    image = np.random.default_rng(height).integers(0, 128, (height, width, 3), dtype=np.uint8)
    objects = []
    for number, (left, top, right, bottom) in enumerate(boxes):
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = True
        image[mask] = 255
        box = (left / width, top / height, right / width, bottom / height)
        objects.append(SceneObject(phrase=f"thing {number}", box=box, mask=encode(mask)))
    return Record(scene=Scene(id="one", objects=tuple(objects), frame=Frame(original=(height, width))), image=image)


def windows(draw, count=400, **settings):
    return [draw(position=position, **{"seed": 3, **settings}) for position in range(count)]


@pytest.mark.parametrize("size", SIZES)
def test_windows_lie_in_the_image_and_follow_seed_and_position(size):
    for draw, settings in ((random_window, {}), (random_resized_window, {"scale": (0.3, 1.0), "ratio": (0.5, 2.0)})):
        drawn = windows(draw, size=size, **settings)
        for top, left, height, width in drawn:
            assert 0 <= top < top + height <= size[0]
            assert 0 <= left < left + width <= size[1]
        assert drawn == windows(draw, size=size, **settings)
        if size[0] != size[1] or draw is random_resized_window:
            assert drawn != windows(draw, size=size, seed=4, **settings)
            assert len(set(drawn)) > 10


def test_a_random_square_is_of_the_short_side_and_as_often_at_each_place():
    drawn = windows(random_window, 5000, size=(40, 49))
    assert {(top, height, width) for top, _, height, width in drawn} == {(0, 40, 40)}
    counts = np.bincount([left for _, left, _, _ in drawn], minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


def test_a_random_window_has_the_share_and_the_proportions_that_are_asked_for():
    size, settings = (400, 400), {"scale": (0.25, 0.75), "ratio": (0.5, 2.0)}
    drawn = windows(random_resized_window, 2000, size=size, **settings)
    shares = np.array([height * width / 400**2 for _, _, height, width in drawn])
    proportions = np.log([width / height for _, _, height, width in drawn])
    assert 0.24 < shares.min() < 0.27
    assert 0.7 < shares.max() < 0.76
    assert abs(proportions).max() < np.log(2.02)
    assert abs(proportions.mean()) < 0.05  # wide and tall alike
    assert {top for top, *_ in drawn} > set(range(100))


def test_where_no_window_fits_it_is_the_largest_central_one():
    # near squares of .8 of a 4 : 3 image do not fit: COCO's images have this one whatever was drawn
    assert set(windows(random_resized_window, size=(480, 640), **PUBLISHED)) == {(0, 68, 480, 504)}
    assert set(windows(random_resized_window, size=(640, 480), **PUBLISHED)) == {(67, 0, 505, 480)}
    assert len(set(windows(random_resized_window, size=(480, 500), **PUBLISHED))) > 100


@pytest.mark.parametrize("size", SIZES)
def test_without_scaling_objects_are_exactly_where_their_pixels_went(size):
    side = min(size)
    one = record(*size, (3, 5, 21, 30), (25, 8, 39, 17))
    transform = SceneTransform(resolution=side, crop="random", seed=3, min_area=0)
    for position in range(40):
        image, scene, dropped = transform.square(one.image, one.scene, position)
        assert len(scene.objects) + dropped == 2
        told = np.zeros((side, side), bool)
        for item in scene.objects:
            edges = np.array(item.box) * side
            left, top, right, bottom = edges.round().astype(int)
            np.testing.assert_allclose(edges, (left, top, right, bottom), atol=1e-9)
            mine = np.zeros((side, side), bool)
            mine[top:bottom, left:right] = True
            assert np.array_equal(decode(item.mask), mine)
            told |= mine
        assert np.array_equal((image == 255).all(axis=2), told)
        top, left, height, width = scene.frame.crop
        assert np.array_equal(one.image[top : top + height, left : left + width], image)
        assert scene.frame.target == (side, side)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", ["center", "random", "random_resized"])
def test_a_frame_says_which_pixels_became_the_square_and_boxes_are_theirs(size, crop):
    rectangle = (3, 5, 21, 30)
    one = record(*size, rectangle)
    settings = {"crop": crop, "crop_scale": (0.4, 0.9), "crop_ratio": (0.6, 1.6)}
    transform = SceneTransform(resolution=24, seed=3, min_area=0, **settings)
    for position in range(40):
        image, scene, dropped = transform.square(one.image, one.scene, position)
        top, left, height, width = scene.frame.crop
        assert scene.frame.original == size
        box = (left, top, left + width, top + height)
        assert np.array_equal(np.asarray(Image.fromarray(one.image).resize((24, 24), 2, box=box)), image)
        if dropped:
            continue
        back = np.array(scene.objects[0].box) * (width, height, width, height) + (left, top, left, top)
        np.testing.assert_allclose(
            back, np.clip(rectangle, (left, top) * 2, (left + width, top + height) * 2), atol=1e-6
        )
        mirrored = scene.flip()
        corner = mirrored.frame.crop[1]
        assert corner == size[1] - left - width
        assert mirrored.objects[0].box[0] * width + corner == pytest.approx(size[1] - back[2])


def test_objects_go_of_which_less_than_the_share_is_visible():
    # of a 20 x 40 image columns 10 to 29 stay: of the things .25, .5 and all of the third
    one = record(20, 40, (4, 0, 12, 4), (6, 8, 14, 12), (15, 15, 20, 18))

    def left(min_visible):
        transform = SceneTransform(resolution=20, min_area=0, min_visible=min_visible)
        sample, scene = transform(one, 0).scene, transform.scene(one.scene)
        assert sample == scene
        return [item.phrase[-1] for item in scene.objects]

    assert left(0.0) == left(0.25) == ["0", "1", "2"]
    assert left(0.26) == left(0.5) == ["1", "2"]
    assert left(0.51) == left(1.0) == ["2"]


def test_a_sample_follows_its_position_and_what_has_none_is_cut_from_the_centre():
    one = record(40, 64, (3, 5, 21, 30))
    transform = SceneTransform(resolution=40, crop="random", flip=True, seed=3, min_area=0)
    samples = [transform(one, position) for position in range(30)]
    for position, sample in enumerate(samples):
        image, scene, _ = transform.square(one.image, one.scene, position)
        if flips(3, position):
            image, scene = image[:, ::-1], scene.flip()
        assert torch.equal(sample.image, to_tensor(image))
        assert sample.scene == scene
    assert len({sample.scene.frame.crop for sample in samples}) > 10
    image, scene, _ = transform.square(one.image, one.scene)
    assert scene.frame.crop == center_window((40, 64)) == (0, 12, 40, 40)
    assert transform.scene(one.scene) == scene


def test_interpolations_differ_and_bilinear_is_the_default():
    one = record(90, 120, (30, 20, 70, 60))
    made = {
        name: SceneTransform(resolution=32, interpolation=name).square(one.image, one.scene)[0]
        for name in ("bilinear", "bicubic", "lanczos")
    }
    reference = Image.fromarray(one.image).resize((32, 32), Image.Resampling.BILINEAR, box=(15, 0, 105, 90))
    assert np.array_equal(made["bilinear"], np.asarray(reference))
    assert np.array_equal(made["bilinear"], SceneTransform(resolution=32).square(one.image, one.scene)[0])
    assert len({image.tobytes() for image in made.values()}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "middle"}, "data.crop=middle: no such choice; take center or random or random_resized"),
        ({"crop": "random", "resize": "squash"}, "data.crop=random: data.resize=squash"),
        ({"crop_scale": [0.8]}, r"data.crop_scale=\[0.8\]"),
        ({"crop_scale": [0.0, 1.0]}, r"data.crop_scale=\[0.0, 1.0\]"),
        ({"crop_ratio": [2.0, 1.0]}, r"data.crop_ratio=\[2.0, 1.0\]"),
        ({"min_visible": 1.5}, "data.min_visible=1.5"),
        (
            {"interpolation": "nearest"},
            "data.interpolation=nearest: no such choice; take bilinear or bicubic or lanczos",
        ),
    ],
)
def test_what_cuts_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        SceneTransform(resolution=32, **settings)
    assert "\n" not in str(caught.value)
