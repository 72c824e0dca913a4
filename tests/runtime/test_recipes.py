"""The published recipes run at tiny size, validate, go on after a stop, and continue one another."""

import shutil

import pytest
import torch

from datamodules.shards import write_shards
from datamodules.sources.shapes import Shapes
from loggers.metrics_csv import read_metrics
from runtime.build import build_data
from runtime.composition import compose
from runtime.run_directory import RunDirectory

RECIPES = {
    "gligen_coco_sd14": ("tiny_sd15", "coco"),
    "igligen_sa1b_sd21": ("tiny_sd21_base", "sa1b"),
    "igligen_sa1b_sdxl_512": ("tiny_sdxl", "sa1b"),
    "igligen_sa1b_sdxl_1024": ("tiny_sdxl", "sa1b"),
    "sdxl_sg_laion_sg": ("tiny_sdxl", "laion_sg"),
    "sd15_sg_laion_sg": ("tiny_sd15", "laion_sg"),
    "rich_context_sdxl_512": ("tiny_sdxl", "mixture"),
    "rich_context_sd15": ("tiny_sd15", "mixture"),
}

BATCH = {"rich_context_sdxl_512": 4, "rich_context_sd15": 8}  # two micro-batches of what they take at once


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    write_shards(Shapes(count=8, size=64), folder)
    return folder


@pytest.fixture(scope="module")
def more_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "more"
    write_shards(Shapes(count=6, size=64, start=100), folder)
    return folder


@pytest.fixture(scope="module")
def recipe(shards, more_shards):
    """recipe(name, run, *overrides): a recipe with its tiny backbone at 64 px on a CPU."""

    def composed(name, run, *overrides):
        backbone, data = RECIPES[name]
        batch = BATCH.get(name, 2)
        small = (
            f"batch_size={batch}",
            "trainer.accumulate=1",
            "trainer.max_steps=2",
            "trainer.save_every=1",
            "trainer.validate_every=1",
            "optimizer.warmup_steps=1",
            f"data.validation_shards={shards}",
            "data.workers=0",
        )
        return compose(
            "train",
            [
                f"experiment={name}",
                f"backbone={backbone}",
                "backbone.resolution=64",
                f"data={data}",
                "data.resolution=64",
                f"data.shards=[{shards},{more_shards}]" if data == "mixture" else f"data.shards={shards}",
                "trainer=cpu",
                "optimizer=adamw",
                "logger=[csv]",
                "callback=[gates,checkpoint]",
                f"run={run}",
                *small,
                *overrides,
            ],
        )

    return composed


def last(run):
    return torch.load(RunDirectory(run).newest_checkpoint(), weights_only=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_stopped_recipe_ends_as_an_unbroken_one(name, recipe, fit, tmp_path):
    trainer = fit(recipe(name, tmp_path / "whole")).trainer
    assert trainer.accumulate_grad_batches == trainer.datamodule.accumulate == (2 if name in BATCH else 1)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (tmp_path / "stopped" / "checkpoints" / "step=2.ckpt").unlink()
    (tmp_path / "stopped" / "finished.json").unlink()
    fit(recipe(name, tmp_path / "stopped"))
    whole, stopped = last(tmp_path / "whole")["state_dict"], last(tmp_path / "stopped")["state_dict"]
    assert whole
    assert all(torch.equal(tensor, stopped[key]) for key, tensor in whole.items())


@pytest.mark.parametrize("name", [name for name, (_, data) in RECIPES.items() if data == "mixture"])
def test_a_mixture_s_recipe_also_takes_one_folder(name, recipe, shards, tmp_path):
    cfg = recipe(name, tmp_path, f"data.shards={shards}", "trainer.micro_batch=1")
    (part,) = build_data(cfg).parts(6)
    assert (part.samples, part.drawn) == (8, 6)
    parts = build_data(recipe(name, tmp_path)).parts(6)
    published = {"rich_context_sdxl_512": [2, 4], "rich_context_sd15": [3, 3]}  # 1 : 2 and 1 : 1
    assert [(part.samples, part.drawn) for part in parts] == list(zip([8, 6], published[name], strict=True))


def test_the_second_stage_goes_on_from_the_first(recipe, fit, tmp_path, capsys):
    fit(recipe("igligen_sa1b_sdxl_512", tmp_path / "first"))
    still = ("optimizer.learning_rate=0", f"start_from={tmp_path / 'first'}")
    fit(recipe("igligen_sa1b_sdxl_1024", tmp_path / "second", *still))
    first, second = last(tmp_path / "first")["state_dict"], last(tmp_path / "second")["state_dict"]
    weights = [key for key in first if key.startswith("adapters.")]
    assert all(torch.equal(first[key], second[key]) for key in weights)
    assert "starts from" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gligen_coco_sd14", "rich_context_sd15", "sdxl_sg_laion_sg"])
def test_a_recipe_holds_scenes_out_and_has_its_images_scores_and_loggers(name, recipe, fit, tmp_path, caplog):
    """As its header gives it, without validation shards and without the detector that scores layouts."""
    whole = compose("train", [f"experiment={name}", "data.shards=DIR"])
    boxes = "layout_score" in whole.callback
    assert boxes == (name != "sdxl_sg_laion_sg")
    names = [{"layout_score": "layout_score_detector"}.get(one, one) for one in whole.callback]
    few = ["callback.pictures.scenes=1", *(["callback.layout_score.scenes=1"] * boxes)]
    cfg = recipe(
        name,
        tmp_path / "run",
        f"callback=[{','.join(names)}]",
        "logger=[csv,tensorboard]",
        "data.validation_shards=null",
        "trainer.log_every=1",
        "sampler.steps=1",
        f"paths.data={tmp_path}",
        *few,
    )
    module = fit(cfg)
    assert len(module.trainer.datamodule.validation_set) == 1
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 2
    logged = {name for _, name, _ in read_metrics(tmp_path / "run" / "metrics.csv")}
    assert {"train/loss", "validation/loss", "gradient_norm", "speed/samples_per_second"} <= logged
    assert not [name for name in logged if name.startswith("passed_over/")]
    told = [record.getMessage() for record in caplog.records if record.name.startswith("callbacks")]
    assert len(told) == boxes
    assert all("callback.layout_score.metric.detector.file=" in line for line in told)
