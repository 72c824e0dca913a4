"""Every backbone, on the real diffusers and transformers classes at tiny widths; the published structures by their size."""

from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import UNet2DConditionModel
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from models.backbones.shapes import ShapesBackbone, places
from models.backbones.stable_diffusion import StableDiffusion
from models.backbones.tiny import make_tiny, tiny_backbone
from models.conditioning.slots import DenoiserInputs, attach, block_sites, detach
from scenes import Frame, Scene, SceneBatch

CONF = Path(__file__).parents[2] / "conf" / "backbone"
KINDS = ("sd15", "sd21", "sd21_base", "sdxl")
CAPTIONS = ["a red circle and a blue square", ""]
SHAPES = {
    "unet_config": {
        "block_out_channels": [16, 32],
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "attention_head_dim": [2, 4],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "text_config": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "patch": 2,
    "words": ["a", "and", "red", "blue", "circle", "square"],
    "max_length": 16,
    "scheduler": {"num_train_timesteps": 1000, "prediction_type": "epsilon"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    for kind in KINDS:
        make_tiny(kind, root / kind)
    return root


@pytest.fixture(scope="module")
def backbones(folders):
    opened = {kind: StableDiffusion.from_folder(folders / kind) for kind in KINDS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {**opened, "shapes": ShapesBackbone(**SHAPES)}


@pytest.fixture(params=[*KINDS, "shapes"])
def backbone(request, backbones):
    return backbones[request.param]


def images(height=64, width=64, *, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(7)) * 2 - 1


def scenes(*frames):
    return SceneBatch([Scene(id=str(index), frame=frame) for index, frame in enumerate(frames)])


def inputs(backbone, **slots):
    prompt = backbone.encode_captions(CAPTIONS)
    size_ids = backbone.size_ids(scenes(None, None), size=(64, 96))
    return DenoiserInputs(prompt=prompt.tokens, pooled=prompt.pooled, size_ids=size_ids, slots=slots)


class TestImages:
    def test_are_encoded_and_decoded_at_their_own_shape(self, backbone):
        latents = backbone.encode_images(images(64, 96))
        scale = backbone.latent_scale
        assert latents.shape == (2, backbone.latent_channels, 64 // scale, 96 // scale)
        decoded = backbone.decode(latents * 50)
        assert decoded.shape == (2, 3, 64, 96)
        assert decoded.abs().max() <= 1

    @pytest.mark.parametrize("fault", [1.5, -1.2, float("nan"), float("inf")])
    def test_outside_their_range_are_refused(self, backbone, fault):
        pictures = images()
        pictures[1, 2, 3, 4] = fault
        with pytest.raises(ValueError, match=r"images: range .* is outside \[-1, 1\]; give uint8 / 127.5 - 1"):
            backbone.encode_images(pictures)

    @pytest.mark.parametrize(
        ("pictures", "message"),
        [
            (images()[0], r"\(3, 64, 64\) torch.float32 is not \(B, 3, H, W\)"),
            (images()[:, :1], r"\(2, 1, 64, 64\)"),
            ((images() * 127).to(torch.uint8), "torch.uint8"),
            (images(63, 64), "63 x 64 px is not a multiple of latent_scale"),
        ],
        ids=["one", "grey", "bytes", "odd"],
    )
    def test_of_another_form_are_refused(self, backbone, pictures, message):
        with pytest.raises(ValueError, match=message):
            backbone.encode_images(pictures)

    @pytest.mark.parametrize("kind", KINDS)
    def test_latents_are_the_scaled_mode_or_a_sample_of_the_posterior(self, backbones, kind):
        backbone = backbones[kind]
        posterior = backbone.vae.encode(images()).latent_dist
        factor = {"sdxl": 0.13025}.get(kind, 0.18215)
        torch.testing.assert_close(backbone.encode_images(images()), posterior.mode() * factor)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        sample = backbone.encode_images(images(), generator=generators)
        assert not torch.allclose(sample, posterior.mode() * factor)
        alone = backbone.encode_images(images()[1:], generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(sample[1:], alone)

    @pytest.mark.parametrize("patch", [1, 2])
    def test_of_the_shapes_backbone_come_back_exactly(self, patch):
        backbone = ShapesBackbone(**{**SHAPES, "patch": patch})
        assert (backbone.latent_scale, backbone.latent_channels) == (patch, 3 * patch**2)
        latents = backbone.encode_images(images(32, 48))
        torch.testing.assert_close(backbone.decode(latents), images(32, 48), atol=0, rtol=0)
        torch.testing.assert_close(latents.norm(), images(32, 48).norm())

    def test_a_shift_is_undone(self, folders):
        backbone = StableDiffusion.from_folder(folders / "sd15")
        plain = backbone.encode_images(images())
        decoded = backbone.decode(plain)
        backbone.vae.register_to_config(shift_factor=0.25)
        shifted = backbone.encode_images(images())
        torch.testing.assert_close(shifted, plain - 0.25 * 0.18215)
        torch.testing.assert_close(backbone.decode(shifted), decoded, atol=1e-5, rtol=0)


class TestDenoiser:
    def test_predicts_in_the_shape_of_the_latents(self, backbone):
        latents = backbone.encode_images(images(64, 96))
        prediction = backbone.denoise(latents, torch.tensor([3, 700]), inputs(backbone))
        assert prediction.shape == latents.shape
        assert prediction.isfinite().all()
        alone = inputs(backbone)
        single = DenoiserInputs(
            prompt=alone.prompt[1:],
            pooled=None if alone.pooled is None else alone.pooled[1:],
            size_ids=None if alone.size_ids is None else alone.size_ids[1:],
        )
        row = backbone.denoise(latents[1:], torch.tensor([700]), single)
        torch.testing.assert_close(prediction[1:], row, atol=1e-5, rtol=1e-4)

    def test_reads_caption_and_time(self, backbone):
        latents = backbone.encode_images(images(batch=1)).expand(2, -1, -1, -1)
        other_caption = backbone.denoise(latents, torch.tensor([3, 3]), inputs(backbone))
        assert (other_caption[0] - other_caption[1]).abs().max() > 1e-6
        one = inputs(backbone)
        same = DenoiserInputs(prompt=one.prompt[[0, 0]], pooled=one.pooled, size_ids=one.size_ids)
        other_time = backbone.denoise(latents, torch.tensor([3, 900]), same)
        assert (other_time[0] - other_time[1]).abs().max() > 1e-6

    def test_hands_payloads_to_the_slots_and_none_without_them(self, backbone):
        class Add(nn.Module):
            def forward(self, hidden, payload):
                return hidden + payload

        latents = backbone.encode_images(images())
        bare = backbone.denoise(latents, torch.tensor([3, 3]), inputs(backbone))
        attach(backbone.unet, {"boxes": {site.path: Add() for site in block_sites(backbone.unet)}})
        try:
            idle = backbone.denoise(latents, torch.tensor([3, 3]), inputs(backbone))
            nought = backbone.denoise(latents, torch.tensor([3, 3]), inputs(backbone, boxes=torch.zeros(1)))
            moved = backbone.denoise(latents, torch.tensor([3, 3]), inputs(backbone, boxes=torch.ones(1)))
        finally:
            detach(backbone.unet)
        torch.testing.assert_close(idle, bare, atol=0, rtol=0)
        torch.testing.assert_close(nought, bare, atol=0, rtol=0)
        assert (moved - bare).abs().max() > 1e-6

    @pytest.mark.parametrize("missing", ["pooled", "size_ids"])
    def test_misses_what_it_needs(self, backbones, missing):
        given = inputs(backbones["sdxl"])
        given = DenoiserInputs(**{**vars(given), missing: None})
        with pytest.raises(ValueError, match=f"inputs.{missing}: None, but this backbone needs it"):
            backbones["sdxl"].denoise(torch.zeros(2, 4, 8, 8), torch.tensor([1, 1]), given)

    def test_what_it_takes_is_data(self, backbones):
        assert {kind: (b.has_pooled, b.has_size_ids) for kind, b in backbones.items()} == {
            "sd15": (False, False),
            "sd21": (False, False),
            "sd21_base": (False, False),
            "sdxl": (True, True),
            "shapes": (False, False),
        }
        assert {kind: b.text_width for kind, b in backbones.items()} == {
            "sd15": 24,
            "sd21": 32,
            "sd21_base": 32,
            "sdxl": 64,
            "shapes": 24,
        }
        assert all(b.phrase_width == b.text_width for b in backbones.values())
        predictions = {kind: backbones[kind].scheduler_config.get("prediction_type") for kind in KINDS}
        assert predictions == {"sd15": None, "sd21": "v_prediction", "sd21_base": "epsilon", "sdxl": "epsilon"}

    def test_works_in_half_precision_beside_an_fp32_autoencoder(self, folders):
        backbone = StableDiffusion.from_folder(folders / "sdxl", dtype="bfloat16")
        assert backbone.unet.dtype == torch.bfloat16
        assert backbone.vae.dtype == torch.float32
        latents = backbone.encode_images(images())
        prediction = backbone.denoise(latents, torch.tensor([3, 700]), inputs(backbone))
        assert latents.dtype == prediction.dtype == torch.float32
        assert backbone.decode(latents).dtype == torch.float32


class TestCaptions:
    def test_are_those_of_the_published_sd_pipeline(self, backbones):
        from diffusers import StableDiffusionPipeline

        for kind in ("sd15", "sd21"):
            backbone, (tower,) = backbones[kind], backbones[kind].text.towers
            pipeline = StableDiffusionPipeline(
                vae=None,
                text_encoder=tower.encoder,
                tokenizer=tower.tokenizer,
                unet=None,
                scheduler=None,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            expected, _ = pipeline.encode_prompt(CAPTIONS, torch.device("cpu"), 1, False)
            prompt = backbone.encode_captions(CAPTIONS)
            assert prompt.tokens.shape[1] == 77
            torch.testing.assert_close(prompt.tokens, expected)

    def test_are_those_of_the_published_sdxl_pipeline(self, backbones):
        from diffusers import StableDiffusionXLPipeline

        backbone, (first, second) = backbones["sdxl"], backbones["sdxl"].text.towers
        pipeline = StableDiffusionXLPipeline(
            vae=None,
            text_encoder=first.encoder,
            text_encoder_2=second.encoder,
            tokenizer=first.tokenizer,
            tokenizer_2=second.tokenizer,
            unet=None,
            scheduler=None,
            add_watermarker=False,
        )
        expected, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
        prompt = backbone.encode_captions(CAPTIONS)
        torch.testing.assert_close(prompt.tokens, expected)
        torch.testing.assert_close(prompt.pooled, pooled)
        assert prompt.tokens.shape == (2, 77, 64)
        assert prompt.pooled.shape == (2, 40)

    def test_of_the_shapes_backbone_have_its_own_length(self, backbones):
        assert backbones["shapes"].encode_captions(CAPTIONS).tokens.shape == (2, 16, 24)

    def test_phrases_have_every_feature(self, backbones):
        features = backbones["sdxl"].encode_phrases(["red circle", "dog"])
        assert features.last_hidden.shape == features.penultimate_hidden.shape == (2, 4, 64)
        assert (features.pooled.shape, features.projected.shape) == ((2, 24), (2, 40))


class TestSizeIds:
    def test_are_exact_height_before_width(self, backbones):
        ids = backbones["sdxl"].size_ids(scenes(Frame(original=(1500, 2773)), Frame(original=(2773, 1500))))
        assert ids.dtype == torch.float32
        assert ids.tolist() == [[1500, 2773, 0, 0, 1500, 2773], [2773, 1500, 0, 0, 2773, 1500]]

    def test_reach_the_denoiser_in_fp32_whatever_its_precision(self, folders):
        backbone = StableDiffusion.from_folder(folders / "sdxl", dtype="bfloat16")
        seen = []
        backbone.unet.add_time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        given = inputs(backbone)
        ids = backbone.size_ids(scenes(*[Frame(original=(1500, 2773))] * 2))
        given = DenoiserInputs(prompt=given.prompt, pooled=given.pooled, size_ids=ids)
        backbone.denoise(torch.zeros(2, 4, 8, 8), torch.tensor([1, 1]), given)
        assert seen[0].dtype == torch.float32
        assert seen[0][:2].tolist() == [1500, 2773]

    def test_count_the_crop_in_pixels_of_the_resized_picture(self, backbones):
        # 1000 x 1500 resized to 512 x 768, its middle 512 x 512 cut out: 128 px lie to the left
        frame = Frame(original=(1000, 1500), crop=(0, 250, 1000, 1000), target=(512, 512))
        assert backbones["sdxl"].size_ids(scenes(frame)).tolist() == [[1000, 1500, 0, 128, 512, 512]]
        frame = Frame(original=(1500, 1000), crop=(250, 0, 1000, 1000), target=(512, 512))
        assert backbones["sdxl"].size_ids(scenes(frame)).tolist() == [[1500, 1000, 128, 0, 512, 512]]

    def test_of_a_scene_without_a_frame_need_a_size(self, backbones):
        with pytest.raises(ValueError, match="scene 0: frame: missing"):
            backbones["sdxl"].size_ids(scenes(None))
        assert backbones["sdxl"].size_ids(scenes(None), size=(64, 96)).tolist() == [[64, 96, 0, 0, 64, 96]]

    def test_are_none_where_the_denoiser_takes_none(self, backbones):
        assert backbones["sd15"].size_ids(scenes(None)) is None
        assert backbones["sdxl"].size_ids(scenes()).shape == (0, 6)


class TestFreezing:
    def test_is_the_default_and_training_leaves_frozen_parts_alone(self, backbone):
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
        backbone.train()
        try:
            assert not any(module.training for part in backbone.children() for module in part.modules())
        finally:
            backbone.eval()

    def test_parts_that_are_made_trainable_do_train(self):
        backbone = ShapesBackbone(**SHAPES)
        backbone.unet.requires_grad_(True)
        backbone.train()
        assert backbone.unet.training
        assert not backbone.text.training
        latents = backbone.encode_images(images(32, 32))
        backbone.denoise(latents, torch.tensor([3, 700]), inputs(backbone)).square().mean().backward()
        assert backbone.unet.conv_in.weight.grad.abs().sum() > 0
        backbone.freeze()
        assert not backbone.unet.training

    def test_the_autoencoder_stays_in_fp32_through_casts(self, folders):
        backbone = StableDiffusion.from_folder(folders / "sd15")
        before = {key: value.clone() for key, value in backbone.vae.state_dict().items()}
        backbone.to(torch.bfloat16)
        assert backbone.unet.dtype == torch.bfloat16
        assert all(torch.equal(value, before[key]) for key, value in backbone.vae.state_dict().items())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert backbone.encode_images(images()).dtype == torch.float32
        assert [name for name, _ in backbone.named_children()] == ["unet", "text", "vae"]

    def test_the_structure_moves_from_meta_to_a_device(self, folders):
        backbone = StableDiffusion.from_configs(folders / "sd15").to_empty(device="cpu")
        assert {parameter.device.type for parameter in backbone.parameters()} == {"cpu"}


class TestShapesWeights:
    def other(self, **changes):
        return ShapesBackbone(**{**SHAPES, **changes})

    @pytest.fixture
    def file(self, tmp_path, backbones):
        backbones["shapes"].save_weights(tmp_path / "weights" / "shapes.safetensors", recipe="abc")
        return tmp_path / "weights" / "shapes.safetensors"

    def test_come_back_exactly(self, file, backbones):
        loaded = self.other(weights=file)
        weights = loaded.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in backbones["shapes"].state_dict().items())
        assert {key.split(".")[0] for key in load_file(file)} == {"unet", "text"}

    def test_can_be_kept_in_half_precision(self, tmp_path, backbones):
        backbones["shapes"].save_weights(tmp_path / "half", recipe="abc", dtype=torch.float16)
        loaded = self.other(weights=tmp_path / "half")
        assert loaded.unet.dtype == torch.float32
        torch.testing.assert_close(
            loaded.unet.conv_in.weight, backbones["shapes"].unet.conv_in.weight, atol=1e-3, rtol=1e-3
        )

    def test_name_each_key_that_is_missing_or_unexpected(self, file, tmp_path):
        from safetensors import safe_open

        tensors = load_file(file)
        tensors["unet.extra"] = tensors.pop("unet.conv_in.bias")
        with safe_open(file, "pt") as opened:
            save_file(tensors, tmp_path / "faulty", metadata=opened.metadata())
        expected = r"missing keys \['unet.conv_in.bias'\], unexpected keys \['unet.extra'\]"
        with pytest.raises(ValueError, match=expected):
            self.other(weights=tmp_path / "faulty")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"words": [*SHAPES["words"][::-1]]}, "backbone.words: "),
            ({"words": [*SHAPES["words"], "green"]}, "backbone.words: "),
            ({"patch": 1}, "backbone.patch: 1 here but 2 in the weights"),
            ({"max_length": 20}, "backbone.max_length: 20 here but 16"),
            (
                {"scheduler": {**SHAPES["scheduler"], "prediction_type": "v_prediction"}},
                "backbone.scheduler: prediction_type is v_prediction here but epsilon",
            ),
            (
                {"unet_config": {**SHAPES["unet_config"], "layers_per_block": 2}},
                "backbone.unet_config: layers_per_block is 2 here but 1",
            ),
        ],
        ids=["order", "words", "patch", "length", "schedule", "depth"],
    )
    def test_of_other_settings_are_refused_in_one_line(self, file, changes, message):
        with pytest.raises(ValueError, match=message) as caught:
            self.other(**changes, weights=file)
        assert "\n" not in str(caught.value)

    def test_take_another_resolution_and_other_sampling(self, file):
        schedule = {**SHAPES["scheduler"], "clip_sample": False}
        assert self.other(weights=file, resolution=64, scheduler=schedule).resolution == 64

    def test_that_are_no_weights_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere.safetensors does not exist; give a file"):
            self.other(weights="nowhere.safetensors")
        (tmp_path / "text").write_text("no weights")
        with pytest.raises(ValueError, match="text is not a safetensors file"):
            self.other(weights=tmp_path / "text")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"patch": 3}, "backbone.patch: 3"),
            ({"unet_config": {**SHAPES["unet_config"], "in_channels": 4}}, "unet_config.in_channels: 4 is derived"),
            ({"text_config": {**SHAPES["text_config"], "vocab_size": 9}}, "text_config.vocab_size: 9 is derived"),
        ],
    )
    def test_settings_that_do_not_fit_are_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.other(**changes)

    def test_the_denoiser_is_told_where_cells_lie(self):
        latents = torch.zeros(1, 12, 4, 8)
        told = places(latents)
        assert told.shape == (1, 2, 4, 8)
        assert torch.equal(told[0, 0, :, 0], torch.tensor([-0.75, -0.25, 0.25, 0.75]))
        assert torch.equal(told[0, 1, 0], torch.tensor([-7, -5, -3, -1, 1, 3, 5, 7]) / 8)
        backbone = self.other()
        seen = []
        hook = backbone.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        prompt = backbone.encode_captions(["a"])
        backbone.denoise(latents, torch.tensor([10]), DenoiserInputs(prompt=prompt.tokens, pooled=prompt.pooled))
        hook.remove()
        assert torch.equal(seen[0][:, 12:], told)


