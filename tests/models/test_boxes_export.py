"""Boxes adapters out of the project and back: gated folder, adapter file, pipeline folder, diffusers alone."""

import json
import re
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import dynamic_modules_utils
from safetensors import safe_open
from safetensors.torch import load_file

from models.backbones.stable_diffusion import StableDiffusion
from models.backbones.tiny import make_tiny
from models.conditioning.adapter_file import save_adapter
from models.conditioning.base import Conditioning
from models.conditioning.boxes import BoxesAdapter
from models.objectives.draws import start_latents
from scenes import Frame, Scene, SceneBatch, SceneObject

WEIGHTS = "diffusion_pytorch_model.safetensors"
# numpy 2 has this against the Euler scheduler of diffusers
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
SOURCES = ["sd15", "sdxl", "sd", "xl"]


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Where diffusers copies a folder's own code to before it imports it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("modules")
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", list(sys.path))
        yield


def gated_folder(root, kind):
    """A tiny model whose UNet diffusers itself has built with gated layers, all random."""
    make_tiny(kind, root)
    plain = UNet2DConditionModel.from_pretrained(root / "unet")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        gated = UNet2DConditionModel.from_config({**plain.config, "attention_type": "gated"})
        with torch.no_grad():
            for name, parameter in gated.named_parameters():
                if "alpha" in name or "null" in name:
                    parameter.normal_()
    gated.save_pretrained(root / "unet")
    return root


@pytest.fixture(scope="module")
def sources(tmp_path_factory, golden):
    root = tmp_path_factory.mktemp("published")
    tiny = {kind: gated_folder(root / kind, kind) for kind in ("sd15", "sdxl")}
    return {**tiny, "sd": golden / "gligen" / "sd", "xl": golden / "gligen" / "sdxl"}


@pytest.fixture(scope="module")
def exported(sources, tmp_path_factory):
    """exported(name): (source folder, adapter file, folder exported from the file), made once."""
    root, made = tmp_path_factory.mktemp("exported"), {}

    def export(name):
        if name not in made:
            source, file, out = sources[name], root / f"{name}.safetensors", root / name
            backbone = StableDiffusion.from_folder(source)
            structure = StableDiffusion.from_configs(source)
            save_adapter(BoxesAdapter(structure, weights=str(source), init="published"), file, backbone=structure)
            BoxesAdapter(backbone, weights=str(file), init="published").export(backbone, out, form="diffusers")
            made[name] = (source, file, out)
        return made[name]

    return export


