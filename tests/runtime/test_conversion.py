"""`convert.py` in process: published weights, runs and adapter files, on the configuration that its command line makes."""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.backbones.stable_diffusion import StableDiffusion
from models.backbones.tiny import make_tiny, tiny_backbone
from models.conditioning.adapter_file import read_weights
from models.conditioning.regions import RegionsAdapter
from runtime.build import build_backbone, build_conditioning
from runtime.command import _open_as_run
from runtime.composition import compose
from runtime.conversion import convert
from runtime.restoring import load_module
from runtime.run_directory import load_run_config

UNET = "diffusion_pytorch_model.safetensors"
SMALL_SHAPES = (
    "backbone.weights=null",
    "backbone.unet_config.norm_num_groups=8",
    "backbone.unet_config.block_out_channels=[16,24]",
    "backbone.unet_config.attention_head_dim=[2,3]",
    "backbone.text_config.hidden_size=32",
    "backbone.text_config.intermediate_size=64",
)


def converted(*arguments):
    return convert(compose("convert", [_open_as_run(argument, "convert") for argument in arguments]))


def refusal(message, *arguments):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        converted(*arguments)
    assert "\n" not in str(caught.value)


def gated_folder(folder, kind):
    make_tiny(kind, folder)
    plain = UNet2DConditionModel.from_pretrained(folder / "unet")
    UNet2DConditionModel.from_config({**plain.config, "attention_type": "gated"}).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    return gated_folder(tmp_path_factory.mktemp("gated"), "sd15")


def sd14(folder):
    return "conditioning=boxes", "backbone=sd14", f"backbone.path={folder}"


def tensors_and_metadata(file):
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118


