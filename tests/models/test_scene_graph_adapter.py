"""The scene-graph adapter: recorded outputs alone and batched, what permuting does, null scenes, cuts, both encoders, weights."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.published_graphs import published_prompt
from models.backbones.stable_diffusion import COMPONENTS, StableDiffusion
from models.backbones.tiny import UNET
from models.conditioning.base import Conditioning, Reading
from models.conditioning.scene_graph import SceneGraphAdapter
from models.conditioning.scene_graph.triple_conv import graph_strings, token_graph
from models.text import TextTower
from scenes import Frame, Relation, Scene, SceneBatch, SceneObject
from scenes.graph import linearise

GOLDEN = Path(__file__).parents[1] / "golden" / "scene_graph"
SIZES = {"width": 28, "hidden": 32, "layers": 3}
SIZE = (4, 4)
long_texts = pytest.mark.filterwarnings("ignore:text. .* was cut:UserWarning")


def config(part):
    return json.loads((COMPONENTS / "sdxl" / part / "config.json").read_text())


@pytest.fixture(scope="module")
def recorded():
    """The recorded text encoders with a tiny UNet that takes what they give: tokens of 64, a pooled vector of 20."""
    tokenizer = CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer")
    towers = [
        TextTower(tokenizer, kind.from_pretrained(GOLDEN / folder).eval())
        for folder, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
    ]
    narrow = {"layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    sizes = {**narrow, **UNET["sdxl"], "projection_class_embeddings_input_dim": 20 + 6 * 8}
    vae_sizes = {"block_out_channels": [8, 8, 12, 16], "layers_per_block": 1, "norm_num_groups": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config({**config("unet"), **sizes})
        vae = AutoencoderKL.from_config({**config("vae"), **vae_sizes})
    return StableDiffusion(unet=unet, vae=vae, towers=towers, scheduler_config={})


def scene_of(entry):
    """A Scene of a LAION-SG entry."""
    places = {item["item_id"]: place for place, item in enumerate(entry["items"])}
    return Scene(
        id=str(entry["img_id"]),
        caption=entry["caption_ori"],
        objects=tuple(
            SceneObject(
                phrase=" ".join([*item["attributes"], item["label"]]),
                label=item["label"],
                attributes=tuple(item["attributes"]),
            )
            for item in entry["items"]
        ),
        relations=tuple(
            Relation(subject=places[r["item1"]], predicate=r["relation"], object=places[r["item2"]])
            for r in entry["relations"]
        ),
        frame=Frame(original=(32, 32)),
    )


ENTRIES = json.loads((GOLDEN / "cases.json").read_text())
CASES = [scene_of(entry) for entry in ENTRIES]
EXPECTED = load_file(GOLDEN / "outputs.safetensors")
LONG = Scene(  # 7 triples of 14 tokens
    id="long",
    caption="a picture",
    objects=tuple(SceneObject(phrase=f"{a} old wooden small tall {b}") for a, b in (("red", "dog"), ("white", "car"))),
    relations=tuple(
        Relation(subject=0, predicate=p, object=1)
        for p in ("near the", "on the", "in the", "behind the", "by the", "at the", "around the")
    ),
    frame=Frame(original=(32, 32)),
)
NULL = Scene(id="null", caption="a picture", frame=Frame(original=(32, 32)))


@pytest.fixture
def published(recorded):
    return SceneGraphAdapter(recorded, **SIZES, weights=str(GOLDEN / "sg_encoder.pt"))


@torch.no_grad()
def encode(backbone, adapter, scenes):
    batch = SceneBatch(scenes)
    return Conditioning({"scene_graph": adapter})(backbone, batch, batch.captions, SIZE)


def close(one, other, atol=1e-4):
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def wake(adapter, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return adapter


# --- the published function ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(CASES)))
def test_each_recorded_case_alone(recorded, published, number):
    inputs = encode(recorded, published, [CASES[number]])
    close(inputs.prompt, EXPECTED[f"case{number}.prompt_embeds"])
    close(inputs.pooled, EXPECTED[f"case{number}.pooled"])


BATCHES = [(0, 1, 2, 3, 4, 5), (5, 3, 1), (2, 2, 0), *itertools.combinations(range(6), 4)]


@pytest.mark.parametrize("order", BATCHES, ids=str)
def test_recorded_cases_in_any_batch(recorded, published, order):
    inputs = encode(recorded, published, [CASES[number] for number in order])
    for row, number in enumerate(order):
        close(inputs.prompt[row], EXPECTED[f"case{number}.prompt_embeds"][0])
        close(inputs.pooled[row], EXPECTED[f"case{number}.pooled"][0])


def test_the_scenes_are_the_published_loaders():
    for entry, scene in zip(ENTRIES, CASES, strict=True):
        parts = [t[key].strip() for t in entry["_triples"] for key in ("item1", "relation", "item2")]
        assert linearise(scene, separator=" ") == " ".join(parts + entry["_isolated"]).replace("  ", " ")


@long_texts
@torch.no_grad()
def test_the_plain_loop_of_the_benchmark_is_the_recorded_function_and_ours_beyond_75_tokens(recorded, published):
    for number, scene in enumerate(CASES):
        tokens, pooled = published_prompt(recorded, published.encoder, scene)
        close(tokens, EXPECTED[f"case{number}.prompt_embeds"])
        close(pooled, EXPECTED[f"case{number}.pooled"])
    tokens, pooled = published_prompt(recorded, published.encoder, LONG)
    inputs = encode(recorded, published, [LONG, CASES[0]])
    close(inputs.prompt[:1], tokens)
    close(inputs.pooled[:1], pooled)


def test_gradients_are_those_of_the_plain_loop(recorded, published):
    weights = torch.randn(len(CASES), 77, 64, generator=torch.Generator().manual_seed(0))
    batch, gradients = SceneBatch(CASES), []
    for way in ("batched", "loop"):
        published.zero_grad()
        if way == "batched":
            prompt = Conditioning({"scene_graph": published})(recorded, batch, batch.captions, SIZE).prompt
        else:
            prompt = torch.cat([published_prompt(recorded, published.encoder, scene)[0] for scene in CASES])
        (prompt * weights).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in published.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_permuting_triples_permutes_their_features(recorded, published):
    scene, order = CASES[2], (2, 0, 1)
    moved = replace(scene, relations=tuple(scene.relations[place] for place in order))
    parts = []
    for each in (scene, moved):
        batch = SceneBatch([each])
        tokens = recorded.read(graph_strings(batch))
        features = published.encoder.features(tokens.hidden, token_graph(batch, tokens, [75], length=77))
        lengths = [
            sum(
                len(tokens.inner(s))
                for s in (each.objects[r.subject].phrase, r.predicate, each.objects[r.object].phrase)
            )
            for r in each.relations
        ]
        parts.append(features.split(lengths))
    for place, number in enumerate(order):
        close(parts[1][place], parts[0][number], atol=1e-6)
    assert not torch.allclose(parts[0][0][0], parts[0][1][0], atol=2e-5)


@torch.no_grad()
def test_with_a_closed_gate_it_is_the_frozen_model_on_the_same_text(recorded, published):
    published.encoder.alpha_obj.zero_()
    inputs = encode(recorded, published, CASES)
    for row, scene in enumerate(CASES):
        features = recorded.encode_phrases([linearise(scene, separator=" ")])
        own = torch.cat([tower.penultimate_hidden for tower in features.towers], dim=-1)[0]
        close(inputs.prompt[row, : len(own)], own, atol=1e-5)
        assert torch.equal(inputs.prompt[row, len(own) :], inputs.prompt[row, len(own) - 1].expand(77 - len(own), -1))
        close(inputs.pooled[row], features.projected[0], atol=1e-5)
    batch = SceneBatch(CASES)
    frozen, _ = Conditioning({"scene_graph": published}).read(recorded, {"scene_graph": batch}, batch.captions)
    assert torch.equal(inputs.prompt, frozen.tokens)
    assert torch.equal(inputs.pooled, frozen.pooled)


# --- what is read -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_call_of_each_encoder_reads_every_string_of_a_batch_once(recorded, published):
    calls = []
    hooks = [
        tower.encoder.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for tower in recorded.text.each
    ]
    try:
        encode(recorded, published, CASES)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == 2
    strings = {*graph_strings(SceneBatch(CASES)), *(linearise(scene, separator=" ") for scene in CASES)}
    lengths = [len(row) for row in recorded.text.each[0].tokenise(sorted(strings))]
    assert calls[0] < len(strings) * max(lengths) / 2  # a batch padded to its longest string


@pytest.mark.parametrize("settings", [{}, {"encoder": "transformer"}, {"prompt": "caption"}], ids=str)
def test_a_scene_without_objects_reads_its_caption_as_the_bare_backbone_does(recorded, settings):
    adapter = wake(SceneGraphAdapter(recorded, **{**SIZES, "heads": 4, **settings}))
    bare = recorded.encode_captions(["a picture"] * 2)
    inputs = encode(recorded, adapter, [NULL, replace(NULL, id="other")])
    assert torch.equal(inputs.prompt, bare.tokens)
    assert torch.equal(inputs.pooled, bare.pooled)
    mixed = encode(recorded, adapter, [CASES[0], NULL, CASES[1]])
    close(mixed.prompt[1], bare.tokens[0], atol=1e-5)
    close(mixed.prompt[[0, 2]], encode(recorded, adapter, CASES[:2]).prompt, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"encoder": "transformer", "heads": 4}], ids=str)
def test_a_batch_of_null_scenes_still_gives_every_weight_its_gradient_of_zero(recorded, settings):
    adapter = SceneGraphAdapter(recorded, **SIZES, **settings)
    batch = SceneBatch([NULL])
    Conditioning({"scene_graph": adapter})(recorded, batch, batch.captions, SIZE).prompt.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in adapter.parameters())


@torch.no_grad()
def test_a_scene_without_relations_is_its_objects_as_text(recorded, published):
    scene = replace(CASES[2], relations=())
    text = "snowy stone tall snowy boat dog black mountain small snowy tree"
    close(encode(recorded, published, [scene]).prompt[0], recorded.read([text]).padded([text], length=77)[0][0])


@torch.no_grad()
def test_prompt_caption_adds_in_order_to_the_caption(recorded):
    adapter = SceneGraphAdapter(recorded, **SIZES, prompt="caption", weights=str(GOLDEN / "sg_encoder.pt"))
    batch = SceneBatch(CASES[:2])
    inputs, bare = encode(recorded, adapter, CASES[:2]), recorded.encode_captions(batch.captions)
    tokens = recorded.read(graph_strings(batch))
    graph = token_graph(batch, tokens, [75, 75], length=77)
    features = adapter.encoder.alpha_obj * adapter.encoder.features(tokens.hidden, graph)
    count = sum(
        len(tokens.inner(phrase)) for phrase in ("car", "next to", "wooden old dog", "car", "holding", "wooden old dog")
    )
    close(inputs.prompt[0, 1 : 1 + count] - bare.tokens[0, 1 : 1 + count], features[:count], atol=1e-5)
    assert torch.equal(inputs.prompt[0, 1 + count :], bare.tokens[0, 1 + count :])
    assert torch.equal(inputs.prompt[:, 0], bare.tokens[:, 0])
    assert torch.equal(inputs.pooled, bare.pooled)
    adapter.encoder.alpha_obj.zero_()
    assert torch.equal(encode(recorded, adapter, CASES[:2]).prompt, bare.tokens)


@long_texts
@pytest.mark.parametrize("prompt", ["triples", "caption"])
def test_tokens_beyond_75_are_counted(recorded, prompt):
    adapter = SceneGraphAdapter(recorded, **SIZES, prompt=prompt)
    tokens = len(recorded.text.each[0].tokenise([linearise(LONG, separator=" ")])[0]) - 2
    encode(recorded, adapter, [LONG, CASES[0], LONG])
    assert tokens > 75
    assert adapter.counts() == {"tokens": 2 * (tokens - 75)}


def test_a_dropped_caption_becomes_zeros_but_not_the_graph_that_is_read_in_its_place(recorded, published):
    batch, kept = SceneBatch([CASES[0], NULL, NULL]), torch.tensor([False, False, True])
    with torch.no_grad():
        inputs = Conditioning({"scene_graph": published})(recorded, batch, ["", "", "a picture"], SIZE, kept=kept)
    close(inputs.prompt[0], EXPECTED["case0.prompt_embeds"][0])
    assert not inputs.prompt[1].any()
    assert not inputs.pooled[1].any()
    assert inputs.prompt[2].any()


def test_two_adapters_that_read_another_text_are_refused(recorded):
    class Other(SceneGraphAdapter):
        def reading(self, scenes):
            return Reading(prompts=["a picture"] * len(scenes))

    both = Conditioning({"scene_graph": SceneGraphAdapter(recorded, **SIZES), "other": Other(recorded, **SIZES)})
    with pytest.raises(ValueError, match="scene_graph and other each read another text in the caption's place"):
        both(recorded, SceneBatch(CASES[:1]), ["a picture"], SIZE)


# --- the transformer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def transformer(recorded):
    return wake(SceneGraphAdapter(recorded, **SIZES, encoder="transformer", prompt="caption", heads=4))


def changed(scene, **changes):
    relation = replace(scene.relations[0], **changes)
    return replace(scene, relations=(relation, *scene.relations[1:]))


def test_the_transformer_knows_who_is_subject_and_what_the_predicate_is(recorded, transformer):
    scene = CASES[4]
    other = changed(scene, subject=scene.relations[0].object, object=scene.relations[0].subject)
    variants = [scene, other, changed(scene, predicate="on"), changed(scene, object=4), replace(scene, relations=())]
    prompts = encode(recorded, transformer, variants).prompt
    for one, two in itertools.combinations(prompts, 2):
        assert (one - two).abs().max() > 1e-3


def test_the_transformer_does_not_know_an_order(recorded, transformer):
    scene, places = CASES[2], (3, 1, 4, 0, 2)
    moved = replace(
        scene,
        objects=tuple(scene.objects[place] for place in places),
        relations=tuple(
            replace(r, subject=places.index(r.subject), object=places.index(r.object)) for r in scene.relations[::-1]
        ),
    )
    together = encode(recorded, transformer, [scene, moved, LONG]).prompt
    close(together[0], together[1], atol=1e-5)
    close(together[0], encode(recorded, transformer, [scene]).prompt[0], atol=1e-5)


def test_the_transformer_has_no_limit(recorded, transformer):
    last = replace(LONG, relations=(*LONG.relations[:-1], replace(LONG.relations[-1], predicate="on top of")))
    prompts = encode(recorded, transformer, [LONG, last]).prompt
    assert (prompts[0] - prompts[1]).abs().max() > 1e-4
    assert transformer.counts() == {"tokens": 0}


# --- settings and weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "mlp"}, "conditioning.scene_graph.encoder: 'mlp' is unknown; take triple_conv or transformer"),
        ({"prompt": "graph"}, "conditioning.scene_graph.prompt: 'graph' is unknown; take triples or caption"),
        (
            {"encoder": "transformer", "heads": 2},
            "conditioning.scene_graph.heads: 2 heads for width=28; take at least 3",
        ),
        ({"encoder": "transformer", "heads": 5}, "conditioning.scene_graph.heads: 5 heads for width=28"),
        ({"weights": "nowhere.pt"}, "conditioning.scene_graph.weights: nowhere.pt is no file"),
        (
            {"weights": str(GOLDEN / "sg_encoder.pt"), "layers": 2},
            "has unexpected 8 keys: graph_net.gconvs.2.net1.0.bias",
        ),
        ({"weights": str(GOLDEN / "sg_encoder.pt"), "width": 24}, "alpha_obj"),
        ({"weights": str(GOLDEN / "sg_encoder.pt"), "encoder": "transformer"}, "is no adapter file"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(recorded, settings, message):
    if settings.get("width") == 24:
        message = "shapes differ"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        SceneGraphAdapter(recorded, **{**SIZES, "heads": 4, **settings})
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_checkpoint_is_refused(recorded, tmp_path):
    for content, message in (({"a": 1}, "holds no tensors under state_dict"), (b"", "cannot be read")):
        file = tmp_path / "weights.pt"
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        with pytest.raises(ValueError, match=message):
            SceneGraphAdapter(recorded, **SIZES, weights=str(file))


def test_names_of_distributed_training_are_known(recorded, tmp_path):
    stored = torch.load(GOLDEN / "sg_encoder.pt", weights_only=True)["state_dict"]
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in stored.items()}}, tmp_path / "w.pt")
    adapter = SceneGraphAdapter(recorded, **SIZES, weights=str(tmp_path / "w.pt"))
    assert all(torch.equal(adapter.published()[name], tensor) for name, tensor in stored.items())


def test_the_real_encoder_has_the_published_size():
    adapter = SceneGraphAdapter(StableDiffusion.from_configs("sdxl"))
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    assert parameters == pytest.approx(14.70e6, abs=0.01e6)
    assert SceneGraphAdapter(StableDiffusion.from_configs("sd15")).encoder.projection_mlp_1.in_features == 768
