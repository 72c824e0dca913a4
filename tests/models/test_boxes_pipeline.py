"""GLIGEN's arguments: what they mean for one picture and for many, and what is said of those that cannot be."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines import StableDiffusionGLIGENPipeline
from PIL import Image

from models.conditioning.base import Conditioning
from models.conditioning.boxes.pipeline import BoxesPipeline

BALL, DOG = (0.1, 0.2, 0.55, 0.7), (0.5, 0.4, 1.0, 1.0)
CALL = {
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "gligen_scheduled_sampling_beta": 1.0,
    "output_type": "pt",
}
LATENT = {**CALL, "output_type": "latent"}  # decoded, tiny pictures differ little

pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing config attribute"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def pipeline(published_boxes):
    made = BoxesPipeline.from_pretrained(published_boxes("sd15").folder)
    made.scheduler = DDIMScheduler.from_config
    return made


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_call_that_diffusers_takes_gives_the_same_picture(pipeline, published_boxes):
    backbone = pipeline.backbone
    published = StableDiffusionGLIGENPipeline(
        vae=backbone.vae,
        text_encoder=backbone.text.each[0].encoder,
        tokenizer=backbone.text.each[0].tokenizer,
        unet=published_boxes("sd15").unet,
        scheduler=DDIMScheduler.from_config(backbone.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    published.set_progress_bar_config(disable=True)
    call = {
        "prompt": "a red ball and a dog",
        "negative_prompt": "a tree",
        "gligen_phrases": ["red ball", "dog"],
        "gligen_boxes": [list(BALL), list(DOG)],
        "gligen_scheduled_sampling_beta": 0.5,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "output_type": "np",
    }
    expected = published(**call, generator=torch.Generator().manual_seed(3)).images
    drawn = pipeline(**call, generator=torch.Generator().manual_seed(3)).images
    assert drawn.shape == (1, 64, 64, 3)
    np.testing.assert_allclose(drawn, expected, atol=1e-4)


def test_each_picture_has_boxes_of_its_own_and_what_is_given_once_serves_all(pipeline):
    many = pipeline(
        ["a red ball", "a dog", "a cat"],
        gligen_phrases=[["red ball"], ["dog", "red ball"], []],
        gligen_boxes=[[BALL], [DOG, BALL], []],
        negative_prompt=["a tree", "a cat", "a tree"],
        generator=seeded(1, 2, 3),
        **LATENT,
    ).images
    alone = pipeline(
        "a dog",
        gligen_phrases=["dog", "red ball"],
        gligen_boxes=np.array([DOG, BALL]),
        negative_prompt="a cat",
        generator=seeded(2),
        **LATENT,
    ).images
    torch.testing.assert_close(alone[0], many[1], atol=1e-5, rtol=0)
    broadcast = pipeline(
        "a dog",
        gligen_phrases=["dog", "red ball"],
        gligen_boxes=torch.tensor([[DOG, BALL], [BALL, DOG]], dtype=torch.float64),
        negative_prompt="a cat",
        generator=seeded(2, 2),
        **LATENT,
    ).images
    torch.testing.assert_close(broadcast[0], alone[0], atol=1e-5, rtol=0)
    assert not torch.allclose(broadcast[1], alone[0], atol=1e-3)


def test_several_pictures_of_a_prompt_stand_side_by_side(pipeline):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pipeline(
        ["a dog", "a cat"],
        num_images_per_prompt=2,
        latents=latents[[0, 1, 0, 1]],
        gligen_phrases=["dog"],
        gligen_boxes=[DOG],
        **CALL,
    ).images
    assert drawn.shape == (4, 3, 64, 64)
    dog = pipeline("a dog", latents=latents[:1], gligen_phrases=["dog"], gligen_boxes=[DOG], **CALL).images
    torch.testing.assert_close(drawn[0], dog[0], atol=1e-4, rtol=0)


def test_every_form_of_output_is_the_same_picture(pipeline):
    def drawn(form):
        return pipeline("a dog", generator=seeded(5), **{**CALL, "output_type": form}).images

    picture, array, tensor, latent = (drawn(form) for form in ("pil", "np", "pt", "latent"))
    assert picture[0].size == (64, 64)
    np.testing.assert_allclose(np.asarray(picture[0]) / 255, array[0], atol=0.51 / 255)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert latent.shape == (1, 4, 8, 8)


def test_without_a_generator_the_global_one_decides(pipeline):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(pipeline("a dog", eta=1.0, **CALL).images)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-2)


@pytest.mark.parametrize("channels", [4, 9])
def test_a_picture_is_kept_outside_the_boxes(channels, pipeline, published_boxes):
    if channels == 9:
        pipeline = BoxesPipeline.from_pretrained(published_boxes("sd15", 9).folder)
        with pytest.raises(ValueError, match="^inpaint: None"):
            pipeline("a dog", **CALL)
    drawn = pipeline(
        "a dog",
        gligen_phrases=["dog"],
        gligen_boxes=[(0.5, 0.5, 1.0, 1.0)],
        gligen_inpaint_image=Image.new("RGB", (80, 100), (255, 127, 0)),
        paste_back=True,
        **{**CALL, "output_type": "pil"},
    ).images[0]
    pixels = np.asarray(drawn)
    assert (pixels[:32] == (255, 127, 0)).all()
    assert not (pixels[32:, 32:] == (255, 127, 0)).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"gligen_boxes": [[BALL], [(0.5, 0.1, 0.2, 0.9)]], "gligen_phrases": [["ball"], ["dog"]]},
            r"^gligen_boxes\[1\]\[0\]: \(0.5, 0.1, 0.2, 0.9\) is inverted; give \(left, top, right, bottom\)",
        ),
        ({"gligen_boxes": [(0, 0, 1, 1.5)], "gligen_phrases": ["a"]}, r"^gligen_boxes\[0\]\[0\]: .* leaves \[0, 1\]"),
        (
            {"gligen_boxes": [BALL, (0, float("nan"), 1, 1)], "gligen_phrases": ["a", "b"]},
            r"^gligen_boxes\[0\]\[1\]: .* not finite",
        ),
        ({"gligen_boxes": [(0, 0, 1)], "gligen_phrases": ["a"]}, r"^gligen_boxes\[0\]\[0\]: .* give four numbers"),
        ({"gligen_boxes": [BALL], "gligen_phrases": [" "]}, r"^gligen_phrases\[0\]\[0\]: ' ' is not a phrase"),
        ({"gligen_boxes": [BALL], "gligen_phrases": ["a", "b"]}, r"^gligen_phrases\[0\]: 2 phrases for 1 boxes"),
        ({"gligen_boxes": [BALL] * 31, "gligen_phrases": ["a"] * 31}, r"^gligen_boxes\[0\]: 31 boxes, but .* take 30"),
        ({"gligen_boxes": [None], "gligen_phrases": ["a"]}, r"^gligen_boxes\[0\]: None is no list"),
        ({"gligen_boxes": 3, "gligen_phrases": ["a"]}, "^gligen_boxes: 3 is no list"),
        ({"gligen_boxes": [BALL], "gligen_phrases": "dog"}, "^gligen_phrases: 'dog' is no list"),
        (
            {"prompt": ["a", "b"], "gligen_boxes": [[BALL]] * 3, "gligen_phrases": ["a"]},
            "^prompt: 2 entries, but gligen_boxes has 3; give 3, or one",
        ),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, "^prompt: 2 entries, but negative_prompt has 3"),
        ({"prompt": []}, "^prompt: 0 entries"),
        ({"generator": [torch.Generator()] * 2}, "^generator: 2 for 1 pictures"),
        ({"latents": torch.zeros(1, 4, 9, 8)}, r"^latents: \(1, 4, 9, 8\) does not fit"),
        ({"height": 60}, "^size: 60 x 64 px is not a multiple of the backbone's 8 px"),
        ({"num_inference_steps": 0}, "^num_inference_steps: 0 is less than 1"),
        ({"guidance_scale": float("nan")}, "^guidance_scale: nan"),
        ({"guidance_rescale": 2.0}, "^guidance_rescale: 2.0"),
        ({"gligen_scheduled_sampling_beta": 1.2}, "^gligen_scheduled_sampling_beta: 1.2 is outside"),
        ({"num_images_per_prompt": 0}, "^num_images_per_prompt: 0"),
        ({"output_type": "jpeg"}, "^output_type: 'jpeg' is unknown; take pil, np, pt, latent"),
        ({"paste_back": True}, "^paste_back: true, but there is no picture"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given, message, pipeline):
    with pytest.raises(ValueError, match=message) as caught:
        pipeline(**{"prompt": "a dog", **CALL, **given})
    assert "\n" not in str(caught.value)


def test_the_adapter_may_keep_the_largest_of_too_many(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.adapter, "overflow", "largest")
    call = {**CALL, "generator": seeded(0), "num_inference_steps": 1}
    assert pipeline("a", gligen_boxes=[BALL] * 31, gligen_phrases=["a"] * 31, **call).images.isfinite().all()
    assert pipeline.adapter.left_out > 0


def test_a_backbone_that_names_no_scheduler_needs_one(published_boxes):
    backbone = published_boxes("sdxl").backbone
    adapter = BoxesPipeline.from_pretrained(published_boxes("sdxl").folder).adapter
    named, backbone.scheduler_config = backbone.scheduler_config, {"_class_name": "Nothing"}
    try:
        with pytest.raises(ValueError, match="^scheduler: the backbone's config names 'Nothing'"):
            BoxesPipeline(backbone, adapter)
    finally:
        backbone.scheduler_config = named
    try:
        made = BoxesPipeline(backbone, adapter, scheduler=DDIMScheduler.from_config)
        call = {**CALL, "num_inference_steps": 1}
        assert made("a dog", gligen_phrases=["dog"], gligen_boxes=[DOG], **call).images.shape[0] == 1
    finally:
        Conditioning.detach(backbone.unet)
