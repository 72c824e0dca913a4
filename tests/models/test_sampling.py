"""The sampler against a plain loop, and what a picture may depend on: weights, settings, seed and its own scene."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hydra.utils import instantiate

from models.conditioning.base import Conditioning
from models.conditioning.regions import RegionsAdapter
from models.objectives.draws import noise_generators, start_latents
from models.sampling import Sampler, to_uint8
from scenes import Frame, Scene, SceneBatch, SceneObject

STEPS = 4
SAMPLERS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "sampler").glob("*.yaml"))


def scene(name, caption, *objects):
    return Scene(id=name, caption=caption, objects=tuple(SceneObject(phrase=p, box=box) for p, box in objects))


SCENES = SceneBatch(
    [
        scene("a", "a red circle", ("red circle", (0.1, 0.1, 0.5, 0.6)), ("square", (0.4, 0.5, 0.9, 0.9))),
        scene("b", "a blue striped square and a circle", ("blue striped square", (0.0, 0.5, 1.0, 1.0))),
        scene("c", "a diamond"),
    ]
)


def awake(backbone):
    """A regions adapter that acts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = RegionsAdapter(backbone, variant="union", width=24, hidden=32, place_width=4)
        with torch.no_grad():
            for attention in adapter.attentions:
                attention.to_out.weight.normal_(std=0.3)
    return Conditioning({"regions": adapter})


@pytest.fixture(scope="module")
def shapes(backbone_named):
    return backbone_named("shapes")


@pytest.fixture(scope="module")
def conditioning(shapes):
    conditioning = awake(shapes)
    conditioning.attach(shapes.unet)
    yield conditioning
    conditioning.detach(shapes.unet)


@pytest.fixture(scope="module")
def sampler_named(composed):
    def build(name, **settings):
        node = composed(f"sampler={name}").sampler
        return instantiate({**node, "steps": STEPS, "guidance": 3.0, **settings}, _convert_="all")

    return build


def ddim(**settings):
    return Sampler(**{"scheduler": DDIMScheduler.from_config, "steps": STEPS, "guidance": 1.0, **settings})


@torch.no_grad()
def looped(backbone, conditioning, *, guidance, seed, negative=""):
    """DDIM with guidance written out."""
    grid = (backbone.resolution // backbone.latent_scale,) * 2
    schedule = DDIMScheduler.from_config(backbone.scheduler_config)
    schedule.set_timesteps(STEPS)
    latents = start_latents(seed, [one.id for one in SCENES], (backbone.latent_channels, *grid))
    null = SceneBatch([one.without_layout() for one in SCENES])
    for time in schedule.timesteps:
        times = time.expand(len(SCENES))
        inputs = conditioning(backbone, SCENES, SCENES.captions, grid)
        prediction = backbone.denoise(latents, times, inputs)
        if guidance != 1:
            unguided = backbone.denoise(latents, times, conditioning(backbone, null, [negative] * 3, grid))
            prediction = unguided + guidance * (prediction - unguided)
        latents = schedule.step(prediction, time, latents).prev_sample
    return backbone.decode(latents)


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (0.0, ""), (3.0, ""), (3.0, "a blue square")])
def test_it_equals_the_loop_written_out(guidance, negative, shapes, conditioning):
    drawn = ddim(guidance=guidance, negative_prompt=negative)(shapes, conditioning, SCENES, seed=0)
    expected = looped(shapes, conditioning, guidance=guidance, seed=0, negative=negative)
    assert drawn.shape == (3, 3, 32, 32)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


def test_without_guidance_the_denoiser_sees_each_scene_once(shapes, conditioning):
    sizes = []
    hook = shapes.unet.conv_in.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    try:
        ddim(guidance=1.0)(shapes, conditioning, SCENES, seed=0)
        ddim(guidance=2.0)(shapes, conditioning, SCENES, seed=0)
    finally:
        hook.remove()
    assert sizes == [3] * STEPS + [6] * STEPS


