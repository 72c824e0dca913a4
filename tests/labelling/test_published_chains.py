"""The published labellings by the commands of their headers, from the download to the published label files.

Every model is one of the published class and file form at tiny size with random weights: what is said means nothing, but all
of it is made, stored and exported as the published code's is. Nothing else than models and sizes is changed.
"""

import io
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.shards import ShardSet, check_shards
from datamodules.sources.gligen_coco import GligenCoco
from datamodules.sources.rich_context import RichContext
from preparation.prepare import prepare
from runtime.composition import CONF, compose
from scenes.masks import decode
from tests.documents import header

SAMPLES = Path(__file__).parents[1] / "samples"
SIDE = 320
SIZES = [(320, 320), (240, 320), (320, 200)]  # (height, width)


def run(*arguments):
    prepare(compose("prepare", [*map(str, arguments), "accelerator=cpu"]))


def labelled(preset, shards, out, models):
    """The shards that the command in the header of a preset makes."""
    [[_, script, *arguments]] = header(CONF / "experiment" / "label" / f"{preset}.yaml")["command"]
    assert script == "prepare.py"
    given = {"shards=DIR": f"shards={shards}", "out=DIR": f"out={out}"}
    assert set(given) <= set(arguments)
    theirs = {model.partition("=")[0] for model in models}
    run(*[given.get(word, word) for word in arguments if word.partition("=")[0] not in theirs], *models)
    assert check_shards(out).ok
    made = ShardSet(out)
    return made, [made[number].scene for number in range(len(made))]


def drawn():
    draw = np.random.default_rng(3)
    small = [Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8)) for _ in SIZES]
    return [np.asarray(image.resize(size[::-1])) for image, size in zip(small, SIZES, strict=True)]


def jpeg(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=95)
    return data.getvalue()


@pytest.fixture
def cc3m(tmp_path):
    """img2dataset's tree: images in their white border, with records."""
    folder = tmp_path / "cc3m" / "00000"
    folder.mkdir(parents=True)
    for number, (pixels, (height, width)) in enumerate(zip(drawn(), SIZES, strict=True)):
        top, left = (SIDE - height) // 2, (SIDE - width) // 2
        padded = np.full((SIDE, SIDE, 3), 255, np.uint8)
        padded[top : top + height, left : left + width] = pixels
        (folder / f"00000000{number}.jpg").write_bytes(jpeg(padded))
        record = {"key": f"00000000{number}", "caption": f"image {number}"}
        record |= {"original_height": height, "original_width": width}
        (folder / f"00000000{number}.json").write_text(json.dumps(record))
    return folder.parent


@pytest.fixture
def coco(tmp_path):
    """COCO's folders: images with two captions each and one box in all."""
    root = tmp_path / "coco"
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, captions = [], []
    for number, (pixels, (height, width)) in enumerate(zip(drawn(), SIZES, strict=True)):
        name = f"{number:012}.jpg"
        (root / "train2017" / name).write_bytes(jpeg(pixels))
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        captions += [{"image_id": number, "caption": f"image {number}, {word}"} for word in ("again", "anew")]
    thing = {"id": 1, "image_id": 0, "category_id": 18, "bbox": [5, 6, 40, 30], "iscrowd": 0}
    instances = {"images": images, "annotations": [thing], "categories": [{"id": 18, "name": "dog"}]}
    for kind, content in {"instances": instances, "captions": {"annotations": captions}}.items():
        (root / "annotations" / f"{kind}_train2017.json").write_text(json.dumps(content))
    return root


PRESETS = ("rich_context", "gligen_coco", "igligen")


def test_every_published_labelling_is_here():
    assert {path.stem for path in (CONF / "experiment" / "label").glob("*.yaml")} == set(PRESETS)


def tags_of(ram):
    return set(Path(ram).with_name("ram_tag_list.txt").read_text(encoding="utf-8").splitlines())


