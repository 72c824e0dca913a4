"""Rich labels of img2dataset's pictures and of COCO's, written tiny: the border goes, boxes move, what goes is counted."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from datamodules.equal_texts import told_apart
from datamodules.shards import ShardError, ShardSet, write_shards
from datamodules.sources.base import EncodedPicture
from datamodules.sources.img2dataset import Img2dataset, content_window
from datamodules.sources.rc_coco import RcCoco
from datamodules.sources.rich_context import RichContext
from scenes import Frame
from scenes.masks import decode, encode

SIDE = 96  # px of the padded pictures


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word) in message for word in words), message


def annotation(box, tag="dog", sentence="A dog on grass.", **more):
    return {"bbox": box, "category_name": tag, "caption": sentence, "pred_score": 0.5, "mask": "", **more}


def encoded(image, form="JPEG"):
    data = io.BytesIO()
    image.save(data, form, quality=95)
    return data.getvalue()


def padded(original, box=None):
    """(JPEG, window): a grey picture of (height, width) in its white border, with a red box (left, top, right, bottom) px."""
    top, left, height, width = content_window((SIDE, SIDE), original)
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[top : top + height, left : left + width] = 90
    if box is not None:
        pixels[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
    return encoded(Image.fromarray(pixels)), (top, left, height, width)


def sample(key, original, annotations, box=None, **label):
    """File names with content: picture, sidecar, labels."""
    height, width = original
    record = {"key": key, "caption": f"{key} fetched", "original_width": width, "original_height": height}
    content = {"caption": f"{key} caption", "file_name": f"there/cc3m/{key[:-4]}/{key}.jpg", "dataset_name": "cc3m"}
    return {
        f"{key}.jpg": padded(original, box)[0],
        f"{key}.json": json.dumps(record).encode(),
        f"{key}.txt": b"text",
        f"label_{key}.json": json.dumps({**content, "annos": annotations, **label}).encode(),
    }


WIDE = sample("000010001", (50, 100), [annotation([24, 30, 48, 24], "dog", "A brown dog.")], box=(24, 30, 72, 54))
TALL = sample("000010002", (100, 75), [annotation([12, 0, 36, 96], "cat", "A cat; asleep.", pred_score=0.9)])
EQUAL = sample("000010003", (64, 64), [annotation([0, 0, 96, 48], "sky", "A blue sky.")])
SAMPLES = {**WIDE, **TALL, **EQUAL}


def tree(root, files, labels=None):
    """img2dataset's tree: 00001/KEY.*, with labels beside the pictures or in a folder of their own."""
    for name, content in files.items():
        folder = root / "00001" if labels is None or not name.startswith("label_") else labels / "batch_0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(root)


def packed(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path.parent)


def changed(key, annotations=None, **label):
    """The wide sample with other annotations or keys of its labels."""
    files = sample(key, (50, 100), [annotation([24, 30, 48, 24])] if annotations is None else annotations)
    content = json.loads(files[f"label_{key}.json"])
    return {**files, f"label_{key}.json": json.dumps({**content, **label}).encode()}


def only(source):
    ((scene, content),) = source
    return scene, content


# Where a picture lies in its border


@pytest.mark.parametrize(
    ("original", "window"),
    [
        ((360, 640), (168, 0, 432, 768)),
        ((640, 556), (0, 50, 768, 667)),
        ((479, 640), (96, 0, 575, 768)),
        ((336, 500), (126, 0, 516, 768)),
        ((64, 64), (0, 0, 768, 768)),
        ((1, 5000), (383, 0, 1, 768)),
    ],
)
def test_the_border_is_where_img2dataset_puts_it(original, window):
    assert content_window((768, 768), original) == window


def test_a_picture_that_is_not_square_has_no_border():
    assert content_window((480, 640), (960, 1280)) == (0, 0, 480, 640)


# Rich context


