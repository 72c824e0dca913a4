"""Adapter files of any method: written whole, read strictly, refused by name."""

import json
import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.conditioning import adapter_file
from models.conditioning.adapter_file import load_weights, save_adapter
from models.conditioning.boxes import BoxesAdapter
from models.conditioning.regions import RegionsAdapter


@pytest.fixture
def backbone(backbone_named):
    return backbone_named("tiny_sd15")


def regions(backbone, **settings):
    return RegionsAdapter(backbone, **{"width": 24, "hidden": 32, "frequencies": 4, **settings})


@pytest.fixture
def file(backbone, tmp_path):
    save_adapter(regions(backbone), tmp_path / "made" / "regions.safetensors", backbone=backbone)
    return tmp_path / "made" / "regions.safetensors"


def refusal(message, backbone, file, **settings):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        regions(backbone, weights=str(file), **settings)
    assert "\n" not in str(caught.value)


def test_a_file_says_what_it_is(backbone, file):
    with safe_open(file, framework="pt") as opened:
        about, keys = opened.metadata(), set(opened.keys())
    assert about["method"] == "regions"
    assert json.loads(about["settings"]) == {
        "variant": "ca",
        "rasterise": "exact",
        "attention_weight_scale": 1.0,
        "overflow": "joined",
        "text": "description",
        "width": 24,
        "hidden": 32,
        "frequencies": 4,
        "place_width": 0,
        "blocks": "all",
    }
    assert json.loads(about["backbone"]) == {"text_width": 24, "latent_channels": 4}
    assert keys == set(regions(backbone).published())
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_an_adapter_starts_from_its_file(backbone, file):
    first, second = regions(backbone, weights=str(file)), regions(backbone, weights=str(file))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = regions(backbone)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_another_methods_file_is_refused_both_ways(backbone, file, tmp_path):
    with pytest.raises(
        ValueError, match=re.escape("holds weights of the method regions; give weights of boxes, or take")
    ):
        BoxesAdapter(backbone, weights=str(file), init="published")
    save_adapter(BoxesAdapter(backbone), tmp_path / "boxes.safetensors", backbone=backbone)
    refusal("holds weights of the method boxes; give weights of regions", backbone, tmp_path / "boxes.safetensors")


def test_another_backbones_file_is_refused(backbone_named, file):
    refusal("its text_width is 24, this one's 64", backbone_named("tiny_sdxl"), file)


def test_other_settings_are_named_where_the_shapes_differ(backbone, file):
    message = "conditioning.regions.width: 32 here, but the weights were made with 24, and does not fit"
    refusal(message, backbone, file, width=32)


def test_what_is_no_adapter_file_is_refused(backbone, file, tmp_path):
    for name in ("nowhere.safetensors", "runs/nowhere.safetensors"):  # the second is no name on the hub
        refusal(f"conditioning.regions.weights: {name} is no file or folder here", backbone, name)
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    refusal(
        "other.safetensors holds no regional weights; give what init_regional_unet.py or its training has written",
        backbone,
        tmp_path / "other.safetensors",
    )
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refusal("regions.safetensors cannot be read", backbone, file)


def test_a_file_that_lacks_a_key_is_refused(backbone, file):
    with safe_open(file, framework="pt") as opened:
        about, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    key = min(tensors)
    del tensors[key]
    save_file(tensors, file, metadata=about)
    refusal(f"misses 1 keys: {key}", backbone, file)


def test_a_write_that_fails_leaves_the_old_file(backbone, file, monkeypatch):
    before = file.read_bytes()

    def full(tensors, path, metadata):
        with open(path, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_file, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(regions(backbone), file, backbone=backbone)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_half_precision_weights_fill_an_adapter_in_full(backbone, file):
    with safe_open(file, framework="pt") as opened:
        about, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    save_file({key: tensor.half() for key, tensor in tensors.items()}, file, metadata=about)
    adapter = regions(backbone)
    load_weights(adapter, file, backbone=backbone)
    for key, tensor in adapter.published().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[key].half().float())


@pytest.mark.parametrize("content", [b"{{", b"\xff\x00", b"[1]", b"[" * 5000 + b"]" * 5000])
@pytest.mark.parametrize(("adapter", "more"), [(BoxesAdapter, {"init": "published"}), (RegionsAdapter, {})])
def test_a_folder_of_weights_with_a_broken_config_is_refused_by_name(adapter, more, content, backbone, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    what = f"conditioning.{adapter.method}.weights: {tmp_path}: config.json"
    with pytest.raises(ValueError, match=f"^{re.escape(what)}") as caught:
        adapter(backbone, weights=str(tmp_path), **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["settings", "backbone"])
def test_broken_words_of_a_file_about_itself_are_refused_by_name(name, backbone, file):
    with safe_open(file, framework="pt") as opened:
        tensors, about = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    save_file(tensors, str(file), metadata={**about, name: "["})
    refusal(f"conditioning.regions.weights: {file}: its {name}", backbone, file)