class TestFolder:
    def test_the_same_seed_gives_the_same_model(self, folders, tmp_path):
        again = tiny_backbone("sdxl", folder=tmp_path / "new")
        opened = tiny_backbone("sdxl", folder=folders / "sdxl")
        weights = opened.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in again.state_dict().items())
        other = tiny_backbone("sdxl", seed=1)
        assert not torch.equal(other.unet.conv_in.weight, again.unet.conv_in.weight)

    def test_resolution_and_latents_follow_from_the_parts(self, folders):
        backbone = StableDiffusion.from_folder(folders / "sd21")
        assert (backbone.resolution, backbone.latent_scale, backbone.latent_channels) == (64, 8, 4)
        assert StableDiffusion.from_folder(folders / "sd21", resolution=128).resolution == 128

    def test_another_autoencoder_is_taken(self, folders):
        own, other = folders / "sd15", folders / "sdxl" / "vae"
        assert StableDiffusion.from_folder(own, vae=other).vae.config.scaling_factor == 0.13025

    def test_a_gated_unet_is_opened_without_the_gates(self, folders, backbones, tmp_path, caplog, capfd):
        folder = _copy(folders / "sd15", tmp_path)
        gated = UNet2DConditionModel.from_config({**backbones["sd15"].unet.config, "attention_type": "gated"})
        gated.load_state_dict(backbones["sd15"].unet.state_dict(), strict=False)
        gated.save_pretrained(folder / "unet")
        with caplog.at_level("INFO", logger="models.backbones.stable_diffusion"):
            opened = StableDiffusion.from_folder(folder).unet
        left = len(gated.state_dict()) - len(opened.state_dict())
        assert f"unet: {left} weights left out (fuser, position_net)" in caplog.text
        assert "fuser.linear" not in capfd.readouterr().err
        assert opened.state_dict().keys() == backbones["sd15"].unet.state_dict().keys()
        assert opened.config.attention_type == "default"
        torch.testing.assert_close(opened.conv_in.weight, backbones["sd15"].unet.conv_in.weight)
        assert len(block_sites(opened)) == 16 - 6

    def test_that_is_not_there_is_refused_in_one_line(self, tmp_path):
        with pytest.raises(ValueError, match=r"^backbone.path: .*nowhere is no folder here") as caught:
            StableDiffusion.from_folder(tmp_path / "nowhere")
        assert "\n" not in str(caught.value)

    def test_a_hub_name_out_of_reach_is_refused_in_one_line(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            ValueError, match=r"^backbone.path: nobody/nothing is no folder here, and the hub"
        ) as caught:
            StableDiffusion.from_folder("nobody/nothing")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("part", ["scheduler", "unet", "vae", "text_encoder_2", "tokenizer"])
    def test_a_missing_part_is_named(self, folders, tmp_path, part):
        folder = _copy(folders / "sdxl", tmp_path)
        (folder / part).rename(tmp_path / "away")
        with pytest.raises(ValueError, match=f"^backbone.path: .* has no folder {part}; "):
            StableDiffusion.from_folder(folder)

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
    def test_missing_weights_are_named(self, folders, tmp_path, part):
        folder = _copy(folders / "sd15", tmp_path)
        file = next((folder / part).glob("*.safetensors"))
        tensors = load_file(file)
        gone = next(key for key in tensors if key.endswith("bias"))
        save_file({key: value for key, value in tensors.items() if key != gone}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"{part}: 1 missing keys"):
            StableDiffusion.from_folder(folder)
        file.unlink()
        with pytest.raises(ValueError, match=f"lacks files in {part}"):
            StableDiffusion.from_folder(folder)

    def test_unknown_weights_are_named(self, folders, tmp_path):
        folder = _copy(folders / "sd15", tmp_path)
        file = next((folder / "unet").glob("*.safetensors"))
        save_file({**load_file(file), "adapter.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"unet: 1 unexpected keys \(adapter.weight\)"):
            StableDiffusion.from_folder(folder)

    def test_parts_of_different_models_are_refused(self, folders, tmp_path):
        folder = _copy(folders / "sd15", tmp_path)
        (folder / "unet").rename(tmp_path / "own")
        _copy(folders / "sd21" / "unet", folder, name="unet")
        with pytest.raises(ValueError, match="unet.cross_attention_dim: 32 is not the text width 24"):
            StableDiffusion.from_folder(folder)

    def test_a_unet_for_other_inputs_is_refused(self, backbones):
        backbone = backbones["sdxl"]
        narrow = UNet2DConditionModel.from_config(
            {**backbone.unet.config, "projection_class_embeddings_input_dim": 30 + 48}
        )
        parts = {"vae": backbone.vae, "towers": list(backbone.text.towers), "scheduler_config": {}}
        with pytest.raises(ValueError, match="wants a pooled caption of width 30, the text encoders give 40"):
            StableDiffusion(unet=narrow, **parts)
        for side in ("in", "out"):
            wide = UNet2DConditionModel.from_config({**backbone.unet.config, f"{side}_channels": 8})
            with pytest.raises(ValueError, match=f"unet.{side}_channels: 8 is not the autoencoder's 4 latent channels"):
                StableDiffusion(unet=wide, **parts)

    def test_a_unet_that_inpaints_is_opened_and_wants_its_picture(self, backbones):
        backbone = backbones["sd15"]
        unet = UNet2DConditionModel.from_config({**backbone.unet.config, "in_channels": 9})
        parts = {"vae": backbone.vae, "towers": list(backbone.text.towers), "scheduler_config": {}}
        inpainting = StableDiffusion(unet=unet, **parts)
        assert (inpainting.inpaints, inpainting.latent_channels, backbone.inpaints) == (True, 4, False)
        given, latents = inputs(backbone), torch.zeros(2, 4, 8, 8)
        with pytest.raises(ValueError, match="^inputs.inpainting: None, but this UNet was trained to inpaint"):
            inpainting.denoise(latents, torch.tensor([1, 1]), given)
        seen = [
            inpainting.denoise(latents, torch.tensor([1, 1]), replace(given, inpainting=torch.full((2, 5, 8, 8), fill)))
            for fill in (0.0, 1.0)
        ]
        assert seen[0].shape == (2, 4, 8, 8)
        assert not torch.allclose(*seen)

    def test_an_unknown_precision_or_kind_is_refused(self, folders):
        with pytest.raises(ValueError, match="backbone.dtype: 'fp8'"):
            StableDiffusion.from_folder(folders / "sd15", dtype="fp8")
        with pytest.raises(ValueError, match="backbone.kind: 'sd3'"):
            tiny_backbone("sd3")
        with pytest.raises(ValueError, match="backbone.components: sd3"):
            StableDiffusion.from_configs("sd3")


UNETS = {"sd15": 859.5, "sd21": 865.9, "sd21_base": 865.9, "sdxl": 2567.5}
TEXTS = {"sd15": [123.1], "sd21": [340.4], "sd21_base": [340.4], "sdxl": [123.1, 694.7]}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_configuration_builds(name):
    config = OmegaConf.load(CONF / f"{name}.yaml")
    if "skeleton" not in config:
        backbone = instantiate(config)
        assert backbone.encode_images(images(*[backbone.resolution] * 2)).shape[1] == backbone.latent_channels
        return
    backbone = instantiate(config, skeleton=True)

    def millions(module):
        return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1)

    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}
    assert millions(backbone.unet) == UNETS[config.components]
    assert [millions(part.encoder) for part in backbone.text.towers] == TEXTS[config.components]
    assert millions(backbone.vae) == 83.7
    assert (backbone.latent_scale, backbone.resolution) == (8, config.resolution)
    assert backbone.has_pooled == (config.components == "sdxl")


def test_a_structure_can_hold_random_weights(folders):
    components = folders / "sdxl"  # a whole folder serves as well as its configs alone
    backbone = StableDiffusion.from_configs(components, device="cpu", seed=3)
    again = StableDiffusion.from_configs(components, device="cpu", seed=3)
    torch.testing.assert_close(again.unet.conv_in.weight, backbone.unet.conv_in.weight, atol=0, rtol=0)
    prediction = backbone.denoise(torch.zeros(2, 4, 8, 8), torch.tensor([1, 1]), inputs(backbone))
    assert prediction.shape == (2, 4, 8, 8)


def _copy(source, target, *, name="copy"):
    """A copy of a model's folder that a test may damage."""
    for path in source.rglob("*"):
        if path.is_file():
            to = target / name / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    return target / name
