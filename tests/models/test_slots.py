"""The contract with the installed diffusers: where slots are called, and that the UNet keeps no trace of them."""

import json
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from models.backbones.stable_diffusion import COMPONENTS
from models.conditioning.slots import BlockSite, DenoiserInputs, attach, block_sites, detach

BACKBONES = ("shapes", "tiny_sd15", "tiny_sdxl")
SIZE = (10, 14)  # no side and no number of tokens is another's, and lower levels are odd


class Probe(nn.Module):
    """Keeps what it is called with; gives `change(hidden)` back."""

    def __init__(self, change=lambda hidden: hidden):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.change, self.calls = change, []

    def forward(self, hidden, payload):
        returned = self.change(hidden)
        self.calls.append((hidden, payload, returned))
        return returned


@pytest.fixture(params=BACKBONES)
def backbone(request, backbone_named):
    backbone = backbone_named(request.param)
    yield backbone
    detach(backbone.unet)


def probes(unet, change=lambda hidden: hidden):
    return {site.path: Probe(change) for site in block_sites(unet)}


@torch.no_grad()
def denoise(backbone, size=SIZE, **slots):
    latents = torch.randn(2, backbone.latent_channels, *size, generator=torch.Generator().manual_seed(1))
    prompt = backbone.encode_captions(["a red circle", "a blue square"])
    size_ids = torch.tensor([[64.0, 96, 0, 0, 64, 96]]).expand(2, -1) if backbone.has_size_ids else None
    inputs = DenoiserInputs(prompt=prompt.tokens, pooled=prompt.pooled, size_ids=size_ids, slots=slots)
    return backbone.denoise(latents, torch.tensor([10, 700]), inputs)


def tiny_unet(**settings):
    plain = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**plain, **settings})


def traces(unet):
    """Every name by which an attached slot could be seen."""
    return {
        "keys": list(unet.state_dict()),
        "parameters": [name for name, _ in unet.named_parameters()],
        "modules": [name for name, _ in unet.named_modules()],
    }


def attributes(unet):
    return {path: set(vars(module)) for path, module in unet.named_modules()}


def test_an_attached_unet_has_the_keys_of_a_bare_one(backbone):
    bare = traces(backbone.unet)
    attach(backbone.unet, {"probe": probes(backbone.unet)})
    assert traces(backbone.unet) == bare


def test_modules_that_pass_through_give_exactly_the_bare_output(backbone):
    bare = denoise(backbone)
    attach(backbone.unet, {"probe": probes(backbone.unet)})
    assert torch.equal(denoise(backbone, probe="payload"), bare)


def test_without_a_payload_nothing_is_called(backbone):
    bare = denoise(backbone)
    modules = probes(backbone.unet, change=lambda hidden: hidden + 1)
    attach(backbone.unet, {"probe": modules})
    assert torch.equal(denoise(backbone), bare)
    assert torch.equal(denoise(backbone, another="payload"), bare)
    assert not any(module.calls for module in modules.values())
    assert not torch.allclose(denoise(backbone, probe="payload"), bare)


def test_each_module_is_called_once_with_the_payload_itself(backbone):
    payload, order = {"tokens": torch.zeros(1)}, []
    modules = probes(backbone.unet)
    for path, module in modules.items():
        module.register_forward_hook(lambda *_, path=path: order.append(path))
    attach(backbone.unet, {"probe": modules})
    denoise(backbone, probe=payload)
    assert order == [site.path for site in block_sites(backbone.unet)]
    assert all(module.calls[0][1] is payload for module in modules.values())


def test_sites_say_how_many_tokens_of_which_width_arrive(backbone):
    modules = probes(backbone.unet)
    attach(backbone.unet, {"probe": modules})
    denoise(backbone, probe=0)
    for site in block_sites(backbone.unet):
        height, width = (math.ceil(side / 2**site.level) for side in SIZE)
        assert modules[site.path].calls[0][0].shape == (2, height * width, site.width), site
        block = backbone.unet.get_submodule(site.path)
        assert (block.attn1.heads, block.attn1.to_q.out_features) == (site.heads, site.heads * site.head_width)
        assert block.attn2.to_k.in_features == site.cross_width


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("shapes", [1, 1, 1, 1]),
        ("tiny_sd15", [0, 1, 2, 3, 2, 2, 1, 1, 0, 0]),
        ("tiny_sdxl", [1, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1]),
    ],
)
def test_levels_of_each_structure(name, levels, backbone_named):
    assert [site.level for site in block_sites(backbone_named(name).unet)] == levels


