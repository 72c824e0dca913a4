"""Regional attention against recorded tensors of the published code and against the plain loop over regions."""

import json
import re
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.published_regions import published_attention, published_inputs, published_tokens, slots_needed
from models.backbones.stable_diffusion import StableDiffusion
from models.conditioning.adapter_file import save_adapter
from models.conditioning.base import Text
from models.conditioning.regions import RegionsAdapter
from models.conditioning.regions.attention import RegionalAttention, RegionPayload
from models.conditioning.regions.levels import BatchRegions, blocks, region_level
from models.conditioning.regions.tokens import RegionRows, RegionText, RegionTokens, RegionWriter
from models.conditioning.slots import BlockSite, DenoiserInputs, attach, block_sites
from models.text import TextTower
from scenes import Scene, SceneBatch, SceneObject
from scenes.scene import SceneError

RECORDED = Path(__file__).parents[1] / "golden" / "rca"
CASES = json.loads((RECORDED / "cases.json").read_text())
long_texts = pytest.mark.filterwarnings("ignore:text. .* was cut:UserWarning")
WORDS = "a the red old small wooden dog boat table person beside holding under with ; and, tree. house water".split()
SIZE = (12, 16)


# recorded tensors ---------------------------------------------------------------------------------------------------


def close(found, recorded, share=1e-5):
    """Equal to a share of the largest number: those of the recorded layers go up to hundreds."""
    assert (found - recorded).abs().max() <= share * max(1.0, float(recorded.abs().max()))


def recorded_layer(case, variant):
    """(layer, hidden states, what ours reads, what the loop reads, recorded output) of a case."""
    tensors = load_file(RECORDED / case["file"])
    hidden, tokens, mask = (tensors[key] for key in ("in.hidden_states", "out.text_feat", "in.cross_attention_mask"))
    real, (side, width) = int(tensors["in.object_masks"].sum()), (int(hidden.shape[1] ** 0.5), hidden.shape[2])
    masks, unions = (tensors[f"in.{name}"] for name in ("reorg_masks", "reorg_union_masks"))
    bias = mask[0, :real].masked_fill(mask[0, :real] < -500, -torch.inf)
    every = torch.ones(1, *unions.shape[2:], dtype=torch.bool)
    regions = BatchRegions(
        index=masks[:, :real].argmax(1),
        owner=[0] * real,
        members=[],
        iou=[],
        unions=torch.cat([unions[0, :real].bool(), every]),
        left_out=0,
    )
    rows = RegionRows(tokens=torch.arange(bias.numel()).view(bias.shape), bias=bias)
    level = region_level(regions, rows, (side, side), rasterise="published", within=True)
    site = BlockSite(
        path="", width=width, heads=case["heads"], head_width=width // case["heads"], cross_width=48, level=0
    )
    layer = RegionalAttention(site, token_width=tokens.shape[-1], place=0, within=variant == "casa")
    prefix = f"fuser_{variant}."
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    payload = RegionPayload(tokens=tokens.flatten(0, 2), levels={side**2: level})
    padded = [torch.nn.functional.interpolate(each.float(), (side, side)).flatten(2) for each in (masks, unions)]
    return layer, hidden, payload, (tokens, mask, *padded), tensors[f"out.{variant}"]


cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
variants = pytest.mark.parametrize("variant", ["ca", "casa"])


@torch.no_grad()
@variants
@cases
def test_a_layer_gives_the_recorded_tensors(case, variant):
    layer, hidden, payload, _, recorded = recorded_layer(case, variant)
    # logits of the recorded self-attention are in the thousands: its numbers themselves are up to 6e-5 of the largest away from
    # the same in double precision
    close(layer(hidden, payload), recorded, share={"ca": 1e-5, "casa": 5e-5}[variant])


@torch.no_grad()
@variants
@cases
def test_a_recorded_layer_is_the_loop_in_double_precision(case, variant):
    layer, hidden, payload, padded, _ = recorded_layer(case, variant)
    wide = RegionPayload(tokens=payload.tokens.double(), levels=payload.levels)
    expected = published_attention(layer.double(), hidden.double(), *(each.double() for each in padded))
    close(layer(hidden.double(), wide), expected, share=1e-8)


