"""What happens beside training, on a real short run: checkpoints, pictures, layout score, rates and gates."""

import contextlib
import resource
import shutil

import numpy as np
import pytest
from PIL import Image

from callbacks.checkpoint import Checkpoint
from callbacks.layout_score import LayoutScore
from callbacks.progress import Progress
from lightning_modules.scene_diffusion import SceneDiffusion
from loggers.metrics_csv import read_metrics
from models.sampling import to_uint8
from runtime.run_directory import RunDirectory, is_whole
from tests.ranks import Brightness


@pytest.fixture(scope="module")
def accumulated(short, fit, tmp_path_factory):
    """A run of 4 steps of 2 micro-batches, with everything every 3 steps and one checkpoint kept."""
    cfg = short(
        tmp_path_factory.mktemp("runs") / "accumulated",
        "trainer.accumulate=2",
        "trainer.save_every=3",
        "trainer.validate_every=3",
        "trainer.log_every=2",
        "trainer.keep=1",
    )
    return cfg, fit(cfg)


def logged(run, name):
    rows = read_metrics(RunDirectory(run[0].run).path / "metrics.csv")
    return [(step, value) for step, metric, value in rows if metric == name]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def folder_of(run, name):
    return RunDirectory(run[0].run).path / name


class TestCheckpoint:
    def test_the_newest_are_kept_whole(self, short_run):
        folder = folder_of(short_run, "checkpoints")
        assert names(folder) == ["step=2.ckpt", "step=3.ckpt", "step=4.ckpt"]
        assert all(is_whole(path) for path in folder.iterdir())

    def test_the_last_step_is_saved_though_it_is_not_due(self, accumulated):
        assert names(folder_of(accumulated, "checkpoints")) == ["step=4.ckpt"]

    def test_a_full_disk_leaves_those_before_whole_and_no_torn_one(self, short_run, tmp_path):
        for step in (2, 3):
            shutil.copy(folder_of(short_run, "checkpoints") / f"step={step}.ckpt", tmp_path)
        callback = Checkpoint(folder=str(tmp_path), every=4)
        with files_of_at_most(20_000), pytest.raises(OSError, match="File too large; nothing was left") as full:
            step_ends(callback, short_run)
        assert full.value.filename == str(tmp_path / "step=4.ckpt")
        assert names(tmp_path) == ["step=2.ckpt", "step=3.ckpt"]
        step_ends(callback, short_run)
        assert names(tmp_path) == ["step=2.ckpt", "step=3.ckpt", "step=4.ckpt"]
        assert is_whole(tmp_path / "step=4.ckpt")

    def test_what_is_not_due_is_not_saved(self, short_run, tmp_path):
        trainer, module = short_run[1].trainer, short_run[1]
        trainer_goes_on = Checkpoint(folder=str(tmp_path / "resumed"), every=1)
        trainer_goes_on.on_train_start(trainer, module)
        step_ends(trainer_goes_on, short_run)
        assert not (tmp_path / "resumed").exists()

    def test_a_validation_that_a_kill_cuts_short_comes_again(self, short_run, short, fit, tmp_path, monkeypatch):
        def killed(*_):
            raise RuntimeError("killed")

        cfg = short(tmp_path / "killed")
        with monkeypatch.context() as broken:
            broken.setattr(SceneDiffusion, "validation_step", killed)
            with pytest.raises(RuntimeError, match="killed"):
                fit(cfg)
        run = cfg, None
        assert names(folder_of(run, "checkpoints")) == ["step=1.ckpt", "step=2.ckpt"]
        fit(cfg)
        assert len(logged(run, "validation/loss")) == 2
        assert logged(run, "validation/loss") == logged(short_run, "validation/loss")

    def test_a_checkpoint_of_a_validated_step_goes_on_where_validation_is_due_elsewhere(
        self, short_run, short, fit, tmp_path
    ):
        folder = tmp_path / "moved"
        shutil.copytree(short_run[0].run, folder)
        (folder / "finished.json").unlink()
        for step in (3, 4):
            (folder / "checkpoints" / f"step={step}.ckpt").unlink()
        cfg = short(folder, "trainer.validate_every=3")
        fit(cfg)
        assert [step for step, _ in logged((cfg, None), "validation/loss")] == [1, 2]
        assert logged((cfg, None), "train/loss") == logged(short_run, "train/loss")


