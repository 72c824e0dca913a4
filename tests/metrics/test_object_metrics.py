"""CropCLIP, CropPickScore and SAMIoU: the real model classes, tiny, at random weights, against the numbers worked out by hand."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
)

from labelling.parts import Segmenter
from labelling.segmenters import Sam
from metrics.base import NotAvailable
from metrics.crop_clip import CropClip
from metrics.crop_pick_score import CropPickScore
from metrics.object_values import object_values, pixel_boxes
from metrics.sam_iou import SamIou, filled
from models.backbones.tiny import WORDS
from models.text import word_tokenizer
from scenes.scene import Scene, SceneObject

LONGEST = 10  # tokens, start and end counted
TINY, SMALL, HALF = (0.5, 0.5, 0.504, 0.9), (0.1, 0.2, 0.2, 0.5), (0.0, 0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(model, processor): folders with a tiny CLIP's weights, and with its tokenizer and preprocessing."""
    model_folder, processor_folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("processor")
    tokenizer = word_tokenizer(WORDS, max_length=LONGEST)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LONGEST,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=14)).eval()
        for parameter in model.parameters():  # at its own start every text would be much like the other
            torch.nn.init.normal_(parameter, std=0.3)
        torch.nn.init.constant_(model.logit_scale, 3.0)
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(processor_folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor.save_pretrained(processor_folder)
    return str(model_folder), str(processor_folder)


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A folder with a tiny SAM."""
    folder = tmp_path_factory.mktemp("sam")
    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "window_size": 2,
            "global_attn_indexes": [0],
            "num_pos_feats": 8,
            "mlp_dim": 16,
            "initializer_range": 0.1,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "hidden_size": 16},
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SamModel(config).save_pretrained(folder)
    SamProcessor(SamImageProcessor(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def set_of_scenes(pictures):
    images = [*pictures(2, size=(60, 80)), *pictures(1, seed=1, size=(64, 48))]
    scenes = [
        Scene(
            id="s0",
            objects=(
                SceneObject(phrase="red circle", box=HALF, description="a large red circle on the blue sky"),
                SceneObject(phrase="a cat", box=SMALL),
                SceneObject(phrase="nowhere"),
                SceneObject(phrase="a line", box=TINY),
            ),
        ),
        Scene(id="s1"),
        Scene(id="s2", objects=(SceneObject(phrase="a green square left of a yellow circle", box=(0.25, 0.0, 1, 1)),)),
    ]
    return images, scenes


def logit(clip, picture, text):
    """CLIP's logit of a picture and a text by its own forward."""
    model = CLIPModel.from_pretrained(clip[0]).eval()
    tokens = CLIPTokenizer.from_pretrained(clip[1])([text], return_tensors="pt", truncation=True, max_length=LONGEST)
    pixels = CLIPImageProcessorPil.from_pretrained(clip[1])(images=picture, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens, **pixels).logits_per_image.item()


@pytest.mark.parametrize("kind", [CropClip, CropPickScore])
def test_each_object_is_scored_by_its_own_part_of_the_picture(kind, clip, set_of_scenes):
    images, scenes = set_of_scenes
    metric = kind(model=clip[0], processor=clip[1], batch_size=2).to("cpu")
    rows = metric.measure(images, scenes)
    expected = [
        logit(clip, Image.fromarray(images[0]).crop((0, 6, 40, 54)), "a large red circle on the blue sky"),
        logit(clip, Image.fromarray(images[0]).crop((8, 12, 16, 30)), "a cat"),
    ]
    assert rows[0]["values"][:2] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 0.1
    assert math.isnan(rows[0]["values"][2])  # no pixel wide
    assert rows[0]["areas"] == pytest.approx([0.4, 0.03, 0.0016])
    last = logit(clip, Image.fromarray(images[2]).crop((12, 0, 48, 64)), "a green square left of a yellow circle")
    assert rows[2]["values"] == pytest.approx([last], rel=1e-4, abs=1e-4)
    assert (rows[1]["values"].shape, rows[0]["cut"].tolist()) == ((0,), [0, 0, 0])
    values = metric.compute(rows)
    scene_means = [np.mean(expected), last]
    assert values[kind.name].mean == pytest.approx(np.mean(scene_means), rel=1e-4)
    assert values[kind.name].count == 2
    assert values[f"{kind.name}_objects"].mean == pytest.approx(np.mean([*expected, last]), rel=1e-4)
    assert values[f"{kind.name}_small"].count == 0
    assert values[f"{kind.name}_medium"].mean == pytest.approx(expected[1], rel=1e-4)
    assert values[f"{kind.name}_large"].mean == pytest.approx(np.mean([expected[0], last]), rel=1e-4)


def test_texts_that_are_too_long_are_cut_and_counted(clip, pictures):
    long = " ".join(["red"] * 30)
    short = " ".join(["red"] * (LONGEST - 2))
    scenes = [
        Scene(id=text[:9] + str(place), objects=(SceneObject(phrase=text, box=HALF),))
        for place, text in enumerate([long, short])
    ]
    metric = CropClip(model=clip[0], processor=clip[1]).to("cpu")
    rows = metric.measure(pictures(1) * 2, scenes)
    assert rows[0]["values"] == pytest.approx(rows[1]["values"])
    assert metric.compute(rows)["crop_clip_cut"].mean == 0.5


def test_batches_change_nothing_but_rounding(clip, sam, set_of_scenes):
    images, scenes = set_of_scenes
    for metric in (
        CropClip(model=clip[0], processor=clip[1], batch_size=2).to("cpu"),
        SamIou(segmenter=Sam(model=sam)).to("cpu"),
    ):
        whole = metric.measure(images, scenes)
        for place, row in enumerate(whole):
            alone = metric.measure(images[place : place + 1], scenes[place : place + 1])[0]
            assert alone["scene"] == row["scene"]
            assert alone["values"] == pytest.approx(row["values"], abs=1e-4, nan_ok=True)


def test_models_that_are_not_there_are_named(clip, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(NotAvailable, match=r"metric\.crop_clip\.model=.*nowhere"):
        CropClip(model=nowhere).to("cpu")
    with pytest.raises(NotAvailable, match=r"metric\.crop_pick_score\.processor=.*nowhere"):
        CropPickScore(model=clip[0], processor=nowhere).to("cpu")
    with pytest.raises(NotAvailable, match=r"metric\.sam_iou\.segmenter\.model=.*nowhere"):
        SamIou(segmenter=Sam(model=nowhere)).to("cpu")
    with pytest.raises(ValueError, match=r"metric\.crop_clip\.sides=\[96, 32\]"):
        CropClip(sides=[96, 32])
    metric = CropClip(model=clip[0], processor=clip[1])
    assert json.loads(json.dumps(metric.settings())) == metric.settings()


def test_sam_is_asked_for_each_box(sam, set_of_scenes):
    images, scenes = set_of_scenes
    segmenter = Sam(model=sam)
    metric = SamIou(segmenter=segmenter).to("cpu")
    row = metric.measure(images[:1], scenes[:1])[0]
    boxes = pixel_boxes(scenes[0], (60, 80))
    assert boxes.tolist() == [[0, 6, 40, 54], [8, 12, 16, 30], [40, 30, 40, 54]]
    masks, scores = segmenter.with_scores(images[:1], [boxes / [80, 60, 80, 60]])[0]
    assert row["scores"] == pytest.approx(scores, abs=1e-5)
    model, processor = SamModel.from_pretrained(sam).eval(), SamProcessor.from_pretrained(sam)
    inputs = processor(
        images=Image.fromarray(images[0]), input_boxes=[boxes[:1].astype(float).tolist()], return_tensors="pt"
    )
    with torch.no_grad():
        own = model(**inputs, multimask_output=False).iou_scores.item()
    assert scores[0] == pytest.approx(min(max(own, 0), 1), abs=1e-5)
    assert np.array_equal(masks, segmenter(images[:1], [boxes / [80, 60, 80, 60]])[0])


class Outlined(Segmenter):
    """The masks and scores that it is given."""

    def __init__(self, masks, scores):
        self.masks, self.scores = masks, scores

    def settings(self):
        return {"model": "given"}

    def to(self, device):
        return self

    def __call__(self, pictures, boxes):
        return [self.masks] * len(pictures)

    def with_scores(self, pictures, boxes):
        return [(self.masks, self.scores)] * len(pictures)


def test_sam_iou_by_hand(pictures):
    scene = Scene(id="s", objects=tuple(SceneObject(phrase="x", box=box) for box in [(0.1, 0.1, 0.6, 0.6)] * 4))
    masks = np.zeros((4, 40, 40), bool)
    masks[0, 4:24, 4:24] = True  # the whole box: its last row and column are 23
    masks[1, 4:25, 4:15] = True
    masks[3] = masks[0]
    segmenter = Outlined(masks, np.array([0.9, 0.9, 0.9, 0.5], np.float32))
    metric = SamIou(segmenter=segmenter)
    rows = metric.measure(pictures(1, size=(40, 40)), [scene])
    whole, half = 19 * 19 / 400, 20 * 10 / 400
    assert rows[0]["values"] == pytest.approx([whole, half, 0, 0])  # empty; not sure
    assert filled(np.array([[4, 4, 23, 23]]), masks[:1]) == pytest.approx([1])
    values = metric.compute(rows)
    assert values["sam_iou"].mean == pytest.approx((whole + half) / 4)
    assert values["sam_iou_large"].mean == pytest.approx((whole + half) / 4)
    assert values["sam_iou_small"].count == 0


def test_a_segmenter_that_gives_no_scores_is_sure():
    class Plain(Outlined):
        with_scores = Segmenter.with_scores

    masks = np.ones((2, 4, 4), bool)
    assert Plain(masks, None).with_scores([np.zeros((4, 4, 3), np.uint8)], [None])[0][1].tolist() == [1, 1]


def test_values_over_scenes_objects_and_sizes():
    edge = (32 / 512) ** 2
    rows = [
        {"scene": "a", "values": [1.0, 3.0, math.nan], "areas": [edge, 0.9 * edge, 0.5]},
        {"scene": "b", "values": [5.0], "areas": [0.5]},
        {"scene": "c", "values": [], "areas": []},
        {"scene": "d", "failure": "no picture"},
    ]
    values = object_values("x", rows, resamples=50)
    assert (values["x"].mean, values["x"].count, values["x"].failed) == (3.5, 2, 1)
    assert (values["x_objects"].mean, values["x_objects"].count) == (3, 2)
    assert [values[f"x_{size}"].mean for size in ("small", "medium", "large")] == [3, 1, 5]
    assert values["x_objects"].low <= 3 <= values["x_objects"].high
    again = object_values("x", [*rows, {**rows[0], "values": [3.0, 5.0, math.nan]}], resamples=50)
    assert (again["x"].mean, again["x"].count) == (4, 2)  # two pictures of a scene: 2 and 4, and 5
    assert again["x_objects"].mean == pytest.approx((1 + 3 + 5 + 3 + 5) / 5)
    assert all(math.isnan(value.mean) for value in object_values("x", []).values())
