"""COCO, GLIGEN-COCO, SA-1B and folders, written tiny: numbers worked out by hand, what goes and what is refused counted."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.shards import ShardError, ShardSet, write_shards
from datamodules.sources.base import EncodedPicture
from datamodules.sources.coco import FILTERS, Coco, mask_of
from datamodules.sources.folder import Folder
from datamodules.sources.gligen_coco import GligenCoco
from datamodules.sources.sa1b import Sa1b, read_captions
from datamodules.transforms import SceneTransform
from preparation.conversion import convert_source
from preparation.prepare import TASKS
from runtime.composition import compose
from runtime.launch.ranks import Ranks
from scenes import Frame
from scenes.masks import decode

WIDE, TALL = (40, 80), (90, 60)  # (height, width)


def picture(size, box=None):
    """Black, with a white box (left, top, right, bottom) px."""
    pixels = np.zeros((*size, 3), np.uint8)
    if box is not None:
        pixels[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(pixels)


def jpeg(size, box=None):
    data = io.BytesIO()
    picture(size, box).save(data, "JPEG", quality=95)
    return data.getvalue()


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message


def boxes_of(scene):
    return [item.box for item in scene.objects]


# COCO


def write_coco(root, pictures, things=(), captions=None, stuff=(), split="train2017"):
    """pictures: name -> (height, width); things, stuff: (name, category, xywh, more)."""
    (root / "annotations").mkdir(parents=True)
    (root / split).mkdir()
    ids = {name: 7 + 2 * place for place, name in enumerate(pictures)}
    for name, size in pictures.items():
        (root / split / f"{name}.jpg").write_bytes(jpeg(size))

    def annotations(items):
        return [
            {"id": n, "image_id": ids[name], "category_id": category, "bbox": box, "iscrowd": 0, **more}
            for n, (name, category, box, *rest) in enumerate(items)
            for more in (rest[0] if rest else {},)
        ]

    images = [{"id": ids[n], "file_name": f"{n}.jpg", "height": h, "width": w} for n, (h, w) in pictures.items()]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 90, "name": "toothbrush"}]
    texts = {name: [f"{name} one", f"{name} two"] for name in pictures} if captions is None else captions
    files = {
        "instances": {"images": images, "annotations": annotations(things), "categories": categories},
        "captions": {"annotations": [{"image_id": ids[n], "caption": t} for n, ts in texts.items() for t in ts]},
        "stuff": {
            "annotations": annotations(stuff),
            "categories": [{"id": 157, "name": "sky-other"}, {"id": 183, "name": "other"}],
        },
    }
    for kind, content in files.items():
        (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def two(tmp_path):
    """A wide and a tall picture with things, a crowd and stuff."""
    return write_coco(
        tmp_path / "coco",
        {"wide": WIDE, "tall": TALL},
        things=[
            ("wide", 18, [30, 10, 20, 20]),
            ("wide", 1, [0, 0, 10, 4]),
            ("tall", 1, [0, 0, 60, 30]),
            ("tall", 1, [0, 0, 60, 90], {"iscrowd": 1, "segmentation": {"size": [90, 60], "counts": [5400]}}),
        ],
        stuff=[("tall", 157, [0, 0, 60, 45]), ("tall", 183, [0, 45, 60, 45])],
    )


def test_coco_boxes_are_parts_of_the_whole_picture_wide_or_tall(two):
    wide, tall = (scene for scene, _ in Coco(root=str(two)))
    assert wide.id == "wide"
    assert [item.phrase for item in wide.objects] == ["dog", "person"]
    assert boxes_of(wide) == [(0.375, 0.25, 0.625, 0.75), (0.0, 0.0, 0.125, 0.1)]
    assert boxes_of(tall) == [(0.0, 0.0, 1.0, pytest.approx(1 / 3))]
    assert (wide.frame, tall.frame) == (Frame(original=WIDE), Frame(original=TALL))
    assert wide.caption == "wide one"
    assert wide.provenance == {"captions": ["wide one", "wide two"]}


def test_what_coco_leaves_out_is_counted_and_can_be_kept(two):
    source = Coco(root=str(two))
    assert sum(len(scene.objects) for scene, _ in source) == 3
    assert source.left_out.counts == {"boxes of crowds": 1}
    source = Coco(root=str(two), crowd=True, stuff=True, min_area=0.02)
    scenes = [scene for scene, _ in source]
    assert [[item.phrase for item in scene.objects] for scene in scenes] == [["dog"], ["person", "person", "sky-other"]]
    assert [item.is_crowd for item in scenes[1].objects] == [False, True, False]
    assert source.left_out.counts == {"boxes under min_area": 1}  # .0125 of the picture; "other" is never read


def test_the_crop_of_training_moves_coco_boxes_and_drops_what_is_small(two, tmp_path):
    stored = ShardSet(write_shards(Coco(root=str(two)), tmp_path / "out"))
    transform = SceneTransform(resolution=20, min_area=0.01)
    wide, tall = (transform(stored[number], number) for number in range(2))
    # wide: the square is columns 20 to 60. The dog's 30..50 becomes 10/40..30/40; the person lies left of it.
    assert boxes_of(wide.scene) == [(0.25, 0.25, 0.75, 0.75)]
    assert (wide.dropped, tall.dropped) == (1, 0)
    assert wide.scene.frame == Frame(original=WIDE, crop=(0, 20, 40, 40), target=(20, 20))
    # tall: the square is rows 15 to 75, of which the person has 15 to 30.
    assert boxes_of(tall.scene) == [pytest.approx((0.0, 0.0, 1.0, 0.25))]
    assert tall.scene.frame == Frame(original=TALL, crop=(15, 0, 60, 60), target=(20, 20))


def test_a_jpeg_that_is_not_changed_is_stored_byte_for_byte(two, tmp_path):
    original = (two / "train2017" / "wide.jpg").read_bytes()
    (_, content), _ = Coco(root=str(two))
    assert content == EncodedPicture(data=original, height=40, width=80)
    out = write_shards(Coco(root=str(two)), tmp_path / "out")
    with tarfile.open(out / "000000.tar") as tar:
        assert tar.extractfile("000000000.jpg").read() == original
    with Image.open(io.BytesIO(original)) as image:
        np.testing.assert_array_equal(ShardSet(out)[0].image, np.asarray(image))


def test_pictures_are_scaled_down_and_never_up(two):
    (wide, small), (tall, large) = Coco(root=str(two), short_side=50)
    assert isinstance(small, EncodedPicture)
    assert wide.frame.target == WIDE
    assert (large.height, large.width) == tall.frame.target == (75, 50)
    assert boxes_of(tall) == [(0.0, 0.0, 1.0, pytest.approx(1 / 3))]


def test_masks_are_coco_s_whatever_form_they_have():
    polygon = mask_of([[2, 1, 5, 1, 5, 3, 2, 3]], (6, 9), "a")
    inside = np.zeros((6, 9), bool)
    inside[1:4, 2:6] = True
    np.testing.assert_array_equal(decode(polygon), inside)
    runs = mask_of({"size": [2, 3], "counts": [1, 2, 3]}, (2, 3), "a")  # down the columns: 0 11 000
    np.testing.assert_array_equal(decode(runs), np.array([[0, 1, 0], [1, 0, 0]], bool))
    assert mask_of(polygon, (6, 9), "a") == polygon
    assert mask_of([], (6, 9), "a") is None
    with pytest.raises(ValueError, match="segmentation"):
        mask_of({"size": [2, 3], "counts": [1, 2]}, (2, 3), "a")


def test_masks_are_kept_if_asked_for(tmp_path):
    root = write_coco(
        tmp_path / "c", {"a": WIDE}, [("a", 18, [30, 10, 20, 20], {"segmentation": [[30, 10, 49, 10, 49, 29, 30, 29]]})]
    )
    ((scene, _),) = Coco(root=str(root), masks=True)
    assert decode(scene.objects[0].mask).sum() == 400
    assert "masks" in Coco(root=str(root), masks=True).provides
    assert "masks" not in Coco(root=str(root)).provides


def square(side):
    """A box of side px in a 100 x 100 picture."""
    return [10, 10, side, side]


def test_lama_takes_three_to_eight_objects_of_two_percent_things_and_stuff(tmp_path):
    kept = {"three": 2, "eight": 7}
    gone = {"two": 1, "nine": 8}
    counts = kept | gone
    things = [(name, 18, square(20)) for name, count in counts.items() for _ in range(count)]
    things += [("three", 90, square(10)), ("two", 90, square(14)), ("three", 1, square(90), {"iscrowd": 1})]
    stuff = [(name, 157, square(50)) for name in counts] + [("two", 183, square(50))]
    root = write_coco(tmp_path / "c", dict.fromkeys(counts, (100, 100)), things, stuff=stuff)
    source = Coco(root=str(root), filter="lama")
    assert [(scene.id, len(scene.objects)) for scene, _ in source] == [("three", 3), ("eight", 8)]
    assert source.left_out.counts == {
        "boxes of crowds": 1,
        "boxes under min_area": 1,
        "pictures outside the filter": 2,
    }
    assert source.left_out.notes == []  # the publishers count val2017 only


def test_creatilayout_counts_persons_before_the_size_of_their_boxes(tmp_path):
    pictures = dict.fromkeys(("few", "many", "one", "eleven"), (100, 100))
    things = [("few", 1, square(20))] * 3 + [("few", 18, square(30))]
    things += [("many", 1, square(20))] * 2 + [("many", 1, square(5))] * 2  # four persons, two of them small
    things += [("one", 18, square(30)), ("one", 18, square(14))]  # 1.96 %
    things += [("eleven", 18, square(20))] * 11
    root = write_coco(tmp_path / "c", pictures, things)
    source = Coco(root=str(root), filter="creatilayout")
    assert [scene.id for scene, _ in source] == ["few"]
    assert source.left_out.notes == ["filter creatilayout: 1 pictures (published: 61002, of the whole train2017)"]
    assert FILTERS["creatilayout"].scenes == {"train2017": 61002, "val2017": 2565}
    assert FILTERS["lama"].scenes == {"val2017": 3097}


def test_rich_context_takes_one_to_thirty_objects_of_one_percent_things_and_stuff(tmp_path):
    counts = {"one": 0, "thirty": 29, "none": 0, "thirty_one": 30}
    things = [(name, 18, square(10)) for name, count in counts.items() for _ in range(count)]
    things += [("one", 18, square(9)), ("thirty", 1, square(90), {"iscrowd": 1})]
    stuff = [(name, 157, square(50)) for name in counts if name != "none"] + [("none", 183, square(50))]
    root = write_coco(tmp_path / "c", dict.fromkeys(counts, (100, 100)), things, stuff=stuff)
    source = Coco(root=str(root), filter="rich_context")
    assert [(scene.id, len(scene.objects)) for scene, _ in source] == [("one", 1), ("thirty", 30)]
    assert source.left_out.counts == {
        "boxes of crowds": 1,
        "boxes under min_area": 1,
        "pictures outside the filter": 2,
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"filter": "lamma"}, ("source.filter=lamma", "lama, creatilayout, rich_context")),
        ({"filter": "lama", "stuff": False}, ("source.stuff=false", "leave source.stuff out")),
        ({"filter": "lama", "crowd": True}, ("source.crowd=true",)),
        ({"filter": "lama", "min_area": 0.1}, ("source.min_area=0.1", "0.02")),
        ({"split": "val2017"}, ("source.images", "val2017 is not there")),
        ({"images": "nowhere"}, ("source.images: nowhere is not there",)),
        ({"min_area": 1.0}, ("source.min_area=1.0",)),
        ({"short_side": 0}, ("source.short_side=0",)),
    ],
)
def test_settings_that_contradict_are_refused(two, settings, words):
    with pytest.raises(ValueError, match="source") as caught:
        Coco(root=str(two), **settings)
    one_line(caught, *words)


def test_files_that_are_not_coco_s_are_refused(two):
    path = two / "annotations" / "instances_train2017.json"
    for content in ("{", "[]", '{"images": [], "annotations": []}', '{"images": 3, "annotations": 3, "categories": 3}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"source\.root") as caught:
            Coco(root=str(two))
        one_line(caught, path)


# What is wrong with a sample


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([30, 10, -5, 20], ("boxes[1]", "inverted")),
        ([30, 10, float("nan"), 20], ("boxes[1]", "not finite")),
        ([70, 10, 15, 20], ("boxes[1]", "leaves the picture at the right", "source.tolerance")),
        ([-4, 10, 15, 20], ("boxes[1]", "leaves the picture at the left")),
        ([30, 10, 5], ("bbox", "[x, y, width, height]")),
        ("30 10 5 5", ("bbox", "str")),
    ],
)
def test_a_box_that_cannot_be_makes_its_sample_bad(tmp_path, box, words):
    root = write_coco(tmp_path / "c", {"a": WIDE, "b": WIDE}, [("a", 18, [0, 0, 9, 9]), ("a", 18, box)])
    source = Coco(root=str(root))
    assert [scene.id for scene, _ in source] == ["b"]
    (line,) = source.left_out.skipped
    assert source.left_out.bad == 1
    assert "\n" not in line
    assert all(word in line for word in ("a: ", *words)), line


def test_boxes_are_cut_within_the_tolerance_and_flat_ones_go(tmp_path):
    things = [("a", 18, [70, 30, 10.5, 10.3]), ("a", 1, [-0.5, 0, 10, 10]), ("a", 1, [5, 5, 7, 0])]
    source = Coco(root=str(write_coco(tmp_path / "c", {"a": WIDE}, things)))
    ((scene, _),) = source
    assert boxes_of(scene) == [(0.875, 0.75, 1.0, 1.0), (0.0, 0.0, 9.5 / 80, 0.25)]
    assert source.left_out.counts == {"boxes with no area in the picture": 1}


def test_pictures_that_cannot_be_read_are_skipped_counted_and_listed(tmp_path):
    root = write_coco(tmp_path / "c", dict.fromkeys(("good", "lost", "cut", "text", "other"), WIDE))
    (root / "train2017" / "lost.jpg").unlink()
    whole = jpeg((400, 500), (3, 3, 200, 200))
    (root / "train2017" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train2017" / "text.jpg").write_text("no picture")
    (root / "train2017" / "other.jpg").write_bytes(jpeg(TALL))
    out = write_shards(Coco(root=str(root)), tmp_path / "out", max_bad_fraction=0.8)
    told = ShardSet(out).index["skipped"]
    assert told["samples"] == 4
    starts = [line.split(";")[0][:30] for line in told["reasons"]]
    assert all(line.startswith(name) for line, name in zip(starts, ("lost", "cut", "text", "other"), strict=True))
    assert "(90, 60) is not the (height, width) (40, 80)" in told["reasons"][3]
    assert len(ShardSet(out)) == 1


@pytest.mark.parametrize("bad", [["a"], ["a", "b", "c"]])
def test_too_many_bad_samples_end_the_preparation_with_their_list(tmp_path, bad, capsys):
    root = write_coco(tmp_path / "c", dict.fromkeys("abc", WIDE))
    for name in bad:
        (root / "train2017" / f"{name}.jpg").unlink()
    cfg = compose("prepare", ["source=coco", f"source.root={root}", f"out={tmp_path / 'out'}"])
    with pytest.raises(ShardError) as caught:
        TASKS["convert"](cfg)
    one_line(caught, f"out={tmp_path / 'out'}", "max_bad_fraction=0.01", "the first: a: picture")
    assert [line[:10] for line in capsys.readouterr().err.splitlines() if ": picture:" in line] == [
        f"{name}: picture"[:10] for name in bad
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_prepare_says_what_it_wrote_and_what_it_left_out(two, tmp_path, capsys):
    (two / "train2017" / "wide.jpg").unlink()
    out = tmp_path / "out"
    arguments = ["source=coco", f"source.root={two}", f"out={out}", "max_bad_fraction=0.5"]
    TASKS["convert"](compose("prepare", arguments))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: 1 scenes, 1 objects, 2 captions, 1 boxes dropped, 1 samples skipped"
    assert said[1] == "  left out: boxes of crowds: 1"
    assert said[2].startswith("  skipped: wide: picture: ")


# captions


def test_any_caption_is_drawn_by_seed_and_position(two, tmp_path):
    record = ShardSet(write_shards(Coco(root=str(two)), tmp_path / "out"))[0]
    draw = SceneTransform(resolution=20, caption="any", seed=3)
    drawn = [draw(record, position).scene.caption for position in range(64)]
    assert drawn == [draw(record, position).scene.caption for position in range(64)]
    assert 16 < drawn.count("wide one") < 48
    assert drawn.count("wide one") + drawn.count("wide two") == 64
    other = SceneTransform(resolution=20, caption="any", seed=4)
    assert drawn != [other(record, position).scene.caption for position in range(64)]
    assert {SceneTransform(resolution=20)(record, position).scene.caption for position in range(9)} == {"wide one"}
    with pytest.raises(ValueError, match=r"data\.caption=all"):
        SceneTransform(resolution=20, caption="all")


# GLIGEN-COCO


@pytest.fixture
def detections(tmp_path):
    (tmp_path / "train2017").mkdir()
    for name, size in (("wide", WIDE), ("tall", TALL)):
        (tmp_path / "train2017" / f"{name}.jpg").write_bytes(jpeg(size))

    def write(entries):
        torch.save(entries, tmp_path / "coco_train2017.pth")
        return tmp_path

    return write


def detection(caption, box):
    return {"caption": caption, "bbox": box, "text_embeddings_before_projection": torch.ones(768)}


def test_gligen_coco_boxes_are_corners_in_pixels(detections):
    root = detections(
        [
            {
                "file_path": "wide.jpg",
                "captions": ["one", "two"],
                "annos": [detection("a dog", [30.0, 10.0, 50.0, 30.0])],
            },
            {"file_path": "tall.jpg", "annos": [detection("a man", [-1, 0, 60, 30]), detection("a cat", [1, 1, 1, 9])]},
        ]
    )
    source = GligenCoco(root=str(root))
    (wide, _), (tall, _) = source
    assert boxes_of(wide) == [(0.375, 0.25, 0.625, 0.75)]
    assert wide.objects[0].phrase == "a dog"
    assert (wide.caption, wide.provenance) == ("one", {"captions": ["one", "two"]})
    assert boxes_of(tall) == [(0.0, 0.0, 1.0, pytest.approx(1 / 3))]
    assert source.left_out.counts == {"boxes with no area in the picture": 1, "captions missing": 1}


def test_gligen_coco_s_bad_entries_are_named(detections):
    good = {"file_path": "wide.jpg", "captions": ["one"], "annos": []}
    root = detections(
        [
            good,
            {**good, "annos": [detection(" ", [0, 0, 9, 9])]},
            {**good, "annos": [detection("a dog", [0, 0, 9])]},
            {**good, "annos": [detection("a dog", torch.ones(4))]},
            {"captions": []},
            "text",
        ]
    )
    source = GligenCoco(root=str(root))
    assert len(list(source)) == 1
    phrases, short, tensor, no_file, text = source.left_out.skipped
    assert phrases.startswith("wide: phrases[0]: ' ' is not a phrase")
    assert short.startswith("wide: boxes: not four numbers")
    assert tensor.startswith("wide: bbox: is of type Embedding")
    assert no_file.startswith("entry 4: file_path: missing")
    assert text.startswith("entry 5: file_path: missing")


# SA-1B


def write_tar(path, pictures, *, lacking=()):
    """pictures: number -> (size, white box)."""
    with tarfile.open(path, "w") as tar:
        for number, (size, box) in pictures.items():
            told = {"image": {"image_id": number, "height": size[0], "width": size[1]}, "annotations": []}
            for name, data in (
                (f"./sa_{number}.jpg", jpeg(size, box)),
                (f"./sa_{number}.json", json.dumps(told).encode()),
            ):
                if name[2:] not in lacking:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_captions(path, captions):
    path.write_text("".join(json.dumps({"key": key, "caption": text}) + "\n" for key, text in captions.items()))
    return path


@pytest.fixture
def sa1b(tmp_path):
    write_tar(tmp_path / "sa_000000.tar", {1: (WIDE, (20, 0, 60, 40)), 2: (TALL, (0, 15, 60, 75))})
    write_tar(tmp_path / "sa_000001.tar", {11: (WIDE, None), 12: (WIDE, None)})
    texts = {"sa_1": "The image features a dog.", "sa_2": "This is a cat.", "sa_11": "The image features a cow. "}
    write_captions(tmp_path / "captions.jsonl", {**texts, "sa_999": "elsewhere"})
    rows = np.empty((2, 5), object)
    for place, (number, box) in enumerate({1: [0.5, 0.25, 0.5, 0.25], 2: [0.5, 0.5, 1.0, 1.0]}.items()):
        rows[place] = [number, "lower-cased.", np.array([box, [0.5] * 4], np.float16), None, ["a dog", "a cat"]]
        rows[place, 3] = np.array([0.9, 0.2], np.float16)
    (tmp_path / "boxes").mkdir()
    np.save(tmp_path / "boxes" / "sa_000000.npy", rows, allow_pickle=True)
    return tmp_path


def test_sa1b_has_captions_without_the_published_words(sa1b):
    source = Sa1b(root=str(sa1b), captions=str(sa1b / "captions.jsonl"))
    assert len(source) == 4
    assert source.provides == {"image", "caption"}
    samples = list(source)
    assert [(scene.id, scene.caption) for scene, _ in samples] == [
        ("sa_1", "a dog."),
        ("sa_2", "This is a cat."),
        ("sa_11", "a cow."),
    ]
    assert samples[0][0].frame == Frame(original=WIDE)
    assert isinstance(samples[0][1], EncodedPicture)
    assert source.left_out.counts == {"pictures without a caption": 1}


def test_sa1b_with_boxes_is_cut_to_the_square_that_they_lie_in(sa1b):
    source = Sa1b(
        root=str(sa1b), tars="sa_000000.tar", boxes=str(sa1b / "boxes"), captions=str(sa1b / "captions.jsonl")
    )
    (wide, wide_picture), (tall, tall_picture) = source
    assert wide.frame == Frame(original=WIDE, crop=(0, 20, 40, 40))
    assert tall.frame == Frame(original=TALL, crop=(15, 0, 60, 60))
    for image, size in ((wide_picture, (40, 40)), (tall_picture, (60, 60))):
        assert (image.height, image.width) == size
        assert np.asarray(image).min() > 200  # all of the white square and nothing else
    assert boxes_of(wide) == [(0.25, 0.125, 0.75, 0.375)]
    assert [item.score for item in wide.objects] == [pytest.approx(0.9, abs=1e-3)]
    assert boxes_of(tall) == [(0.0, 0.0, 1.0, 1.0)]
    assert source.left_out.counts == {"boxes under min_score": 2}


def test_sa1b_takes_the_boxes_captions_where_there_is_no_table(sa1b):
    source = Sa1b(root=str(sa1b), tars="sa_000000.tar", boxes=str(sa1b / "boxes"))
    assert [scene.caption for scene, _ in source] == ["lower-cased."] * 2
    with pytest.raises(ValueError, match=r"source\.captions: .*captions.parquet is not there") as caught:
        Sa1b(root=str(sa1b))
    one_line(caught, "source.boxes=DIR")
    with pytest.raises(ValueError, match=r"source\.tars=\*\.zip"):
        Sa1b(root=str(sa1b), tars="*.zip")


def test_sa1b_opens_the_tars_and_captions_of_its_share_alone(sa1b, tmp_path):
    """What a process is not to read is taken away before it begins."""
    settings = {"root": str(sa1b), "captions": str(sa1b / "captions.jsonl")}
    tars = sorted(sa1b.glob("*.tar"))
    assert len(tars) == 2
    for rank in range(2):
        source = Sa1b(**settings)
        other = tars[1 - rank].rename(tmp_path / "away")
        told = []
        convert_source(
            source,
            tmp_path / "out",
            ranks=Ranks(rank=rank, count=2),
            progress=lambda *numbers, told=told: told.append(numbers),
        )
        assert told[-1][0] == told[-1][1] == source.size_of(rank) > 0
        other.rename(tars[1 - rank])
    convert_source(Sa1b(**settings), tmp_path / "alone")
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    scenes = ShardSet(tmp_path / "out")
    tars_of = [scenes.scene(n).provenance["tar"] for n in range(len(scenes))]
    assert tars_of == sorted(tars_of)
    assert set(tars_of) == {"sa_000000", "sa_000001"}
    idle = Sa1b(**settings)
    (sa1b / "captions.jsonl").unlink()
    report = convert_source(idle, tmp_path / "out", ranks=Ranks(rank=0, count=3))  # of two files none is the first's
    assert (report.whole, report.done, report.index is not None) == ([], [], True)


def test_of_a_table_in_groups_those_without_a_wanted_key_are_passed_over(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "captions.parquet"
    table = pyarrow.table({"key": [f"sa_{n}" for n in range(40)], "caption": [f"{n} " + "x" * 5000 for n in range(40)]})
    parquet.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    groups = parquet.ParquetFile(path).metadata
    place = groups.row_group(2).column(1).data_page_offset
    with path.open("r+b") as file:  # whoever reads the captions of group 2 fails
        file.seek(place)
        file.write(b"\xff" * 64)
    found = read_captions(path, ["sa_3", "sa_35", "sa_99"])
    assert {key: caption[:2] for key, caption in found.items()} == {"sa_3": "3 ", "sa_35": "35"}
    with pytest.raises(ValueError, match="source.captions"):
        read_captions(path, ["sa_25"])


def test_sa1b_goes_on_within_a_tar_whose_files_are_mixed(sa1b):
    pictures = dict.fromkeys((31, 32, 33, 34), (WIDE, None))
    write_tar(sa1b / "paired.tar", pictures)
    with tarfile.open(sa1b / "paired.tar") as tar, tarfile.open(sa1b / "mixed.tar", "w") as mixed:
        names = [f"./sa_{name}" for name in ("31.jpg", "32.jpg", "33.json", "32.json", "33.jpg", "34.jpg", "31.json")]
        for name in names:
            mixed.addfile(tar.getmember(name), tar.extractfile(name))
    texts = write_captions(sa1b / "c.jsonl", {f"sa_{n}": f"picture {n}" for n in pictures})
    source = Sa1b(root=str(sa1b), tars="mixed.tar", captions=str(texts))
    assert [scene.id for scene, _ in source] == ["sa_32", "sa_33", "sa_31"]
    (lacking,) = source.left_out.skipped
    for start in range(4):
        assert [scene.id for scene, _ in source.span_of(0, start, 9)] == ["sa_32", "sa_33", "sa_31"][start:]
        assert source.left_out.skipped == [lacking]


def test_sa1b_s_broken_tars_are_counted(sa1b):
    whole = (sa1b / "sa_000001.tar").read_bytes()
    (sa1b / "sa_000001.tar").write_bytes(whole[:700])  # within the first picture
    write_tar(sa1b / "sa_000002.tar", {21: (WIDE, None), 22: (WIDE, None)}, lacking=("sa_22.json",))
    texts = {f"sa_{n}": "text" for n in (1, 2, 11, 12, 21, 22)}
    source = Sa1b(root=str(sa1b), captions=str(write_captions(sa1b / "c.jsonl", texts)))
    assert [scene.id for scene, _ in source] == ["sa_1", "sa_2", "sa_21"]
    cut, lone = source.left_out.skipped
    assert "sa_000001.tar" in cut
    assert lone.startswith("sa_22: its .json is missing")


def test_a_table_of_other_columns_is_refused(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"id": "sa_1", "text": "a"}\n')
    with pytest.raises(ValueError, match=r"source\.captions: .*no table of the columns key and caption") as caught:
        read_captions(tmp_path / "c.jsonl", ["sa_1"])
    one_line(caught)


def test_a_parquet_table_is_read_in_pieces(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet tables need pyarrow")
    from pyarrow import parquet

    keys = [f"sa_{number}" for number in range(1000)]
    table = pyarrow.table({"other": range(1000), "key": keys, "caption": [f"text of {key}" for key in keys]})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=64)
    assert read_captions(tmp_path / "c.parquet", ["sa_7", "sa_999", "sa_1000"]) == {
        "sa_7": "text of sa_7",
        "sa_999": "text of sa_999",
    }
    parquet.write_table(pyarrow.table({"id": keys}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="no table of the columns"):
        read_captions(tmp_path / "c.parquet", keys)


def test_a_parquet_table_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "c.parquet").touch()
    with pytest.raises(ValueError, match="needs pyarrow") as caught:
        read_captions(tmp_path / "c.parquet", ["sa_1"])
    one_line(caught, ".jsonl")


# folders


def write_folder(root: Path, *lines) -> Path:
    root.mkdir(exist_ok=True)
    (root / "scenes.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return root


def test_a_folder_has_scenes_beside_pictures(tmp_path):
    root = write_folder(
        tmp_path / "mine",
        {"id": "a", "caption": "one", "objects": [{"phrase": "a dog", "box": [0.375, 0.25, 0.625, 0.75]}]},
        "",
        {
            "id": "b/2",
            "caption": "two",
            "file": "sub/b.png",
            "objects": [{"phrase": "a cat", "box": [0, 0, 0.05, 0.1]}],
        },
    )
    (root / "sub").mkdir()
    (root / "a.jpg").write_bytes(jpeg(WIDE))
    picture(TALL).save(root / "sub" / "b.png")
    source = Folder(root=str(root), min_area=0.01)
    assert len(source) == 2
    assert source.provides == {"image", "caption", "boxes", "phrases"}
    (a, first), (b, second) = source
    assert isinstance(first, EncodedPicture)
    assert boxes_of(a) == [(0.375, 0.25, 0.625, 0.75)]
    assert (second.height, second.width) == b.frame.original == TALL
    assert b.objects == ()
    assert source.left_out.counts == {"boxes under min_area": 1}


def test_a_folder_provides_what_every_scene_has(tmp_path):
    thing = {"phrase": "a dog", "box": [0, 0, 1, 1]}
    related = {"objects": [thing, thing], "relations": [{"subject": 0, "predicate": "in", "object": 1}]}
    root = write_folder(tmp_path / "mine", {"id": "a", **related}, {"id": "b", "objects": [thing]})
    assert Folder(root=str(root)).provides == {"image", "boxes", "phrases", "relations"}
    write_folder(root, {"id": "a", **related}, {"id": "b", "objects": [{"phrase": "a dog"}, thing]})
    assert Folder(root=str(root)).provides == {"image", "phrases"}


def test_a_folder_s_bad_lines_are_named(tmp_path):
    root = write_folder(
        tmp_path / "mine",
        {"id": "a"},
        "{",
        {"id": "c", "colour": "red"},
        {"id": "d", "objects": [{"phrase": "a dog", "box": [0.5, 0.5, 0.2, 1.0]}]},
        {"id": "e"},
        {"id": "f", "file": "a.jpg", "frame": {"original": [9, 9]}},
        {"id": "g", "file": 3},
    )
    (root / "a.jpg").write_bytes(jpeg(WIDE))
    source = Folder(root=str(root))
    assert [scene.id for scene, _ in source] == ["a"]
    starts = ("scenes.jsonl line 2: not JSON", "scenes.jsonl line 3: colour: unknown key", "scenes.jsonl line 4: ")
    ends = ("scenes.jsonl line 5: picture: no e.jpg", "scene 'f': frame: target (9, 9)", "scenes.jsonl line 7: file: 3")
    assert all(line.startswith(start) for line, start in zip(source.left_out.skipped, (*starts, *ends), strict=True)), (
        source.left_out.skipped
    )
    assert "objects[0].box" in source.left_out.skipped[2]


def test_a_picture_that_its_camera_turned_is_turned_upright(tmp_path):
    root = write_folder(tmp_path / "mine", {"id": "a"})
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the file has WIDE, people see it tall
    picture(WIDE, (0, 0, 40, 40)).save(root / "a.jpg", exif=exif, quality=95)
    ((scene, content),) = Folder(root=str(root))
    assert scene.frame.original == (80, 40)
    pixels = np.asarray(content.convert("L"))
    assert pixels[:30].mean() > 200
    assert pixels[50:].mean() < 50


def test_a_folder_of_crops_keeps_what_its_frames_say(tmp_path):
    frame = {"original": [80, 160], "crop": [0, 0, 80, 160], "target": [40, 80]}
    root = write_folder(tmp_path / "mine", {"id": "a", "frame": frame})
    (root / "a.jpg").write_bytes(jpeg(WIDE))
    ((scene, _),) = Folder(root=str(root), short_side=20)
    assert scene.frame == Frame(original=(80, 160), crop=(0, 0, 80, 160), target=(20, 40))
