"""Labels written as published files are read back by the sources of those files as the same scenes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from datamodules.safe_pickle import load_pth
from datamodules.shards import ShardError, write_shards
from datamodules.sources.gligen_coco import GligenCoco
from datamodules.sources.img2dataset import content_window
from datamodules.sources.rich_context import RichContext
from models.text import word_tokenizer
from preparation.export_labels import export_labels
from preparation.prepare import prepare
from runtime.composition import compose
from scenes import Frame, Scene, SceneObject
from scenes.masks import encode
from tests.preparation.conftest import Listed

SIZE = (48, 80)  # px, of other sides than any power of two


def mask(left, top, right, bottom):
    pixels = np.zeros(SIZE, bool)
    pixels[top:bottom, left:right] = True
    return encode(pixels)


def labelled(tag, sentence, corners, score):
    left, top, right, bottom = corners
    box = (left / SIZE[1], top / SIZE[0], right / SIZE[1], bottom / SIZE[0])
    return SceneObject(phrase=tag, label=tag, description=sentence, box=box, score=score, mask=mask(*corners))


SCENES = [
    Scene(
        id="one",
        caption="a dog and a cat",
        objects=(labelled("dog", "A brown dog.", (3, 5, 41, 47), 0.875), labelled("cat", "cat", (50, 0, 80, 48), 0.3)),
        frame=Frame(original=SIZE),
        source="tests",
        provenance={"labelling": {"detector": {"part": "X"}}},
    ),
    Scene(id="none", caption="nothing", frame=Frame(original=SIZE)),
    Scene(
        id="two",
        caption="Größe",
        objects=(labelled("häuser", "Zwei Häuser.", (0, 0, 1, 1), 1.0),),
        frame=Frame(original=SIZE),
        provenance={"captions": ["Größe", "size"], "dataset": "cc3m"},
    ),
]


PROVIDES = "image caption boxes phrases scores masks descriptions"


def shards_of(scenes, folder):
    def picture(number, scene):
        return Image.new("RGB", scene.frame.target[::-1], (90, 20 * number, 200))

    return write_shards(Listed(scenes, picture, provides=PROVIDES), folder / "shards", shard_size=2)


def same_objects(read, written):
    assert len(read.objects) == len(written.objects)
    for one, other in zip(read.objects, written.objects, strict=True):
        assert replace(one, box=None) == replace(other, box=None)
        assert one.box == pytest.approx(other.box, abs=1e-12)


def test_rich_context_is_read_back_as_it_was(tmp_path):
    counts = export_labels(shards_of(SCENES, tmp_path), tmp_path / "out")
    assert counts == {"pictures": 2, "objects": 3, "pictures without boxes": 1}
    for settings in ({}, {"meta": str(tmp_path / "out" / "meta.json")}):
        read = {
            scene.id: (scene, content)
            for scene, content in RichContext(root=str(tmp_path / "out"), border=False, masks=True, **settings)
        }
        assert set(read) == {"one", "two"}
        for written in (SCENES[0], SCENES[2]):
            scene, content = read[written.id]
            same_objects(scene, written)
            assert (scene.caption, scene.frame) == (written.caption, written.frame)
            assert (content.height, content.width) == SIZE


def test_rich_labels_have_the_published_keys(tmp_path):
    out = tmp_path / "out"
    export_labels(shards_of(SCENES, tmp_path), out)
    label = json.loads((out / "000000" / "label_one.json").read_text())
    assert set(label) == {"caption", "file_name", "is_det", "dataset_name", "data_id", "annos"}
    first = label["annos"][0]
    assert set(first) == set(
        "id isfake isreflected bbox mask_value mask pred_score category_id data_id category_name text_embedding_before caption "
        "blip_clip_embeddings is_stuff is_thing area".split()
    )
    assert (first["bbox"], first["area"], first["mask_value"]) == ([3, 5, 38, 42], 38 * 42, 1)
    assert all(type(value) is int for value in first["bbox"])
    assert label["file_name"] == "000000/one.jpg"
    assert json.loads((out / "000001" / "label_two.json").read_text())["dataset_name"] == "cc3m"
    assert not list(out.rglob("label_none.json"))


@pytest.mark.parametrize("whole", [True, False])
def test_boxes_between_pixels_are_rounded_or_kept(tmp_path, whole):
    item = SceneObject(phrase="dog", label="dog", description="dog", box=(0.101, 0.2, 0.1012, 0.91), score=0.5)
    scene = Scene(id="x", objects=(item,), frame=Frame(original=SIZE))
    export_labels(shards_of([scene], tmp_path), tmp_path / "out", whole_pixels=whole)
    ((read, _),) = RichContext(root=str(tmp_path / "out"), border=False)
    if whole:
        assert read.objects[0].box == pytest.approx((8 / 80, 10 / 48, 9 / 80, 44 / 48))
    else:
        same_objects(read, scene)


def test_labels_alone_are_for_the_published_pictures(tmp_path):
    """Pictures of img2dataset with their border, scenes of what is in it, labels again for the pictures with the border."""
    top, left, height, width = window = content_window((96, 96), SIZE)
    assert top > 0
    objects = tuple(
        replace(item, mask=encode(np.ones((height, width), bool)), box=tuple(round(v * 32) / 32 for v in item.box))
        for item in SCENES[0].objects
    )
    frame = Frame(original=SIZE, target=(height, width))
    provenance = {"padded": {"size": [96, 96], "window": list(window)}}
    scene = replace(SCENES[0], id="000010001", objects=objects, frame=frame, provenance=provenance)
    counts = export_labels(shards_of([scene], tmp_path), tmp_path / "out", pictures=False, whole_pixels=False)
    assert counts == {"pictures": 1, "objects": 2}
    assert not list((tmp_path / "out").rglob("*.jpg"))

    published = tmp_path / "published" / "00001"
    published.mkdir(parents=True)
    pixels = np.full((96, 96, 3), 255, np.uint8)
    pixels[top : top + height, left : left + width] = 90
    Image.fromarray(pixels).save(published / "000010001.jpg")
    sidecar = {"original_width": SIZE[1], "original_height": SIZE[0]}
    (published / "000010001.json").write_text(json.dumps(sidecar))
    ((read, _),) = RichContext(root=str(tmp_path / "published"), labels=str(tmp_path / "out"), masks=True)
    same_objects(read, scene)
    assert (read.frame, read.provenance["padded"]) == (frame, provenance["padded"])


def test_gligen_cocos_list_is_read_back_as_it_was(tmp_path):
    counts = export_labels(shards_of(SCENES, tmp_path), tmp_path / "out", form="gligen_coco")
    assert counts == {"pictures": 2, "objects": 3, "pictures without boxes": 1}
    read = {scene.id: (scene, content) for scene, content in GligenCoco(root=str(tmp_path / "out"))}
    assert set(read) == {"one", "two"}
    for written in (SCENES[0], SCENES[2]):
        scene, content = read[written.id]
        held = [SceneObject(phrase=item.phrase, box=item.box) for item in written.objects]
        same_objects(scene, replace(written, objects=tuple(held)))
        assert (scene.caption, scene.frame) == (written.caption, written.frame)
        assert (content.height, content.width) == SIZE
    assert read["two"][0].provenance["captions"] == ["Größe", "size"]


def test_the_list_holds_features_for_the_published_loader(tmp_path):
    def embed(phrases):
        return np.array([[len(phrase), 1.5] for phrase in phrases], np.float32)

    export_labels(shards_of(SCENES, tmp_path), tmp_path / "out", form="gligen_coco", pictures=False, embed=embed)
    path = tmp_path / "out" / "coco_train2017.pth"
    entries = torch.load(path, weights_only=True)
    feature = entries[1]["annos"][0]["text_embeddings_before_projection"]
    assert feature.dtype == torch.float32
    assert feature.tolist() == [6.0, 1.5]
    assert [entry["file_path"] for entry in load_pth(path)] == ["one.jpg", "two.jpg"]


def test_the_command_writes_either_form(tmp_path, capsys):
    shards = shards_of(SCENES, tmp_path)
    tokenizer = word_tokenizer(["dog", "cat", "häuser"], max_length=16)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **sizes, **ids)
    encoder = CLIPTextModel(config).eval()
    encoder.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    given = ["task=export", f"shards={shards}"]
    prepare(compose("prepare", [*given, f"out={tmp_path / 'rich'}", "export.pictures=false"]))
    assert capsys.readouterr().out == f"{tmp_path / 'rich'}: 2 pictures, 3 objects, 1 pictures without boxes\n"
    more = ["export.form=gligen_coco", f"export.text_encoder={tmp_path / 'clip'}", "accelerator=cpu"]
    prepare(compose("prepare", [*given, f"out={tmp_path / 'list'}", *more]))
    entries = torch.load(tmp_path / "list" / "coco_train2017.pth", weights_only=True)
    features = {note["caption"]: note["text_embeddings_before_projection"] for e in entries for note in e["annos"]}
    for phrase in ("dog", "häuser"):
        tokens = tokenizer(phrase, return_tensors="pt", padding="max_length", max_length=16)
        with torch.no_grad():
            pooled = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output[0]
        torch.testing.assert_close(features[phrase], pooled, rtol=1e-5, atol=1e-6)
    for wrong in ("export.form=coco", "export.text_encoder=X"):
        with pytest.raises(ValueError, match=f"{wrong}: "):
            compose("prepare", [*given, "out=DIR", wrong])


def test_what_cannot_be_told_is_refused_and_leaves_nothing(tmp_path):
    plain = SceneObject(phrase="dog", box=(0, 0, 1, 1))
    scored = replace(plain, score=0.5)
    frame = Frame(original=SIZE)
    wrong = {
        "x: .*score": [Scene(id="x", objects=(plain,), frame=frame)],
        "a/b": [Scene(id="a/b", objects=(scored,), frame=frame)],
        "x: .*twice": [Scene(id="x", objects=(scored,), frame=frame)] * 2,
    }
    for number, (words, scenes) in enumerate(wrong.items()):
        folder = tmp_path / str(number)
        with pytest.raises(ShardError, match=words) as caught:
            export_labels(shards_of(scenes, folder), folder / "out")
        assert "\n" not in str(caught.value)
        assert [path.name for path in folder.iterdir()] == ["shards"]
    shards = shards_of(SCENES, tmp_path)
    with pytest.raises(ValueError, match="export.form=coco"):
        export_labels(shards, tmp_path / "out", form="coco")
    with pytest.raises(ShardError, match=str(shards)):
        export_labels(shards, shards)