def test_the_border_goes_and_boxes_move_along(tmp_path):
    root = tree(tmp_path / "cc3m", SAMPLES)
    (wide, content), (tall, _), (equal, whole) = RichContext(root=root)
    # wide: 100 x 50 at 96 px is 48 rows from row 24 on. The box is columns 24..72, rows 30..54, so 6..30 of 48 rows.
    assert wide.objects[0].box == pytest.approx((0.25, 0.125, 0.75, 0.625))
    assert wide.frame == Frame(original=(50, 100), target=(48, 96))
    assert (wide.id, wide.caption, wide.source) == ("000010001", "000010001 caption", "rich_context")
    assert wide.provenance == {"dataset": "cc3m", "padded": {"size": [96, 96], "window": [24, 0, 48, 96]}}
    item = wide.objects[0]
    assert (item.phrase, item.label, item.description, item.score) == ("dog", "dog", "A brown dog.", 0.5)
    assert content.size == (96, 48)
    red = np.asarray(content)[..., 0] > 200
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert abs(rows[0] - 6) <= 1
    assert abs(rows[-1] - 29) <= 1
    assert abs(columns[0] - 24) <= 1
    assert abs(columns[-1] - 71) <= 1
    # tall: 75 columns of 100 become 72 from column 12 on.
    assert tall.objects[0].box == pytest.approx((0.0, 0.0, 0.5, 1.0))
    assert tall.frame == Frame(original=(100, 75), target=(96, 72))
    # a square picture has no border and stays byte for byte
    assert equal.objects[0].box == (0.0, 0.0, 1.0, 0.5)
    assert whole == EncodedPicture(data=EQUAL["000010003.jpg"], height=96, width=96)
    assert equal.frame == Frame(original=(64, 64), target=(96, 96))


def forms(folder):
    """The same samples in every published arrangement: settings of each."""
    labels = {name: content for name, content in SAMPLES.items() if name.startswith("label_")}
    others = {name: content for name, content in SAMPLES.items() if not name.startswith("label_")}
    apart = {"root": tree(folder / "apart", SAMPLES, labels=folder / "labels"), "labels": str(folder / "labels")}
    pairs = [
        [f"/home/them/cc3m/00001/{key}.jpg", f"/home/them/generated/batch_0/label_{key}.json"]
        for key in ("000010001", "000010002", "000010003")
    ]
    (folder / "meta.json").write_text(json.dumps(pairs))
    return {
        "beside": {"root": tree(folder / "beside", SAMPLES)},
        "apart": apart,
        "list": {**apart, "meta": str(folder / "meta.json")},
        "tar": {"root": packed(folder / "tars" / "00001.tar", SAMPLES), "tars": "*.tar"},
        "tar, labels last": {"root": packed(folder / "last" / "00001.tar", {**others, **labels}), "tars": "*.tar"},
        "tar, labels apart": {
            "root": packed(folder / "bare" / "00001.tar", others),
            "tars": "*.tar",
            "labels": str(folder / "labels"),
        },
    }


def test_every_arrangement_of_the_files_gives_the_same_shards(tmp_path):
    made = {}
    for name, settings in forms(tmp_path).items():
        source = RichContext(**settings)
        assert len(source) == 3, name
        made[name] = write_shards(source, tmp_path / "out" / name)
        assert (source.left_out.counts, source.left_out.bad) == ({}, 0), name
    contents = {name: (folder / "000000.tar").read_bytes() for name, folder in made.items()}
    assert len(set(contents.values())) == 1
    assert ShardSet(made["tar"]).provides >= {"descriptions", "scores", "boxes"}


def test_what_lies_in_the_border_is_cut_and_counted(tmp_path):
    boxes = [[24, 0, 48, 48], [0, 0, 96, 20], [0, -3, 96, 101], [30, 24, 0, 10]]
    files = changed("000010001", [annotation(box) for box in boxes])
    source = RichContext(root=tree(tmp_path, files))
    scene, _ = only(source)
    assert [item.box for item in scene.objects] == [
        pytest.approx((0.25, 0.0, 0.75, 0.5)),
        pytest.approx((0.0, 0.0, 1.0, 1.0)),
    ]
    assert source.left_out.counts == {"boxes with no area in the picture": 2}