def test_published_weights_become_a_file_without_the_base_weights(gated, tmp_path):
    structure = tmp_path / "structure"  # configs alone, as the structures that are part of the project
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        (structure / part).mkdir(parents=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (structure / part / name).write_bytes((gated / part / name).read_bytes())
    line = converted(*sd14(structure), f"weights={gated}", f"out={tmp_path / 'a.safetensors'}")
    tensors, about = tensors_and_metadata(tmp_path / "a.safetensors")
    stored = load_file(gated / "unet" / UNET)
    assert tensors.keys() == {key for key in stored if ".fuser." in key or key.startswith("position_net.")}
    assert all(torch.equal(tensor, stored[key]) for key, tensor in tensors.items())
    assert about["method"] == "boxes"
    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert line == (
        f"{tmp_path / 'a.safetensors'}: boxes, {len(tensors)} tensors, {parameters:,} parameters, from {gated}"
    )


def test_the_precision_of_published_weights_stays(gated, tmp_path):
    stored = {key: tensor.half() for key, tensor in load_file(gated / "unet" / UNET).items()}
    save_file(stored, tmp_path / "half.safetensors")
    converted(*sd14(gated), f"weights={tmp_path / 'half.safetensors'}", f"out={tmp_path / 'a.safetensors'}")
    tensors, _ = tensors_and_metadata(tmp_path / "a.safetensors")
    assert all(tensor.dtype == torch.float16 and torch.equal(tensor, stored[key]) for key, tensor in tensors.items())


def test_an_adapter_file_becomes_the_gated_folder_again(gated, tmp_path):
    converted(*sd14(gated), f"weights={gated}", f"out={tmp_path / 'a.safetensors'}")
    line = converted(*sd14(gated), f"weights={tmp_path / 'a.safetensors'}", "form=diffusers", f"out={tmp_path / 'out'}")
    assert line.startswith(f"{tmp_path / 'out'}: boxes, ")
    before, after = (load_file(folder / "unet" / UNET) for folder in (gated, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    parts = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert names == parts | {"model_index.json", "boxes_pipeline.py"}
    StableDiffusion.from_folder(tmp_path / "out")


def test_settings_of_a_file_are_not_changed_on_the_way(gated, tmp_path):
    file = tmp_path / "a.safetensors"
    converted(*sd14(gated), f"weights={gated}", "conditioning.boxes.slots=32", f"out={file}")
    assert json.loads(tensors_and_metadata(file)[1]["settings"])["slots"] == 32
    message = "conditioning.boxes.slots: 30 here, but the weights were made with 32"
    refusal(message, *sd14(gated), f"weights={file}", "form=diffusers", f"out={tmp_path / 'out'}")
    more = "conditioning.boxes.slots=32"
    converted(*sd14(gated), f"weights={file}", more, "form=diffusers", f"out={tmp_path / 'out'}")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["gligen_slots"] == 32


def test_weights_of_another_backbone_are_refused(gated, tmp_path):
    out = f"out={tmp_path / 'a.safetensors'}"
    refusal("belongs to another backbone", "conditioning=boxes", "backbone=tiny_sdxl", f"weights={gated}", out)
    refusal("(24,) for (2048,)", "conditioning=boxes", "backbone=sdxl", f"weights={gated}", out)
    assert not (tmp_path / "a.safetensors").exists()


def test_the_methods_own_refusals_reach_the_caller(gated, tmp_path):
    regions = ("conditioning=regions", "backbone=tiny_sd15", f"out={tmp_path / 'a.safetensors'}")
    refusal("config.json names fuser_cls=None and position_net_cls=None; give", *regions, f"weights={gated}")
    out = f"out={tmp_path / 'out'}"
    refusal(
        "form=diffuser: conditioning.boxes has no such form", *sd14(gated), f"weights={gated}", "form=diffuser", out
    )
    missing = f"weights={tmp_path / 'none'}"
    refusal("is no file or folder here", *sd14(gated), missing, f"out={tmp_path / 'a.safetensors'}")
    both = ("conditioning=[boxes,regions]", *sd14(gated)[1:], f"weights={gated}", f"out={tmp_path / 'a.safetensors'}")
    refusal("needs one adapter to convert (have: boxes, regions)", *both)


@pytest.mark.parametrize("average", [True, False])
def test_a_run_becomes_a_file_of_its_averaged_or_its_plain_weights(short_run, tmp_path, average):
    cfg, module = short_run
    file = tmp_path / "regions.safetensors"
    line = converted(f"run={cfg.run}", f"out={file}", f"average={str(average).lower()}")
    assert f"from {'averaged' if average else 'plain'} weights of {cfg.run}, step=4.ckpt" in line
    adapter = module.conditioning.named["regions"]
    plain = {key: tensor.clone() for key, tensor in adapter.published().items()}
    with module.averaged():
        averaged = {key: tensor.clone() for key, tensor in adapter.published().items()}
    tensors, _ = tensors_and_metadata(file)
    expected, other = (averaged, plain) if average else (plain, averaged)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
    assert any(not torch.equal(tensors[key], other[key]) for key in tensors)


GRAPHS = Path(__file__).parents[1] / "golden" / "scene_graph" / "sg_encoder.pt"
GRAPH = (
    "conditioning=scene_graph",
    "backbone=tiny_sdxl",
    *(f"conditioning.scene_graph.{size}" for size in ("width=28", "hidden=32", "layers=3")),
)


def test_a_checkpoint_of_scene_graphs_goes_to_an_adapter_file_and_back_bit_by_bit(tmp_path):
    file, back = tmp_path / "graph.safetensors", tmp_path / "back.pt"
    line = converted(*GRAPH, f"weights={GRAPHS}", f"out={file}")
    assert "scene_graph, 36 tensors" in line
    converted(*GRAPH, f"weights={file}", "form=published", f"out={back}")
    stored, written = (torch.load(each, weights_only=True)["state_dict"] for each in (GRAPHS, back))
    assert stored.keys() == written.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == written[name].dtype
        assert tensor.shape == written[name].shape
        assert torch.equal(tensor, written[name])
    converted(*GRAPH, f"weights={back}", f"out={tmp_path / 'again.safetensors'}")
    again, about = tensors_and_metadata(tmp_path / "again.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.items())
    assert json.loads(about["settings"])["width"] == 28


def test_what_is_no_such_checkpoint_or_no_such_form_is_refused(tmp_path):
    stored = torch.load(GRAPHS, weights_only=True)
    del stored["state_dict"]["alpha_obj"]
    torch.save(stored, tmp_path / "less.pt")
    refusal("misses 1 keys: alpha_obj", *GRAPH, f"weights={tmp_path / 'less.pt'}", f"out={tmp_path / 'a.safetensors'}")
    out = f"out={tmp_path / 'a.pt'}"
    refusal(
        "form=diffusers: conditioning.scene_graph with encoder=triple_conv",
        *GRAPH,
        f"weights={GRAPHS}",
        "form=diffusers",
        out,
    )
    whole = [setting for setting in GRAPH if "layers" not in setting]
    refusal("has unexpected", *whole, "conditioning.scene_graph.layers=1", f"weights={GRAPHS}", out, "form=published")
    assert not (tmp_path / "a.pt").exists()


def test_a_runs_file_starts_another_run(short_run, tmp_path):
    cfg, _ = short_run
    converted(f"run={cfg.run}", f"out={tmp_path / 'regions.safetensors'}")
    cfg = cfg.copy()
    cfg.conditioning.regions.weights = str(tmp_path / "regions.safetensors")
    backbone = build_backbone(cfg)
    adapter = build_conditioning(cfg, backbone).named["regions"]
    assert isinstance(adapter, RegionsAdapter)
    weights = read_weights(adapter, tmp_path / "regions.safetensors", backbone=backbone)
    assert all(torch.equal(tensor, weights.tensors[key]) for key, tensor in adapter.published().items())


def test_a_run_is_converted_without_what_it_started_from(short, fit, tmp_path, composed):
    """The file that a run began with may be gone: its checkpoint holds every weight."""
    start = tmp_path / "start.safetensors"
    first = short(tmp_path / "first", "trainer.max_steps=1", "trainer.validate_every=1")
    fit(first)
    converted(f"run={first.run}", f"out={start}")
    second = short(
        tmp_path / "second", "trainer.max_steps=1", "trainer.validate_every=1", f"conditioning.regions.weights={start}"
    )
    fit(second)
    start.unlink()
    converted(f"run={second.run}", f"out={tmp_path / 'end.safetensors'}")
    module, _ = load_module(load_run_config(second.run), None)
    assert module.loaded_step == 1


def test_a_runs_refusals(short_run, tmp_path):
    run, out = f"run={short_run[0].run}", f"out={tmp_path / 'a.safetensors'}"
    refusal("adapter=boxes: ", run, out, "adapter=boxes")
    form = "form=diffusers: conditioning.regions has no such form; take form=adapter"
    refusal(form, run, "form=diffusers", f"out={tmp_path / 'out'}")
    refusal("holds no run", f"run={tmp_path}", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=a.safetensors"], "run, weights: neither given; name what to convert with run=DIR or weights=FILE"),
        (["run=a", "weights=b", "out=a.safetensors"], "run, weights: both given"),
        (["run=a"], "out: needs a value"),
        (["run=a", "out=a.bin"], "out=a.bin: form=adapter makes a safetensors file"),
        (["weights=a", "out=a.safetensors"], "conditioning: weights=a of which conditioning? Name it"),
        (["weights=a", "conditioning=boxes", "out=a.safetensors"], "backbone: weights=a of which backbone? Name it"),
        (
            ["weights=a", "conditioning=boxes", "backbone=sd14", "average=false", "out=a.safetensors"],
            "average=False: only a run has that",
        ),
        (["weights=a", "conditioning=boxes", "backbone=sd144", "out=a.safetensors"], "did you mean sd14?"),
        (["run=a", "out=a.safetensors", "forms=diffusers"], "did you mean form?"),
    ],
)
def test_what_names_no_conversion_is_refused_before_torch_is_needed(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compose("convert", arguments)


def test_lora_of_a_run_with_two_methods_goes_out_and_in_again(short, fit, tmp_path):
    whole, stopped = (
        short(tmp_path / name, "conditioning=[regions,lora]", "conditioning.lora.rank=2") for name in "ab"
    )
    module = fit(whole)
    fit(stopped)
    (tmp_path / "b" / "checkpoints" / "step=4.ckpt").unlink()
    (tmp_path / "b" / "finished.json").unlink()
    fit(stopped)
    states = [
        torch.load(tmp_path / name / "checkpoints" / "step=4.ckpt", weights_only=True)["state_dict"] for name in "ab"
    ]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert {key.split(".")[1] for key in states[0] if key.startswith("adapters.")} == {"regions", "lora"}
    with module.averaged():
        expected = {key: tensor.clone() for key, tensor in module.conditioning.named["lora"].published().items()}
    assert any(tensor.any() for key, tensor in expected.items() if "lora_B" in key)
    run = f"run={tmp_path / 'a'}"
    refusal("needs one adapter to convert (have: regions, lora)", run, f"out={tmp_path / 'x.safetensors'}")
    converted(run, "adapter=lora", "form=diffusers", f"out={tmp_path / 'lora'}")
    converted(run, "adapter=regions", f"out={tmp_path / 'regions.safetensors'}")
    assert tensors_and_metadata(tmp_path / "regions.safetensors")[1]["method"] == "regions"
    assert any(".fuser.to_q." in key for key in expected)  # also on what the regions have in the blocks
    shapes = ("conditioning.lora.rank=2", "backbone=shapes", *SMALL_SHAPES)
    again = (f"weights={tmp_path / 'lora'}", f"out={tmp_path / 'again.safetensors'}")
    refusal("has unexpected", "conditioning=lora", *shapes, *again)
    as_trained = (
        "conditioning.regions.variant=union",
        "conditioning.regions.width=24",
        "conditioning.regions.place_width=8",
    )
    both = ("conditioning=[regions,lora]", *as_trained, *shapes)
    refusal("needs one adapter to convert (have: regions, lora)", *both, *again)
    converted(*both, "adapter=lora", *again)
    tensors, about = tensors_and_metadata(tmp_path / "again.safetensors")
    assert about["method"] == "lora"
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_released_regions_are_converted_by_their_hub_name(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    tiny = ("conditioning=regions", "conditioning.regions.hidden=24", "backbone=tiny_sdxl")
    arguments = (*tiny, "weights=cplusx/rich_context_l2i_sdxl", f"out={tmp_path / 'released.safetensors'}")
    refusal("hf download cplusx/rich_context_l2i_sdxl --local-dir DIR", *arguments)
    repository, commit = tmp_path / "cache" / "models--cplusx--rich_context_l2i_sdxl", "0" * 40
    unet = repository / "snapshots" / commit / "unet"
    unet.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    names = {"fuser_cls": "regional.RegionalCrossAttention", "position_net_cls": "regional.TextEmbeddingNetV2"}
    (unet / "config.json").write_text(json.dumps(names))
    adapter = RegionsAdapter(tiny_backbone("sdxl"), hidden=24)
    save_file({key: tensor + 0.5 for key, tensor in adapter.published().items()}, unet / UNET)
    converted(*arguments)
    tensors, about = tensors_and_metadata(tmp_path / "released.safetensors")
    assert about["method"] == "regions"
    assert all(torch.equal(tensors[key], tensor + 0.5) for key, tensor in adapter.published().items())
