"""The samples of the published forms: shards have the counts, boxes and captions of the files.

Expected values are worked out from the files with json and numpy here, not with the readers.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.shards import ShardSet
from preparation.prepare import TASKS
from runtime.composition import compose
from scenes import masks as mask_math
from scenes.forms import read_scene
from scenes.graph import isolated_objects, triples


@pytest.fixture
def prepared(tmp_path):
    def prepare(*arguments):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        TASKS["convert"](compose("prepare", [*arguments, f"out={out}"]))
        stored = ShardSet(out)
        return stored.index, {record.scene.id: record for record in (stored[n] for n in range(len(stored)))}

    return prepare


def test_coco(prepared, samples):
    root = samples / "coco"
    index, records = prepared("source=coco", f"source.root={root}")
    instances = json.loads((root / "annotations/instances_train2017.json").read_text())
    captions = json.loads((root / "annotations/captions_train2017.json").read_text())["annotations"]
    names = {category["id"]: category["name"] for category in instances["categories"]}
    assert len(records) == len(instances["images"]) > 24
    crowds = sum(item["iscrowd"] for item in instances["annotations"])
    assert index["counts"]["objects"] == len(instances["annotations"]) - crowds
    assert index["left_out"] == {"boxes of crowds": crowds}
    assert crowds > 0
    assert index["counts"]["captions"] == len(captions)
    assert "skipped" not in index
    for image in instances["images"]:
        record = records[Path(image["file_name"]).stem]
        items = [i for i in instances["annotations"] if i["image_id"] == image["id"] and not i["iscrowd"]]
        texts = [item["caption"] for item in captions if item["image_id"] == image["id"]]
        assert [item.phrase for item in record.scene.objects] == [names[item["category_id"]] for item in items]
        side = np.array([image["width"], image["height"]] * 2)
        for mine, item in zip(record.scene.objects, items, strict=True):
            x, y, w, h = item["bbox"]
            np.testing.assert_allclose(np.array(mine.box) * side, [x, y, x + w, y + h], atol=1e-2)
        assert record.scene.caption == texts[0]
        assert record.scene.provenance["captions"] == texts
        assert record.image.shape == (image["height"], image["width"], 3)


def test_coco_stuff_has_captions_and_boxes_of_both(prepared, samples):
    root = samples / "coco"
    index, records = prepared("source=coco", f"source.root={root}", "source.stuff=true")
    stuff = json.loads((root / "annotations/stuff_train2017.json").read_text())
    things = json.loads((root / "annotations/instances_train2017.json").read_text())
    regions = [item for item in stuff["annotations"] if item["category_id"] != 183]
    assert regions
    assert index["counts"]["objects"] == len(regions) + sum(not item["iscrowd"] for item in things["annotations"])
    captions = json.loads((root / "annotations/captions_train2017.json").read_text())["annotations"]
    assert index["counts"]["captions"] == len(captions)
    names = {category["id"]: category["name"] for category in stuff["categories"] + things["categories"]}
    for image in things["images"]:
        of_both = [i for i in things["annotations"] + regions if i["image_id"] == image["id"] and not i["iscrowd"]]
        scene = records[Path(image["file_name"]).stem].scene
        assert [item.phrase for item in scene.objects] == [names[item["category_id"]] for item in of_both]


@pytest.mark.parametrize(
    ("name", "stuff", "low", "high", "share"),
    [("lama", True, 3, 8, 0.02), ("creatilayout", False, 2, 10, 0.02), ("rich_context", True, 1, 30, 0.01)],
)
def test_coco_filters(prepared, samples, name, stuff, low, high, share):
    root = samples / "coco"
    _, records = prepared("source=coco", f"source.root={root}", f"source.filter={name}")
    instances = json.loads((root / "annotations/instances_train2017.json").read_text())
    more = json.loads((root / "annotations/stuff_train2017.json").read_text())["annotations"] if stuff else []
    more = [item for item in more if item["category_id"] != 183]
    expected = {}
    for image in instances["images"]:
        items = [i for i in instances["annotations"] + more if i["image_id"] == image["id"] and not i["iscrowd"]]
        large = [i for i in items if i["bbox"][2] * i["bbox"][3] >= share * image["width"] * image["height"]]
        persons = sum(item["category_id"] == 1 for item in items)
        if low <= len(large) <= high and (name != "creatilayout" or persons <= 3):
            expected[Path(image["file_name"]).stem] = len(large)
    assert {key: len(record.scene.objects) for key, record in records.items()} == expected
    assert 0 < len(expected) < len(instances["images"]) or name == "rich_context"


def test_gligen_coco(prepared, samples):
    pictures = samples / "coco" / "train2017"
    index, records = prepared(
        "source=gligen_coco", f"source.root={samples / 'gligen_coco'}", f"source.images={pictures}"
    )
    published = torch.load(samples / "gligen_coco" / "coco_train2017.pth", weights_only=True)
    assert len(records) == len(published)
    assert index["counts"]["objects"] == sum(len(item["annos"]) for item in published)
    for item in published:
        record = records[Path(item["file_path"]).stem]
        height, width = record.image.shape[:2]
        assert [o.phrase for o in record.scene.objects] == [one["caption"] for one in item["annos"]]
        boxes = np.array([o.box for o in record.scene.objects]) * [width, height, width, height]
        np.testing.assert_allclose(boxes, [one["bbox"] for one in item["annos"]], atol=1e-2)
        assert record.scene.provenance["captions"] == item["captions"]


def igligen_rows(folder):
    """Rows of every file, and the numbers of the latents beside them."""
    rows, numbers = {}, set()
    for file in sorted(folder.glob("*.npy")):
        rows |= {f"sa_{row[0]}": row for row in np.load(file, allow_pickle=True)}
        latents = folder.parent / "latents" / file.name
        if latents.is_file():
            numbers |= {f"sa_{n}" for n in np.load(latents, allow_pickle=True).item()["indices"]}
    return rows, numbers


def wanted(row):
    """Places of the boxes of confidence .25 that reach into the square, and those boxes, cut."""
    x, y, w, h = row[2].astype(np.float64).T
    boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).clip(0, 1)
    places = np.flatnonzero((row[3] >= 0.25) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    return places, boxes[places]


@pytest.mark.parametrize(("folder", "cells"), [("sdxl-512", 64), ("sdxl-1024", 128)])
def test_igligen(prepared, samples, folder, cells):
    root = samples / "igligen" / folder
    index, records = prepared("source=igligen", f"source.root={root}")
    rows, numbers = igligen_rows(root / "boxes")
    assert set(records) == rows.keys() & numbers
    assert index["left_out"]["pictures without boxes"] == len(numbers - rows.keys()) == 2
    assert index["latents"]["height"] == cells
    for key, record in records.items():
        _, caption, _, _, phrases, (height, width) = rows[key]
        places, expected = wanted(rows[key])
        assert record.scene.caption == caption
        assert [item.phrase for item in record.scene.objects] == [phrases[place] for place in places]
        np.testing.assert_allclose([item.box for item in record.scene.objects], expected, atol=1e-6)
        side = min(height, width)
        assert record.scene.frame.original == (height, width)
        assert record.scene.frame.crop == ((height - side) // 2, (width - side) // 2, side, side)
        assert record.scene.frame.target == (8 * cells, 8 * cells)
        assert record.latent.shape == (4, cells, cells)
    content = np.load(root / "latents" / "sa_000001.npy", allow_pickle=True).item()
    for number, latent in zip(content["indices"], content["latents"], strict=True):
        if f"sa_{number}" in records:
            np.testing.assert_array_equal(records[f"sa_{number}"].latent, latent)


def test_igligen_boxes_without_sizes(prepared, samples):
    boxes = samples / "igligen" / "boxes_without_size"
    index, records = prepared(
        "source=igligen", f"source.root={samples / 'igligen' / 'sdxl-512'}", f"source.boxes={boxes}"
    )
    assert {record.scene.frame for record in records.values()} == {None}
    assert index["left_out"]["sizes of pictures unknown"] == len(records) == len(igligen_rows(boxes)[0]) > 0


def sa1b_sizes(folder):
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    image = json.load(tar.extractfile(member))["image"]
                    yield f"sa_{image['image_id']}", (image["height"], image["width"])


def test_sa1b_with_its_table_of_captions(prepared, samples):
    pytest.importorskip("pyarrow", reason="parquet tables need pyarrow")
    from pyarrow import parquet

    table = parquet.read_table(samples / "sa1b" / "captions.parquet").to_pylist()
    captions = {row["key"]: row["caption"].replace("The image features ", "", 1) for row in table}
    sizes = dict(sa1b_sizes(samples / "sa1b"))
    index, records = prepared("source=sa1b", f"source.root={samples / 'sa1b'}")
    assert set(records) == captions.keys() & sizes.keys()
    assert index["left_out"] == {"pictures without a caption": len(sizes.keys() - captions.keys())}
    for key, record in records.items():
        assert record.scene.caption == captions[key].strip()
        assert record.scene.frame.original == sizes[key] == record.image.shape[:2]


def test_sa1b_with_igligen_s_boxes(prepared, samples, tmp_path_factory):
    boxes = samples / "igligen" / "boxes_without_size"
    rows, _ = igligen_rows(boxes)
    table = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    table.write_text("".join(json.dumps({"key": k, "caption": f"The image features {k}"}) + "\n" for k in rows))
    _, records = prepared(
        "source=sa1b", f"source.root={samples / 'sa1b'}", f"source.boxes={boxes}", f"source.captions={table}"
    )
    assert set(records) == set(rows)
    for key, size in sa1b_sizes(samples / "sa1b"):
        if key in rows:
            record, side = records[key], min(size)
            assert record.scene.caption == key
            assert record.image.shape == (side, side, 3)
            assert record.scene.frame.crop == ((size[0] - side) // 2, (size[1] - side) // 2, side, side)
            np.testing.assert_allclose([item.box for item in record.scene.objects], wanted(rows[key])[1], atol=1e-6)


def shown(record):
    """Boxes of a record in px of its picture."""
    height, width = record.image.shape[:2]
    return np.array([item.box for item in record.scene.objects]) * [width, height, width, height]


def test_rich_context(prepared, samples):
    root = samples / "cc3m"
    index, records = prepared("source=rich_context", f"source.root={root}", "source.masks=true")
    labels = {path.stem[6:]: json.loads(path.read_text()) for path in root.glob("labels/*/label_*.json")}
    assert set(records) == set(labels)
    assert index["counts"]["objects"] == sum(len(label["annos"]) for label in labels.values())
    assert "left_out" not in index
    for key, record in records.items():
        sidecar = json.loads((root / f"cc3m-images/00000/{key}.json").read_text())
        height, width = sidecar["original_height"], sidecar["original_width"]
        assert record.scene.frame.original == (height, width)
        assert record.image.shape[:2] == (
            round(768 * height / max(height, width)),
            round(768 * width / max(height, width)),
        )
        annotations = labels[key]["annos"]
        assert record.scene.caption == labels[key]["caption"]
        assert [item.description for item in record.scene.objects] == [one["caption"] for one in annotations]
        assert [item.label for item in record.scene.objects] == [one["category_name"] for one in annotations]
        assert [item.score for item in record.scene.objects] == [one["pred_score"] for one in annotations]
        boxes = np.array([one["bbox"] for one in annotations], float)
        boxes[:, 2:] += boxes[:, :2]
        boxes -= [(768 - record.image.shape[1]) // 2, (768 - record.image.shape[0]) // 2] * 2
        np.testing.assert_allclose(shown(record), boxes.clip(0, [*record.image.shape[1::-1]] * 2), atol=1e-6)
        for item, one in zip(record.scene.objects, annotations, strict=True):
            inside = mask_math.decode(item.mask)
            assert inside.shape == record.image.shape[:2]
            assert 0 <= mask_math.decode(one["mask"]).sum() - inside.sum() <= 0.02 * inside.sum() + 768
        with Image.open(root / f"cc3m-images/00000/{key}.jpg") as padded:
            top, left = (768 - record.image.shape[0]) // 2, (768 - record.image.shape[1]) // 2
            inside = np.asarray(padded.convert("RGB"))[
                top : top + record.image.shape[0], left : left + record.image.shape[1]
            ]
        assert np.abs(record.image.astype(int) - inside).mean() < 3  # stored as a JPEG once more


def test_rc_coco_is_the_rich_labels_of_the_same_pictures(prepared, samples):
    _, records = prepared(
        "source=rc_coco",
        f"source.root={samples / 'coco'}",
        f"source.labels={samples / 'rc_coco'}",
        "source.split=train2017",
    )
    labels = {path.stem[6:]: json.loads(path.read_text()) for path in samples.glob("rc_coco/label_*.json")}
    assert set(records) == set(labels)
    for key, record in records.items():
        boxes = np.array([one["bbox"] for one in labels[key]["annos"]], float)
        boxes[:, 2:] += boxes[:, :2]
        limits = [*record.image.shape[1::-1]] * 2
        np.testing.assert_allclose(shown(record), (boxes * max(record.image.shape) / 768).clip(0, limits), atol=1e-6)
        assert [item.description for item in record.scene.objects] == [one["caption"] for one in labels[key]["annos"]]


def test_the_demo_s_layout_is_read_as_it_is(samples):
    published = json.loads((samples / "cc3m" / "demo_layout.json").read_text())
    scene = read_scene(samples / "cc3m" / "demo_layout.json")
    assert [item.phrase for item in scene.objects] == published["labels"]
    assert [[512 * side for side in item.box] for item in scene.objects] == published["bboxes"]


def test_laion_sg(prepared, samples):
    root = samples / "laion_sg"
    entries = {entry["img_id"]: entry for entry in json.loads((root / "train.json").read_text())}
    index, records = prepared("source=laion_sg", f"source.root={root}")
    related = {name for name, entry in entries.items() if entry["relations"]}
    there = {name for name in related if (root / "data" / entries[name]["name"]).is_file()}
    assert set(records) == there
    assert index["left_out"]["pictures missing"] == len(related) - len(there) == 1
    assert index["left_out"].get("entries without relations", 0) == len(entries) - len(related)
    for name, record in records.items():
        items = {item["item_id"]: item for item in entries[name]["items"]}
        phrases = {number: " ".join([*item["attributes"], item["label"]]) for number, item in items.items()}
        said = [(phrases[one["item1"]], one["relation"], phrases[one["item2"]]) for one in entries[name]["relations"]]
        scene = record.scene
        assert [item.phrase for item in scene.objects] == list(phrases.values())
        assert [item.attributes for item in scene.objects] == [tuple(item["attributes"]) for item in items.values()]
        assert set(triples(scene)) == set(said)
        assert scene.caption == entries[name]["caption_ori"]
        assert scene.frame.original == record.image.shape[:2]
    bench, few = prepared("source=laion_sg", f"source.root={root}", "source.filter=compsg_bench")
    assert set(few) == {name for name in there if len(entries[name]["relations"]) > 4}
    assert 0 < bench["counts"]["samples"] == len(few) < len(there)


def test_laion_sg_with_a_tokenizer(prepared, samples):
    from transformers import CLIPTokenizer

    folder = Path(__file__).parents[1] / "golden" / "scene_graph" / "tokenizer"
    index, records = prepared("source=laion_sg", f"source.root={samples / 'laion_sg'}", f"source.tokenizer={folder}")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    lengths = []
    for record in records.values():
        parts = [word for triple in triples(record.scene) for word in triple]
        parts += [record.scene.objects[place].phrase for place in isolated_objects(record.scene)]
        lengths.append(sum(len(tokenizer(part)["input_ids"]) - 2 for part in parts))
    cut = [length - 75 for length in lengths if length > 75]
    assert index["notes"][-1] == f"tokens cut: {sum(cut)}; {len(cut)} of {len(lengths)} graphs have more than 75 tokens"