# diffusers 0.42 turns a tensor into an array in a way that numpy 2 warns of
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize(("name", "settings"), [("ddim", {}), ("ddim", {"eta": 1.0}), ("dpm_solver", {})])
def test_a_picture_does_not_depend_on_its_batch(name, settings, sampler_named, shapes, conditioning):
    sampler = sampler_named(name, **settings)
    together = sampler(shapes, conditioning, SCENES, seed=5)
    assert together.isfinite().all()
    assert together.abs().max() <= 1
    for place in range(3):
        alone = sampler(shapes, conditioning, SCENES[[place]], seed=5)
        torch.testing.assert_close(alone[0], together[place], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_do_not_depend_on_their_batch(name, sampler_named, backbone_named):
    # not on shapes: its schedule ends in pure noise, where Euler's latents are thousands and fp32 rounds them coarsely
    sampler, backbone = sampler_named(name), backbone_named("tiny_sd15")
    conditioning = awake(backbone)
    conditioning.attach(backbone.unet)
    try:
        together = sampler(backbone, conditioning, SCENES, seed=5, decode=False)
        alone = [sampler(backbone, conditioning, SCENES[[place]], seed=5, decode=False)[0] for place in range(3)]
    finally:
        conditioning.detach(backbone.unet)
    assert together.isfinite().all()
    scale = together.abs().max()
    torch.testing.assert_close(torch.stack(alone) / scale, together / scale, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize(("name", "settings"), [("euler_ancestral", {}), ("ddpm", {}), ("ddim", {"eta": 1.0})])
def test_the_noise_of_the_steps_belongs_to_seed_and_scene(name, settings, sampler_named, shapes, conditioning):
    sampler = sampler_named(name, **settings)
    latents = start_latents(0, ["a", "b", "c"], (shapes.latent_channels, *(shapes.resolution // 2,) * 2))
    torch.manual_seed(1)
    first = sampler(shapes, conditioning, SCENES, seed=0, latents=latents)
    torch.manual_seed(2)
    assert torch.equal(sampler(shapes, conditioning, SCENES, seed=0, latents=latents), first)
    other = sampler(shapes, conditioning, SCENES, seed=1, latents=latents)
    for place in range(3):
        assert not torch.allclose(other[place], first[place], atol=1e-2)


def test_the_noise_of_two_pictures_differs_and_is_not_their_start():
    first, again, other = (torch.randn(4, 64, generator=g) for g in noise_generators(3, ["a", "a", "b"]))
    assert torch.equal(first, again)
    start = start_latents(3, ["a"], (4, 8, 8)).view(4, 64)
    for unlike in (other, start, torch.randn(4, 64, generator=noise_generators(4, ["a"])[0])):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), unlike.flatten()]))[0, 1]) < 0.25