def test_min_area_is_a_share_of_the_picture_without_its_border(tmp_path):
    # 48 x 24 px of 96 x 48 is a quarter; of 96 x 96 it would be an eighth
    root = tree(tmp_path, changed("000010001", [annotation([0, 24, 48, 24]), annotation([0, 24, 44, 24])]))
    source = RichContext(root=root, min_area=0.25)
    assert len(only(source)[0].objects) == 1
    assert source.left_out.counts == {"boxes under min_area": 1}


def test_at_most_so_many_objects_the_most_confident_in_their_order(tmp_path):
    scores = [0.3, 0.9, 0.3, 0.8, 0.3]
    items = [annotation([i, 24, 9, 9], f"thing {i}", pred_score=score) for i, score in enumerate(scores)]
    root = tree(tmp_path, changed("000010001", items))
    source = RichContext(root=root, max_objects=3)
    assert [item.phrase for item in only(source)[0].objects] == ["thing 0", "thing 1", "thing 3"]
    assert source.left_out.counts == {"boxes beyond max_objects": 2}
    assert len(only(RichContext(root=root, max_objects=None))[0].objects) == 5


def test_the_published_limit_is_the_default(tmp_path):
    items = [annotation([i, 24, 9, 9]) for i in range(25)]
    source = RichContext(root=tree(tmp_path, changed("000010001", items)))
    assert len(only(source)[0].objects) == 20


def test_masks_move_with_the_picture_or_are_said_to_be_wrong(tmp_path):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[20:40, 30:50] = True  # rows 24 to 72 are the picture
    small = np.ones((48, 48), bool)
    items = [annotation([24, 30, 48, 24], mask=m) for m in (encode(mask), encode(small), "")]
    root = tree(tmp_path, changed("000010001", items))
    source = RichContext(root=root, masks=True)
    first, second, third = only(source)[0].objects
    moved = decode(first.mask)
    assert moved.shape == (48, 96)
    np.testing.assert_array_equal(moved, mask[24:72])
    assert (second.mask, third.mask) == (None, None)
    assert source.left_out.counts == {"masks of another size than the picture": 1, "masks missing": 1}
    assert "masks" in source.provides
    assert "masks" not in RichContext(root=root).provides
    assert only(RichContext(root=root))[0].objects[0].mask is None


def test_labels_made_at_another_size_are_scaled(tmp_path):
    root = tree(tmp_path, changed("000010001", [annotation([192, 240, 384, 192])]))
    scene, _ = only(RichContext(root=root, labelled_at=768))
    assert scene.objects[0].box == pytest.approx((0.25, 0.125, 0.75, 0.625))


def test_a_tag_or_a_sentence_alone_will_do_and_neither_is_counted(tmp_path):
    items = [annotation([0, 24, 9, 9], *texts) for texts in (("dog", ""), ("", "A cat."), (" ", ""))]
    source = RichContext(root=tree(tmp_path, changed("000010001", items)))
    objects = only(source)[0].objects
    assert [(o.phrase, o.label, o.description) for o in objects] == [("dog", "dog", "dog"), ("A cat.", "", "A cat.")]
    assert source.left_out.counts == {"boxes without a text": 1}


def test_pictures_without_boxes_or_without_files_are_counted(tmp_path):
    files = {**SAMPLES, **changed("000010004", []), **changed("000010005")}
    del files["000010005.jpg"]
    source = RichContext(root=tree(tmp_path / "a", files))
    assert len(list(source)) == 3
    assert source.left_out.counts == {"pictures without boxes": 1, "labels without a picture": 1}
    del files["label_000010001.json"]
    source = RichContext(root=packed(tmp_path / "b" / "0.tar", files), tars="*.tar")
    assert len(source) == 4
    assert [scene.id for scene, _ in source] == ["000010002", "000010003"]
    expected = {"pictures without labels": 1, "pictures without boxes": 1, "labels without a picture": 1}
    assert source.left_out.counts == expected
    assert source.left_out.bad == 0
    # gone on with behind the second picture, where the account of the file is the same
    assert [scene.id for scene, _ in source.span_of(0, 2, 9)] == ["000010003"]
    assert source.left_out.counts == {"pictures without boxes": 1, "labels without a picture": 1}


