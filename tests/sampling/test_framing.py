"""Padding is cut off before anything is measured, and pictures that something else made are told by their own size."""

import json

import numpy as np
import pytest
from PIL import Image

from datamodules.shards import write_shards
from datamodules.sources.base import Source
from datamodules.sources.shapes import Shapes
from datamodules.transforms import SceneTransform
from evaluation.evaluate import evaluate
from evaluation.plan import open_split
from metrics.object_values import areas, pixel_boxes
from runtime.composition import compose
from runtime.run_directory import load_run_config
from sampling.framing import Framing
from scenes.scene import Frame, Scene, SceneObject


class Wide(Source):
    """Shapes of 64 px without their lower quarter."""

    provides = Shapes.provides
    image_format = "png"
    rows = 48

    def __len__(self):
        return 4

    def __iter__(self):
        for scene, picture in Shapes(count=4, size=64):
            yield scene.crop(0, 0, self.rows, 64, min_area=0.04)[0], picture.crop((0, 0, 64, self.rows))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    write_shards(Wide(), folder / "shards")
    return folder / "shards"


def framing(size, resize, resolution=512):
    transform = SceneTransform(resolution=resolution, resize=resize, min_area=0)
    return transform, Framing(transform=transform, sizes=[size], ids=["one"])


@pytest.mark.parametrize("size", [(427, 640), (640, 361), (500, 333), (512, 512), (99, 640)])
def test_boxes_and_pixels_without_padding_are_those_of_the_published_arithmetic(size):
    (height, width), box = size, (31, 17, 290, 97)  # px of the picture
    fractions = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    scene = Scene(id="one", objects=(SceneObject(phrase="a", box=fractions),), frame=Frame(original=size))
    transform, frames = framing(size, "pad")
    measured = frames.measured(0, transform.scene(scene))
    side = max(size)
    rows, columns = (512 - int((side - extent) / side * 512) for extent in size)
    assert frames.cut(0, np.zeros((512, 512, 3), np.uint8)).shape == (rows, columns, 3)
    assert measured.frame.target == (rows, columns)
    expected = [int(value * 512 / side + 1e-6) for value in box]
    assert pixel_boxes(measured, (rows, columns)).tolist() == [expected]
    # sizes of objects are those of the padded square, whatever is cut off
    pixels = (box[2] - box[0]) * (box[3] - box[1]) * (512 / side) ** 2
    assert areas(measured)[0] * 512**2 == pytest.approx(pixels, rel=1e-6)


@pytest.mark.parametrize("resize", ["pad", "crop", "squash"])
def test_a_picture_is_told_by_its_own_size(resize):
    stored = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    transform, frames = framing((48, 64), resize, resolution=64)
    square = transform.square(stored, Scene(id="one"))[0]
    real = frames.cut(0, square)
    for how in ("auto", "whole"):
        assert np.array_equal(frames.fitting(how)(0, stored), real)
    for how in ("auto", "square"):
        assert np.array_equal(frames.fitting(how)(0, square), real)
    smaller = np.asarray(Image.fromarray(square).resize((32, 32)))
    assert frames.fitting("auto")(0, smaller).shape == ((24, 32, 3) if resize == "pad" else (32, 32, 3))
    squashed = np.asarray(Image.fromarray(stored).resize((64, 64)))
    shown = frames.fitting("whole")(0, squashed)  # all of the picture, though it is square
    assert shown.shape == ((64, 64, 3))
    with pytest.raises(ValueError, match="images: the picture of one has 60 x 64 px, .* 48 x 64; .*images_are=whole"):
        frames.fitting("auto")(0, stored.repeat(2, axis=0)[:60])


def test_without_a_size_squares_are_refused_where_the_stored_pictures_are_none():
    frames = Framing(transform=None, sizes=[(48, 64), None], ids=["one", "two"])
    square = np.zeros((64, 64, 3), np.uint8)
    assert frames.fitting("auto")(0, np.zeros((24, 32, 3), np.uint8)).shape == (24, 32, 3)
    assert frames.fitting("whole")(0, square) is square
    assert frames.fitting("auto")(1, square) is square  # its scene has no frame
    with pytest.raises(ValueError, match="protocol.size=N"):
        frames.fitting("auto")(0, square)


def test_images_are_is_of_given_pictures_alone():
    for given in (["run=r"], ["images=real"]):
        with pytest.raises(ValueError, match="images_are=whole: only a folder of pictures"):
            compose("evaluate", [*given, "images_are=whole"])
    with pytest.raises(ValueError, match="images_are=padded: no such choice"):
        compose("evaluate", ["images=d", "images_are=padded"])


def test_drawn_real_and_given_pictures_are_measured_without_padding(wide, short_run, tmp_path):
    shown = [f"protocol.shards={wide}", "protocol.make=null", "protocol.scenes=null", "protocol.size=64"]
    shown += [f"++protocol.transform.{setting}" for setting in ("resize=pad", "min_area=0.0")]
    shown += ["protocol.arms=[with_scene,ceiling]"]
    split = open_split(compose("evaluate", ["images=d", *shown]), None)
    assert {scene.frame.target for scene in split.scenes} == {(48, 64)}
    assert {scene.frame.target for scene in split.drawn} == {(64, 64)}
    assert split.true.read(0).shape == (48, 64, 3)
    values = {}
    for name in ("whole", "squares"):
        (tmp_path / name).mkdir()
        for place, scene in enumerate(split.scenes):
            picture = split.true.read(place)
            if name == "squares":
                picture = np.pad(picture, ((0, 16), (0, 0), (0, 0)), constant_values=255)
            Image.fromarray(picture).save(tmp_path / name / f"{scene.id}.png")
        cfg = compose("evaluate", [f"images={tmp_path / name}", f"out={tmp_path / name}", *shown])
        kept = evaluate(cfg, None)
        values[name] = kept["values"]["pictures"]
        assert kept["values"]["pictures"] == kept["values"]["ceiling"]
    assert values["whole"] == values["squares"]
    assert values["whole"]["layout_iou"].mean > 0.9
    # drawn ones: the files are the squares, the page and the figures are without the padding
    cfg = compose("evaluate", [f"run={short_run[0].run}", f"out={tmp_path / 'drawn'}", *shown])
    evaluate(cfg, load_run_config(cfg.run, cfg))
    kept = json.loads((tmp_path / "drawn" / "metrics.json").read_text())
    assert kept["protocol"]["transform"] == {"resize": "pad", "min_area": 0.0}
    files = sorted((tmp_path / "drawn" / "with_scene" / "pictures").glob("*.png"))
    assert len(files) == 4
    with Image.open(files[0]) as file:
        assert file.size[0] == file.size[1]
