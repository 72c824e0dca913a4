"""What several test files share: small shards, the composed configuration, tiny backbones and one short run."""

import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from datamodules.shards import write_shards
from datamodules.sources.base import Source
from datamodules.sources.shapes import Shapes
from models.backbones.tiny import WORDS
from models.text import word_tokenizer
from runtime.build import build_backbone, build_module
from runtime.composition import compose
from runtime.run_directory import RunDirectory

TESTS = Path(__file__).parent
SHARED = os.environ.get(
    "SCENOGRAPH_SHARED"
)  # a folder with `samples` and `golden` as published, to be tested beside those of here
TINY_SHAPES = (
    "backbone.weights=null",
    "backbone.unet_config.norm_num_groups=8",
    "backbone.unet_config.block_out_channels=[16,24]",
    "backbone.unet_config.attention_head_dim=[2,3]",
    "backbone.text_config.hidden_size=32",
    "backbone.text_config.intermediate_size=64",
)
SHORT = (
    "batch_size=8",
    "conditioning.regions.variant=union",
    "conditioning.regions.width=24",
    "conditioning.regions.hidden=32",
    "conditioning.regions.place_width=8",
    "data.make.source.count=64",
    "data.make_validation.source.count=8",
    "callback.layout_score.scenes=2",
    "callback.pictures.scenes=2",
    "optimizer.learning_rate=1e-3",
    "optimizer.schedule=cosine",
    "sampler.steps=2",
    "trainer.max_steps=4",
    "trainer.save_every=1",
    "trainer.log_every=1",
    "trainer.validate_every=2",
)


def folders(name):
    """The folder of the tests, and beside it the one of SCENOGRAPH_SHARED if that is set."""
    own, published = TESTS / name, [Path(SHARED) / name] if SHARED else []
    return [pytest.param(own, id="own"), *(pytest.param(folder, id="published") for folder in published)]


def pytest_terminal_summary(terminalreporter):
    """What the skips do not show: the published files are no part of the repository."""
    if not SHARED:
        terminalreporter.write_line(
            "drawn samples and recordings of tests/ alone; SCENOGRAPH_SHARED=DIR adds the published ones"
        )


@pytest.fixture(scope="session", params=folders("samples"))
def samples(request):
    """A folder of samples in every published form (`scripts.make_samples`)."""
    return request.param


@pytest.fixture(scope="session", params=folders("golden"))
def golden(request, tmp_path_factory):
    """The folder of recorded tensors, its weights in single precision; to be small, some lie there in half precision."""
    if request.param != TESTS / "golden":
        return request.param
    folder = tmp_path_factory.mktemp("recorded") / "golden"
    shutil.copytree(request.param, folder)
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        if any(tensor.dtype == torch.float16 for tensor in tensors.values()):
            single = {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}
            save_file(single, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def composed(tmp_path_factory):
    """composed(*overrides): `conf/train.yaml` without what an experiment would state."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "experiment").mkdir()
    (folder / "experiment" / "blank.yaml").write_text("# @package _global_\nname: blank\n")

    def with_overrides(*overrides):
        return compose("train", ["experiment=blank", *overrides], config_dir=str(folder))

    return with_overrides


@pytest.fixture(scope="session")
def backbone_named(composed):
    """backbone_named(name): a backbone of `conf/backbone` at tiny size and random weights, built once; detach what you attach."""

    @functools.cache
    def build(name):
        cfg = composed(f"backbone={name}", *(TINY_SHAPES if name == "shapes" else ()))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_backbone(cfg)

    return build


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A folder for `paths.data`: 64 training scenes in 4 shards, 8 held out."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(Shapes(count=64), folder / "shapes" / "train", shard_size=16)
    write_shards(Shapes(count=8, start=10_000_000), folder / "shapes" / "validation")
    return folder


@pytest.fixture(scope="session")
def short(composed, small_data):
    """short(folder, *overrides): a run of 4 steps over the small shards; `without` leaves out what names these groups."""

    def with_overrides(folder, *overrides, without=()):
        small = [setting for setting in SHORT if not setting.startswith(tuple(f"{group}." for group in without))]
        return composed(f"run={folder}", f"paths.data={small_data}", *TINY_SHAPES, *small, *overrides)

    return with_overrides


@pytest.fixture(scope="session")
def fit():
    """fit(cfg): what `train.py` does; gives the trained module."""
    from runtime.training import train

    def fitted(cfg):
        directory = RunDirectory(cfg.run)
        return train(cfg, directory, directory.inspect(cfg))

    return fitted


class Marked(Source):
    """16 pictures of shapes; the captions of some have a word that no other has."""

    provides = Shapes.provides
    image_format = "png"
    word = "surrounding"  # the backbone knows it, and no caption of the shapes has it

    def __init__(self, *chosen):
        self.chosen = chosen

    def __len__(self):
        return 16

    def __iter__(self):
        for place, (scene, picture) in enumerate(Shapes(count=16)):
            if place in self.chosen:
                scene = type(scene).from_json({**scene.to_json(), "caption": f"{scene.caption} {self.word}"})
            yield scene, picture


@pytest.fixture(scope="session")
def poisoned(short):
    """poisoned(folder, *overrides, scenes): (configuration, module, ids) of a run whose losses are NaN for some of 16 scenes."""

    def build(folder, *overrides, scenes=(5,)):
        shards = folder.parent / f"marked-{'-'.join(map(str, scenes))}"
        if not shards.exists():
            write_shards(Marked(*scenes), shards)
        cfg = short(
            folder,
            f"data.shards={shards}",
            "data.make=null",
            "callback=[]",
            "logger=[csv]",
            "trainer.max_steps=2",
            "drops.keep=1",
            "drops.scene_only=0",
            "drops.caption_only=0",
            "drops.none=0",
            *overrides,
            without=["callback", "data.make"],
        )
        module = build_module(cfg)
        tower = module.backbone.text.towers[0]
        [_, word, _] = tower.tokenizer(Marked.word)["input_ids"]
        with torch.no_grad():
            tower.encoder.get_input_embeddings().weight[word] = torch.nan
        ids = [scene.id for scene, _ in Shapes(count=16)]
        return cfg, module, {ids[place] for place in scenes}

    return build


@pytest.fixture(scope="session")
def short_run(short, fit, tmp_path_factory):
    """(configuration, module) of a finished short run with every callback; to be read, not changed."""
    cfg = short(tmp_path_factory.mktemp("runs") / "short")
    return cfg, fit(cfg)


@pytest.fixture(scope="session")
def tiny_refiner(tmp_path_factory):
    """A folder with SDXL's refiner at tiny widths and random weights: one text encoder, an aesthetic score among its size ids."""
    folder = tmp_path_factory.mktemp("refiner")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = word_tokenizer(WORDS, max_length=77)
        text = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=20,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=20,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 24, 24),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 2, 3, 3),
            cross_attention_dim=20,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=20 + 5 * 4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 12, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        )
        pipeline = StableDiffusionXLImg2ImgPipeline(
            vae=vae,
            text_encoder=None,
            text_encoder_2=CLIPTextModelWithProjection(text),
            tokenizer=None,
            tokenizer_2=words,
            unet=unet,
            scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def s3():
    """The address of a folder on an S3 server of this machine."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "tests"),
            ("AWS_SECRET_ACCESS_KEY", "tests"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="tests")
        yield "s3://tests"
    server.stop()
