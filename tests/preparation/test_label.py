"""Pictures of shapes labelled by parts that read them exactly: what comes out is what was drawn, whatever the batches."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from datamodules.shard_index import read_index
from datamodules.shards import ShardSet, check_shards, write_shards
from datamodules.sources.shapes import Shapes
from labelling.taggers import CaptionTagger, VocabularyTagger
from preparation.label import Label
from preparation.runner import run_stage
from preparation.stage import Sample
from scenes import Frame, Scene, SceneObject
from scenes.boxes import iou
from scenes.masks import decode
from tests.preparation.conftest import Listed

COUNT = 10


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Scenes as they were drawn, and shards with their pictures and captions alone."""

    scenes, pictures = zip(*Shapes(count=COUNT, size=64), strict=True)
    bare = [scene.without_layout() for scene in scenes]
    source = Listed(bare, lambda number, _: pictures[number], provides="image caption", image_format="png")
    return scenes, write_shards(source, tmp_path_factory.mktemp("drawn") / "unlabelled", shard_size=4)


def encoded(pixels, form="PNG"):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, form)
    return data.getvalue()


def sample(pixels, *, caption="", objects=(), key="000000000", frame=True, form="png"):
    frame = Frame(original=pixels.shape[:2]) if frame else None
    scene = Scene(id=f"scene {key}", caption=caption, objects=objects, frame=frame)
    return Sample(key=key, scene=scene, members={form: encoded(pixels, {"png": "PNG", "jpg": "JPEG"}[form])})


def compare(labelled, drawn):
    """Each object that was drawn was found, where it is and under its phrase."""
    by_phrase = {item.phrase: item for item in labelled.objects}
    assert set(by_phrase) == {item.phrase for item in drawn.objects}
    for item in drawn.objects:
        overlap = iou(np.array([item.box]), np.array([by_phrase[item.phrase].box]))[0, 0]
        assert overlap > 0.999, (drawn.id, item.phrase, overlap)


@pytest.mark.parametrize("tagger", ["shapes", "caption"])
def test_what_was_drawn_is_found_again(drawn, parts, tmp_path, tagger):
    scenes, shards = drawn
    named = parts.ShapesTagger() if tagger == "shapes" else CaptionTagger()
    stage = Label(tagger=named, detector=parts.ShapesDetector(), batch_size=3)
    report = run_stage(stage, shards, tmp_path / "out")
    assert not report.failed
    assert check_shards(tmp_path / "out").ok
    out = ShardSet(tmp_path / "out")
    assert set(out.provides) == {"image", "caption", "boxes", "phrases", "scores"}
    assert len(out) == COUNT
    for number, scene in enumerate(scenes):
        record = out[number]
        compare(record.scene, scene)
        assert (record.scene.id, record.scene.caption, record.scene.frame) == (scene.id, scene.caption, scene.frame)
        scores = [item.score for item in record.scene.objects]
        assert scores == sorted(scores, reverse=True)
    settings = read_index(tmp_path / "out")["stages"][-1]["settings"]
    assert settings == json.loads(json.dumps(stage.settings()))


def chain(parts, journal=None, **settings):
    return Label(
        tagger=parts.ShapesTagger(journal),
        detector=parts.ShapesDetector(journal),
        segmenter=parts.CornerSegmenter(journal),
        describer=parts.SizeDescriber(journal),
        **settings,
    )


def test_batches_and_memory_change_nothing(drawn, parts, tmp_path):
    _, shards = drawn
    made = []
    for memory, batch_size in (("one", 1), ("one", 3), ("all", 3)):
        out = tmp_path / f"{memory}{batch_size}"
        run_stage(chain(parts, memory=memory, batch_size=batch_size), shards, out)
        made.append([(out / f"00000{number}.tar").read_bytes() for number in range(3)])
    assert made[0] == made[1] == made[2]


def test_one_part_at_a_time_is_on_the_device(parts, drawn):
    _, shards = drawn
    record = ShardSet(shards)[0]
    samples = [sample(record.image, caption=record.scene.caption, key=f"{n:09d}") for n in range(3)]
    journal = []
    stage = chain(parts, journal, memory="one", batch_size=2, min_crop=0).to("meta")
    assert journal == []
    assert len(list(stage(samples))) == 3
    kinds = ["ShapesTagger", "ShapesDetector", "CornerSegmenter", "SizeDescriber"]
    expected = [(kind, step) for kind in kinds for step in ("meta", "works", "works", "cpu")]
    assert journal == expected
    journal.clear()
    stage = chain(parts, journal, memory="all", batch_size=2, min_crop=0).to("meta")
    assert journal == [(kind, "meta") for kind in kinds]
    list(stage(samples))
    assert ("ShapesTagger", "cpu") not in journal


def test_masks_and_descriptions_belong_to_their_boxes(parts, drawn):
    scenes, shards = drawn
    record = ShardSet(shards)[1]
    stage = chain(parts, min_crop=0, short_side=40)
    (made,) = stage([sample(record.image)])
    assert {item.phrase for item in made.scene.objects} == {item.phrase for item in scenes[1].objects}
    for item in made.scene.objects:
        x0, y0, x1, y1 = (round(value * 64) for value in item.box)
        rows, columns = np.nonzero(decode(item.mask))
        assert decode(item.mask).shape == (64, 64)
        assert (rows.min(), columns.min()) == (y0, x0)
        assert rows.max() < (y0 + y1) / 2
        assert columns.max() < (x0 + x1) / 2
        tag, height, width = re.match(r"(.*) in (\d+) by (\d+), ", item.description).groups()
        assert (tag, item.label) == (item.phrase, item.phrase)
        assert min(int(height), int(width)) == 40
        assert int(width) / int(height) == pytest.approx((x1 - x0) / (y1 - y0), abs=0.03)