@pytest.mark.parametrize("name", SOURCES)
def test_a_gated_unet_comes_back_bit_for_bit(exported, name):
    source, file, out = exported(name)
    before, after = (load_file(folder / "unet" / WEIGHTS) for folder in (source, out))
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype
        assert before[key].shape == after[key].shape
        assert torch.equal(before[key], after[key]), key
    own = load_file(file)
    assert {key for key in before if ".fuser." in key or key.startswith("position_net.")} == own.keys()
    assert all(torch.equal(own[key], before[key]) for key in own)
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    assert about["method"] == "boxes"
    assert json.loads(about["settings"]) == {"slots": 30, "mask": "none", "blocks": "all"}
    _, info = UNet2DConditionModel.from_pretrained(out / "unet", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@torch.no_grad()
@pytest.mark.parametrize("name", SOURCES)
def test_the_exported_unet_predicts_what_backbone_and_adapter_predict(exported, name):
    _, file, out = exported(name)
    backbone = StableDiffusion.from_folder(out)  # opened without the gated layers
    adapter = BoxesAdapter(backbone, weights=str(file), init="published")
    conditioning = Conditioning({"boxes": adapter})
    conditioning.attach(backbone.unet)
    objects = tuple(
        SceneObject(phrase=phrase, box=box)
        for phrase, box in (("red dog", (0.1, 0.2, 0.5, 0.9)), ("tree", (0.4, 0.0, 1.0, 0.6)))
    )
    batch = SceneBatch([Scene(id="a", caption="a dog", objects=objects, frame=Frame(original=(64, 96)))])
    latents = start_latents(0, ["a"], (4, 8, 12))
    inputs = conditioning(backbone, batch, batch.captions, (8, 12))
    prediction = backbone.denoise(latents, torch.tensor([400]), inputs)

    pipeline = opened(out)
    conditions = pipeline._conditions(["a dog"], None, False, (64, 96))
    grounding = pipeline._grounding([(["red dog", "tree"], [item.box for item in objects])], False)
    expected = pipeline.unet(latents, 400, cross_attention_kwargs={"gligen": grounding}, **conditions).sample
    torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
    bare = pipeline.unet(latents, 400, **conditions).sample
    assert (bare - expected).abs().max() > 1e-3


def opened(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize(("name", "family"), [("sd", "sd"), ("xl", "sdxl")])
def test_the_exported_folder_draws_what_the_published_pipelines_drew(exported, golden, name, family, case):
    about = json.loads((golden / "gligen" / "cases.json").read_text())[case]
    tensors = load_file(golden / "gligen" / "outputs.safetensors")
    latents = opened(exported(name)[2])(
        prompt=about["prompt"],
        gligen_phrases=about["phrases"],
        gligen_boxes=about["boxes"],
        gligen_scheduled_sampling_beta=about["beta"],
        negative_prompt=about["negative_prompt"] or None,  # as recorded: SDXL's pipeline takes zeros for none
        guidance_scale=about["guidance_scale"],
        num_inference_steps=about["steps"],
        height=about["height"],
        width=about["width"],
        latents=tensors[f"case{case}.{family}.start"],
        output_type="latent",
    ).images
    torch.testing.assert_close(latents, tensors[f"case{case}.{family}.latents"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_picture_of_a_batch_has_its_own_layout(exported, name):
    pipeline = opened(exported(name)[2])
    settings = {"num_inference_steps": 2, "height": 64, "width": 96, "gligen_scheduled_sampling_beta": 1.0}
    prompts = ["a dog", "a tree on the grass", "a red car"]
    phrases = [["red dog"], [], ["car", "blue sky"]]
    boxes = [[(0.1, 0.2, 0.5, 0.9)], [], [(0.0, 0.5, 0.5, 1.0), (0.2, 0.0, 1.0, 0.4)]]
    start = start_latents(0, prompts, (4, 8, 12))

    def draw(places, boxes=boxes, **changes):
        return pipeline(
            prompt=[prompts[place] for place in places],
            gligen_phrases=[phrases[place] for place in places],
            gligen_boxes=[boxes[place] for place in places],
            latents=start[list(places)],
            output_type="latent",
            **{**settings, **changes},
        ).images

    together = draw((0, 1, 2))
    for place in range(3):
        torch.testing.assert_close(together[place : place + 1], draw((place,)), atol=1e-4, rtol=1e-4)
    moved = draw((0, 1, 2), [boxes[0], [], [(0.5, 0.5, 1.0, 1.0), boxes[2][1]]])
    assert torch.allclose(moved[:2], together[:2], atol=1e-5)
    assert (moved[2] - together[2]).abs().max() > 1e-4
    # a flat list is one layout for all; one negative prompt, too
    flat = pipeline(
        prompt=[prompts[0]] * 2,
        gligen_phrases=phrases[0],
        gligen_boxes=boxes[0],
        negative_prompt="a cat",
        latents=start[[0, 0]],
        output_type="latent",
        **settings,
    ).images
    assert torch.allclose(flat[0], flat[1], atol=1e-5)
    # and what people look at
    shown = pipeline(prompts[0], phrases[0], boxes[0], generator=torch.Generator().manual_seed(0), **settings).images
    again = pipeline(prompts[0], phrases[0], boxes[0], generator=torch.Generator().manual_seed(0), **settings).images
    assert shown[0].size == (96, 64)
    assert shown[0].tobytes() == again[0].tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gligen_phrases": ["dog"], "gligen_boxes": []}, "gligen_boxes: picture 0 has 0 boxes for 1 phrases"),
        ({"gligen_phrases": [["dog"]] * 2, "gligen_boxes": [[(0, 0, 1, 1)]] * 2}, "2 and 2 layouts for 1 prompts"),
        ({"gligen_phrases": ["dog"], "gligen_boxes": [(10, 10, 64, 64)]}, "give x0 < x1 and y0 < y1 in [0, 1]"),
        ({"gligen_phrases": ["dog"] * 31, "gligen_boxes": [(0, 0, 1, 1)] * 31}, "31 boxes for 30 slots"),
        ({"gligen_scheduled_sampling_beta": 1.5}, "gligen_scheduled_sampling_beta: 1.5 is outside [0, 1]"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 for 1 prompts"),
        ({"latents": torch.zeros(1, 4, 3, 3)}, "latents: (1, 4, 3, 3) for (1, 4, 8, 8)"),
        ({"height": 60}, "height, width: 60 x 64 are no multiples of 8"),
    ],
)
def test_the_pipeline_refuses_arguments_by_name(exported, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        opened(exported("sd15")[2])("a dog", num_inference_steps=1, **arguments)


def test_the_pipeline_file_imports_nothing_of_the_project(exported):
    _, _, out = exported("sd15")
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == ["boxes_pipeline", "BoxesPipeline"]
    assert index["gligen_slots"] == 30
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('alone', {str(out / 'boxes_pipeline.py')!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "assert not {'models', 'scenes', 'runtime'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=out)  # -I: nothing beside it can be imported


def test_the_number_of_slots_goes_with_the_folder(sources, tmp_path):
    backbone = StableDiffusion.from_folder(sources["sd15"])
    BoxesAdapter(backbone, slots=4).export(backbone, tmp_path / "out", form="diffusers")
    with pytest.raises(ValueError, match="5 boxes for 4 slots"):
        opened(tmp_path / "out")("a dog", ["dog"] * 5, [(0, 0, 1, 1)] * 5)


def test_what_diffusers_cannot_hold_is_refused(sources, backbone_named, tmp_path):
    backbone = StableDiffusion.from_folder(sources["sd15"])

    def refuse(message, backbone=backbone, out="new", form="diffusers", **settings):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            BoxesAdapter(backbone, **settings).export(backbone, tmp_path / out, form=form)
        assert "\n" not in str(caught.value)

    refuse("conditioning.boxes.mask: box, but diffusers' gated UNet knows only none", mask="box")
    refuse("conditioning.boxes.blocks: ['mid'], but diffusers' gated UNet knows only all", blocks=["mid"])
    refuse("not ShapesBackbone", backbone=backbone_named("shapes"))
    refuse("not StableDiffusion without them", backbone=StableDiffusion.from_configs(sources["sd15"]))
    refuse("form=onnx: conditioning.boxes has no such form; take form=adapter or form=diffusers", form="onnx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    refuse("is there already; name a new folder", out="full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_a_failed_export_leaves_nothing(sources, tmp_path, monkeypatch):
    backbone = StableDiffusion.from_folder(sources["sd15"])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(backbone.vae), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        BoxesAdapter(backbone).export(backbone, tmp_path / "out", form="diffusers")
    assert not list(tmp_path.iterdir())
