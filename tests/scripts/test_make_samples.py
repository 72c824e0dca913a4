"""The drawn samples: the script writes what lies in `tests/samples`, and every published choice leaves enough to train on."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.composition import compose
from scripts.make_samples import main
from scripts.samples.drawing import OUTLINES, draw

SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    main(str(folder))
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, int)


def members(path):
    with tarfile.open(path) as tar:
        return [(member.name, member.size) for member in tar if not member.name.endswith(".jpg")]


def test_the_script_writes_the_samples_that_are_there(written):
    there = {str(path.relative_to(SAMPLES)) for path in SAMPLES.rglob("*") if path.is_file()}
    assert there == {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    for name in there:
        own, again = SAMPLES / name, written / name
        if name.endswith((".jpg", ".png")):  # another build of the codec may round otherwise
            assert np.abs(pixels(own) - pixels(again)).mean() < 1, name
        elif name.endswith(".tar"):
            assert members(own) == members(again), name
        elif not name.endswith((".parquet", ".pth")):  # which tell the version of what wrote them
            assert own.read_bytes() == again.read_bytes(), name


@pytest.mark.parametrize(
    ("fewest", "arguments"),
    [
        (24, ["source=coco", "source.root={}/coco", "source.filter=lama"]),
        (24, ["source=coco", "source.root={}/coco", "source.filter=creatilayout"]),
        (24, ["source=coco", "source.root={}/coco", "source.filter=rich_context"]),
        (24, ["source=gligen_coco", "source.root={}/gligen_coco", "source.images={}/coco/train2017"]),
        (24, ["source=rc_coco", "source.root={}/coco", "source.labels={}/rc_coco", "source.split=train2017"]),
        (24, ["source=sa1b", "source.root={}/sa1b", "source.boxes={}/igligen/boxes_without_size"]),
        (24, ["source=igligen", "source.root={}/igligen/sdxl-512"]),
        (6, ["source=igligen", "source.root={}/igligen/sdxl-1024"]),
        (24, ["source=rich_context", "source.root={}/cc3m"]),
        (24, ["source=laion_sg", "source.root={}/laion_sg", "source.filter=compsg_bench"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_source_has_enough_that_is_large_enough(fewest, arguments):
    from hydra.utils import instantiate

    settings = [argument.format(SAMPLES) for argument in arguments]
    source = instantiate(compose("prepare", [*settings, "out=out"]).source, _convert_="all")
    scenes = [scene for scene, _ in source]
    assert not source.left_out.skipped
    assert len(scenes) >= fewest
    for scene in scenes:
        assert scene.caption
        boxes = [item.box for item in scene.objects if item.box is not None]
        areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
        assert sum(area >= 0.02 for area in areas) >= len(areas) - 1  # a single image has a tiny object besides
        assert len(scene.objects) >= 2


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_an_object_fills_its_box_to_the_edges(count):
    one = draw(count, (97, 131), count)
    assert len(one.things) == count
    for thing in one.things:
        rows, columns = np.nonzero(thing.mask(one.size))
        x0, y0, x1, y1 = thing.box
        assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (x0, x1, y0, y1)
        assert thing.name in OUTLINES


def test_odd_cases_are_there():
    instances = json.loads((SAMPLES / "coco/annotations/instances_train2017.json").read_text())
    assert any(item["iscrowd"] for item in instances["annotations"])
    empty = {image["id"] for image in instances["images"]} - {item["image_id"] for item in instances["annotations"]}
    assert len(empty) == 1
    assert len({(image["height"], image["width"]) for image in instances["images"]}) >= 8
    modes = set()
    for path in (*(SAMPLES / "coco" / "train2017").iterdir(), *(SAMPLES / "laion_sg" / "data").iterdir()):
        with Image.open(path) as image:
            modes.add(image.mode)
    assert modes == {"RGB", "L", "CMYK", "RGBA"}
    entries = json.loads((SAMPLES / "laion_sg/train.json").read_text())
    told = [[(one["item1"], one["relation"], one["item2"]) for one in entry["relations"]] for entry in entries]
    assert any(not relations for relations in told)
    assert any(len(set(relations)) < len(relations) for relations in told)
    named = [{place for first, _, second in relations for place in (first, second)} for relations in told]
    assert any(0 < len(places) < len(entry["items"]) for places, entry in zip(named, entries, strict=True))
