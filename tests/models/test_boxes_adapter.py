"""The boxes adapter against diffusers' own gated UNet; what it starts from; overflow and mask."""

import math
import os
import re
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from models.backbones.stable_diffusion import StableDiffusion
from models.backbones.tiny import make_tiny
from models.conditioning.adapter_file import save_adapter
from models.conditioning.base import Conditioning, Text
from models.conditioning.boxes import BoxesAdapter
from models.conditioning.boxes.adapter import BoxPayload, GatedSelfAttention, attention_loss, phrase_vectors
from models.objectives.draws import start_latents
from scenes import Frame, Scene, SceneBatch, SceneObject

SIZE = (8, 12)
SLOTS = 5
PHRASES = ("red dog", "a large tree", "car", "woman with a black hat", "blue plate")
BOXES = ((0.05, 0.1, 0.6, 0.7), (0.4, 0.3, 0.95, 0.9), (0.7, 0.0, 1.0, 0.2), (0.0, 0.0, 1.0, 1.0), (0.2, 0.8, 0.3, 0.9))


def thing(place, **changes):
    return SceneObject(**{"phrase": PHRASES[place], "box": BOXES[place], **changes})


def scene(count, **changes):
    return Scene(
        **{
            "id": f"with {count}",
            "caption": "a dog under a tree",
            "objects": tuple(thing(place) for place in range(count)),
            "frame": Frame(original=(64, 96)),
            **changes,
        }
    )


SCENES = [scene(count) for count in (0, 1, 3, SLOTS)]


