"""LoRA beside another method: borrowed and given back, always on, read and written as diffusers has it."""

import copy
import re

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from models.conditioning.adapter_file import load_weights, save_adapter
from models.conditioning.base import Conditioning
from models.conditioning.boxes import BoxesAdapter
from models.conditioning.lora import LoraAdapter
from models.conditioning.lora.adapter import FILE, TARGETS
from models.conditioning.regions import RegionsAdapter
from models.conditioning.slots import DenoiserInputs, attach, attention_layers, detach, slot_layers
from scenes import Frame, Scene, SceneBatch, SceneObject

SIZE = (8, 12)
NULL = Scene(id="empty", caption="a cat", frame=Frame(original=(48, 64)))
SCENES = (
    Scene(
        id="two",
        caption="a red circle and a blue square",
        objects=(
            SceneObject(phrase="red circle", box=(0.05, 0.1, 0.6, 0.7)),
            SceneObject(phrase="blue square", box=(0.4, 0.3, 0.95, 0.9)),
        ),
        frame=Frame(original=(64, 96)),
    ),
    NULL,
)


@pytest.fixture(params=["tiny_sd15", "tiny_sdxl"])
def backbone(request, backbone_named):
    backbone = backbone_named(request.param)
    yield backbone
    detach(backbone.unet)


def wake(module):
    """Random weights everywhere, so that it acts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@torch.no_grad()
def predict(backbone, conditioning, scenes=SCENES):
    batch = SceneBatch(scenes)
    latents = torch.randn(len(batch), backbone.latent_channels, *SIZE, generator=torch.Generator().manual_seed(1))
    inputs = conditioning(backbone, batch, batch.captions, SIZE)
    return backbone.denoise(latents, torch.full((len(batch),), 500), inputs)


def awake(backbone, **settings):
    lora = LoraAdapter(backbone, **{"rank": 3, "alpha": 6, **settings})
    wake(lora)
    return lora


def test_beside_another_method_both_act_and_own_their_weights(backbone):
    regions, lora = RegionsAdapter(backbone, hidden=16), awake(backbone)
    both = Conditioning({"regions": regions, "lora": lora})
    bare, keys = predict(backbone, Conditioning({})), list(backbone.unet.state_dict())
    both.attach(backbone.unet)
    closed = predict(backbone, both)
    assert list(backbone.unet.state_dict()) == keys
    assert both.requires == {"boxes", "phrases"}
    assert {key.split(".")[1] for key in both.state_dict()} == {"regions", "lora"}
    assert not torch.allclose(closed, bare, atol=1e-4)
    wake(regions)
    opened = predict(backbone, both)
    assert not torch.allclose(opened[0], closed[0], atol=1e-4)
    both.detach(backbone.unet)
    assert torch.equal(predict(backbone, Conditioning({})), bare)
    assert not any(module._forward_hooks for module in backbone.unet.modules())


def test_it_stays_on_where_the_scene_is_left_out(backbone):
    lora = awake(backbone)
    conditioning = Conditioning({"lora": lora})
    bare = predict(backbone, conditioning)
    conditioning.attach(backbone.unet)
    with_lora = predict(backbone, conditioning)
    assert not torch.allclose(with_lora, bare, atol=1e-4)
    assert torch.equal(predict(backbone, Conditioning({})), with_lora)
    assert torch.equal(predict(backbone, conditioning, [NULL])[0], predict(backbone, Conditioning({}), [NULL])[0])


def owned(unet, regions):
    """The published UNet: one that owns the regions' layers, under their published names."""
    detach(unet)
    for path, module in regions.slot_modules().items():
        unet.get_submodule(path).fuser = copy.deepcopy(module)
    unet.position_net = copy.deepcopy(regions.position_net)
    return unet


@pytest.mark.parametrize("variant", ["ca", "casa"])
def test_beside_regions_it_has_the_layers_that_peft_means_by_the_published_ends_of_names(variant, backbone, tmp_path):
    regions = RegionsAdapter(backbone, variant=variant, hidden=16)
    lora = awake(backbone, adapters=True, others={"regions": regions})
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)
    unet = inject_adapter_in_model(config, owned(copy.deepcopy(backbone.unet), regions))
    names = {f"unet.{name}": parameter for name, parameter in unet.state_dict().items()}
    wrapped = {name: tensor for name, tensor in names.items() if ".lora_" in name}
    found = {name.replace(".weight", ".default.weight"): tensor for name, tensor in lora.published().items()}
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in wrapped.items()}
    assert len(lora.paths) == len(attention_layers(backbone.unet)) * (12 if variant == "ca" else 16) // 8
    # a checkpoint of such a training gives both adapters back
    wake(regions)
    base = {name: name.replace(".weight", ".base_layer.weight") for name in regions.published() if ".to_" in name}
    stored = {f"unet.{base.get(name, name)}": tensor for name, tensor in regions.published().items()}
    average = {f"ema_{name}": tensor + 1 for name, tensor in found.items()}
    torch.save({"state_dict": stored | found | average}, tmp_path / "last.ckpt")
    again = RegionsAdapter(backbone, variant=variant, hidden=16, weights=str(tmp_path / "last.ckpt"))
    assert all(torch.equal(tensor, regions.published()[name]) for name, tensor in again.published().items())
    both = {"adapters": True, "others": {"regions": again}, "rank": 3, "alpha": 3}  # a checkpoint says no alpha
    back = LoraAdapter(backbone, **both, weights=str(tmp_path / "last.ckpt"))
    assert all(torch.equal(tensor, lora.published()[name]) for name, tensor in back.published().items())


