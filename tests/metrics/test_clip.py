"""CLIP with captions and CLIP with true pictures: the real model classes, tiny, at random weights, opened from a folder."""

import functools

import numpy as np
import pytest
import torch
from torchmetrics.functional.multimodal import clip_score as published
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from metrics.base import NotAvailable
from metrics.clip_image import ClipImage
from metrics.clip_score import ClipScore
from models.backbones.tiny import WORDS
from models.text import word_tokenizer
from scenes.scene import Scene

LONGEST = 12  # tokens, start and end counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP in transformers' layout."""
    made = tmp_path_factory.mktemp("clip")
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
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(made)
    return str(made)


@pytest.fixture(scope="module")
def scenes():
    captions = ["a red circle", "a cat on a table", "the sky", "", "a blue square left of a dog"]
    return [Scene(id=f"s{place}", caption=caption) for place, caption in enumerate(captions)]


@pytest.fixture(scope="module")
def clip_score(folder):
    """clip_score(**settings): the metric over the tiny model, loaded once a setting."""
    return functools.cache(lambda **settings: ClipScore(model=folder, batch_size=2, **settings).to("cpu"))


class Wrapped(torch.nn.Module):
    """The model as torchmetrics expects it: features, not an output that holds them."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def get_text_features(self, ids, mask):
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


def test_scores_are_torchmetrics_own(clip_score, pictures, scenes):
    metric = clip_score()
    clip = metric.clip

    def processor(text=None, images=None, **_):
        if images is not None:
            return clip.processor(images=[image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")
        return clip.tokenizer(text, padding=True, return_tensors="pt")

    rows = metric.measure(pictures(3), scenes[:3])
    for picture, scene, row in zip(pictures(3), scenes, rows, strict=False):
        shown = torch.from_numpy(picture.copy()).permute(2, 0, 1)
        wanted = float(published(shown, scene.caption, lambda: (Wrapped(clip.model), processor)).detach())
        assert row["clip_score"] == pytest.approx(wanted, abs=1e-3)
    assert len({round(row["clip_score"], 2) for row in rows}) > 1


def test_a_negative_cosine_scores_nothing(clip_score, pictures, scenes, monkeypatch):
    clip = clip_score().clip
    monkeypatch.setattr(clip, "texts", lambda tokens: -clip.pictures(pictures(1)))
    assert clip_score().measure(pictures(1), scenes[:1])[0]["clip_score"] == 0


def test_rows_do_not_depend_on_their_company_and_captions_that_lack_do_not_count(clip_score, pictures, scenes):
    metric = clip_score()
    mixed = [*pictures(3), *pictures(2, seed=1, size=(30, 61))]
    rows = metric.measure(mixed, scenes)
    for row, picture, scene in zip(rows, mixed, scenes, strict=True):
        assert metric.score(picture, scene) == pytest.approx(
            {column: row[column] for column in metric.columns}, abs=1e-4, nan_ok=True
        )
    assert rows[3] == {"scene": "s3", "clip_score": None, "clip_score_long_captions": None}
    values = metric.compute(rows)
    assert values["clip_score"].count == 4
    assert values["clip_score"].mean == pytest.approx(np.mean([rows[i]["clip_score"] for i in (0, 1, 2, 4)]))


def test_captions_that_are_too_long_are_counted_and_treated_as_asked(clip_score, pictures):
    words = ("red circle blue square cat dog " * 3).split()
    fits, longer = Scene(id="a", caption=" ".join(words[:10])), Scene(id="b", caption=" ".join(words[:14]))
    rest = Scene(id="c", caption=" ".join(words[10:14]))
    picture = pictures(1)[0]
    cut, whole, tail = clip_score().measure([picture] * 3, [longer, fits, rest])
    assert (cut["clip_score_long_captions"], whole["clip_score_long_captions"]) == (1, 0)
    assert cut["clip_score"] == pytest.approx(whole["clip_score"], abs=1e-4)
    windows = clip_score(long_captions="windows")
    clip = windows.clip
    parts = clip.texts([clip.tokens(fits.caption), clip.tokens(rest.caption)]).sum(axis=0)
    cosine = float(clip.pictures([picture])[0] @ parts / np.linalg.norm(parts))
    assert windows.score(picture, longer)["clip_score"] == pytest.approx(max(100 * cosine, 0), abs=1e-4)
    assert windows.score(picture, fits)["clip_score"] == pytest.approx(whole["clip_score"], abs=1e-4)
    left = clip_score(long_captions="left_out").measure([picture] * 3, [longer, fits, rest])
    assert [row["clip_score"] for row in left] == [
        None,
        pytest.approx(whole["clip_score"]),
        pytest.approx(tail["clip_score"]),
    ]
    values = clip_score(long_captions="left_out").compute(left)
    assert values["clip_score"].count == 2
    assert values["clip_score_long_captions"].mean == pytest.approx(1 / 3)


def test_similarity_of_pictures_is_one_with_themselves_and_the_cosine_with_others(folder, pictures, scenes, tmp_path):
    metric = ClipImage(model=folder, batch_size=2, cache=tmp_path).to("cpu")
    rows, true = metric.measure(pictures(5), scenes), metric.measure(pictures(5, seed=1), scenes)
    assert metric.compute(rows, true=rows)["clip_image"].mean == pytest.approx(1, abs=1e-6)
    value = metric.compute(rows, true=true)["clip_image"]
    cosines = [row["embedding"] @ other["embedding"] for row, other in zip(rows, true, strict=True)]
    assert value.mean == pytest.approx(np.mean(cosines))
    assert value.low < value.mean < value.high < 1
    assert value.count == 5
    again = ClipImage(model=folder, cache=tmp_path)  # every embedding is kept: no model is opened
    assert np.array_equal(again.measure(pictures(5), scenes)[4]["embedding"], rows[4]["embedding"])
    assert again.clip.model is None


def test_similarity_needs_the_true_pictures_of_the_same_scenes_and_counts_failures(folder, pictures, scenes):
    metric = ClipImage(model=folder)
    rows = metric.measure(pictures(3), scenes[:3])
    with pytest.raises(ValueError, match="0 rows of true pictures for 3 rows"):
        metric.compute(rows)
    with pytest.raises(ValueError, match="or of other scenes"):
        metric.compute(rows, true=rows[::-1])
    value = metric.compute([{"scene": "s0", "failure": "no picture"}, *rows[1:]], true=rows)["clip_image"]
    assert (value.count, value.failed) == (2, 1)


@pytest.mark.parametrize(("metric", "setting"), [(ClipScore, "clip_score"), (ClipImage, "clip_image")])
def test_a_model_that_is_not_there_is_named_with_its_setting(metric, setting, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotAvailable) as error:
        metric(model="nobody/no-such-clip").to("cpu")
    assert f"metric.{setting}.model=nobody/no-such-clip: neither a local folder" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(NotAvailable, match=rf"metric\.{setting}\.model={tmp_path}: folder without such files"):
        metric(model=str(tmp_path)).to("cpu")


def test_settings_tell_models_apart_by_their_files_and_unknown_ways_are_refused(folder):
    settings = ClipScore(model=folder).settings()
    assert len(settings["sha256"]) == 64
    assert settings["long_captions"] == "cut"
    assert ClipImage().settings()["model"] == "openai/clip-vit-base-patch32"
    with pytest.raises(ValueError, match="long_captions: truncate is unknown; choose one of cut, windows, left_out"):
        ClipScore(model=folder, long_captions="truncate")
    with pytest.raises(ValueError, match="batch_size: 0"):
        ClipImage(model=folder, batch_size=0)