def test_scene_and_seed_matter_and_the_global_generator_does_not(shapes, conditioning):
    sampler = ddim()
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), sampler(shapes, conditioning, SCENES, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(sampler(shapes, conditioning, SCENES, seed=0), first)
    assert not torch.allclose(sampler(shapes, conditioning, SCENES, seed=1), first, atol=1e-2)
    bare = sampler(shapes, conditioning, SCENES.drop(torch.tensor([False, True, True])), seed=0)
    assert not torch.allclose(bare[0], first[0], atol=1e-3)
    torch.testing.assert_close(bare[1:], first[1:], atol=1e-5, rtol=0)


def test_with_a_grounding_fraction_of_zero_it_is_the_bare_backbone(shapes, conditioning):
    never = ddim(guidance=3.0, grounding_fraction=0.0)(shapes, conditioning, SCENES, seed=0)
    assert not torch.allclose(ddim(guidance=3.0)(shapes, conditioning, SCENES, seed=0), never, atol=1e-3)
    conditioning.detach(shapes.unet)
    try:
        bare = ddim(guidance=3.0)(shapes, Conditioning({}), SCENES, seed=0)
    finally:
        conditioning.attach(shapes.unet)
    assert torch.equal(never, bare)


@pytest.mark.parametrize(("fraction", "grounded"), [(0.0, 0), (0.24, 0), (0.3, 1), (0.5, 2), (0.99, 3), (1.0, 4)])
def test_the_scene_acts_in_the_first_share_of_the_steps(fraction, grounded, shapes, conditioning):
    steps, acted = [], []
    hooks = [
        shapes.unet.conv_in.register_forward_hook(lambda *_: steps.append(None)),
        conditioning.adapters["regions"].attentions[0].register_forward_hook(lambda *_: acted.append(len(steps))),
    ]
    try:
        ddim(grounding_fraction=fraction)(shapes, conditioning, SCENES, seed=0)
    finally:
        for hook in hooks:
            hook.remove()
    assert acted == list(range(1, grounded + 1))


def test_other_sizes_and_given_latents(shapes, conditioning):
    wide = ddim()(shapes, conditioning, SCENES, seed=0, size=(20, 28))
    assert wide.shape == (3, 3, 20, 28)
    latents = start_latents(0, ["a", "b", "c"], (shapes.latent_channels, 10, 14))
    given = ddim()(shapes, conditioning, SCENES, seed=9, size=(20, 28), latents=latents)
    assert torch.equal(given, wide)


def test_scenes_without_a_frame_are_drawn_as_whole_pictures(backbone_named):
    backbone = backbone_named("tiny_sdxl")
    framed = SceneBatch(
        [Scene(id=one.id, caption=one.caption, objects=one.objects, frame=Frame(original=(64, 128))) for one in SCENES]
    )
    conditioning = awake(backbone)
    conditioning.attach(backbone.unet)
    try:
        drawn = [
            ddim(steps=2, guidance=2.0)(backbone, conditioning, scenes, seed=0, size=(64, 128))
            for scenes in (SCENES, framed)
        ]
    finally:
        conditioning.detach(backbone.unet)
    assert drawn[0].shape == (3, 3, 64, 128)
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "sampler.steps: 0 is less than 1"),
        ({"grounding_fraction": 1.5}, r"sampler.grounding_fraction: 1.5 is outside \[0, 1\]"),
        ({"grounding_fraction": -0.1}, "sampler.grounding_fraction: -0.1"),
        ({"grounding_fraction": float("nan")}, "sampler.grounding_fraction: nan"),
        ({"guidance": -1.0}, "sampler.guidance: -1.0 is not a number from 0 up"),
        ({"guidance": float("inf")}, "sampler.guidance: inf"),
        ({"guidance_rescale": 1.1}, "sampler.guidance_rescale: 1.1 is outside"),
        ({"eta": 2.0}, "sampler.eta: 2.0 is outside"),
        ({"size_ids": [64, 64, 0, 0]}, r"sampler.size_ids: \[64, 64, 0, 0\] are not six numbers"),
        ({"size_ids": [64, 64, 0, 0, 64, float("nan")]}, "sampler.size_ids"),
        ({"size_ids": "real"}, "sampler.size_ids: 'real' is unknown; take target, scene"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        ddim(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"steps": 1001}, {}, "sampler.steps: 1001 is more than the schedule's 1000 levels"),
        ({"scheduler": EulerDiscreteScheduler.from_config, "eta": 0.5}, {}, "sampler.eta: 0.5 means nothing to Euler"),
        ({"size_ids": [64, 64, 0, 0, 64, 64]}, {}, "sampler.size_ids: .* this backbone takes none"),
        ({}, {"size": (33, 32)}, "size: 33 x 32 px is not a multiple of the backbone's 2 px"),
        (
            {},
            {"latents": torch.zeros(2, 12, 16, 16)},
            r"latents: \(2, 12, 16, 16\) does not fit .* give \(3, 12, 16, 16\)",
        ),
        ({}, {"negative_prompts": ["a", "b"]}, "negative_prompts: 2 for 3 scenes"),
        ({}, {"generators": [torch.Generator()]}, "generators: 1 for 3 scenes"),
        ({}, {"inpaint": torch.zeros(3, 3, 16, 16)}, r"inpaint: \(3, 3, 16, 16\) does not fit"),
        ({}, {"paste_back": True}, "paste_back: true, but there is no picture"),
    ],
)
def test_what_does_not_fit_backbone_or_scenes_is_refused(settings, given, message, shapes, conditioning):
    with pytest.raises(ValueError, match=message) as caught:
        ddim(**settings)(shapes, conditioning, SCENES, seed=0, **given)
    assert "\n" not in str(caught.value)