@torch.no_grad()
def test_the_token_network_gives_the_recorded_tensors():
    tensors = load_file(RECORDED / "case1.safetensors")
    own = {k.removeprefix("position_net."): v for k, v in tensors.items() if k.startswith("position_net.")}
    network = RegionTokens(text_width=24, width=48, hidden=512, frequencies=8)
    network.load_state_dict(own)
    real = int(tensors["in.object_masks"].sum())
    found = network(tensors["in.text_embeddings"][:, :real], tensors["in.bbox_embeddings"][:, :real])
    close(found, tensors["out.text_feat"][:, :real])


def recorded_backbone(golden, variant):
    """The published UNet without its regional layers, with its text encoders."""
    folder = golden / f"regional_unet_{variant}" / "unet"
    config = json.loads((folder / "config.json").read_text())
    added = ("attention_type", "fuser_cls", "position_net_cls")
    unet = UNet2DConditionModel.from_config(
        {k: v for k, v in config.items() if k not in added and not k.startswith("_")}
    )
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    unet.load_state_dict({k: v for k, v in weights.items() if "fuser" not in k and "position_net" not in k})
    tokenizer = CLIPTokenizer.from_pretrained(golden / "scene_graph" / "tokenizer")
    towers = [
        TextTower(tokenizer, kind.from_pretrained(golden / "scene_graph" / name))
        for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
    ]
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
    )
    backbone = StableDiffusion(unet=unet, vae=vae, towers=towers, scheduler_config={}, resolution=128)
    backbone.freeze()
    return backbone