@pytest.mark.parametrize("method", [RegionsAdapter, BoxesAdapter])
def test_beside_another_adapter_s_layers_it_is_their_changed_weights(method, backbone, tmp_path):
    other = method(backbone, **({"hidden": 16} if method is RegionsAdapter else {}))
    wake(other)
    lora = awake(backbone, adapters=True, others={"other": other})
    both = Conditioning({"other": other, "lora": lora})
    both.attach(backbone.unet)
    expected = predict(backbone, both)
    keys = list(other.state_dict())
    both.detach(backbone.unet)
    assert not any(module._forward_hooks for module in [*other.modules(), *backbone.unet.modules()])
    # the same weights in the layers themselves, LoRA on the UNet's own alone
    plain = LoraAdapter(backbone, rank=3, alpha=6)
    load_weights_of(plain, lora)
    layers = slot_layers(other.slot_modules())
    with torch.no_grad():
        for path, change in lora.layer_modules().items():
            if path in layers:
                layers[path].weight.add_(change.lora_B.weight @ change.lora_A.weight, alpha=change.scaling)
    merged = Conditioning({"other": other, "lora": plain})
    merged.attach(backbone.unet)
    torch.testing.assert_close(predict(backbone, merged), expected, atol=2e-5, rtol=2e-5)
    assert list(other.state_dict()) == keys
    # a file of its own goes out and in
    save_adapter(lora, tmp_path / "own.safetensors", backbone=backbone)
    settings = {"rank": 3, "alpha": 6, "adapters": True, "weights": str(tmp_path / "own.safetensors")}
    back = LoraAdapter(backbone, others={"other": other}, **settings)
    assert all(torch.equal(tensor, lora.published()[name]) for name, tensor in back.published().items())
    with pytest.raises(ValueError, match="has unexpected"):
        LoraAdapter(backbone, **settings)


def load_weights_of(plain, lora):
    """Fills a LoRA on the UNet's own layers from one that has more."""
    with torch.no_grad():
        for name, tensor in plain.published().items():
            tensor.copy_(lora.published()[name])


def test_two_adapters_with_layers_of_one_name_are_refused(backbone):
    others = {"regions": RegionsAdapter(backbone, hidden=16), "boxes": BoxesAdapter(backbone)}
    with pytest.raises(
        ValueError, match=re.escape("conditioning.lora.adapters: true, but regions and boxes both have")
    ):
        LoraAdapter(backbone, adapters=True, others=others)
    assert LoraAdapter(backbone, adapters=False, others=others).paths == list(attention_layers(backbone.unet))


def test_every_layer_of_both_attentions_is_changed(backbone):
    layers = attention_layers(backbone.unet)
    blocks = {path.rsplit(".attn", 1)[0] for path in layers}
    assert len(layers) == 8 * len(blocks)
    assert list(LoraAdapter(backbone).layer_modules()) == list(layers)
    up = LoraAdapter(backbone, blocks="up")
    assert 0 < len(up.paths) < len(layers)
    assert all(path.startswith("up_blocks.") for path in up.paths)


def test_it_is_what_peft_computes_inside_the_unet(backbone):
    lora = awake(backbone)
    conditioning = Conditioning({"lora": lora})
    conditioning.attach(backbone.unet)
    expected = predict(backbone, conditioning)
    conditioning.detach(backbone.unet)
    backbone.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    try:
        parameters = dict(backbone.unet.named_parameters())
        with torch.no_grad():
            for path, change in lora.layer_modules().items():
                for name, parameter in change.named_parameters():
                    parameters[f"{path}.{name.replace('.weight', '.default.weight')}"].copy_(parameter)
        torch.testing.assert_close(predict(backbone, Conditioning({})), expected, atol=1e-5, rtol=1e-5)
    finally:
        backbone.unet.unload_lora()


def test_initialisation_is_peft_s(backbone):
    for init, deviation in (("gaussian", 1 / 8), ("kaiming", None)):
        for path, change in LoraAdapter(backbone, rank=8, init=init).layer_modules().items():
            first = change.lora_A.weight
            assert change.lora_B.weight.eq(0).all()
            if deviation is None:
                assert first.abs().max() <= first.shape[1] ** -0.5
            elif first.numel() > 200:
                assert first.std().item() == pytest.approx(deviation, rel=0.3), path
            assert first.device.type == "cpu"
            assert first.is_contiguous()