def gate(unet, folder, seed=3):
    """Saves a UNet of diffusers' own with gated layers, every one of them random and open."""
    config = {**unet.config, "attention_type": "gated"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gated = UNet2DConditionModel.from_config(config)
        gated.load_state_dict(unet.state_dict(), strict=False)
        with torch.no_grad():
            for name, parameter in gated.named_parameters():
                if "alpha" in name:
                    parameter.uniform_(0.3, 0.9)
                elif "null" in name:
                    parameter.normal_()
    gated.save_pretrained(folder)
    return gated.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders in diffusers' layout whose UNets are gated, by kind."""
    root = tmp_path_factory.mktemp("gated")
    for kind in ("sd15", "sdxl"):
        make_tiny(kind, root / kind)
        gate(UNet2DConditionModel.from_pretrained(root / kind / "unet"), root / kind / "unet")
    return root


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def published(request, folders):
    """(folder, diffusers' gated UNet, our backbone without its gated layers)."""
    folder = folders / request.param
    return folder, UNet2DConditionModel.from_pretrained(folder / "unet"), StableDiffusion.from_folder(folder)


@pytest.fixture
def sd15(folders):
    return StableDiffusion.from_folder(folders / "sd15")


def text_of(backbone):
    return Text(prompt=backbone.encode_captions([""]), phrases=backbone.encode_phrases)


def payload_of(adapter, backbone, *scenes, size=SIZE):
    return adapter(SceneBatch(scenes), text_of(backbone), size).payload


def times(count):
    return torch.arange(count) * 200 + 50


@torch.no_grad()
def ours(backbone, adapter, scenes):
    conditioning = Conditioning({"boxes": adapter})
    conditioning.attach(backbone.unet)
    try:
        batch = SceneBatch(scenes)
        inputs = conditioning(backbone, batch, batch.captions, SIZE)
        latents = start_latents(0, [scene.id for scene in scenes], (4, *SIZE))
        return backbone.denoise(latents, times(len(scenes)), inputs)
    finally:
        conditioning.detach(backbone.unet)


@torch.no_grad()
def theirs(backbone, gated, scenes, slots=SLOTS):
    """The same from diffusers' UNet: boxes, phrase vectors and masks padded to the slots with zeros."""
    batch, width = SceneBatch(scenes), backbone.text_width
    boxes, vectors, masks = (torch.zeros(len(scenes), slots, *rest) for rest in ((4,), (width,), ()))
    for place, one in enumerate(scenes):
        count = len(one.objects)
        if count:
            features = backbone.encode_phrases([item.phrase for item in one.objects])
            vectors[place, :count] = phrase_vectors(features, with_projection=backbone.has_pooled)
            boxes[place, :count] = torch.tensor([item.box for item in one.objects])
            masks[place, :count] = 1
    prompt, extra = backbone.encode_captions(batch.captions), {}
    if backbone.has_pooled:
        extra["added_cond_kwargs"] = {"text_embeds": prompt.pooled, "time_ids": backbone.size_ids(batch)}
    return gated(
        start_latents(0, [scene.id for scene in scenes], (4, *SIZE)),
        times(len(scenes)),
        encoder_hidden_states=prompt.tokens,
        cross_attention_kwargs={"gligen": {"boxes": boxes, "positive_embeddings": vectors, "masks": masks}},
        **extra,
    ).sample


def close(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


# --- the function -------------------------------------------------------------------------------------------------------


def test_it_is_diffusers_own_gated_unet_with_no_one_several_and_all_slots_taken(published):
    folder, gated, backbone = published
    adapter = BoxesAdapter(backbone, slots=SLOTS, weights=str(folder), init="published")
    expected = theirs(backbone, gated, SCENES)
    close(ours(backbone, adapter, SCENES), expected)
    # boxes act, and how many slots there are is part of the function
    bare = ours(backbone, BoxesAdapter(backbone, slots=SLOTS), SCENES)
    assert (bare - expected).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    others = theirs(backbone, gated, SCENES, slots=SLOTS + 3)
    assert (others - expected).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_a_scene_without_boxes_is_the_published_null_condition(published):
    folder, gated, backbone = published
    adapter = BoxesAdapter(backbone, slots=30, weights=str(folder), init="published")
    empty = [scene(0), scene(0, id="named only", objects=(SceneObject(phrase="a dog"),)), scene(3).without_layout()]
    close(
        ours(backbone, adapter, empty), theirs(backbone, gated, [replace(one, objects=()) for one in empty], slots=30)
    )


@torch.no_grad()
def test_empty_slots_as_one_key_with_the_log_of_their_number_are_explicit_null_tokens(published):
    folder, _, backbone = published
    adapter = BoxesAdapter(backbone, slots=SLOTS, weights=str(folder), init="published")
    module = adapter.fusers[0]
    cells = SIZE[0] * SIZE[1] // 4 ** adapter.levels[0]  # the first block's
    hidden = torch.randn(1, cells, module.norm1.normalized_shape[0], generator=torch.Generator().manual_seed(0))
    for count in range(SLOTS):
        payload = payload_of(adapter, backbone, scene(count))
        assert payload.bias[cells].flatten().tolist() == pytest.approx([0.0] * count + [math.log(SLOTS - count)])
        objects, null = payload.tokens.split([count, 1], dim=1)
        tokens = torch.cat([objects, null.expand(-1, SLOTS - count, -1)], dim=1)
        explicit = BoxPayload(tokens=tokens, bias={cells: torch.zeros(1, 1, 1, SLOTS)})
        close(module(hidden, payload), module(hidden, explicit))


@torch.no_grad()
def test_with_the_box_mask_a_phrase_reaches_the_positions_of_its_box_alone(sd15, folders):
    changed = scene(2, objects=(thing(0, phrase="yellow bus"), thing(1)))
    columns, rows = ((torch.arange(side) + 0.5) / side for side in SIZE[::-1])
    x0, y0, x1, y1 = BOXES[0]
    inside = ((rows >= y0) & (rows <= y1))[:, None] & ((columns >= x0) & (columns <= x1))[None]
    inside = inside.flatten()
    assert 0 < inside.sum() < inside.numel()
    moved = {}
    for mask in ("box", "none"):
        adapter = BoxesAdapter(sd15, mask=mask, weights=str(folders / "sd15"), init="published")
        module = adapter.fusers[0]
        hidden = torch.randn(1, inside.numel(), 16, generator=torch.Generator().manual_seed(0))
        before, after = (module(hidden, payload_of(adapter, sd15, one)) for one in (scene(2), changed))
        moved[mask] = (after - before).abs().amax(dim=-1)[0]
    assert moved["box"][~inside].max() == 0
    assert moved["box"][inside].min() > 0
    assert moved["none"].min() > 0


def test_gates_say_how_far_they_are_open(sd15, folders):
    assert set(BoxesAdapter(sd15).gates().values()) == {0.0}
    adapter = BoxesAdapter(sd15, weights=str(folders / "sd15"), init="published")
    stored = load_file(folders / "sd15" / "unet" / "diffusion_pytorch_model.safetensors")
    path = adapter.paths[1]
    assert adapter.gates()[f"{path}.attn"] == pytest.approx(float(stored[f"{path}.fuser.alpha_attn"].tanh()))
    assert all(
        module.alpha_attn.shape == (1,) for module in adapter.modules() if isinstance(module, GatedSelfAttention)
    )


# --- the loss for what positions attend to -------------------------------------------------------------------------------


def test_the_attention_loss_is_minus_the_log_of_the_share_that_goes_where_it_should():
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4 + 2 + 1, 8)  # 4 positions, 2 objects, the null token
    bias = torch.zeros(2, 1, 1, 7)
    bias[1, ..., 5] = -math.inf  # the second scene has one object
    bias[..., 6] = math.log(3)
    under = torch.tensor(
        [[[True, False], [True, True], [False, False], [False, True]], [[True, False]] * 2 + [[False, False]] * 2]
    )
    weights = (query @ key.transpose(-1, -2) / math.sqrt(8) + bias).softmax(dim=-1)
    expected = []
    for picture in range(2):
        logs = []
        for head in range(3):
            for position in range(4):
                share = weights[picture, head, position]
                own = [place for place in range(2) if under[picture, position, place]]
                right = sum(share[4 + place] for place in own) if own else 1 - share[4] - share[5]
                logs.append(-math.log(right))
        expected.append(sum(logs) / len(logs))
    close(attention_loss(query, key, bias, under), torch.tensor(expected))


def test_taught_where_to_look_it_computes_the_same_and_learns_queries_and_keys(sd15):
    torch.manual_seed(0)
    adapter = BoxesAdapter(sd15, closed_by="projections", attention_loss=0.5)
    conditioning = Conditioning({"boxes": adapter})
    conditioning.attach(sd15.unet)
    batch = SceneBatch(SCENES[:3])
    latents = start_latents(0, [one.id for one in batch.scenes], (4, *SIZE))
    found = {}
    for training in (True, False):
        adapter.train(training)
        inputs = conditioning(sd15, batch, batch.captions, SIZE)
        found[training] = sd15.denoise(latents, times(3), inputs), conditioning.losses(inputs)
    assert torch.equal(found[True][0], found[False][0])
    assert found[False][1] == {}
    losses = found[True][1]["boxes"]
    assert losses.shape == (3,)
    assert losses[0] == 0  # no box: nothing to look at, and no object to look away from
    assert (losses[1:] > 0).all()
    losses.sum().backward()
    for fuser in adapter.fusers:
        assert fuser.attn["to_q"].weight.grad.abs().sum() > 0
        assert fuser.attn["to_k"].weight.grad.abs().sum() > 0
    assert adapter.position_net.linears[0].weight.grad.abs().sum() > 0
    gradient = adapter.fusers[0].attn["to_k"].weight.grad.clone()
    adapter.zero_grad()
    sd15.unet.enable_gradient_checkpointing()
    adapter.train()
    inputs = conditioning(sd15, batch, batch.captions, SIZE)
    sd15.denoise(latents, times(3), inputs)
    conditioning.losses(inputs)["boxes"].sum().backward()
    close(adapter.fusers[0].attn["to_k"].weight.grad, gradient)
    conditioning.detach(sd15.unet)
    half = BoxesAdapter(sd15, closed_by="projections", attention_loss=0.25)
    half.load_state_dict(adapter.state_dict())
    conditioning = Conditioning({"boxes": half})
    conditioning.attach(sd15.unet)
    inputs = conditioning(sd15, batch, batch.captions, SIZE)
    sd15.denoise(latents, times(3), inputs)
    close(2 * conditioning.losses(inputs)["boxes"], losses)


# --- what it starts from ------------------------------------------------------------------------------------------------


def seeded(backbone, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BoxesAdapter(backbone, **settings).published()


def stored_in(folder):
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return {key: tensor for key, tensor in tensors.items() if "fuser" in key or "position_net" in key}


def test_it_starts_published_reset_or_fresh(sd15, folders):
    stored = stored_in(folders / "sd15")
    fresh = seeded(sd15)
    taken = seeded(sd15, weights=str(folders / "sd15" / "unet"), init="published")
    reset = seeded(sd15, weights=str(folders / "sd15"), init="reset")
    assert fresh.keys() == taken.keys() == reset.keys() == stored.keys()
    assert all(torch.equal(taken[key], stored[key]) for key in stored)
    plain = {key for key in stored if key.rsplit(".", 1)[-1] in ("alpha_attn", "alpha_dense")} | {
        f"position_net.null_{kind}_feature" for kind in ("positive", "position")
    }
    assert len(plain) == 2 * len([key for key in stored if key.endswith("norm1.weight")]) + 2
    for key in stored:
        assert torch.equal(reset[key], (stored if key in plain else fresh)[key]), key
    assert all((fresh[key] == 0).all() for key in plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "publish"}, "conditioning.boxes.init: 'publish' is unknown; take published, reset, fresh"),
        ({"init": "published"}, "conditioning.boxes.init: published needs conditioning.boxes.weights=FILE"),
        ({"weights": "somewhere"}, "conditioning.boxes.weights: somewhere is not used by init=fresh"),
        (
            {"weights": "./nowhere", "init": "published"},
            "conditioning.boxes.weights: ./nowhere is no file or folder here",
        ),
        ({"slots": 0}, "conditioning.boxes.slots: 0 is less than 1"),
        ({"overflow": "random"}, "conditioning.boxes.overflow: 'random' is unknown; take refuse, largest, score"),
        ({"mask": "boxes"}, "conditioning.boxes.mask: 'boxes' is unknown; take none, box"),
        ({"attention_loss": -1.0}, "conditioning.boxes.attention_loss: -1.0 is negative; take 0"),
        ({"attention_loss": 0.1, "mask": "box"}, "conditioning.boxes.attention_loss: with mask=box positions see only"),
    ],
)
def test_wrong_settings_are_refused_by_name(backbone_named, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        BoxesAdapter(backbone_named("tiny_sd15"), **settings)
    assert "\n" not in str(caught.value)


def refusal(backbone, weights, **settings):
    with pytest.raises(ValueError, match=re.escape(f"conditioning.boxes.weights: {weights}")) as caught:
        BoxesAdapter(backbone, weights=str(weights), init="published", **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_unexpected_keys_are_all_named(sd15, folders, tmp_path):
    stored = stored_in(folders / "sd15")
    missing = ["position_net.linears.0.bias", "mid_block.attentions.0.transformer_blocks.0.fuser.alpha_dense"]
    for key in missing:
        stored[f"{key}_too"] = stored.pop(key)
    save_file(stored, tmp_path / "renamed.safetensors")
    message = refusal(sd15, tmp_path / "renamed.safetensors")
    assert f"misses 2 keys: {', '.join(sorted(missing))}" in message
    assert f"has unexpected 2 keys: {', '.join(sorted(f'{key}_too' for key in missing))}" in message


def test_weights_for_another_text_width_are_refused_with_both(backbone_named, folders, tmp_path):
    sdxl = StableDiffusion.from_folder(folders / "sdxl")
    message = refusal(sdxl, folders / "sd15")
    assert "belongs to another backbone" in message
    assert "position_net.null_positive_feature (24,) for (64,)" in message
    file = tmp_path / "sdxl.safetensors"
    save_adapter(BoxesAdapter(sdxl), file, backbone=sdxl)
    message = refusal(backbone_named("tiny_sd15"), file)
    assert "its text_width is 64, this one's 24; give weights of this backbone, or choose theirs" in message


def test_the_real_widths_768_and_2048_are_told_apart(tmp_path):
    def skeleton(name):
        return StableDiffusion.from_configs(name)

    adapter = BoxesAdapter(skeleton("sd15"), blocks="mid")
    save_adapter(adapter, tmp_path / "sd.safetensors", backbone=skeleton("sd15"))
    message = refusal(skeleton("sdxl"), tmp_path / "sd.safetensors", blocks="mid")
    assert "its text_width is 768, this one's 2048" in message
    bare = adapter.published()
    save_file({key: tensor.contiguous() for key, tensor in bare.items()}, tmp_path / "bare.safetensors")
    message = refusal(skeleton("sdxl"), tmp_path / "bare.safetensors", blocks="mid")
    assert "position_net.null_positive_feature (768,) for (2048,)" in message


def test_with_open_gates_the_projections_learn_from_the_first_step(sd15):
    for closed_by, learns in (("gates", False), ("projections", True)):
        adapter = BoxesAdapter(sd15, closed_by=closed_by)
        fuser = adapter.fusers[0]
        hidden = torch.randn(1, 16, fuser.norm1.normalized_shape[0])
        tokens = adapter.position_net(torch.randn(1, 2, sd15.text_width), torch.rand(1, 2, 4))
        payload = BoxPayload(tokens=tokens, bias={16: torch.zeros(1, 1, 1, 3)})
        out = fuser(hidden, payload)
        assert torch.equal(out, hidden)
        out.square().sum().backward()
        assert bool(fuser.attn["to_out"][0].weight.grad.abs().sum() > 0) is learns
        assert bool(fuser.ff.net[-1].weight.grad.abs().sum() > 0) is learns


def test_open_gates_need_a_fresh_start(sd15, tmp_path):
    save_adapter(BoxesAdapter(sd15), tmp_path / "boxes.safetensors", backbone=sd15)
    with pytest.raises(ValueError, match="closed_by: projections needs init=fresh"):
        BoxesAdapter(sd15, closed_by="projections", weights=str(tmp_path / "boxes.safetensors"), init="published")
    with pytest.raises(ValueError, match="conditioning.boxes.closed_by: 'doors' is unknown; take gates, projections"):
        BoxesAdapter(sd15, closed_by="doors")


def test_a_unet_without_gated_layers_is_refused(sd15, tmp_path):
    sd15.unet.save_pretrained(tmp_path / "unet")
    assert "has attention_type='default'; give a UNet with gated" in refusal(sd15, tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    assert "holds no box weights" in refusal(sd15, tmp_path)


class Trap:
    """What a hostile pickle holds."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_weights_are_read_and_pickled_code_is_not_run(sd15, folders, tmp_path):
    stored = stored_in(folders / "sd15")
    file = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(stored, file)
    adapter = BoxesAdapter(sd15, weights=str(tmp_path), init="published")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in adapter.published().items())
    torch.save({**stored, "trap": Trap(str(tmp_path / "sprung"))}, file)
    assert "diffusion_pytorch_model.bin cannot be read" in refusal(sd15, tmp_path)
    assert not (tmp_path / "sprung").exists()
    torch.save({"step": 3, "state": stored}, file)
    assert "holds other things than tensors by name" in refusal(sd15, tmp_path)
    file.write_bytes(b"half a file")
    assert "cannot be read" in refusal(sd15, tmp_path)


def test_of_a_folder_with_several_precisions_the_full_one_is_read(sd15, folders, tmp_path):
    stored = stored_in(folders / "sd15")
    for name, tensors in (("", stored), (".fp16", {k: t.half() for k, t in stored.items()}), (".non_ema", {})):
        save_file(tensors, tmp_path / f"diffusion_pytorch_model{name}.safetensors")
    adapter = BoxesAdapter(sd15, weights=str(tmp_path), init="published")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in adapter.published().items())
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    halved = BoxesAdapter(sd15, weights=str(tmp_path), init="published").published()
    assert all(torch.equal(tensor, stored[key].half().float()) for key, tensor in halved.items())


def test_other_slots_than_those_of_the_weights_are_said(sd15, tmp_path):
    save_adapter(BoxesAdapter(sd15, slots=32), tmp_path / "a.safetensors", backbone=sd15)
    with pytest.warns(UserWarning, match="boxes.slots: 30 here, but the weights were made with 32; set it as there"):
        BoxesAdapter(sd15, weights=str(tmp_path / "a.safetensors"), init="published")
    BoxesAdapter(sd15, slots=32, weights=str(tmp_path / "a.safetensors"), init="published")
    with pytest.raises(ValueError, match=re.escape("blocks: ['mid'] here, but the weights were made with all")):
        BoxesAdapter(sd15, slots=32, blocks=["mid"], weights=str(tmp_path / "a.safetensors"), init="published")


# --- more boxes than slots ----------------------------------------------------------------------------------------------

SCORES = (0.9, 0.2, 0.8, 0.3, 0.7)


@torch.no_grad()
@pytest.mark.parametrize(("overflow", "kept"), [("largest", (0, 1, 3)), ("score", (0, 2, 4))])
def test_too_many_boxes_leave_the_largest_or_the_surest_in_their_order(sd15, overflow, kept):
    adapter = BoxesAdapter(sd15, slots=3, overflow=overflow)
    objects = tuple(thing(place, score=SCORES[place]) for place in range(SLOTS))
    crowded = scene(0, objects=(*objects, SceneObject(phrase="no box")))
    expected = scene(0, objects=tuple(objects[place] for place in kept))
    payload, other = (payload_of(adapter, sd15, one) for one in (crowded, expected))
    assert adapter.left_out == 2
    close(payload.tokens, other.tokens)
    assert torch.equal(payload.bias[96], other.bias[96])
    assert payload.bias[96].flatten().tolist() == [0.0, 0.0, 0.0, -math.inf]  # no slot is empty
    assert ours(sd15, adapter, [crowded]).isfinite().all()


@torch.no_grad()
def test_too_many_boxes_are_refused_where_nothing_else_is_said(sd15):
    message = (
        "scene with 5: objects: 5 boxes for conditioning.boxes.slots=4; raise slots, or set conditioning.boxes.overflow"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        payload_of(BoxesAdapter(sd15, slots=4), sd15, scene(5))
    unscored = BoxesAdapter(sd15, slots=4, overflow="score")
    with pytest.raises(ValueError, match=re.escape("scene with 5: objects[0].score: missing")):
        payload_of(unscored, sd15, scene(5))
    absent = scene(4, objects=(*scene(4).objects, SceneObject(phrase="no box")))
    assert (
        payload_of(BoxesAdapter(sd15, slots=4), sd15, absent).tokens.shape[1] == 6
    )  # a name without a box takes no slot