def step_ends(callback, run):
    """What a trainer calls between a step and the next."""
    callback.on_train_batch_end(run[1].trainer, run[1], None, None, 0)
    callback.on_validation_end(run[1].trainer, run[1])
    callback.on_train_batch_start(run[1].trainer, run[1], None, 1)


@contextlib.contextmanager
def files_of_at_most(size):
    """Within the block this process cannot write longer files: what a full disk does, for root too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestPictures:
    def test_there_is_one_sheet_for_each_step_that_is_due(self, short_run, accumulated):
        assert names(folder_of(short_run, "pictures")) == ["step=0000002.png", "step=0000004.png"]
        assert names(folder_of(accumulated, "pictures")) == ["step=0000003.png"]

    def test_a_sheet_has_a_row_for_each_scene_and_three_columns(self, short_run):
        with Image.open(folder_of(short_run, "pictures") / "step=0000004.png") as sheet:
            width, height = sheet.size
            pixels = np.asarray(sheet.convert("RGB"))
        assert width >= 3 * 256
        assert height >= 2 * 256
        assert width > height
        thirds = np.array_split(pixels, 3, axis=1)
        assert all(third.std() > 10 for third in thirds)

    def test_tensorboard_has_them(self, short_run):
        [events] = folder_of(short_run, "tensorboard").glob("events.*")
        assert events.read_bytes().count(b"pictures") == 2


class TestLayoutScore:
    def test_it_is_what_the_metric_says_of_the_averaged_weights(self, accumulated):
        module, metric = accumulated[1], Brightness()
        trainer, held_out = module.trainer, module.trainer.datamodule.held_out(2)
        callback = LayoutScore(metric=metric, every=4, scenes=2, seed=3)
        callback.on_train_epoch_end(trainer, module)
        with module.averaged():
            drawn = to_uint8(module.sample(held_out.scenes, seed=3))
        assert drawn.std() > 1
        value = float(trainer.callback_metrics["layout/brightness"])
        assert value == pytest.approx(drawn.mean(), rel=1e-6)
        assert logged(accumulated, "layout/brightness") == [(4, pytest.approx(value))]

    def test_it_is_logged_once_on_the_steps_that_are_due(self, short_run, accumulated):
        assert [step for step, _ in logged(short_run, "layout/layout_iou")] == [2, 4]
        assert [step for step, _ in logged(accumulated, "layout/layout_iou")] == [3]


class TestProgress:
    def test_rates_are_logged(self, short_run, accumulated):
        assert [step for step, _ in logged(short_run, "speed/samples_per_second")] == [1, 2, 3, 4]
        assert [step for step, _ in logged(accumulated, "speed/samples_per_second")] == [2, 4]
        for run in (short_run, accumulated):
            assert all(value > 0 for _, value in logged(run, "speed/samples_per_second"))
            assert all(0 <= value <= 1 for _, value in logged(run, "speed/data_wait"))

    def test_samples_are_counted_through_accumulated_steps(self, accumulated):
        trainer, module = accumulated[1].trainer, accumulated[1]
        [progress] = [callback for callback in trainer.callbacks if isinstance(callback, Progress)]
        shown = progress.get_metrics(trainer, module)
        assert set(shown) == {"loss", "samples/s", "data wait"}
        assert float(shown["loss"]) > 0


class TestGates:
    def test_every_gate_is_logged_and_opens_after_the_first_step(self, short_run):
        gates = short_run[1].adapters["regions"].gates()
        assert gates
        for gate in gates:
            values = logged(short_run, f"gates/regions/{gate}")
            assert [step for step, _ in values] == [0, 1, 2, 3]
            assert values[0][1] == 0
            assert all(value > 0 for _, value in values[1:])

    def test_the_norm_is_that_of_the_whole_gradient(self, short_run, accumulated):
        assert all(value > 0 for _, value in logged(short_run, "gradient_norm"))
        assert [step for step, _ in logged(accumulated, "gradient_norm")] == [0, 2]
        # the same first batch, at once and as two micro-batches
        first, halves = (logged(run, "gradient_norm")[0][1] for run in (short_run, accumulated))
        assert halves == pytest.approx(first, rel=1e-3)