@pytest.mark.parametrize(("name", "count"), [("sd15", 16), ("sdxl", 70)])
def test_published_structures_have_their_blocks_without_weights(name, count):
    config = json.loads((COMPONENTS / name / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    assert len(block_sites(unet)) == count


def test_the_slot_lies_between_self_and_cross_attention(backbone):
    modules = probes(backbone.unet, change=lambda hidden: hidden * 2 + 1)
    attach(backbone.unet, {"probe": modules})
    seen, hooks = {path: {} for path in modules}, []
    for path, record in seen.items():
        block = backbone.unet.get_submodule(path)
        hooks += [
            block.norm1.register_forward_pre_hook(lambda _, args, at=record: at.update(entered=args[0])),
            block.attn1.register_forward_hook(lambda _, args, result, at=record: at.update(self_attention=result)),
            block.norm2.register_forward_pre_hook(lambda _, args, at=record: at.update(before_cross=args[0])),
        ]
    try:
        denoise(backbone, probe=0)
    finally:
        for hook in hooks:
            hook.remove()
    for path, module in modules.items():
        [(received, _, returned)] = module.calls
        torch.testing.assert_close(received, seen[path]["entered"] + seen[path]["self_attention"])
        assert seen[path]["before_cross"] is returned


def test_several_adapters_act_in_the_order_of_their_names(backbone_named):
    backbone = backbone_named("shapes")
    site = block_sites(backbone.unet)[0]
    double, add = Probe(lambda hidden: hidden * 2), Probe(lambda hidden: hidden + 1)
    attach(backbone.unet, {"b_add": {site.path: add}, "a_double": {site.path: double}})
    try:
        denoise(backbone, a_double=0, b_add=0)
        assert add.calls[0][0] is double.calls[0][2]
        denoise(backbone, b_add=0)
        assert (len(double.calls), len(add.calls)) == (1, 2)
    finally:
        detach(backbone.unet)


def test_detach_restores_the_unet(backbone):
    bare, before = denoise(backbone), attributes(backbone.unet)
    attach(backbone.unet, {"probe": probes(backbone.unet, change=lambda hidden: hidden + 1)})
    assert attributes(backbone.unet) != before
    detach(backbone.unet)
    assert attributes(backbone.unet) == before
    assert torch.equal(denoise(backbone), bare)
    detach(backbone.unet)
    assert attributes(backbone.unet) == before
    attach(backbone.unet, {"probe": probes(backbone.unet)})
    assert torch.equal(denoise(backbone, probe=0), bare)


def test_a_taken_slot_is_refused():
    gated = tiny_unet(attention_type="gated")
    before, keys = attributes(gated), list(gated.state_dict())
    with pytest.raises(ValueError, match=r"slot of .* is taken; detach\(unet\) first") as refusal:
        attach(gated, {"probe": probes(gated)})
    assert "\n" not in str(refusal.value)
    assert attributes(gated) == before
    detach(gated)
    assert list(gated.state_dict()) == keys


def test_a_second_attach_is_refused_and_leaves_the_first():
    unet = tiny_unet()
    attach(unet, {"first": probes(unet)})
    before = attributes(unet)
    with pytest.raises(ValueError, match="is taken"):
        attach(unet, {"second": probes(unet)})
    assert attributes(unet) == before
    assert list(unet.position_net(first=1)) == ["first"]


@pytest.mark.parametrize("path", ["down_blocks.0", "down_blocks.0.resnets.0", "nowhere"])
def test_a_path_that_is_no_transformer_block_is_refused(path):
    unet = tiny_unet()
    before = attributes(unet)
    with pytest.raises(ValueError, match=f"probe: {path} is no transformer block .* block_sites"):
        attach(unet, {"probe": {**probes(unet), path: Probe()}})
    assert attributes(unet) == before


@pytest.mark.parametrize(
    ("blocks", "prefixes"),
    [
        ("all", {"down_blocks", "mid_block", "up_blocks"}),
        ("mid", {"mid_block"}),
        (["up", "down"], {"down_blocks", "up_blocks"}),
    ],
)
def test_parts_of_the_unet_can_be_chosen(blocks, prefixes):
    sites = block_sites(tiny_unet(), blocks)
    assert {site.path.split(".")[0] for site in sites} == prefixes
    assert all(isinstance(site, BlockSite) for site in sites)


def test_parts_that_do_not_exist_or_have_no_block_are_refused():
    with pytest.raises(ValueError, match="'middle' is no part of a UNet; take all, or some of down, mid, up"):
        block_sites(tiny_unet(), ["down", "middle"])
    plain = tiny_unet(down_block_types=("DownBlock2D", "DownBlock2D"))
    with pytest.raises(ValueError, match="names no transformer block"):
        block_sites(plain, "down")