def test_dropout_acts_in_training_alone(backbone):
    lora = awake(backbone, dropout=0.5)
    path, change = next(iter(lora.layer_modules().items()))
    hidden = torch.ones(1, attention_layers(backbone.unet)[path][0])
    assert torch.equal(change.eval()(hidden), change(hidden))
    assert not torch.equal(change.train()(hidden), change.eval()(hidden))


def test_half_precision_layers_take_it(backbone):
    lora = awake(backbone)
    path, change = next(iter(lora.layer_modules().items()))
    layer = torch.nn.Linear(*attention_layers(backbone.unet)[path], dtype=torch.bfloat16)
    unet = backbone.unet
    attach(unet, {}, {"lora": {path: change}})
    (hook,) = unet.get_submodule(path)._forward_hooks.values()
    hidden = torch.randn(2, layer.in_features, dtype=torch.bfloat16)
    assert hook(layer, (hidden,), layer(hidden)).dtype == torch.bfloat16


def test_a_pipeline_of_diffusers_reads_what_is_written(backbone_named, tmp_path):
    backbone = backbone_named("tiny_sd15")
    lora = awake(backbone)
    lora.export(backbone, tmp_path / "out", form="diffusers")
    conditioning = Conditioning({"lora": lora})
    conditioning.attach(backbone.unet)
    expected = predict(backbone, conditioning)
    conditioning.detach(backbone.unet)
    pipeline = pipeline_of(backbone)
    pipeline.load_lora_weights(tmp_path / "out")
    try:
        torch.testing.assert_close(predict(backbone, Conditioning({})), expected, atol=1e-5, rtol=1e-5)
    finally:
        pipeline.unload_lora_weights()
    back = LoraAdapter(backbone, rank=3, alpha=6, weights=str(tmp_path / "out"))
    assert all(torch.equal(tensor, lora.published()[name]) for name, tensor in back.published().items())
    by_file = LoraAdapter(backbone, rank=3, alpha=6, weights=str(tmp_path / "out" / FILE))
    assert torch.equal(by_file.changes[0].lora_B.weight, lora.changes[0].lora_B.weight)


def pipeline_of(backbone):
    """diffusers' pipeline around the backbone's own parts; no picture is drawn with it."""
    tower = backbone.text.each[0]
    return StableDiffusionPipeline(
        vae=backbone.vae,
        text_encoder=tower.encoder,
        tokenizer=tower.tokenizer,
        unet=backbone.unet,
        scheduler=DDIMScheduler.from_config(backbone.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_what_does_not_fit_is_refused_by_name(backbone, tmp_path):
    lora = awake(backbone)
    lora.export(backbone, tmp_path / "out", form="diffusers")
    save_adapter(lora, tmp_path / "own.safetensors", backbone=backbone)
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    plain = load_file(tmp_path / "out" / FILE)
    save_file(plain, tmp_path / "plain.safetensors")
    for settings, file, message in (
        ({"rank": 4}, "out", "conditioning.lora.rank: 4 here, but"),
        ({"alpha": 3}, "out", "has 6; set it as there"),
        ({"alpha": 6}, "plain.safetensors", "conditioning.lora.alpha: 6 here, but"),  # without metadata it is the rank
        ({"rank": 4}, "own.safetensors", "conditioning.lora.rank: 4 here, but the weights were made with 3"),
        ({"blocks": "mid"}, "out", "has unexpected"),
        ({}, "none.safetensors", "holds no LoRA of the form"),
        ({}, "nowhere", "is no safetensors file, checkpoint or folder"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            LoraAdapter(backbone, **{"rank": 3, "alpha": 6, **settings}, weights=str(tmp_path / file))
        assert "\n" not in str(caught.value)
    for settings, message in (
        ({"rank": 0}, "conditioning.lora.rank: 0 is less than 1"),
        ({"dropout": 1.0}, "conditioning.lora.dropout: 1.0"),
        ({"init": "pissa"}, "conditioning.lora.init: 'pissa' is unknown"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            LoraAdapter(backbone, **settings)
    with pytest.raises(ValueError, match="form=kohya: conditioning.lora has no such form"):
        lora.export(backbone, tmp_path / "x", form="kohya")
    with pytest.raises(ValueError, match="conv_in is no linear layer of this UNet"):
        attach(backbone.unet, {}, {"lora": {"conv_in": lora.changes[0]}})


def test_other_settings_of_its_own_file_are_said(backbone, tmp_path):
    save_adapter(awake(backbone), tmp_path / "own.safetensors", backbone=backbone)
    other = LoraAdapter(backbone, rank=3, alpha=3)
    with pytest.warns(UserWarning, match="conditioning.lora.alpha: 3.0 here, but the weights were made with 6.0"):
        load_weights(other, tmp_path / "own.safetensors", backbone=backbone)


def test_no_slots_are_asked_for_without_a_payload(backbone):
    conditioning = Conditioning({"lora": LoraAdapter(backbone)})
    batch = SceneBatch(SCENES)
    inputs = conditioning(backbone, batch, batch.captions, SIZE)
    assert isinstance(inputs, DenoiserInputs)
    assert inputs.slots == {}