def test_small_crops_keep_their_tag_and_are_counted(parts, drawn):
    _, shards = drawn
    record = ShardSet(shards)[1]
    (all_described,) = chain(parts, min_crop=0)([sample(record.image)])
    boxes = [item.box for item in all_described.scene.objects]
    areas = sorted((right - left) * (bottom - top) * 64 * 64 for left, top, right, bottom in boxes)
    least = int(np.sqrt(areas[1]))  # of which the smallest has less
    stage = chain(parts, min_crop=least)
    (made,) = stage([sample(record.image)])
    kept = [item for item in made.scene.objects if item.description == item.label]
    assert len(kept) == sum(area < least**2 for area in areas) >= 1
    assert len(kept) < len(areas)
    assert stage.left_out.counts["crops under min_crop, which keep their tag"] == len(kept)


def test_a_description_can_be_the_phrase(parts, drawn):
    _, shards = drawn
    stage = chain(parts, phrase="description", min_crop=0, short_side=None)
    (made,) = stage([sample(ShardSet(shards)[0].image)])
    for item in made.scene.objects:
        x0, y0, x1, y1 = (round(value * 64) for value in item.box)
        assert item.phrase == item.description
        assert item.phrase.startswith(f"{item.label} in {y1 - y0} by {x1 - x0}, ")


@pytest.mark.parametrize("form", ["png", "jpg"])
def test_the_centre_square_is_labelled_at_its_size(parts, drawn, form):
    scenes, shards = drawn
    record = ShardSet(shards)[2]
    wide = np.zeros((64, 101, 3), np.uint8)
    wide[:, 18:82] = record.image
    seen = []

    class Watching(parts.ShapesDetector):
        def __call__(self, pictures, asked=None):
            seen.extend(picture.shape for picture in pictures)
            return super().__call__(pictures, asked)

    stage = Label(tagger=CaptionTagger(), detector=Watching(), square=64 if form == "png" else 128)
    caption = scenes[2].caption
    (made,) = stage([sample(wide, caption=caption, form=form, frame=False)])
    assert seen == [(64, 64, 3) if form == "png" else (128, 128, 3)]
    picture = np.asarray(made.picture())
    assert picture.shape == (64, 64, 3)
    assert made.scene.frame == Frame(original=(64, 101), crop=(0, 18, 64, 64))
    if form == "png":
        np.testing.assert_array_equal(picture, record.image)
        compare(made.scene, scenes[2])
    else:
        assert len(made.scene.objects) > 0
    (square,) = stage([sample(record.image, caption=caption)])
    assert square.members["png"] == encoded(record.image)


def test_what_falls_out_is_counted(parts, drawn):
    scenes, shards = drawn
    image = ShardSet(shards)[0].image
    black = np.zeros_like(image)
    old = SceneObject(phrase="old", box=(0, 0, 0.5, 0.5))
    broken = Sample(key="3", scene=Scene(id="broken"), members={"png": b"no picture"})
    samples = [
        sample(image, objects=(old, old)),
        sample(black, key="000000001"),
        broken,
        sample(black, key="000000004"),
    ]
    stage = Label(tagger=parts.ShapesTagger(), detector=parts.ShapesDetector())
    made = list(stage(samples))
    assert [each.key for each in made] == ["000000000"]
    assert {item.phrase for item in made[0].scene.objects} == {item.phrase for item in scenes[0].objects}
    assert stage.left_out.counts == {"objects replaced": 2, "pictures without tags": 2}
    assert stage.left_out.bad == 1
    assert "broken" in stage.left_out.skipped[0]

    stage = Label(tagger=VocabularyTagger(words=["red circle"]), detector=parts.ShapesDetector(), keep_empty=True)
    assert [each.scene.objects for each in stage([sample(black)])] == [()]
    stage = Label(tagger=VocabularyTagger(words=["red circle"]), detector=parts.ShapesDetector())
    assert list(stage([sample(black)])) == []
    assert stage.left_out.counts == {"pictures without boxes": 1}


def test_a_detector_with_names_of_its_own_needs_no_tagger(parts, drawn):
    scenes, shards = drawn
    stage = Label(detector=parts.ShapesDetector())
    (made,) = stage([sample(ShardSet(shards)[0].image)])
    assert {item.phrase for item in made.scene.objects} == {f"{o.attributes[0]} thing" for o in scenes[0].objects}


def test_every_scene_says_what_it_was_made_with(parts, drawn):
    _, shards = drawn
    stage = chain(parts, square=64, min_crop=7)
    (made,) = stage([sample(ShardSet(shards)[0].image)])
    told = made.scene.provenance["labelling"]
    assert told["detector"] == {"part": "ShapesDetector"}
    assert list(told)[:4] == ["tagger", "detector", "segmenter", "describer"]
    assert (told["square"], told["min_crop"], told["phrase"]) == (64, 7, "tag")
    assert told["versions"]["scenograph"]
    assert Scene.from_json(json.loads(json.dumps(made.scene.to_json()))) == made.scene


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detector": None}, "detector: "),
        ({"memory": "two"}, "stage.memory=two"),
        ({"phrase": "words"}, "stage.phrase=words"),
        ({"batch_size": 0}, "stage.batch_size=0"),
        ({"square": 0}, "stage.square=0"),
        ({"min_crop": -1}, "stage.min_crop=-1"),
        ({"phrase": "description"}, "stage.phrase=description"),
    ],
)
def test_wrong_settings_are_refused_in_a_line(parts, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Label(**{"detector": parts.ShapesDetector(), **settings})
    assert "\n" not in str(caught.value)