def test_a_tar_that_ends_too_early_gives_what_is_before_its_end(tmp_path):
    root = packed(tmp_path / "t" / "00001.tar", {**WIDE, **TALL})
    path = tmp_path / "t" / "00001.tar"
    with tarfile.open(path) as tar:
        end = tar.getmember("label_000010002.json").offset_data + 10
    path.write_bytes(path.read_bytes()[:end])
    source = RichContext(root=root, tars="*.tar")
    assert [scene.id for scene, _ in source] == ["000010001"]
    assert source.left_out.bad == 1
    assert "fetch it again" in source.left_out.skipped[0]


def without(files, name):
    return {key: content for key, content in files.items() if key != name}


def cut_instead_of_padded():
    """A square of the middle of a picture that was not square."""
    grey = encoded(Image.new("RGB", (SIDE, SIDE), (90, 90, 90)))
    return {**WIDE, "000010001.jpg": grey}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (changed("000010001", annos="none"), ("000010001", "annos", "str")),
        ({**WIDE, "label_000010001.json": b"{"}, ("000010001", "label", "not JSON")),
        (changed("000010001", [annotation([1, 2, 3])]), ("boxes", "not four numbers")),
        (changed("000010001", [annotation([9, 9, -4, 5])]), ("boxes[0]", "inverted")),
        (changed("000010001", [annotation([0, 0, 200, 5])]), ("boxes[0]", "leaves the picture at the right")),
        (changed("000010001", [annotation([0, 24, 9, 9], 3)]), ("category_name", "int")),
        (changed("000010001", [annotation([0, 24, 9, 9], pred_score="1")]), ("pred_score", "str")),
        (changed("000010001", [annotation([0, 24, 9, 9], pred_score=None)]), ("pred_score", "missing")),
        (without(WIDE, "000010001.json"), ("000010001.json", "source.border=false")),
        ({**WIDE, "000010001.json": b"{}"}, ("original_height", "source.border=false")),
        ({**WIDE, "000010001.jpg": WIDE["000010001.jpg"][:200]}, ("picture", "cannot be decoded")),
        (cut_instead_of_padded(), ("no white border", "mean 90", "source.border=false")),
    ],
)
def test_a_sample_that_cannot_be_read_is_skipped_with_a_line(tmp_path, files, words):
    for source in (
        RichContext(root=tree(tmp_path / "tree", files)),
        RichContext(root=packed(tmp_path / "tars" / "0.tar", files), tars="*.tar"),
    ):
        assert list(source) == []
        assert source.left_out.bad == 1
        (line,) = source.left_out.skipped
        assert all(word in line for word in words), line


def test_without_a_border_no_sidecar_is_needed(tmp_path):
    files = without(cut_instead_of_padded(), "000010001.json")
    scene, content = only(RichContext(root=tree(tmp_path, files), border=False))
    assert scene.objects[0].box == pytest.approx((0.25, 30 / 96, 0.75, 54 / 96))
    assert scene.frame == Frame(original=(96, 96))
    assert isinstance(content, EncodedPicture)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"root": "nowhere"}, ("source.root", "nowhere")),
        ({"labels": "nowhere"}, ("source.labels", "nowhere")),
        ({"meta": "nowhere"}, ("source.meta", "nowhere")),
        ({"tars": "*.tgz"}, ("source.tars=*.tgz", "no such file")),
        ({"tars": "*.tar", "meta": "m.json"}, ("source.meta=m.json", "leave source.tars out")),
        ({"max_objects": 0}, ("source.max_objects=0",)),
        ({"labelled_at": 0}, ("source.labelled_at=0",)),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, words):
    root = tree(tmp_path, WIDE)
    with pytest.raises(ValueError, match="source") as caught:
        RichContext(**{"root": root, **settings})
    one_line(caught, *words)