def test_rich_context_from_img2dataset_to_its_label_files(cc3m, tmp_path, ram, tiny_model):
    run("source=img2dataset", f"source.root={cc3m}", f"out={tmp_path / 'plain'}")
    folders = {"detector": "grounding_dino", "segmenter": "sam", "describer": "qwen_vl"}
    models = [f"tagger.model={ram}", *(f"{part}.model={tiny_model(name)}" for part, name in folders.items())]
    models += ["describer.dtype=float32", "describer.max_tokens=5"]
    made, scenes = labelled("rich_context", tmp_path / "plain", tmp_path / "labelled", models)
    assert made.provides >= {"image", "caption", "boxes", "phrases", "scores", "masks", "descriptions"}
    assert scenes
    words = {word for tag in tags_of(ram) for word in tag.split()}
    for scene in scenes:
        assert set(scene.provenance["labelling"]["versions"]) == {"scenograph", "transformers"}
        used = scene.provenance["labelling"]["tagger"]
        assert (used["part"], used["model"], used["interpolation"]) == ("RamTagger", ram, "bicubic")
        assert scene.objects
        for item in scene.objects:
            assert item.phrase == item.label
            assert set(item.phrase.split()) <= words
            assert item.description
            assert item.score > 0.25
            assert item.mask is None or decode(item.mask).shape == scene.frame.target
    assert any(item.description != item.label for scene in scenes for item in scene.objects)
    run("task=export", f"shards={tmp_path / 'labelled'}", f"out={tmp_path / 'published'}")
    labels = sorted((tmp_path / "published").rglob("label_*.json"))
    assert len(labels) == len(scenes)
    for file in labels:
        content = json.loads(file.read_text())
        assert set(content) == {"caption", "file_name", "is_det", "dataset_name", "data_id", "annos"}
        for note in content["annos"]:
            assert {"bbox", "mask", "pred_score", "category_name", "caption"} <= set(note)
            assert set(note["category_name"].split()) <= words
    read = {scene.id: scene for scene, _ in RichContext(root=str(tmp_path / "published"), border=False, masks=True)}
    for scene in scenes:
        assert [item.phrase for item in read[scene.id].objects] == [item.phrase for item in scene.objects]
        assert [item.description for item in read[scene.id].objects] == [item.description for item in scene.objects]


def test_gligen_coco_from_coco_to_its_list(coco, tmp_path, ram, tiny_model):
    run("source=coco", f"source.root={coco}", f"out={tmp_path / 'plain'}")
    models = [f"tagger.model={ram}", f"detector.model={tiny_model('grounding_dino')}"]
    models += [f"describer.model={tiny_model('blip2')}", "describer.dtype=float32"]
    made, scenes = labelled("gligen_coco", tmp_path / "plain", tmp_path / "labelled", models)
    assert made.provides >= {"image", "caption", "boxes", "phrases", "scores", "descriptions"}
    assert scenes
    for scene in scenes:
        assert scene.provenance["labelling"]["tagger"]["interpolation"] == "bilinear"
        assert scene.objects
        for item in scene.objects:
            assert item.label in tags_of(ram)
            assert item.phrase == item.description
    assert any(item.phrase != item.label for scene in scenes for item in scene.objects)
    features = ["export.form=gligen_coco", f"export.text_encoder={tiny_model('clip_text')}"]
    run("task=export", f"shards={tmp_path / 'labelled'}", f"out={tmp_path / 'published'}", *features)
    entries = torch.load(tmp_path / "published" / "coco_train2017.pth", weights_only=True)
    assert len(entries) == len(scenes)
    for entry in entries:
        assert {"file_path", "captions", "annos"} <= set(entry)
        assert entry["captions"] == [f"image {int(entry['file_path'][:12])}, {word}" for word in ("again", "anew")]
        for note in entry["annos"]:
            assert set(note) >= {"caption", "bbox", "text_embeddings_before_projection"}
            assert note["text_embeddings_before_projection"].shape == (8,)
    read = {scene.id: scene for scene, _ in GligenCoco(root=str(tmp_path / "published"))}
    for scene in scenes:
        assert [item.phrase for item in read[scene.id].objects] == [item.phrase for item in scene.objects]


def words_in(text):
    plain = unicodedata.normalize("NFD", text.lower()).encode("ascii", "ignore").decode()  # as BERT's tokenizer
    return set(re.findall(r"\w+", plain))


def test_igligen_from_sa1b_to_boxes_of_the_caption(tmp_path, tiny_model):
    run("source=sa1b", f"source.root={SAMPLES / 'sa1b'}", "source.tars='sa_000001.tar'", f"out={tmp_path / 'plain'}")
    models = [f"detector.model={tiny_model('grounding_dino')}"]
    made, scenes = labelled("igligen", tmp_path / "plain", tmp_path / "labelled", models)
    assert made.provides >= {"image", "caption", "boxes", "phrases", "scores"}
    assert any(scene.objects for scene in scenes)
    for number, scene in enumerate(scenes):
        height, width = scene.frame.target
        assert made[number].image.shape == (height, width, 3)
        assert height == width
        for item in scene.objects:
            assert item.phrase
            assert words_in(item.phrase) <= words_in(scene.caption)
            assert item.score > 0.2
