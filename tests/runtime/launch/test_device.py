"""Where a run draws: the device and the precision of its trainer settings, through evaluation and drawing themselves."""

import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image

from evaluation.evaluate import evaluate
from runtime.composition import compose
from runtime.launch.device import accumulation, device_of, placed, world_size
from runtime.restoring import load_module
from runtime.run_directory import RunError, load_run_config
from sampling.sample import draw
from scenes import SceneBatch, save_scene

HAS_GPU = torch.cuda.is_available()


@pytest.fixture
def settings(short_run, small_data):
    """settings(config, *overrides): of evaluate or sample over the short run, and the run's own with them laid over."""

    def composed(config, *overrides):
        cfg = compose(config, [f"run={short_run[0].run}", f"paths.data={small_data}", *overrides])
        return cfg, load_run_config(cfg.run, cfg)

    return composed


def evaluated(settings, out, *overrides):
    """The pictures (scenes, H, W, 3) of an evaluation and its result."""
    small = ("protocol.scenes=2", "protocol.make.source.count=4")
    result = evaluate(*settings("evaluate", f"out={out}", *small, *overrides))
    files = sorted((out / "with_scene" / "pictures").glob("*.png"))
    return np.stack([pixels(file) for file in files]), result


def pixels(file):
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


def test_a_mixed_precision_is_the_one_that_evaluation_draws_in(settings, tmp_path):
    whole, result = evaluated(settings, tmp_path / "whole")
    again, _ = evaluated(settings, tmp_path / "again", "++trainer.accelerator=auto") if not HAS_GPU else (whole, None)
    mixed, mixed_result = evaluated(settings, tmp_path / "mixed", "++trainer.precision=bf16-mixed")
    assert np.array_equal(whole, again)
    assert abs(mixed - whole).max() > 0
    assert abs(mixed - whole).mean() < 2
    assert (result["protocol"]["precision"], mixed_result["protocol"]["precision"]) == ("32-true", "bf16-mixed")
    assert result["weights_sha256"] == mixed_result["weights_sha256"]
    assert result["device"] == "cpu"
    with pytest.raises(ValueError, match="its pictures were made with"):
        evaluated(settings, tmp_path / "whole", "++trainer.precision=bf16-mixed")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU, so none is refused")
@pytest.mark.parametrize("config", ["evaluate", "sample"])
def test_a_gpu_that_is_not_there_is_refused_with_the_way_out(config, settings, short_run, tmp_path):
    save_scene(short_run[1].trainer.datamodule.held_out(1).scenes.scenes[0], tmp_path / "scene.json")
    if config == "sample":
        cfg = settings(
            config, "++trainer.accelerator=gpu", f"scene={tmp_path / 'scene.json'}", f"out={tmp_path / 'o.png'}"
        )
    else:
        cfg = settings(config, "trainer=gpu", "protocol.scenes=2", "protocol.make.source.count=4", f"out={tmp_path}")
    with pytest.raises(RunError, match="trainer.accelerator=gpu: .* add trainer.accelerator=cpu$"):
        (draw if config == "sample" else evaluate)(*cfg)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_on_a_gpu_everything_is_there_and_pictures_differ_by_rounding(settings, short_run):
    _, run_cfg = settings("evaluate", "++trainer.accelerator=gpu", "++trainer.matmul=highest")
    scenes = short_run[1].trainer.datamodule.held_out(2).scenes
    module, _ = load_module(run_cfg, None)
    with module.averaged():
        expected = module.sample(scenes, seed=0)
    with placed(module, run_cfg.trainer), module.averaged():
        drawn = module.sample(SceneBatch(list(scenes), device=module.device), seed=0)
    assert drawn.device.type == "cuda"
    torch.testing.assert_close(drawn.cpu(), expected, atol=1e-2, rtol=0)


def test_another_accelerator_is_refused():
    with pytest.raises(RunError, match="trainer.accelerator=tpu: no such choice"):
        device_of(OmegaConf.create({"accelerator": "tpu", "devices": 1}))


def trainer_of(**settings):
    return OmegaConf.create({"accelerator": "cpu", "devices": 1, "num_nodes": 1, "accumulate": 1} | settings)


@pytest.mark.parametrize("devices", [1, 3, "2", "auto"])
def test_ranks_are_counted_as_lightning_counts_them(devices):
    trainer = pl.Trainer(accelerator="cpu", devices=devices, logger=False, enable_progress_bar=False)
    assert world_size(trainer_of(devices=devices)) == trainer.num_devices
    assert world_size(trainer_of(devices=devices, num_nodes=4)) == 4 * trainer.num_devices


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 128), (4, 32), (8, 16), (128, 1)])
def test_the_global_batch_is_the_same_on_any_number_of_devices(devices, accumulate):
    assert accumulation(256, trainer_of(devices=devices, micro_batch=2)) == accumulate
    assert accumulation(256, trainer_of(devices=devices, micro_batch=None, accumulate=5)) == 5


@pytest.mark.parametrize(
    ("batch_size", "devices", "micro", "way"),
    [
        (256, 3, 2, "take another number of devices, or another batch_size"),
        (2, 1, 4, "take trainer.micro_batch=2, or another"),
        (12, 2, 4, "take trainer.micro_batch=3, or another"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_a_way_out(batch_size, devices, micro, way):
    message = (
        f"trainer.micro_batch={micro}: batch_size={batch_size} (the global one) does not divide by ranks={devices} x"
    )
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        accumulation(batch_size, trainer_of(devices=devices, micro_batch=micro))
    assert way in str(caught.value)
    assert "\n" not in str(caught.value)