def test_a_tree_without_labels_and_a_list_of_something_else_are_refused(tmp_path):
    root = tree(tmp_path / "a", without(WIDE, "label_000010001.json"))
    with pytest.raises(ValueError, match=r"no label_\*\.json") as caught:
        RichContext(root=root)
    one_line(caught, "source.tars=PATTERN")
    (tmp_path / "meta.json").write_text('[{"image": "a", "caption": "b"}]')
    with pytest.raises(ValueError, match="list of pairs") as caught:
        RichContext(root=root, meta=str(tmp_path / "meta.json"))
    one_line(caught, "source.meta")


def test_a_wrong_root_gives_nothing_and_says_why(tmp_path):
    tree(tmp_path / "pictures", SAMPLES, labels=tmp_path / "labels")
    (tmp_path / "empty").mkdir()
    source = RichContext(root=str(tmp_path / "empty"), labels=str(tmp_path / "labels"))
    with pytest.raises(ShardError, match="labels without a picture: 3") as caught:
        write_shards(source, tmp_path / "out")
    one_line(caught)


# RC-COCO


@pytest.fixture
def coco(tmp_path):
    """A wide picture of 200 x 100 px and a tall one of 60 x 120, labelled at 768."""
    (tmp_path / "coco" / "val2017").mkdir(parents=True)
    (tmp_path / "labels").mkdir()
    for name, size, box in (
        ("000000000001", (200, 100), [384, 96, 192, 96]),
        ("000000000002", (60, 120), [0, 0, 384, 768]),
    ):
        Image.new("RGB", size, (90, 90, 90)).save(tmp_path / "coco" / "val2017" / f"{name}.jpg")
        plain = {"bbox": box, "category_name": "dog", "caption": "A dog."}
        content = {"caption": "one", "file_name": f"{name}.jpg", "annos": [plain]}
        (tmp_path / "labels" / f"label_{name}.json").write_text(json.dumps(content))
    return {"root": str(tmp_path / "coco"), "labels": str(tmp_path / "labels")}


def test_rc_coco_boxes_are_parts_of_the_whole_picture(coco):
    (wide, content), (tall, _) = RcCoco(**coco)
    # 768 px are the 200: the box is 100..150 of 200 columns, 25..50 of 100 rows
    assert wide.objects[0].box == pytest.approx((0.5, 0.25, 0.75, 0.5))
    assert tall.objects[0].box == pytest.approx((0.0, 0.0, 1.0, 1.0))
    assert (wide.id, wide.caption, wide.frame) == ("000000000001", "one", Frame(original=(100, 200)))
    assert (wide.objects[0].phrase, wide.objects[0].description, wide.objects[0].score) == ("dog", "A dog.", None)
    assert isinstance(content, EncodedPicture)


def test_rc_coco_counts_labels_of_other_splits(coco, tmp_path):
    (tmp_path / "labels" / "label_9.json").write_text('{"caption": "", "annos": []}')
    (tmp_path / "labels" / "notes.json").write_text("[]")
    source = RcCoco(**coco)
    assert (len(source), len(list(source))) == (3, 2)
    assert source.left_out.counts == {"labels without a picture": 1}


def test_rc_coco_without_scores_keeps_the_first(coco, tmp_path):
    file = tmp_path / "labels" / "label_000000000001.json"
    content = json.loads(file.read_text())
    items = [{**content["annos"][0], "category_name": f"thing {i}"} for i in range(4)]
    file.write_text(json.dumps({**content, "annos": items}))
    (scene, _), _ = RcCoco(**coco, max_objects=2)
    assert [item.phrase for item in scene.objects] == ["thing 0", "thing 1"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"split": "train2017"}, ("source.images",)), ({"labels": "nowhere"}, ("source.labels",))],
)
def test_rc_coco_refuses_folders_that_are_not_there(coco, settings, words):
    with pytest.raises(ValueError, match="is not there") as caught:
        RcCoco(**{**coco, **settings})
    one_line(caught, *words)


