"""What every conditioning method promises, on several backbones: a new `conf/conditioning/*.yaml` is tested by existing."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.sources.base import PROVIDABLE
from models.backbones.base import Backbone
from models.conditioning.adapter_file import load_weights, save_adapter
from models.conditioning.base import Conditioning
from models.conditioning.slots import block_sites
from models.objectives.draws import start_latents
from runtime.build import build_conditioning
from scenes import Frame, Relation, Scene, SceneBatch, SceneObject
from scenes.masks import encode

METHODS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "conf" / "conditioning").glob("*.yaml") if path.stem != "none"
)
BACKBONES = ("shapes", "tiny_sd15", "tiny_sdxl")
VARIANTS = {
    "boxes-projections": ("conditioning.boxes.closed_by=projections",),
    "regions-casa": ["conditioning.regions.variant=casa"],
    "regions-per_object": ["conditioning.regions.overflow=per_object"],
    "regions-union": ["conditioning.regions.variant=union", "conditioning.regions.place_width=6"],
    "scene_graph-transformer": [
        "conditioning.scene_graph.encoder=transformer",
        "conditioning.scene_graph.prompt=caption",
    ],
}
# as published, texts are made of several objects, in the order of the scene or of its relations
IN_ORDER = {"regions", "regions-casa", "scene_graph"}
SCENELESS = {"lora"}  # part of the denoiser: it acts whatever the scene
CASES = [*((method, name) for method in METHODS for name in BACKBONES), *((variant, "shapes") for variant in VARIANTS)]
# as published these read texts in the order of the scene; variants of them that do not are in CASES
without_order = pytest.mark.parametrize(
    "case", [pair for pair in CASES if pair[0] not in IN_ORDER], indirect=True, ids="-".join
)
on_shapes = pytest.mark.parametrize(
    "case", [(method, "shapes") for method in [*METHODS, *VARIANTS]], indirect=True, ids=[*METHODS, *VARIANTS]
)
SIZE = (8, 12)
NULL = Scene(id="empty", caption="a cat", frame=Frame(original=(48, 64)))


def thing(phrase, *box):
    """An object with everything that a source may provide."""
    *attributes, label = phrase.split()
    mask = np.zeros((20, 20), bool)
    x0, y0, x1, y1 = (round(20 * side) for side in box)
    mask[y0:y1, x0:x1] = True
    return SceneObject(
        phrase=phrase,
        label=label,
        attributes=tuple(attributes),
        box=box,
        description=f"a {phrase} and a cat",
        score=0.9,
        mask=encode(mask),
    )


SCENES = (
    Scene(
        id="three",
        caption="a red circle and a blue square",
        objects=(
            thing("red striped circle", 0.05, 0.1, 0.6, 0.7),
            thing("square", 0.4, 0.3, 0.95, 0.9),
            thing("green triangle", 0.7, 0.0, 1.0, 0.2),
        ),
        relations=(
            Relation(subject=0, predicate="left of", object=1),
            Relation(subject=2, predicate="above", object=1),
        ),
        frame=Frame(original=(64, 96)),
    ),
    Scene(
        id="two",
        caption="a yellow diamond",
        objects=(thing("yellow diamond", 0.3, 0.3, 0.5, 0.55), thing("blue plain square", 0.0, 0.55, 0.45, 1.0)),
        relations=(Relation(subject=0, predicate="above", object=1),),
        frame=Frame(original=(80, 80), crop=(8, 0, 64, 72)),
    ),
    NULL,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    method: str
    backbone: Backbone
    conditioning: Conditioning
    cfg: object

    @property
    def unet(self):
        return self.backbone.unet


@pytest.fixture(scope="module")
def method_cfg(composed):
    return functools.cache(lambda method: composed(f"conditioning=[{method.split('-')[0]}]", *VARIANTS.get(method, ())))


@pytest.fixture(params=CASES, ids="-".join)
def case(request, method_cfg, backbone_named):
    method, name = request.param
    backbone, cfg = backbone_named(name), method_cfg(method)
    conditioning = build_conditioning(cfg, backbone)
    conditioning.attach(backbone.unet)
    yield Case(method=method, backbone=backbone, conditioning=conditioning, cfg=cfg)
    conditioning.detach(backbone.unet)


def wake(conditioning, seed=0):
    """Random weights everywhere, so that an adapter acts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in conditioning.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def predict(case, scenes, size=SIZE, conditioning=None):
    """The prediction for each scene from latents that belong to its id."""
    batch = SceneBatch(scenes)
    latents = start_latents(0, [scene.id for scene in scenes], (case.backbone.latent_channels, *size))
    inputs = (conditioning or case.conditioning)(case.backbone, batch, batch.captions, size)
    return case.backbone.denoise(latents, torch.full((len(batch),), 500), inputs)


