"""RAM against tensors recorded from its published code at tiny size, and the names and shapes of its real weights."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labelling.parts import PartMissing
from labelling.ram import RamTagger
from labelling.ram_weights import ram_of

GOLDEN = Path(__file__).parents[1] / "golden" / "ram"
CAPTIONS = ["", "", ""]
WEIGHTS, TAGS, THRESHOLDS = "ram_swin_large_14m.pth", "ram_tag_list.txt", "ram_tag_list_threshold.txt"


@pytest.fixture(scope="module")
def weights():
    return load_file(GOLDEN / "weights.safetensors")


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "outputs.safetensors")


@pytest.fixture(scope="module")
def raw(recorded):
    """Three images (H, W, 3) uint8 of three sizes."""
    return [recorded[f"raw_rgb.{number}"].numpy() for number in range(3)]


@pytest.fixture(scope="module")
def tag_list():
    return json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))["tag_list"]


def tags_of(row, tag_list):
    return [tag for tag, on in zip(tag_list, row.tolist(), strict=True) if on]


@torch.inference_mode()
def test_every_layer_gives_what_the_published_code_gives(weights, recorded):
    network = ram_of(weights).eval()
    seen = {}
    layers = {f"swin_stage{number}": stage for number, stage in enumerate(network.encoder.encoder.layers)}
    layers |= {f"head_layer{number}": layer for number, layer in enumerate(network.decoder)}
    layers |= {"image_embeds": network.image_proj, "label_queries": network.wordvec_proj}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: output[0] if isinstance(output, tuple) else output})
        )
    seen["logits"] = network(recorded["image"])
    seen["visual_tokens"] = network.image_tokens(recorded["image"])
    seen["label_queries"] = seen["label_queries"].relu()
    assert set(seen) == set(recorded) - {"image", "tags", "tags_before_delete"} - {f"raw_rgb.{n}" for n in range(3)}
    for name, value in seen.items():
        torch.testing.assert_close(value, recorded[name], rtol=1e-6, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_images_are_prepared_as_published_or_by_bicubic_scaling(ram, raw, recorded):
    images = torch.stack([RamTagger(model=ram)._image(picture, 96) for picture in raw])
    torch.testing.assert_close(images, recorded["image"], rtol=0, atol=1e-6)
    images = [RamTagger(model=ram, interpolation="bicubic")._image(picture, 96) for picture in raw]
    torch.testing.assert_close(images[0], recorded["image"][0], rtol=0, atol=1e-6)  # it has that size already
    assert all((image - was).abs().max() > 0.1 for image, was in zip(images[1:], recorded["image"][1:], strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_many_images_get_the_tags_that_each_gets_alone(ram, raw, recorded, tag_list, batch_size):
    part = RamTagger(model=ram, batch_size=batch_size)
    assert part(raw, CAPTIONS) == [tags_of(row, tag_list) for row in recorded["tags_before_delete"]]
    torch.testing.assert_close(part.logits(raw), recorded["logits"], rtol=0, atol=2e-5)
    alone = torch.cat([part.logits([picture]) for picture in raw])
    torch.testing.assert_close(part.logits(raw), alone, rtol=0, atol=2e-5)
    assert torch.equal(part.logits(raw), part.logits(raw))
    assert part([], []) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(ram, raw, recorded, dtype):
    part = RamTagger(model=ram, dtype=dtype)
    logits = part.logits(raw)
    assert logits.dtype == torch.float32
    assert {value.dtype for value in part.model.parameters()} == {getattr(torch, dtype)}
    error = (logits - recorded["logits"]).abs().max()
    assert 0 < error < {"bfloat16": 0.2, "float16": 0.03}[dtype]


def test_a_tag_has_to_be_above_its_own_threshold(ram, raw, tag_list, tmp_path):
    probabilities = RamTagger(model=ram).logits(raw[:1]).sigmoid()[0].tolist()
    file = tmp_path / "thresholds.txt"
    file.write_text("\n".join(map(repr, probabilities)))
    assert RamTagger(model=ram, thresholds=str(file))(raw[:1], [""]) == [[]]
    file.write_text("\n".join(repr(max(p - 1e-6, 0)) for p in probabilities))
    assert RamTagger(model=ram, thresholds=str(file))(raw[:1], [""]) == [tag_list]


def test_every_tensor_of_the_real_weights_has_its_place():
    """Names and shapes of `ram_swin_large_14m.pth`, without its numbers."""
    shapes = json.loads((GOLDEN / "real_keys.json").read_text())
    network = ram_of({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert len(shapes) == 366
    taken = network.state_dict()
    assert sum(value.numel() for value in taken.values()) == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert len(taken) == len(shapes) + 2 * 2 * 24  # of 24 blocks, weight and bias become three of each
    sizes = network.sizes
    assert (sizes.tags, sizes.image_size, sizes.window_size, sizes.mlp_ratio) == (4585, 384, 12, 4)
    assert (sizes.depths, sizes.heads, sizes.decoder_layers) == ((2, 2, 18, 2), (6, 12, 24, 48), 2)


def test_the_decoder_s_earlier_name_is_read_too(weights, recorded):
    state = {key.replace("tagging_head", "vision_multi"): value for key, value in weights.items()}
    assert any("vision_multi" in key for key in state)
    with torch.inference_mode():
        torch.testing.assert_close(ram_of(state).eval()(recorded["image"]), recorded["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None}, "1 .*fc.weight"),
        ({"label_embed": None}, "label_embed"),
        ({"visual_encoder.layers.0.blocks.1.attn.qkv.bias": None}, "3 .*layers.0.blocks.1"),
        ({"reweight_scale": torch.ones(())}, "1 .*reweight_scale"),
        ({"fc.weight": torch.ones(1, 47)}, "1 .*fc.weight"),
    ],
)
def test_weights_that_are_not_ram_s_are_refused(weights, change, message):
    state = {key: value for key, value in {**weights, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        ram_of(state)


@pytest.fixture
def copied(ram, tmp_path):
    """A folder with the weights and both lists, to be spoilt."""
    shutil.copytree(Path(ram).parent, tmp_path / "ram")
    return tmp_path / "ram"


def tagger(folder, **settings):
    return RamTagger(model=str(folder / WEIGHTS), **settings)


@pytest.mark.parametrize(("setting", "name"), [("model", WEIGHTS), ("tags", TAGS), ("thresholds", THRESHOLDS)])
def test_a_file_that_is_not_there_is_named_with_where_to_get_it(copied, setting, name):
    (copied / name).unlink()
    with pytest.raises(PartMissing, match=rf"^tagger.{setting}=.*{name}.*xinyu1205/recognize-anything") as caught:
        tagger(copied)
    assert "\n" not in str(caught.value)


def test_lists_may_lie_elsewhere_and_are_told(copied, tmp_path):
    beside = tagger(copied).settings()
    assert (beside["tags"], beside["thresholds"]) == (None, None)
    elsewhere = {
        setting: str((copied / name).rename(tmp_path / name))
        for setting, name in (("tags", TAGS), ("thresholds", THRESHOLDS))
    }
    assert tagger(copied, **elsewhere).settings() == {**beside, **elsewhere}
    (tmp_path / THRESHOLDS).write_text("0.5\n" * 20)
    assert tagger(copied, **elsewhere).settings()["lists_sha256"] != beside["lists_sha256"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TAGS, "dog\ncat\n", "tagger.thresholds: 20 .* 2 "),
        (TAGS, "dog\n\ncat\n", "tagger.tags=.*line 2 "),
        (THRESHOLDS, "0.5\n" * 19 + "high\n", "tagger.thresholds: line 20: high"),
        (THRESHOLDS, "0.5\n" * 19 + "nan\n", "tagger.thresholds: line 20: nan"),
    ],
)
def test_lists_that_cannot_be_are_refused(copied, name, content, message):
    (copied / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        tagger(copied)
    assert "\n" not in str(caught.value)


class Calls:
    """A pickle of this would run a program."""

    def __reduce__(self):
        return print, ("run",)


OTHER_FILES = {
    "garbage": lambda path: path.write_bytes(b"<html>not found</html>"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "program": lambda path: torch.save({"model": Calls()}, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"model": {}}, protocol=2)),
    "no model": lambda path: torch.save({"state_dict": {}}, path),
    "list": lambda path: torch.save([1, 2], path),
    "other": lambda path: torch.save({"model": {"conv1.weight": torch.ones(1)}}, path),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_of_something_else_is_refused_in_one_line(copied, raw, kind, capsys):
    OTHER_FILES[kind](copied / WEIGHTS)
    with pytest.raises(PartMissing, match=r"^tagger.model=.*14m.pth: .*xinyu1205") as caught:
        tagger(copied)(raw, CAPTIONS)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_lists_of_another_model_are_refused(copied, raw):
    (copied / TAGS).write_text("dog\ncat\n")
    (copied / THRESHOLDS).write_text("0.5\n0.5\n")
    with pytest.raises(PartMissing, match="20 .* 2 in tagger.tags"):
        tagger(copied)(raw, CAPTIONS)