def test_rc_coco_refuses_a_folder_without_labels(coco, tmp_path):
    with pytest.raises(ValueError, match=r"no label_\*\.json there") as caught:
        RcCoco(**{**coco, "labels": str(tmp_path / "coco")})
    one_line(caught)


# Pictures alone, before they are labelled


def test_pictures_come_with_their_caption_and_without_their_border(tmp_path):
    lone = {"000010004.png": encoded(Image.new("RGB", (64, 32)), "PNG")}
    root = tree(tmp_path / "cc3m", SAMPLES)
    source = Img2dataset(root=root)
    (wide, content), (tall, _), (equal, whole) = source
    assert (wide.id, wide.caption, wide.source, wide.objects) == ("000010001", "000010001 fetched", "img2dataset", ())
    assert wide.frame == Frame(original=(50, 100), target=(48, 96))
    assert content.size == (96, 48)
    assert tall.frame == Frame(original=(100, 75), target=(96, 72))
    assert isinstance(whole, EncodedPicture)  # a square picture is stored as it was fetched
    packed(tmp_path / "tars" / "00000.tar", {**WIDE, **TALL})
    packed(tmp_path / "tars" / "00001.tar", EQUAL)
    from_tars = [scene for scene, _ in Img2dataset(root=str(tmp_path / "tars"), tars="*.tar")]
    assert from_tars == [wide, tall, equal]
    source = Img2dataset(root=str(tmp_path / "tars"), tars="*.tar")
    assert (source.files(), [scene for scene, _ in source.span_of(0, 1, 2)]) == (2, [tall])
    assert source.is_at_end
    # without a record: the caption is the text's, the border is unknown
    plain = tree(tmp_path / "plain", {**lone, "000010004.txt": b" a dark strip "})
    ((scene, _),) = Img2dataset(root=plain, border=False)
    assert (scene.caption, scene.frame) == ("a dark strip", Frame(original=(32, 64)))
    strict = Img2dataset(root=plain)
    assert list(strict) == []
    assert "000010004.json: is not there to tell the border" in strict.left_out.skipped[0]


def test_pictures_alone_that_cannot_be_read_are_told(tmp_path):
    root = tree(tmp_path / "cc3m", {**WIDE, **TALL, "000010001.jpg": WIDE["000010001.jpg"][:200], "000010002.txt": b""})
    record = {"original_width": 75, "original_height": 100}
    (tmp_path / "cc3m" / "00001" / "000010002.json").write_text(json.dumps(record))
    source = Img2dataset(root=root)
    ((scene, _),) = source
    assert (scene.id, scene.caption) == ("000010002", "")
    assert source.left_out.counts["captions missing"] == 1
    assert "000010001: picture: cannot be decoded" in source.left_out.skipped[0]
    with pytest.raises(ValueError, match=r"source.root: no pictures in .*; name the folder above them"):
        Img2dataset(root=tree(tmp_path / "texts", {"000010002.txt": b"a"}))


@pytest.mark.parametrize(
    ("how", "texts", "told"),
    [  # of "published" as the released loader gave them
        ("published", "a a", "a_0 a"),
        ("published", "a a b a", "a_0 a_0 b a"),
        ("published", "a a a_0", "a_0 a a_0_1"),
        ("published", "a a a_0 a_0", "a_0 a a_0_1 a_0_1"),
        ("numbered", "a a b a", "a_0 a_1 b a_2"),
        ("kept", "a a b a", "a a b a"),
    ],
)
def test_equal_sentences_get_the_endings_that_are_asked_for(how, texts, told):
    assert told_apart(texts.split(), how) == told.split()
