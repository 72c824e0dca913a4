"""Boxes drawn by the sampler against diffusers' own pipelines, and against latents that the published ones gave."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.pipelines import StableDiffusionGLIGENPipeline
from PIL import Image
from safetensors.torch import load_file

from models.backbones.stable_diffusion import StableDiffusion
from models.conditioning.base import Conditioning
from models.conditioning.boxes import BoxesAdapter
from models.inpainting import as_image, kept_cells
from models.objectives.draws import start_latents
from models.sampling import Sampler
from scenes import Scene, SceneBatch, SceneObject

# diffusers' pipelines: what they read from configs, and how some schedulers turn tensors into arrays
pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing config attribute"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


def scene(name, caption, *objects):
    return Scene(id=name, caption=caption, objects=tuple(SceneObject(phrase=p, box=tuple(box)) for p, box in objects))


TWO = scene("two", "a red ball and a dog", ("red ball", (0.1, 0.2, 0.55, 0.7)), ("dog", (0.5, 0.4, 1.0, 1.0)))
SCENES = SceneBatch(
    [TWO, scene("one", "a blue cup on a table", ("a blue cup", (0.3, 0.0, 0.8, 0.5))), scene("none", "a cat")]
)


def ddim(**settings):
    return Sampler(**{"scheduler": DDIMScheduler.from_config, "steps": 4, "guidance": 1.0, **settings})


def start(*ids, size=8):
    return start_latents(0, ids, (4, size, size))


@pytest.fixture
def opened(published_boxes):
    """opened(kind, channels): backbone and attached conditioning of a published folder."""
    attached = []

    def open_(kind, channels=4, backbone=None):
        published = published_boxes(kind, channels)
        backbone = backbone or published.backbone
        adapter = BoxesAdapter(backbone, weights=str(published.folder), init="published").eval()
        conditioning = Conditioning({"boxes": adapter})
        conditioning.attach(backbone.unet)
        attached.append(backbone)
        return backbone, conditioning

    yield open_
    for backbone in attached:
        Conditioning.detach(backbone.unet)


@pytest.fixture
def reference(monkeypatch):
    """reference(backbone, unet): diffusers' own GLIGEN pipeline of the same parts, with DDIM."""

    def build(backbone, unet):
        tower = backbone.text.each[0]
        pipeline = StableDiffusionGLIGENPipeline(
            vae=backbone.vae,
            text_encoder=tower.encoder,
            tokenizer=tower.tokenizer,
            unet=unet,
            scheduler=DDIMScheduler.from_config(backbone.scheduler_config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        # a picture comes with its channels innermost, and noise like its latents is then drawn in that order
        preprocess = pipeline.image_processor.preprocess
        monkeypatch.setattr(pipeline.image_processor, "preprocess", lambda image: preprocess(image).contiguous())
        return pipeline

    return build


def referred(pipeline, one, **settings):
    """Final latents of diffusers' pipeline for one scene."""
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "gligen_scheduled_sampling_beta": 1.0, **settings}
    return pipeline(
        prompt=one.caption,
        gligen_phrases=[item.phrase for item in one.objects],
        gligen_boxes=[list(item.box) for item in one.objects],
        latents=start(one.id),
        output_type="latent",
        **settings,
    ).images


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("number", range(4))
def test_recorded_latents_of_the_published_pipelines(kind, number, golden):
    folder = golden / "gligen"
    case, tensors = json.loads((folder / "cases.json").read_text())[number], load_file(folder / "outputs.safetensors")
    backbone = StableDiffusion.from_folder(folder / kind)
    adapter = BoxesAdapter(backbone, weights=str(folder / kind), init="published").eval()
    conditioning = Conditioning({"boxes": adapter})
    conditioning.attach(backbone.unet)
    sampler = Sampler(
        scheduler={"sd": DDIMScheduler, "sdxl": EulerDiscreteScheduler}[kind].from_config,
        steps=case["steps"],
        guidance=case["guidance_scale"],
        grounding_fraction=case["beta"],
        negative_prompt=case["negative_prompt"] or None,  # "" was recorded where none was given
    )
    latents = sampler(
        backbone,
        conditioning,
        SceneBatch([scene("case", case["prompt"], *zip(case["phrases"], case["boxes"], strict=True))]),
        seed=0,
        size=(case["height"], case["width"]),
        latents=tensors[f"case{number}.{kind}.start"],
        decode=False,
    )
    torch.testing.assert_close(latents, tensors[f"case{number}.{kind}.latents"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("guidance", "beta", "negative"), [(1.0, 1.0, None), (5.0, 0.6, None), (5.0, 1.0, "a green tree"), (3.0, 0.0, None)]
)
def test_sd_is_drawn_as_by_diffusers(guidance, beta, negative, opened, reference, published_boxes):
    backbone, conditioning = opened("sd15")
    expected = referred(
        reference(backbone, published_boxes("sd15").unet),
        TWO,
        guidance_scale=guidance,
        gligen_scheduled_sampling_beta=beta,
        negative_prompt=negative,
    )
    sampler = ddim(guidance=guidance, grounding_fraction=beta, negative_prompt=negative)
    drawn = sampler(backbone, conditioning, SceneBatch([TWO]), seed=0, latents=start("two"), decode=False)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("negative", [None, "", "a green tree"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_sdxl_is_guided_as_by_diffusers(negative, rescale, published_boxes):
    backbone = published_boxes("sdxl").backbone
    one, two = backbone.text.each
    pipeline = StableDiffusionXLPipeline(
        vae=backbone.vae,
        text_encoder=one.encoder,
        text_encoder_2=two.encoder,
        tokenizer=one.tokenizer,
        tokenizer_2=two.tokenizer,
        unet=backbone.unet,
        scheduler=EulerDiscreteScheduler.from_config(backbone.scheduler_config),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    size = backbone.resolution // backbone.latent_scale
    latents = start("two", size=size)
    expected = pipeline(
        TWO.caption,
        negative_prompt=negative,
        guidance_scale=5.0,
        guidance_rescale=rescale,
        num_inference_steps=4,
        latents=latents,
        output_type="latent",
    ).images
    sampler = ddim(
        scheduler=EulerDiscreteScheduler.from_config, guidance=5.0, guidance_rescale=rescale, negative_prompt=negative
    )
    drawn = sampler(backbone, Conditioning({}), SceneBatch([TWO]), seed=0, latents=latents, decode=False)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_scenes_of_a_batch_are_drawn_as_if_alone(kind, opened):
    backbone, conditioning = opened(kind)
    sampler = ddim(guidance=3.0)
    together = sampler(backbone, conditioning, SCENES, seed=4, decode=False)
    for place in range(3):
        alone = sampler(backbone, conditioning, SCENES[[place]], seed=4, decode=False)
        torch.testing.assert_close(alone[0], together[place], atol=1e-4, rtol=0)
    dropped = sampler(backbone, conditioning, SCENES.drop(torch.zeros(3, dtype=torch.bool)), seed=4, decode=False)
    assert not torch.allclose(dropped[0], together[0], atol=1e-2)


def test_without_grounded_steps_it_is_the_bare_backbone_bit_for_bit(opened):
    backbone, conditioning = opened("sd15")
    never = ddim(guidance=3.0, grounding_fraction=0.0)(backbone, conditioning, SCENES, seed=0)
    conditioning.detach(backbone.unet)
    assert torch.equal(ddim(guidance=3.0)(backbone, Conditioning({}), SCENES, seed=0), never)


def picture(width, height):
    """A gradient with some structure, RGB."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [255 * rows / height, 255 * columns / width, 127 + 127 * np.sin(rows / 5) * np.cos(columns / 7)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.mark.parametrize(("guidance", "beta", "shape"), [(1.0, 1.0, (64, 64)), (5.0, 0.5, (101, 80))])
def test_a_unet_that_inpaints_draws_as_in_diffusers(guidance, beta, shape, opened, reference, published_boxes):
    backbone, conditioning = opened("sd15", 9)
    assert backbone.inpaints
    given = picture(*shape)
    torch.manual_seed(7)  # the pipeline draws posterior and noise from the global generator
    expected = referred(
        reference(backbone, published_boxes("sd15", 9).unet),
        TWO,
        guidance_scale=guidance,
        gligen_scheduled_sampling_beta=beta,
        gligen_inpaint_image=given,
    )
    drawn = ddim(guidance=guidance, grounding_fraction=beta)(
        backbone,
        conditioning,
        SceneBatch([TWO]),
        seed=0,
        latents=start("two"),
        generators=[torch.Generator().manual_seed(7)],
        inpaint=as_image(given, (64, 64))[None],
        decode=False,
    )
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


def test_any_unet_keeps_what_is_outside_as_one_that_ignores_the_picture(opened, reference, published_boxes):
    """Diffusers always gives the picture's channels; a UNet whose first layer has zeros for them is one of four channels."""
    backbone, conditioning = opened("sd15")
    plain = published_boxes("sd15").unet
    wide = UNet2DConditionModel.from_config({**plain.config, "in_channels": 9}).eval()
    weights = plain.state_dict()
    weights["conv_in.weight"] = torch.nn.functional.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, 5))
    wide.load_state_dict(weights)
    torch.manual_seed(7)
    given = picture(64, 64)
    expected = referred(reference(backbone, wide), TWO, guidance_scale=3.0, gligen_inpaint_image=given)
    drawn = ddim(guidance=3.0)(
        backbone,
        conditioning,
        SceneBatch([TWO]),
        seed=0,
        latents=start("two"),
        generators=[torch.Generator().manual_seed(7)],
        inpaint=as_image(given, (64, 64))[None],
        decode=False,
    )
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainted_pictures_do_not_depend_on_their_batch_and_keep_pasted_pixels(channels, opened):
    backbone, conditioning = opened("sd15", channels)
    scenes = SCENES[:2]
    given = torch.stack([as_image(picture(64, 64), (64, 64)), as_image(picture(90, 70), (64, 64))])
    sampler = ddim(guidance=2.0)
    together = sampler(backbone, conditioning, scenes, seed=1, inpaint=given)
    for place in range(2):
        alone = sampler(backbone, conditioning, scenes[[place]], seed=1, inpaint=given[[place]])
        torch.testing.assert_close(alone[0], together[place], atol=1e-4, rtol=0)
    pasted = sampler(backbone, conditioning, scenes, seed=1, inpaint=given, paste_back=True)
    kept = torch.nn.functional.interpolate(kept_cells(scenes, (8, 8)), scale_factor=8).bool().expand_as(given)
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(pasted[kept], given[kept])
    assert torch.equal(pasted[~kept], together[~kept])
    assert not torch.allclose(together[kept], given[kept], atol=1e-2)


def test_a_unet_that_inpaints_is_refused_without_a_picture(opened):
    backbone, conditioning = opened("sd15", 9)
    with pytest.raises(ValueError, match=r"^inpaint: None, but this UNet was trained to inpaint .*inpaint=FILE"):
        ddim()(backbone, conditioning, SCENES, seed=0)


def test_a_scene_without_a_box_to_paint_is_refused(opened):
    backbone, conditioning = opened("sd15")
    tiny = SceneBatch([scene("tiny", "a cat", ("cat", (0.51, 0.51, 0.55, 0.55)))])
    for scenes, name in ((tiny, "tiny"), (SCENES[[2]], "none")):
        with pytest.raises(ValueError, match=f"scene {name}: objects: their boxes cover no whole cell of 8 px"):
            ddim()(backbone, conditioning, scenes, seed=0, inpaint=torch.zeros(1, 3, 64, 64))


def test_kept_cells_are_cut_towards_the_top_left():
    # 0.7 * 10 is 7 in float64 and less in float32
    scenes = SceneBatch([scene("a", "", ("x", (0.19, 0.5, 0.7, 1.0))), scene("b", "")])
    kept = kept_cells(scenes, (4, 10))
    assert kept.shape == (2, 1, 4, 10)
    expected = torch.ones(4, 10)
    expected[2:, 1:7] = 0
    assert torch.equal(kept[0, 0], expected)
    assert kept[1].all()


def test_a_picture_is_cut_about_its_centre_to_the_shape_asked_for():
    wide = Image.new("RGB", (90, 30), (255, 0, 0))
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    square = as_image(wide, (12, 12))
    torch.testing.assert_close(square, torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 12, 12))
    both = as_image(wide, (30, 60))
    assert both.shape == (3, 30, 60)
    assert both[:, 15, 5].tolist() == [1, -1, -1]
    assert both[:, 15, 30].tolist() == [-1, -1, 1]
    grey = as_image(wide.convert("L"), (30, 90))
    assert torch.equal(grey[0], grey[2])
