"""The stage `latents`: what it stores is what training would encode, and training reads it so."""

import functools
import io
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from datamodules.batch import collate
from datamodules.loaders import PositionDataset
from datamodules.order import flips, latent_noise
from datamodules.scene_datamodule import SceneDataModule
from datamodules.shard_index import LATENT, LATENT_FLIPPED, ShardError
from datamodules.shards import ShardSet, check_shards, write_shards
from datamodules.sources.base import LatentForm
from datamodules.storage import folder_at
from datamodules.transforms import SceneTransform
from models.backbones.base import EXACT
from models.backbones.tiny import tiny_backbone
from preparation import stages
from preparation.checking import check_folder
from preparation.latents import ImageTransform, LatentOutput, Latents
from preparation.runner import read_samples, run_stage
from preparation.stages import open_part
from runtime.build import build_module
from scenes.scene import Frame, Relation, Scene, SceneObject
from tests.preparation.conftest import Listed, with_index

SIZES = ((64, 64), (80, 112), (120, 72), (64, 96), (100, 100))  # (height, width) px
SIDE, CELLS = 64, 8
FACTOR = 0.18215
NODE = {"_target_": "models.backbones.tiny.tiny_backbone", "kind": "sd15"}


def latents(backbone=NODE, **settings):
    """The stage, its settings by their own names."""
    kinds = {"transform": ImageTransform, "output": LatentOutput}
    groups = {
        group: {field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings}
        for group, kind in kinds.items()
    }
    return stages.latents(backbone=backbone, **groups, **settings)


