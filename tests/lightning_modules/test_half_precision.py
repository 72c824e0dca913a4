"""Frozen weights in half precision: what trains stays in fp32, and losses are those of whole weights but for rounding."""

from contextlib import nullcontext

import pytest
import torch

from datamodules.batch import Batch
from datamodules.shards import write_shards
from datamodules.sources.shapes import Shapes
from models.backbones.stable_diffusion import StableDiffusion
from models.backbones.tiny import make_tiny
from runtime.build import build_module
from runtime.composition import compose
from runtime.conversion import convert
from runtime.launch.device import placed
from runtime.planning import planned
from runtime.restoring import load_module
from runtime.run_directory import load_run_config
from scenes import Frame, Relation, Scene, SceneBatch, SceneObject

BUILT = ("objective=diffusion", "data=folder")
ON_CPU = (
    "trainer=cpu",
    "optimizer=adamw",
    "logger=[csv]",
    "callback=[checkpoint]",
    "data.workers=0",
    "data.resolution=64",
)
FRAME = Frame(original=(64, 64))
DOG = SceneObject(phrase="dog", box=(0.0, 0.1, 0.5, 0.9))
CIRCLE = SceneObject(phrase="red circle", box=(0.4, 0.3, 0.9, 0.8))
BY = Relation(subject=0, predicate="by", object=1)
TWO = Scene(id="two", caption="a dog by a red circle", objects=(DOG, CIRCLE), relations=(BY,), frame=FRAME)
SCENES = SceneBatch([TWO, Scene(id="none", caption="a cat", frame=FRAME)])


@pytest.fixture(scope="module")
def built(composed):
    """built(method, kind, dtype): a module whose adapter acts, the same for any dtype."""

    def build(method, kind, dtype):
        chosen = (f"conditioning=[{method}]", f"backbone=tiny_{kind}", f"backbone.dtype={dtype}")
        module = build_module(composed(*BUILT, "data.shards=x", "drops=kept", "sampler.steps=2", *chosen))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.conditioning.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        return module.train()

    return build


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(Shapes(count=4, size=64), tmp_path_factory.mktemp("images") / "shards")


def autocast(on):
    return torch.autocast("cpu", dtype=torch.bfloat16) if on else nullcontext()


def dtypes(parameters):
    return {p.dtype for p in parameters}


def step(module, mixed):
    """Losses and gradients of two samples."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = Batch(images, scenes=SCENES, positions=torch.arange(2))
    module.zero_grad()
    with autocast(mixed):
        losses = module.losses(batch, [0, 1])
        losses.mean().backward()
    return losses.detach(), [p.grad for p in module.conditioning.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("method", "kind"), [("boxes", "sd15"), ("regions", "sdxl"), ("scene_graph", "sd15"), ("boxes,lora", "sdxl")]
)
def test_a_step_over_half_weights_is_that_over_whole_ones_but_for_rounding(built, method, kind):
    expected, whole = step(built(method, kind, "float32"), False)
    half = built(method, kind, "bfloat16")
    assert half.backbone.unet.dtype == torch.bfloat16
    assert dtypes(p for tower in half.backbone.text.each for p in tower.parameters()) == {torch.bfloat16}
    for part in (half.backbone.vae, half.trained, half.average):
        assert dtypes(part.parameters()) == {torch.float32}
    for mixed in (False, True):
        losses, gradients = step(half, mixed)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected, rtol=5e-3, atol=0)
        assert dtypes(gradients) == {torch.float32}
        away = sum((one - other).square().sum() for one, other in zip(gradients, whole, strict=True))
        assert away.sqrt() < 0.15 * sum(one.square().sum() for one in whole).sqrt()


@pytest.mark.parametrize("method", ["boxes", "regions"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_closed_adapter_leaves_the_half_unet_s_numbers_as_they_are(composed, method, mixed):
    half = ("backbone=tiny_sd15", "backbone.dtype=bfloat16", f"conditioning=[{method}]")
    module = build_module(composed(*BUILT, "data.shards=x", *half))
    latents, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    with torch.no_grad(), autocast(mixed):
        inputs = module.conditioning(module.backbone, SCENES, SCENES.captions, (8, 8))
        found = module.backbone.denoise(latents, times, inputs)
        assert inputs.slots
        inputs.slots.clear()
        assert torch.equal(found, module.backbone.denoise(latents, times, inputs))


def test_images_are_drawn_over_half_weights(built):
    def drawn(module, precision):
        with placed(module, compose("train", [f"trainer.precision={precision}"]).trainer), module.averaged():
            return module.sample(SCENES, seed=0)

    half, expected = built("boxes", "sdxl", "bfloat16"), drawn(built("boxes", "sdxl", "float32"), "32-true")
    for precision in ("32-true", "bf16-mixed"):
        images = drawn(half, precision)
        assert images.dtype == torch.float32
        assert (images - expected).abs().mean() < 0.05
    assert expected.std() > 0.05


def test_another_half_precision_than_that_of_the_trainer_is_refused(composed):
    mixed = (*BUILT, "data.shards=x", "backbone=tiny_sd15", "conditioning=[boxes]", "trainer.precision=16-mixed")
    named = r"backbone\.dtype=bfloat16: trainer\.precision=16-mixed .*backbone\.dtype=float16"
    with pytest.raises(ValueError, match=named):
        build_module(composed(*mixed, "backbone.dtype=bfloat16"))
    assert build_module(composed(*mixed, "backbone.dtype=float16"))


def test_a_backbone_that_trains_itself_is_not_held_in_half_precision(composed, fit, shards, tmp_path):
    half = ("conditioning=none", "backbone=tiny_sd15", "backbone.dtype=bfloat16", "batch_size=2", f"run={tmp_path}/run")
    with pytest.raises(ValueError, match=r"backbone\.dtype.*bfloat16.* backbone\.dtype=float32"):
        fit(composed(*BUILT, f"data.shards={shards}", *ON_CPU, *half))


def test_a_recipe_s_run_keeps_its_adapter_whole_and_is_exported_over_whole_weights(fit, shards, tmp_path):
    run, tiny, pipeline = (tmp_path / name for name in ("run", "tiny", "pipeline"))
    make_tiny("sd15", tiny)
    small = ("backbone=tiny_sd15", f"backbone.folder={tiny}", "backbone.resolution=64", "conditioning.boxes.init=fresh")
    short = ("trainer.save_every=1", "trainer.max_steps=1", "batch_size=2", f"run={run}", f"data.shards={shards}")
    cfg = compose("train", ["experiment=gligen_coco_sd14", *small, *ON_CPU, *short])
    assert cfg.backbone.dtype == "bfloat16"
    module = fit(cfg)
    assert module.backbone.unet.dtype == torch.bfloat16
    again, checkpoint = load_module(load_run_config(run), None)
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert dtypes(value for value in kept.values() if value.is_floating_point()) == {torch.float32}
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in kept.items())

    convert(compose("convert", [f"run={run}", "form=diffusers", f"out={pipeline}"]))
    exported, whole = (StableDiffusion.from_folder(folder).unet.state_dict() for folder in (pipeline, tiny))
    assert all(torch.equal(value, whole[key]) for key, value in exported.items())


def test_the_plan_counts_what_half_weights_take(composed):
    module, lines = planned(composed("experiment=gligen_coco_sd14", "data.shards=/nowhere"))
    parts = (module.backbone.unet, module.backbone.text, module.backbone.vae)
    unet, text, vae = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert f"frozen weights {(2 * (unet + text) + 4 * vae) / 1e9:.1f}," in lines
