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

ON_CPU = (
    "trainer=cpu",
    "optimizer=adamw",
    "logger=[csv]",
    "callback=[checkpoint]",
    "data.workers=0",
    "trainer.save_every=1",
)
SCENES = SceneBatch(
    [
        Scene(
            id="two",
            caption="a dog by a red circle",
            objects=(
                SceneObject(phrase="dog", box=(0.0, 0.1, 0.5, 0.9)),
                SceneObject(phrase="red circle", box=(0.4, 0.3, 0.9, 0.8)),
            ),
            relations=(Relation(subject=0, predicate="by", object=1),),
            frame=Frame(original=(64, 64)),
        ),
        Scene(id="none", caption="a cat", frame=Frame(original=(64, 64))),
    ]
)


@pytest.fixture(scope="module")
def built(composed):
    """built(method, kind, dtype, *overrides): a module whose adapter acts, the same for any dtype."""

    def build(method, kind, dtype, *overrides):
        settings = ("objective=diffusion", "data=folder", "data.shards=x", "drops=kept", "sampler.steps=2")
        chosen = (f"conditioning=[{method}]", f"backbone=tiny_{kind}", f"backbone.dtype={dtype}")
        module = build_module(composed(*settings, *chosen, *overrides))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.conditioning.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        return module.train()

    return build


def step(module, autocast):
    """Losses and gradients of two samples."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = Batch(images, scenes=SCENES, positions=torch.arange(2))
    module.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        losses = module.losses(batch, [0, 1])
        losses.mean().backward()
    return losses.detach(), [p.grad for p in module.conditioning.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("method", "kind"),
    [("boxes", "sd15"), ("regions", "sdxl"), ("scene_graph", "sd15"), ("boxes,lora", "sdxl")],
)
def test_a_step_over_half_weights_is_that_over_whole_ones_but_for_rounding(built, method, kind):
    expected, whole = step(built(method, kind, "float32"), False)
    half = built(method, kind, "bfloat16")
    assert half.backbone.unet.dtype == torch.bfloat16
    assert {p.dtype for tower in half.backbone.text.each for p in tower.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.backbone.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in half.trained.parameters()} == {torch.float32}
    assert {p.dtype for p in half.average.parameters()} == {torch.float32}
    for autocast in (False, True):
        losses, gradients = step(half, autocast)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected, rtol=5e-3, atol=0)
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        away = sum((one - other).square().sum() for one, other in zip(gradients, whole, strict=True))
        assert away.sqrt() < 0.15 * sum(one.square().sum() for one in whole).sqrt()


@pytest.mark.parametrize("method", ["boxes", "regions"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_closed_adapter_leaves_the_half_unet_s_numbers_as_they_are(composed, method, autocast):
    settings = ("objective=diffusion", "data=folder", "data.shards=x", "backbone=tiny_sd15", "backbone.dtype=bfloat16")
    module = build_module(composed(*settings, f"conditioning=[{method}]"))
    latents, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()
    with torch.no_grad(), context:
        inputs = module.conditioning(module.backbone, SCENES, SCENES.captions, (8, 8))
        found = module.backbone.denoise(latents, times, inputs)
        assert inputs.slots
        inputs.slots.clear()
        assert torch.equal(found, module.backbone.denoise(latents, times, inputs))


def test_images_are_drawn_over_half_weights(built):
    module = built("boxes", "sdxl", "bfloat16")
    with placed(module, composed_trainer("32-true")), module.averaged():
        plain = module.sample(SCENES, seed=0)
    with placed(module, composed_trainer("bf16-mixed")), module.averaged():
        mixed = module.sample(SCENES, seed=0)
    whole = built("boxes", "sdxl", "float32")
    with whole.averaged():
        expected = whole.sample(SCENES, seed=0)
    for images in (plain, mixed):
        assert images.dtype == torch.float32
        assert (images - expected).abs().mean() < 0.05
    assert expected.std() > 0.05


def composed_trainer(precision):
    return compose("train", [f"trainer.precision={precision}"]).trainer


def test_another_half_precision_than_that_of_the_trainer_is_refused(composed):
    settings = ("objective=diffusion", "data=folder", "data.shards=x", "backbone=tiny_sd15", "conditioning=[boxes]")
    with pytest.raises(
        ValueError, match=r"backbone\.dtype=bfloat16: trainer\.precision=16-mixed .*backbone\.dtype=float16"
    ):
        build_module(composed(*settings, "backbone.dtype=bfloat16", "trainer.precision=16-mixed"))
    assert build_module(composed(*settings, "backbone.dtype=float16", "trainer.precision=16-mixed"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(Shapes(count=4, size=64), tmp_path_factory.mktemp("images") / "shards")


def test_a_backbone_that_trains_itself_is_not_held_in_half_precision(composed, fit, shards, tmp_path):
    settings = (
        "objective=diffusion",
        "data=folder",
        f"data.shards={shards}",
        "data.resolution=64",
        "conditioning=none",
    )
    cfg = composed(
        *settings, *ON_CPU, "backbone=tiny_sd15", "backbone.dtype=bfloat16", "batch_size=2", f"run={tmp_path}/run"
    )
    with pytest.raises(ValueError, match=r"backbone\.dtype: .*set backbone\.dtype=float32"):
        fit(cfg)


def test_a_recipe_s_run_keeps_its_adapter_whole_and_is_exported_over_whole_weights(fit, shards, tmp_path):
    make_tiny("sd15", tmp_path / "tiny")
    cfg = compose(
        "train",
        [
            "experiment=gligen_coco_sd14",
            "backbone=tiny_sd15",
            f"backbone.folder={tmp_path / 'tiny'}",
            "backbone.resolution=64",
            "conditioning.boxes.init=fresh",
            f"data.shards={shards}",
            "data.resolution=64",
            *ON_CPU,
            "batch_size=2",
            "trainer.max_steps=1",
            f"run={tmp_path / 'run'}",
        ],
    )
    assert cfg.backbone.dtype == "bfloat16"
    module = fit(cfg)
    assert module.backbone.unet.dtype == torch.bfloat16
    again, checkpoint = load_module(load_run_config(tmp_path / "run"), None)
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {value.dtype for key, value in kept.items() if value.is_floating_point()} == {torch.float32}
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in kept.items())

    convert(compose("convert", [f"run={tmp_path / 'run'}", "form=diffusers", f"out={tmp_path / 'pipeline'}"]))
    exported, whole = (StableDiffusion.from_folder(tmp_path / name).unet.state_dict() for name in ("pipeline", "tiny"))
    assert all(torch.equal(value, whole[key]) for key, value in exported.items())


def test_the_plan_counts_what_half_weights_take(composed):
    module, lines = planned(composed("experiment=gligen_coco_sd14", "data.shards=/nowhere"))
    backbone = module.backbone
    unet, text, vae = (
        sum(p.numel() for p in part.parameters()) for part in (backbone.unet, backbone.text, backbone.vae)
    )
    assert f"frozen weights {(2 * (unet + text) + 4 * vae) / 1e9:.1f}," in lines