def smooth(number, scene):
    """A smooth picture of the scene's size."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(scene.frame.original[::-1], Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """12 pictures of every shape in 3 shards of 5, 5 and 2; of the two objects a centre square may cut one off."""
    scene = Scene(
        id="picture",
        caption="a dog on the left of a red circle",
        objects=(
            SceneObject(phrase="a red circle", box=(0.3, 0.35, 0.6, 0.8)),
            SceneObject(phrase="a dog", box=(0.01, 0.2, 0.12, 0.3)),
        ),
        relations=(Relation(subject=1, predicate="left of", object=0),),
    )
    frames = [Frame(original=SIZES[number % len(SIZES)]) for number in range(12)]
    scenes = [replace(scene, id=f"picture-{number}", frame=frame) for number, frame in enumerate(frames)]
    source = Listed(scenes, smooth, provides="image caption boxes phrases relations", image_format="png")
    return write_shards(source, tmp_path_factory.mktemp("pictures") / "shards", shard_size=5)


@pytest.fixture(scope="module")
def backbone(backbone_named):
    return backbone_named("tiny_sd15")


@pytest.fixture(scope="module")
def prepared(pictures, tmp_path_factory):
    """prepared(**settings): the folder that the stage makes of the pictures, each made once."""

    @functools.cache
    def make(**settings):
        out = tmp_path_factory.mktemp("latents") / "shards"
        stage = latents(**{"dtype": "float32", "batch_size": 3, **settings}).to("cpu")
        assert run_stage(stage, pictures, out).index is not None
        return out

    return make


def samples(folder, **transform):
    """The samples of a folder at the positions of a training stream that reads it in order."""
    stored, order = ShardSet(folder), Straight()
    return [PositionDataset(stored, SceneTransform(resolution=SIDE, **transform), order=order)[n] for n in range(12)]


class Straight:
    """The order of shards of 5."""

    def __getitem__(self, position):
        return divmod(position, 5)


def encoded(backbone, images):
    with torch.inference_mode():
        return backbone.encode_images(torch.stack(list(images)))


def test_the_index_says_what_the_numbers_are(pictures, prepared):
    folder = prepared(flipped=True)
    stored = ShardSet(folder)
    assert check_shards(folder).ok
    assert stored.index["members"] == [LATENT, LATENT_FLIPPED, "scene.json"]
    assert stored.latents == LatentForm(
        channels=4, height=CELLS, width=CELLS, scale=8, scaling_factor=FACTOR, moments=True, flipped=True
    )
    assert (stored.latents.shape, stored.latents.stored_shape) == ((4, 8, 8), (8, 8, 8))
    assert stored.provides == ShardSet(pictures).provides - {"image"} | {"latents"}
    assert stored.sizes == (5, 5, 2)
    step = stored.index["stages"][-1]
    assert step["name"] == "latents"
    assert step["settings"]["backbone"] == NODE
    assert step["settings"]["resolution"] == SIDE


def test_pictures_may_stay_beside_their_latents(pictures, prepared):
    folder = prepared(pictures=True)
    stored = ShardSet(folder)
    assert stored.index["members"] == [LATENT, "png", "scene.json"]
    assert stored.provides == ShardSet(pictures).provides | {"latents"}
    assert check_folder(str(folder)).faults == []
    wanted = samples(pictures, min_area=0.0)
    for sample, seen in zip(read_samples(folder_at(folder), stored.entries[0]), wanted, strict=False):
        kept = torch.from_numpy(np.array(sample.picture())).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(kept, seen.image, rtol=0, atol=1e-6)
    assert torch.equal(samples(folder)[3].latent, samples(prepared())[3].latent)  # training takes the latent


def test_an_index_from_before_is_read(prepared, tmp_path):
    def without(index):
        for key in ("moments", "flipped"):
            del index["latents"][key]

    folder = prepared(store="mode")
    old = with_index(folder, tmp_path / "old", without)
    assert ShardSet(old).latents == ShardSet(folder).latents
    np.testing.assert_array_equal(ShardSet(old)[3].latent, ShardSet(folder)[3].latent)


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_pictures_become_square_as_in_training(pictures, prepared, backbone, resize):
    of_pictures = samples(pictures, resize=resize, min_area=0.0)
    of_latents = samples(prepared(resize=resize), min_area=0.0)
    expected = encoded(backbone, [sample.image for sample in of_pictures])
    for picture, latent, wanted in zip(of_pictures, of_latents, expected, strict=True):
        assert latent.scene == picture.scene
        torch.testing.assert_close(latent.latent, wanted, rtol=1e-5, atol=1e-5)


def test_small_objects_stay_for_training_to_drop(pictures, prepared):
    of_pictures, of_latents = samples(pictures, min_area=0.012), samples(prepared(), min_area=0.012)
    assert [sample.scene for sample in of_latents] == [sample.scene for sample in of_pictures]
    assert any(sample.dropped for sample in of_latents)
    fewer = ShardSet(prepared(min_area=0.012))
    assert [len(fewer.scene(n).objects) for n in range(12)] == [len(sample.scene.objects) for sample in of_pictures]
    lost = fewer.index["left_out"]["objects that the square leaves too little of"]
    assert lost == 24 - sum(len(fewer.scene(n).objects) for n in range(12)) > 0


def test_the_mirrored_latent_is_that_of_the_mirrored_picture(pictures, prepared, backbone):
    stored = ShardSet(prepared(flipped=True))
    plain = samples(pictures)
    wanted = encoded(backbone, [sample.image.flip(-1) for sample in plain])
    for number in range(12):
        record = stored.read(*divmod(number, 5), mirrored=True)
        assert record.mirrored
        torch.testing.assert_close(torch.from_numpy(record.latent), wanted[number], rtol=1e-5, atol=1e-5)
    apart = wanted - encoded(backbone, [sample.image for sample in plain])
    assert apart.abs().max() > 1e-2


def test_moments_are_those_of_the_autoencoder_in_latent_units(pictures, prepared, backbone):
    images = torch.stack([sample.image for sample in samples(pictures)])
    with torch.inference_mode():
        posterior = backbone.vae.encode(images).latent_dist
    stored = ShardSet(prepared())
    for number in range(12):
        record = stored[number]
        deviation = np.exp(record.log_variance / 2)
        np.testing.assert_allclose(record.latent, FACTOR * posterior.mean[number].numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(deviation, FACTOR * posterior.std[number].numpy(), rtol=1e-4)


def test_one_draw_is_a_function_of_seed_and_scene(pictures, prepared):
    moments, drawn = ShardSet(prepared(flipped=True)), ShardSet(prepared(store="sample"))
    twin, other = (
        ShardSet(prepared(store="sample", **more)) for more in ({"flipped": True, "batch_size": 2}, {"seed": 1})
    )
    noise = []
    for number in range(12):
        record = moments[number]
        noise.append((drawn[number].latent - record.latent) / np.exp(record.log_variance / 2))
        np.testing.assert_allclose(twin[number].latent, drawn[number].latent, rtol=1e-4, atol=1e-4)
        assert np.abs(other[number].latent - drawn[number].latent).max() > 1e-3
    noise = np.stack(noise)
    assert abs(noise.mean()) < 0.06  # 3072 numbers
    assert abs(noise.std() - 1) < 0.06
    assert np.abs(np.corrcoef(noise.reshape(12, -1)) - np.eye(12)).max() < 0.3


def test_half_the_bytes_for_half_precision(prepared, backbone):
    half, full = ShardSet(prepared(dtype="float16")), ShardSet(prepared())
    assert half[4].latent.dtype == np.float16
    np.testing.assert_allclose(half[4].latent, full[4].latent, rtol=1e-3, atol=1e-4)


def test_bytes_do_not_depend_on_the_threads(pictures, tmp_path):
    folders = []
    for threads in (1, 5):
        stage = latents(threads=threads, batch_size=4).to("cpu")
        run_stage(stage, pictures, tmp_path / str(threads))
        folders.append(ShardSet(tmp_path / str(threads)))
    assert [entry.sha256 for entry in folders[0].entries] == [entry.sha256 for entry in folders[1].entries]


def test_a_picture_that_cannot_be_decoded_is_left_out_and_told(pictures):
    stored = ShardSet(pictures)
    given = list(read_samples(folder_at(pictures), stored.entries[0]))
    given[2].members["png"] = given[2].members["png"][:60]
    stage = latents(batch_size=2).to("cpu")
    made = list(stage(given))
    assert [sample.key for sample in made] == [sample.key for n, sample in enumerate(given) if n != 2]
    assert stage.left_out.bad == 1
    assert "picture-2: " in stage.left_out.skipped[0]
    list(stage(given[:2]))
    assert stage.left_out.bad == 0


def test_a_latent_that_is_not_finite_is_left_out_with_the_ways_out(pictures):
    given = list(read_samples(folder_at(pictures), ShardSet(pictures).entries[0]))
    broken = tiny_backbone("sd15")
    with torch.no_grad():
        broken.vae.quant_conv.bias[0] = 1e7  # beyond what float16 holds
    stage = Latents(lambda: broken, model=NODE).to("cpu")
    assert not list(stage(given))
    assert stage.left_out.bad == 5
    assert re.search("picture-0: .*float32.*float16.*stage.precision", stage.left_out.skipped[0])


def test_what_the_picture_decides_wholly_has_no_variance(pictures, backbone_named):
    shapes = backbone_named("shapes")
    stage = Latents(lambda: shapes, model={}, output=LatentOutput(dtype="float32")).to("cpu")
    made = list(stage(read_samples(folder_at(pictures), ShardSet(pictures).entries[0])))
    moments = np.load(io.BytesIO(made[0].members[LATENT]))
    assert stage.latent_form(None).stored_shape == moments.shape == (24, 16, 16)
    assert (moments[12:] == EXACT).all()
    assert "png" not in made[0].members


def test_a_full_check_finds_what_is_not_as_the_index_says(prepared, tmp_path):
    folder = prepared(flipped=True)
    assert not check_folder(folder).faults
    changed = with_index(folder, tmp_path, lambda index: index["latents"].update(width=9))
    assert re.search(r"latent: \(8, 8, 8\).*\(8, 8, 9\)", check_folder(changed).faults[0])


def test_nothing_but_the_autoencoder_is_read(tmp_path, backbone):
    folder = tmp_path / "tiny"
    whole = tiny_backbone("sd15", folder=folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "text_encoder" / "model.safetensors").unlink()
    node = {**NODE, "folder": str(folder)}
    alone = open_part(node, "autoencoder")
    assert {parameter.device.type for parameter in alone.unet.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in alone.text.parameters()} == {"meta"}
    assert (alone.latent_channels, alone.resolution) == (whole.latent_channels, whole.resolution)
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    assert torch.equal(alone.encode_images(images), whole.encode_images(images))
    with pytest.raises(ValueError, match="unet"):
        tiny_backbone("sd15", folder=folder)


def test_the_text_encoders_can_be_read_alone(tmp_path):
    folder = tmp_path / "tiny"
    whole = tiny_backbone("sdxl", folder=folder)
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    alone = tiny_backbone("sdxl", folder=folder, only="text")
    assert torch.equal(alone.encode_captions(["a red dog"]).tokens, whole.encode_captions(["a red dog"]).tokens)
    with pytest.raises(ValueError, match=r"backbone\.only: 'unet'"):
        tiny_backbone("sdxl", folder=folder, only="unet")


def test_a_backbone_without_parts_is_opened_whole():
    node = {"_target_": "diffusers.UNet2DConditionModel", "block_out_channels": [8], "norm_num_groups": 4}
    node |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    assert isinstance(open_part(node, "autoencoder"), UNet2DConditionModel)


def test_half_precision_is_of_the_autoencoder_alone(pictures, prepared):
    stage = latents(precision="bfloat16").to("cpu")
    assert {parameter.dtype for parameter in stage.backbone.vae.parameters()} == {torch.bfloat16}
    made = list(stage(read_samples(folder_at(pictures), ShardSet(pictures).entries[0])))
    rough = np.load(io.BytesIO(made[0].members[LATENT]))[:4]
    exact = ShardSet(prepared())[0].latent
    assert 0 < np.abs(rough - exact).max() < 0.05


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"store": "means"}, "stage.output.store=means"),
        ({"dtype": "bfloat16"}, "stage.output.dtype=bfloat16"),
        ({"precision": "half"}, "stage.precision=half"),
        ({"batch_size": 0}, "stage.batch_size=0"),
        ({"threads": 0}, "stage.threads=0"),
        ({"resize": "fit"}, "resize=fit"),
        ({"interpolation": "nearest"}, "interpolation=nearest"),
        ({"min_visible": -0.1}, "min_visible=-0.1"),
        ({"backbone": None}, "backbone: "),
        ({"resolution": 60}, "stage.transform.resolution=60"),
    ],
)
def test_settings_that_make_no_latents_are_refused(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        latents(**settings).to("cpu")
    assert "\n" not in str(caught.value)


def test_latents_of_latents_are_refused(prepared, tmp_path):
    with pytest.raises(ShardError, match="task=latents .*image"):
        run_stage(latents(), prepared(), tmp_path / "again")


def test_images_are_scaled_as_training_scales_them_and_lose_what_it_would_lose(pictures, prepared, backbone):
    stored = ShardSet(prepared(interpolation="lanczos", min_visible=0.9))
    assert stored.index["stages"][-1]["settings"]["interpolation"] == "lanczos"
    transform = SceneTransform(resolution=SIDE, interpolation="lanczos", min_visible=0.9, min_area=0)
    squares = [transform(ShardSet(pictures)[number], number) for number in range(12)]
    for number, wanted in enumerate(encoded(backbone, [sample.image for sample in squares])):
        np.testing.assert_allclose(stored[number].latent, wanted.numpy(), rtol=0, atol=1e-5)
        assert stored[number].scene == squares[number].scene
    assert {len(sample.scene.objects) for sample in squares} == {1, 2}
    other = ShardSet(prepared())
    assert not np.allclose(stored[1].latent, other[1].latent, rtol=0, atol=1e-4)


def data(folder, **settings):
    given = {"resolution": SIDE, "batch_size": 4, "seed": 3, "min_area": 0.0, **settings}
    module = SceneDataModule(str(folder), **given)
    module.setup("fit")
    return module


def batch_of(module, positions):
    dataset = PositionDataset(module.training_set, module._transform, order=module.order)
    return collate([dataset[position] for position in positions])


def test_training_draws_from_moments_by_seed_and_position(prepared):
    module, other = data(prepared()), data(prepared(), seed=4)
    means = data(prepared(), posterior="mode")
    whole = batch_of(module, range(24))
    parts = [batch_of(data(prepared()), part) for part in (range(20, 24), range(8), range(8, 20))]
    again = torch.cat([parts[1].latents, parts[2].latents, parts[0].latents])
    assert torch.equal(whole.latents, again)  # another batch size, another rank, another start
    mean = batch_of(means, range(24)).latents
    apart = whole.latents - mean
    log_variance = np.stack([module.training_set.read(*module.order[n]).log_variance for n in range(24)])
    wanted = np.stack([latent_noise(3, n, (4, 8, 8)) for n in range(24)])
    np.testing.assert_allclose(apart.numpy() / np.exp(log_variance / 2), wanted, rtol=1e-2, atol=1e-2)
    assert abs(wanted.mean()) < 0.05
    assert abs(wanted.std() - 1) < 0.05
    same = [n for n in range(12, 24) if whole.scenes.scenes[n].id == whole.scenes.scenes[0].id]  # in the second epoch
    assert same
    assert not torch.equal(whole.latents[0], whole.latents[same[0]])
    assert not torch.equal(whole.latents, batch_of(other, range(24)).latents)


def test_held_out_scenes_have_the_mean(prepared):
    module = data(prepared(), validation_shards=str(prepared()))
    held_out = module.held_out(3)
    stored = np.stack([module.validation_set[n].latent for n in range(3)])
    np.testing.assert_array_equal(held_out.latents.numpy(), stored)


def test_mirrored_samples_have_the_mirrored_latent(pictures, prepared, backbone):
    folder = prepared(flipped=True)
    of_pictures = batch_of(data(pictures, flip=True), range(24))
    of_latents = batch_of(data(folder, flip=True, posterior="mode"), range(24))
    assert {flips(3, n) for n in range(24)} == {False, True}
    assert of_latents.scenes.scenes == of_pictures.scenes.scenes
    wanted = encoded(backbone, of_pictures.images)
    torch.testing.assert_close(of_latents.latents, wanted, rtol=1e-5, atol=1e-5)


def test_mirroring_without_mirrored_latents_is_refused(prepared):
    with pytest.raises(ShardError, match=r"data\.flip=true.*data\.flip=false.*stage\.output\.flipped=true") as caught:
        data(prepared(), flip=True)
    assert "\n" not in str(caught.value)


def test_folders_of_other_forms_are_not_mixed(prepared):
    folders = [str(prepared()), str(prepared(flipped=True))]
    with pytest.raises(ShardError, match="moments of latents .*mirrored"):
        SceneDataModule(folders, resolution=SIDE, batch_size=4, seed=0, weights=[1, 1]).setup("fit")


def test_moments_of_another_shape_than_the_index_says_are_refused(prepared, tmp_path):
    folder = with_index(prepared(), tmp_path, lambda index: index["latents"].update(moments=False))
    with pytest.raises(ShardError, match=r"\(8, 8, 8\).*\(4, 8, 8\)"):
        _ = ShardSet(folder)[0]


def module_of(composed, pictures, *overrides):
    settings = ("backbone=tiny_sd15", "data=folder", f"data.shards={pictures}", "data.resolution=64", "batch_size=4")
    return build_module(composed(*settings, "seed=3", *overrides))


@pytest.mark.parametrize("posterior", ["mode", "sample"])
@pytest.mark.parametrize("flip", [False, True])
def test_the_loss_on_moments_is_the_loss_on_images(pictures, prepared, composed, flip, posterior):
    module = module_of(composed, pictures, f"data.posterior={posterior}")
    settings = {"flip": flip, "posterior": posterior}
    losses = []
    for folder in (pictures, prepared(flipped=True)):
        batch = batch_of(data(folder, **settings), range(12))
        losses.append(module.losses(batch, batch.positions.tolist()))
    assert torch.isfinite(losses[0]).all()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_images_train_on_a_draw_from_the_posterior_and_are_validated_on_its_mean(pictures, composed):
    module = module_of(composed, pictures)
    batch = batch_of(data(pictures), range(5, 11))
    keys = batch.positions.tolist()
    with torch.no_grad():
        posterior = module.backbone.vae.encode(batch.images).latent_dist
        drawn = module.latents(batch, keys)
        noise = torch.from_numpy(np.stack([latent_noise(3, key, (4, 8, 8)) for key in keys]))
        torch.testing.assert_close(drawn, FACTOR * (posterior.mean + posterior.std * noise), rtol=1e-4, atol=1e-4)
        parts = [batch_of(data(pictures), span) for span in (range(8, 11), range(5, 8))]
        again = torch.cat([module.latents(part, part.positions.tolist()) for part in reversed(parts)])
        torch.testing.assert_close(again, drawn, rtol=1e-5, atol=1e-5)
        mean = module.latents(batch)
        assert torch.equal(mean, module.backbone.encode_images(batch.images))
        assert not torch.allclose(mean, drawn, atol=1e-2)
        fixed = module.losses(batch, keys, drop=False)
        module.posterior = "mode"
        assert torch.equal(module.losses(batch, keys, drop=False), fixed)
        assert torch.equal(module.latents(batch, keys), mean)


def test_training_runs_on_moments(prepared, composed, fit, tmp_path):
    folder = prepared(flipped=True, dtype="float16")
    overrides = ["backbone=tiny_sd15", "data=folder", f"data.shards={folder}", "data.resolution=64", "data.flip=true"]
    overrides += ["data.workers=0", "batch_size=4", "callback=[progress,checkpoint]", "trainer.max_steps=2"]
    overrides += ["trainer.log_every=1", "optimizer.warmup_steps=0"]
    assert fit(composed(*overrides, f"run={tmp_path / 'run'}")).global_step == 2