def framed(*frames):
    return SceneBatch([replace(scene, frame=frame) for scene, frame in zip(SCENES, frames, strict=True)])


def test_size_ids_are_those_of_the_image_that_is_drawn_and_tell_nothing_of_the_real_one(backbone_named):
    backbone, bare, size = backbone_named("tiny_sdxl"), Conditioning({}), (64, 80)
    real = framed(Frame(original=(640, 480)), Frame(original=(1500, 2773), crop=(0, 90, 1500, 1500)), None)
    drawn = ddim(guidance=2.0)(backbone, bare, real, seed=0, size=size)
    assert torch.equal(drawn, ddim(guidance=2.0)(backbone, bare, SCENES, seed=0, size=size))
    given = ddim(guidance=2.0, size_ids=[64, 80, 0, 0, 64, 80])(backbone, bare, real, seed=0, size=size)
    assert torch.equal(drawn, given)
    assert torch.equal(drawn, ddim(guidance=2.0, size_ids=None)(backbone, bare, real, seed=0, size=size))
    constant = copy.copy(backbone)
    constant._size_ids = [512, 512, 0, 0, 512, 512]  # what it was trained with is no word on what is drawn
    assert torch.equal(drawn, ddim(guidance=2.0)(constant, bare, real, seed=0, size=size))
    own = ddim(guidance=2.0, size_ids="scene")(constant, bare, real, seed=0, size=size)
    assert not torch.allclose(drawn, own, atol=1e-4)


def test_size_ids_of_the_scene_are_its_own_when_asked_for(backbone_named):
    backbone, bare = backbone_named("tiny_sdxl"), Conditioning({})
    own = ddim(guidance=2.0, size_ids="scene")
    real = framed(*[Frame(original=(640, 480), target=(96, 72))] * len(SCENES))
    given = ddim(guidance=2.0, size_ids=[640, 480, 0, 0, 96, 72])(backbone, bare, SCENES, seed=0)
    assert torch.equal(own(backbone, bare, real, seed=0), given)
    assert not torch.allclose(own(backbone, bare, SCENES, seed=0), given, atol=1e-4)


def test_each_picture_may_have_a_negative_prompt_of_its_own(shapes, conditioning):
    sampler = ddim(guidance=3.0, negative_prompt="a blue square")
    given = sampler(shapes, conditioning, SCENES, seed=0, negative_prompts=["a blue square", None, "a diamond"])
    one = sampler(shapes, conditioning, SCENES, seed=0)
    torch.testing.assert_close(given[0], one[0], atol=1e-5, rtol=0)
    none = ddim(guidance=3.0)(shapes, conditioning, SCENES, seed=0)
    torch.testing.assert_close(given[1], none[1], atol=1e-5, rtol=0)
    assert not torch.allclose(given[2], one[2], atol=1e-3)


def test_pictures_of_the_range():
    images = torch.tensor([-1.0, 1.0, 0.0, -2.0, 5.0, 128 / 127.5 - 1]).view(1, 1, 1, 6).expand(2, 3, 4, 6)
    pictures = to_uint8(images)
    assert pictures.shape == (2, 4, 6, 3)
    assert pictures.dtype == np.uint8
    assert pictures[1, 2, :, 0].tolist() == [0, 255, 128, 0, 255, 128]