@torch.no_grad()
@variants
def test_the_unet_gives_the_recorded_noise(variant, golden):
    folder = golden / f"regional_unet_{variant}"
    backbone = recorded_backbone(golden, variant)
    adapter = RegionsAdapter(backbone, variant=variant, rasterise="published", weights=str(folder))
    outputs = load_file(folder / "outputs.safetensors")
    attach(backbone.unet, {"regions": adapter.slot_modules()})
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        size = (case["height"], case["width"])
        boxes = (torch.tensor(case["boxes_xyxy_px"]) / torch.tensor([size[1], size[0]] * 2)).tolist()
        layout = scene(*zip(case["labels"], boxes, strict=True))
        for kind, one in (("layout", layout), ("empty_layout", layout.without_layout()), ("no_layout", None)):
            slots = {} if one is None else {"regions": payload_of(adapter, backbone, one, size=(size[0] // 8,) * 2)}
            given = {name: outputs[f"case{number}.{name}"] for name in ("x", "t", "ctx", "pooled", "time_ids")}
            inputs = DenoiserInputs(
                prompt=given["ctx"], pooled=given["pooled"], size_ids=given["time_ids"], slots=slots
            )
            found = backbone.denoise(given["x"], given["t"], inputs)
            torch.testing.assert_close(found, outputs[f"case{number}.eps_{kind}"], atol=1e-5, rtol=0)


# the plain loop -----------------------------------------------------------------------------------------------------


def scene(*objects, name="a"):
    return Scene(id=name, objects=tuple(SceneObject(phrase=phrase, box=tuple(box)) for phrase, box in objects))


def random_scene(count, seed):
    """Boxes of any size, some the same, some on a lattice, with texts of 1 to 12 words."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(size=(count, 2, 2))
    low, high = corners.min(1), corners.max(1)
    high = np.minimum(np.maximum(high, low + 0.02), 1)
    low = np.minimum(low, high - 0.02)
    boxes = np.concatenate([low, high], axis=1)
    boxes[1::5] = boxes[::5][: len(boxes[1::5])]
    boxes[2::5] = [0.0, 0.25, 1.0, 0.75]
    texts = [" ".join(generator.choice(WORDS, size=generator.integers(1, 13))) + " cat" for _ in boxes]
    return scene(*zip(texts, boxes.tolist(), strict=True), name=f"random {seed}")


def text_of(backbone):
    return Text(prompt=backbone.encode_captions([""]), phrases=backbone.encode_phrases)


def payload_of(adapter, backbone, *scenes, size=SIZE):
    return adapter(SceneBatch(scenes), text_of(backbone), size).payload


def awake(backbone, **settings):
    """An adapter whose layers all act."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = RegionsAdapter(backbone, hidden=24, **settings)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if "to_out" in name or "null" in name:
                    parameter.normal_(std=0.3)
    return adapter


@pytest.fixture(scope="module")
def sdxl(backbone_named):
    return backbone_named("tiny_sdxl")


@long_texts
@pytest.mark.parametrize("rasterise", ["exact", "published"])
@variants
@pytest.mark.parametrize("count", [1, 4, 13, 60])
def test_values_and_gradients_are_those_of_the_loop(count, variant, rasterise, sdxl):
    adapter = awake(sdxl, variant=variant, rasterise=rasterise)
    layer, level = adapter.attentions[0], block_sites(sdxl.unet)[0].level
    scenes = SceneBatch([random_scene(count, count), random_scene(max(1, count // 2), 7), scene(name="none")])
    grid = tuple(-(-side // 2**level) for side in SIZE)
    generator = torch.Generator().manual_seed(count)
    width = layer.null_text_feat.shape[0]
    hidden = torch.randn(3, grid[0] * grid[1], width, generator=generator).requires_grad_()
    pull = torch.randn(hidden.shape, generator=generator) / hidden[0].numel() ** 0.5

    def result(output):
        wanted = {
            name: p for name, p in adapter.named_parameters() if name.startswith(("position_net", "attentions.0."))
        }
        gradients = torch.autograd.grad((output * pull).sum(), [hidden, *wanted.values()])
        return output, dict(zip(["hidden", *wanted], gradients, strict=True))

    fast, fast_gradients = result(layer(hidden, adapter(scenes, text_of(sdxl), SIZE).payload))
    slots = slots_needed(scenes.scenes, SIZE, rasterise=rasterise) + 1
    inputs = published_inputs(scenes, sdxl.text, SIZE, slots=slots, rasterise=rasterise)
    masks, unions = inputs.at(grid, "nearest" if rasterise == "published" else "nearest-exact")
    tokens = published_tokens(adapter.position_net, inputs)
    slow, slow_gradients = result(published_attention(layer, hidden, tokens, inputs.bias, masks, unions))
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    for name in fast_gradients:
        torch.testing.assert_close(fast_gradients[name], slow_gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_keys_and_values_of_a_picture_are_kept_where_no_gradient_is_asked_for(sdxl):
    adapter = awake(sdxl)
    one = random_scene(5, 3)
    kept = payload_of(adapter, sdxl, one)
    assert len(kept.kept) == len(adapter.attentions)
    with torch.enable_grad():
        fresh = payload_of(adapter, sdxl, one)
    assert not fresh.kept
    layer = adapter.attentions[-1]
    hidden = torch.randn(1, SIZE[0] * SIZE[1] // 4 ** adapter.levels[-1], layer.null_text_feat.shape[0])
    torch.testing.assert_close(layer(hidden, kept), layer(hidden, fresh), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 32])
def test_blocks_hold_every_position_once_with_its_own_region(size):
    index = torch.randint(-1, 6, (50,), generator=torch.Generator().manual_seed(size))
    index[index == 3] = 2  # a region without a position
    query, region, place = blocks(index, 6, size=size)
    assert query.shape == (len(region), size)
    held = (index >= 0).nonzero().flatten()
    assert torch.equal(query.flatten()[place[held]], held)
    assert torch.equal(region[place[held] // size], index[held])
    assert len(place[held].unique()) == len(held)


# words ---------------------------------------------------------------------------------------------------------------


def written(backbone, texts, overflow="joined", iou=None):
    """(words, strings that were encoded) of regions given as lists of objects by number."""
    asked = []

    def phrases(strings, **options):
        asked.extend(strings)
        return backbone.encode_phrases(strings, **options)

    regions = [
        RegionText(
            texts=[row[n] for n in row],
            boxes=[(0.1 * n, 0.0, 1.0, 1.0) for n in row],
            iou=(iou or {}).get(place, [1.0] * len(row)),
            scope=0,
            names=list(row),
        )
        for place, row in enumerate(texts)
    ]
    writer = RegionWriter(
        tokenise=backbone.text.each[0].tokenise,
        max_length=backbone.text.max_length,
        overflow=overflow,
        scale=2.0,
    )
    return writer(regions, phrases, torch.device("cpu")), asked


def test_words_that_regions_share_are_there_once(sdxl):
    words, asked = written(sdxl, [{}, {0: "cat"}, {0: "cat", 1: "dog"}, {1: "dog"}])
    cat, dog = (len(sdxl.text.each[0].tokenise([one])[0]) - 2 for one in ("cat", "dog"))
    assert asked == ["cat; dog", "dog", ""]  # what another text begins with is not encoded again
    assert len(words.features) == 77 + cat + 2 * dog  # the second dog comes after a cat, the first after nothing
    rows = [words.rows.tokens[r][words.rows.bias[r].isfinite()] for r in range(4)]
    assert [len(row) for row in rows] == [77, cat, cat + dog, dog]
    assert torch.equal(rows[1], rows[2][:cat])
    assert words.boxes[rows[0]].eq(-1).all()
    assert words.boxes[rows[3]].eq(torch.tensor([0.1, 0.0, 1.0, 1.0])).all()
    assert words.cut == 0


def test_the_bias_is_the_overlap_less_one_times_the_scale(sdxl):
    words, _ = written(sdxl, [{0: "cat", 1: "dog"}], iou={0: [0.25, 1.0]})
    assert words.rows.bias.unique().tolist() == [-1.5, 0.0]


@pytest.mark.parametrize("texts", [("a; b", "c"), ("cat.", "dog"), ("cat\u037e", "dog!"), ("one", ";;", "two;")])
def test_separators_within_texts_do_not_move_boxes(texts, sdxl):
    words, _ = written(sdxl, [dict(enumerate(texts))])
    for n, text in enumerate(texts):
        own = words.boxes[:, 0].eq(torch.tensor(0.1 * n)).sum()
        plain = text.replace(";", "").replace("\u037e", "")
        assert own == len(sdxl.text.each[0].tokenise([plain])[0]) - 2


@long_texts
def test_what_does_not_fit_is_counted(sdxl):
    long = " ".join(["dog"] * 30)
    tokens = len(sdxl.text.each[0].tokenise([f"{long}; {long}; {long}"])[0])
    assert tokens > 77
    joined, _ = written(sdxl, [{0: long, 1: long, 2: long}])
    assert joined.cut == tokens - 77
    assert len(joined.features) < 77
    apart, _ = written(sdxl, [{0: long, 1: long, 2: long}], overflow="per_object")
    assert apart.cut == 0
    assert len(apart.features) == 90
    adapter = RegionsAdapter(sdxl, hidden=8)
    payload_of(adapter, sdxl, scene(*[(long, (0, 0, 1, 1))] * 3))
    assert adapter.counts() == {"tokens": tokens - 77, "regions": 0}


def test_a_description_falls_back_to_the_phrase(sdxl):
    item = SceneObject(phrase="cat", box=(0, 0, 1, 1), description="a red cat")
    plain = SceneObject(phrase="cat", box=(0, 0, 1, 1))
    for text, objects, expected in (
        ("description", (item,), "a red cat"),
        ("phrase", (item,), "cat"),
        ("description", (plain,), "cat"),
    ):
        adapter, seen = RegionsAdapter(sdxl, hidden=8, text=text), []

        def phrases(strings, seen=seen, **options):
            seen.extend(strings)
            return sdxl.encode_phrases(strings, **options)

        adapter(SceneBatch([Scene(id="a", objects=objects)]), Text(prompt=None, phrases=phrases), SIZE)
        assert seen == [expected]


# bad and extreme input -----------------------------------------------------------------------------------------------

EXTREMES = {
    "no objects": scene(),
    "identical boxes": scene(*[(word, (0.2, 0.2, 0.7, 0.9)) for word in ("cat", "dog", "cat")]),
    "a box over everything": scene(("sky", (0, 0, 1, 1)), ("dog", (0.5, 0.5, 0.6, 0.6))),
    "thin boxes": scene(("line", (0.5, 0.1, 0.501, 0.9)), ("dot", (0.9, 0.9, 0.901, 0.901))),
    "200 objects": random_scene(200, 1),
}


@long_texts
@torch.no_grad()
@variants
@pytest.mark.parametrize("rasterise", ["exact", "published"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_layouts_give_finite_numbers(name, rasterise, variant, sdxl):
    adapter = awake(sdxl, variant=variant, rasterise=rasterise, overflow="per_object")
    payload = payload_of(adapter, sdxl, EXTREMES[name])
    hidden = torch.randn(1, 48, adapter.attentions[0].null_text_feat.shape[0])
    found = adapter.attentions[0](hidden, payload)
    assert found.isfinite().all()
    if name == "no objects":
        torch.testing.assert_close(found, hidden + adapter.attentions[0].null_text_feat)
    if name == "thin boxes":
        covered = {"exact": 2, "published": 0}[rasterise]
        kept = [row for row in payload.levels[48].bias.isfinite().sum(-1).flatten().tolist() if row < 77]
        assert len(set(kept)) <= covered


def test_boxes_without_area_are_no_scenes():
    with pytest.raises(SceneError, match="box"):
        scene(("dot", (0.5, 0.5, 0.5, 0.6)))


@torch.no_grad()
def test_regions_beyond_the_limit_get_the_null_feature_and_are_counted(sdxl):
    one = random_scene(8, 2)
    adapter = awake(sdxl, max_regions=3, overflow="per_object").eval()
    whole = awake(sdxl, overflow="per_object").eval()
    payload, every = payload_of(adapter, sdxl, one), payload_of(whole, sdxl, one)
    level, full = payload.levels[48], every.levels[48]
    assert full.covered.all()
    assert 0 < level.covered.sum() < 48
    present = slots_needed([one], SIZE, rasterise="exact")
    assert adapter.counts() == {"tokens": 0, "regions": present - 3}
    layer, hidden = adapter.attentions[0], torch.randn(1, 48, adapter.attentions[0].null_text_feat.shape[0])
    found, expected = layer(hidden, payload), layer(hidden, every)
    inside = level.covered[0, :, 0]
    torch.testing.assert_close(found[0, inside], expected[0, inside], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0, ~inside], (hidden + layer.null_text_feat)[0, ~inside])
    adapter.train()
    torch.manual_seed(0)
    drawn = {tuple(payload_of(adapter, sdxl, one).levels[48].covered.flatten().tolist()) for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "cross"}, "conditioning.regions.variant: 'cross' is unknown; take ca, casa, union"),
        ({"rasterise": "rough"}, "conditioning.regions.rasterise: 'rough' is unknown; take exact, published"),
        ({"overflow": "cut"}, "conditioning.regions.overflow: 'cut' is unknown; take joined, per_object"),
        ({"max_regions": 0}, "conditioning.regions.max_regions: 0 is less than 1; take null"),
        ({"place_width": 4}, "conditioning.regions.place_width: 4 with variant=ca"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, sdxl):
    with pytest.raises(ValueError, match=re.escape(message)):
        RegionsAdapter(sdxl, **settings)


# weights -------------------------------------------------------------------------------------------------------------

CLASSES = {"ca": "RegionalCrossAttention", "casa": "RegionalCrossAndSelfAttention"}


def published_folder(adapter, unet, folder, variant="ca", **config):
    """A folder as the published script writes it."""
    (folder / "unet").mkdir(parents=True)
    names = {
        "fuser_cls": f"regional_attention.regional_attention.{CLASSES[variant]}",
        "position_net_cls": "regional_attention.regional_attention.TextEmbeddingNetV2",
    }
    (folder / "unet" / "config.json").write_text(json.dumps({"attention_type": "regional", **names, **config}))
    tensors = {**unet.state_dict(), **adapter.published()}
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def same(one, other):
    ours, theirs = one.published(), other.published()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind", ["tiny_sd15", "tiny_sdxl"])
@variants
def test_published_folders_checkpoints_and_own_files_come_and_go(variant, kind, backbone_named, tmp_path):
    backbone = backbone_named(kind)
    adapter = awake(backbone, variant=variant)
    adapter.position_net.null_text_feature.fill_(0.5)
    folder = published_folder(adapter, backbone.unet, tmp_path / "published", variant)
    tensors = adapter.published()
    old = {key.replace("null_text_feature", "null_positive_feature"): value for key, value in tensors.items()}
    average = {f"ema_unet.module.{key}": value + 1 for key, value in tensors.items()}
    torch.save({"state_dict": {f"unet.{k}": v for k, v in tensors.items()} | average}, tmp_path / "last.ckpt")
    torch.save({"module": {f"_forward_module.unet.{k}": v for k, v in tensors.items()}}, tmp_path / "zero.pt")
    # what extract_pn_and_fuser.py takes out of a checkpoint with an average: the published start of the SD 1.5 run
    torch.save(old | {f"ema_module.{k}": v + 1 for k, v in tensors.items()}, tmp_path / "extracted.pt")
    wrapped = {
        key.replace(".attn.to_q.weight", ".attn.to_q.base_layer.weight"): value for key, value in tensors.items()
    }
    place = next(iter(adapter.slot_modules()))
    wrapped[f"{place}.fuser.attn.to_q.lora_A.default.weight"] = torch.ones(2, 2)
    torch.save({"state_dict": {f"unet.{k}": v for k, v in wrapped.items()}}, tmp_path / "lora.ckpt")
    save_adapter(adapter, tmp_path / "own.safetensors", backbone=backbone)
    for path in (
        folder,
        folder / "unet",
        *(tmp_path / name for name in ("last.ckpt", "zero.pt", "extracted.pt", "lora.ckpt", "own.safetensors")),
    ):
        other = RegionsAdapter(backbone, variant=variant, hidden=24, weights=str(path))
        assert same(other, adapter), path


def test_weights_that_do_not_fit_are_refused_by_name(sdxl, tmp_path):
    ca, casa = awake(sdxl), awake(sdxl, variant="casa")
    torch.save({"state_dict": {"vae.a": torch.zeros(1)}}, tmp_path / "none.ckpt")
    torch.save({"model": Path("a")}, tmp_path / "code.ckpt")
    torch.save(dict(casa.published()), tmp_path / "casa.pt")
    inst = {"position_net_cls": "regional_attention.regional_attention.TextEmbeddingNetInstDiff"}
    for path, message in (
        (published_folder(casa, sdxl.unet, tmp_path / "casa", "casa"), "is of variant=casa, this adapter of ca; set"),
        (published_folder(ca, sdxl.unet, tmp_path / "inst", **inst), "position_net_cls=TextEmbeddingNetInstDiff; give"),
        (published_folder(ca, sdxl.unet, tmp_path / "plain", fuser_cls=None), "names fuser_cls=None"),
        (tmp_path / "casa.pt", "set conditioning.regions.variant=casa"),
        (tmp_path / "none.ckpt", "holds no regional weights"),
        (tmp_path / "code.ckpt", "cannot be read"),
        (tmp_path / "away", "away is no file or folder here"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            RegionsAdapter(sdxl, hidden=24, weights=str(path))
        assert "\n" not in str(caught.value)
    short = {key: value for key, value in ca.published().items() if "null_text_feature" not in key}
    torch.save(short, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=re.escape("misses 1 keys: position_net.null_text_feature")):
        RegionsAdapter(sdxl, hidden=24, weights=str(tmp_path / "short.pt"))


HUB_NAME = "cplusx/rich_context_l2i_sdxl"


def test_a_hub_name_is_found_in_the_cache_and_refused_in_a_line_where_it_is_not(sdxl, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"^conditioning.regions.weights: {HUB_NAME} .*--local-dir DIR") as caught:
        RegionsAdapter(sdxl, hidden=24, weights=HUB_NAME)
    assert "\n" not in str(caught.value)
    adapter, commit = awake(sdxl), "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / f"models--{HUB_NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    published_folder(adapter, sdxl.unet, repository / "snapshots" / commit)
    assert same(RegionsAdapter(sdxl, hidden=24, weights=HUB_NAME), adapter)