def with_prompt(inputs, prompt):
    return replace(inputs, prompt=prompt.tokens, pooled=prompt.pooled)


@torch.no_grad()
def predict_bare(case, scenes, size=SIZE):
    """The same from a UNet without slots, under the text that the method reads."""
    case.conditioning.detach(case.unet)
    batch = SceneBatch(scenes)
    seen = dict.fromkeys(case.conditioning.named, batch)
    prompt, _ = case.conditioning.read(case.backbone, seen, batch.captions)
    try:
        return predict(case, scenes, size, lambda *given: with_prompt(Conditioning({})(*given), prompt))
    finally:
        case.conditioning.attach(case.unet)


def close(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


@torch.no_grad()
def test_at_initialisation_the_output_is_the_bare_unets(case):
    assert torch.equal(predict(case, SCENES), predict_bare(case, SCENES))


TOGETHER = (["boxes", "scene_graph"], ["regions", "scene_graph"], ["boxes", "regions", "scene_graph"])


@torch.no_grad()
@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
@pytest.mark.parametrize("name", BACKBONES)
def test_methods_together_are_the_bare_unet_at_first_and_each_acts(composed, backbone_named, names, name):
    backbone, cfg = backbone_named(name), composed(f"conditioning=[{','.join(names)}]")
    case = Case(method="", backbone=backbone, conditioning=build_conditioning(cfg, backbone), cfg=cfg)
    case.conditioning.attach(backbone.unet)
    try:
        bare = predict_bare(case, SCENES)
        assert torch.equal(predict(case, SCENES), bare)
        for adapter in case.conditioning.named.values():
            wake(adapter)
            before, bare = bare, predict(case, SCENES)
            assert not torch.allclose(before[:2], bare[:2], atol=1e-4)
        dropped = [scene.without_layout() for scene in SCENES]
        seen = {names[-1]: SceneBatch(dropped)}  # the scene is dropped for the last method alone
        latents = start_latents(0, [scene.id for scene in SCENES], (backbone.latent_channels, *SIZE))
        inputs = case.conditioning(backbone, SceneBatch(SCENES), [s.caption for s in SCENES], SIZE, seen=seen)
        assert torch.equal(inputs.prompt, backbone.encode_captions([s.caption for s in SCENES]).tokens)
        alone = backbone.denoise(latents, torch.full((len(SCENES),), 500), inputs)
        assert not torch.allclose(alone[:2], predict(case, dropped)[:2], atol=1e-4)
    finally:
        case.conditioning.detach(backbone.unet)


def test_scenes_without_objects_give_every_parameter_a_gradient(case):
    # several processes wait for the gradient of each parameter in each step, though one may have had only such scenes
    for parameter in case.conditioning.parameters():
        parameter.grad = None
    predict(case, [scene.without_layout() for scene in SCENES[:1]]).square().mean().backward()
    assert not [name for name, p in case.conditioning.named_parameters() if p.grad is None]


def test_gradients_reach_every_parameter_of_the_adapter_and_no_other(case):
    before = {key: value.clone() for key, value in case.backbone.state_dict().items()}
    parameters = dict(case.conditioning.named_parameters())
    assert not {id(p) for p in parameters.values()} & {id(p) for p in case.backbone.parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    target = torch.randn(len(SCENES), case.backbone.latent_channels, *SIZE, generator=torch.Generator().manual_seed(2))
    for _ in range(2):  # outputs that are zero at first let gradients through from the second step on
        optimizer.step()
        optimizer.zero_grad()
        (predict(case, SCENES) - target).square().mean().backward()
    unreached = [name for name, p in parameters.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert parameters
    assert not unreached
    assert all(p.grad is None for p in case.backbone.parameters())
    after = case.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@torch.no_grad()
@without_order
def test_the_order_of_objects_does_not_matter(case):
    wake(case.conditioning)
    scene, places = SCENES[0], (2, 0, 1)
    moved = replace(
        scene,
        objects=tuple(scene.objects[place] for place in places),
        relations=tuple(
            Relation(subject=places.index(r.subject), predicate=r.predicate, object=places.index(r.object))
            for r in reversed(scene.relations)
        ),
    )
    close(predict(case, [moved]), predict(case, [scene]))


@torch.no_grad()
def test_what_else_is_in_the_batch_does_not_matter(case):
    wake(case.conditioning)
    together = predict(case, SCENES)
    for place, scene in enumerate(SCENES):
        close(together[place], predict(case, [scene])[0])


@torch.no_grad()
def test_an_empty_scene_is_the_null_condition(case):
    wake(case.conditioning)
    scene = SCENES[0]
    alone = predict(case, [scene.without_layout()])
    dropped = SceneBatch(SCENES).drop(torch.tensor([False, True, True]))
    close(predict(case, dropped.scenes)[:1], alone)
    assert torch.allclose(predict(case, [scene]), alone, atol=1e-4) == (case.method in SCENELESS)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(case):
    wake(case.conditioning)
    expected = predict(case, SCENES)
    other = build_conditioning(case.cfg, case.backbone)
    wake(other, seed=1)
    case.conditioning.detach(case.unet)
    other.attach(case.unet)
    assert not torch.allclose(predict(case, SCENES, conditioning=other), expected, atol=1e-4)
    stored = case.conditioning.state_dict()
    assert {key.split(".")[0] for key in stored} == {"adapters"}
    other.load_state_dict(stored)
    assert torch.equal(predict(case, SCENES, conditioning=other), expected)


@torch.no_grad()
def test_its_file_makes_it_again(case, tmp_path):
    wake(case.conditioning)
    expected = predict(case, SCENES)
    ((name, adapter),) = case.conditioning.named.items()
    assert adapter.method == name
    save_adapter(adapter, tmp_path / "a.safetensors", backbone=case.backbone)
    other = type(adapter)(case.backbone, **adapter.settings())  # the settings are all that the file needs to be read
    load_weights(other, tmp_path / "a.safetensors", backbone=case.backbone)
    case.conditioning.detach(case.unet)
    conditioning = Conditioning({name: other})
    conditioning.attach(case.unet)
    assert torch.equal(predict(case, SCENES, conditioning=conditioning), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(12, 4), (10, 14), (5, 7)], ids=str)
def test_sides_may_differ_and_be_odd_at_any_level(case, size):
    assert torch.equal(predict(case, SCENES, size), predict_bare(case, SCENES, size))
    wake(case.conditioning)
    prediction = predict(case, SCENES, size)
    assert prediction.shape == (len(SCENES), case.backbone.latent_channels, *size)
    assert prediction.isfinite().all()
    assert not torch.allclose(prediction[0], predict_bare(case, SCENES, size)[0], atol=1e-4)


@torch.no_grad()
def test_bfloat16_autocast_is_close(case):
    wake(case.conditioning)
    expected = predict(case, SCENES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = predict(case, SCENES)
    assert prediction.dtype == torch.float32
    assert (prediction - expected).norm() < 0.05 * expected.norm()


def test_what_it_requires_is_something_that_a_source_can_provide(case):
    for adapter in case.conditioning.adapters.values():
        assert bool(adapter.requires) == (case.method not in SCENELESS)
        assert adapter.requires <= PROVIDABLE
        assert all(isinstance(value, float) for value in adapter.gates().values())


# dynamo looks at .grad of every input, also of a payload's tensors, which are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@on_shapes
def test_the_unet_compiles_with_it_as_one_graph(case):
    wake(case.conditioning)
    keys, predictions, gradients = list(case.unet.state_dict()), [], []
    try:
        for compiled in (False, True):
            if compiled:
                case.unet.compile(fullgraph=True, backend="eager")
            case.conditioning.zero_grad()
            predictions.append(predict(case, SCENES))
            predictions[-1].square().mean().backward()
            gradients.append({name: p.grad for name, p in case.conditioning.named_parameters()})
        assert list(case.unet.state_dict()) == keys
    finally:
        case.unet._compiled_call_impl = None
        torch._dynamo.reset()
    close(predictions[1], predictions[0])
    for name in gradients[0]:
        close(gradients[1][name], gradients[0][name], atol=1e-6)


@on_shapes
def test_gradient_checkpointing_gives_the_same_gradients(case):
    wake(case.conditioning)
    block, calls = case.unet.get_submodule(block_sites(case.unet)[0].path), []
    hook = block.norm1.register_forward_hook(lambda *_: calls.append(None))
    gradients = []
    try:
        for enable in (case.unet.disable_gradient_checkpointing, case.unet.enable_gradient_checkpointing):
            enable()
            case.conditioning.zero_grad()
            predict(case, SCENES).square().mean().backward()
            gradients.append({name: p.grad for name, p in case.conditioning.named_parameters()})
    finally:
        case.unet.disable_gradient_checkpointing()
        hook.remove()
    assert len(calls) == 3  # once plainly, then once forward and once again backward
    for name in gradients[0]:
        close(gradients[1][name], gradients[0][name], atol=1e-6)
