"""When a run saves, which checkpoints stay, and how it stops before its end: real signals, real clocks, a full disk."""

import contextlib
import json
import os
import resource
import shutil
import signal

import pytest
import pytorch_lightning as pl

from callbacks.checkpoint import BEST, Checkpoint, KeepBest
from callbacks.layout_score import LayoutScore
from callbacks.observer import PassedOver
from callbacks.pictures import Pictures
from callbacks.progress import Progress
from callbacks.signals import HEARD, SIGNALS
from datamodules.resume import ResumeWholeSteps
from lightning_modules.scene_diffusion import SceneDiffusion
from loggers.metrics_csv import read_metrics
from runtime.run_directory import RunDirectory, is_whole
from runtime.training import STOPPED
from tests.ranks import on_ranks
from tests.run_files import broken_off, folder_of, logged, names, saved, steps_of

FIGURES = ("train/loss", "validation/loss", "layout/layout_iou")
SELDOM = "trainer.save_every=1000"


class TestFiles:
    def test_the_newest_are_kept_whole_and_the_last_though_it_is_not_due(self, short_run, accumulated):
        assert names(short_run[0], "checkpoints") == ["step=2.ckpt", "step=3.ckpt", "step=4.ckpt"]
        assert all(is_whole(path) for path in (folder_of(short_run[0]) / "checkpoints").iterdir())
        assert names(accumulated[0], "checkpoints") == ["step=4.ckpt"]

    def test_a_full_disk_leaves_those_before_whole_and_no_torn_one(self, short_run, tmp_path):
        before, after = ["step=2.ckpt", "step=3.ckpt"], ["step=2.ckpt", "step=3.ckpt", "step=4.ckpt"]
        for name in before:
            shutil.copy(folder_of(short_run[0]) / "checkpoints" / name, tmp_path)
        callback = Checkpoint(folder=str(tmp_path), every=4)
        with files_of_at_most(20_000), pytest.raises(OSError, match="File too large") as full:
            step_ends(callback, short_run)
        assert full.value.filename == str(tmp_path / "step=4.ckpt")
        assert names(tmp_path, "") == before
        step_ends(callback, short_run)
        assert names(tmp_path, "") == after
        assert is_whole(tmp_path / "step=4.ckpt")

    def test_where_the_disk_of_rank_0_is_full_the_other_rank_ends_with_it(self, quick, fit):
        cfg = quick("callback=[checkpoint]", "trainer.devices=2", "trainer.strategy=ddp")

        def both(rank):
            with files_of_at_most(20_000), pytest.raises((OSError, SystemExit)) as ended:
                fit(cfg)
            return str(ended.value)

        first, other = on_ranks(both, timeout=300)
        assert "step=1.ckpt" in first
        assert other == "2"
        assert names(cfg, "checkpoints") == []

    def test_what_is_not_due_is_not_saved(self, short_run, tmp_path):
        resumed = Checkpoint(folder=str(tmp_path / "resumed"), every=1)
        resumed.on_train_start(short_run[1].trainer, short_run[1])
        step_ends(resumed, short_run)
        assert not (tmp_path / "resumed").exists()

    def test_a_validated_step_goes_on_where_validation_is_due_elsewhere(self, short_run, short, fit, tmp_path):
        broken_off(short_run[0], tmp_path / "moved", 2)
        cfg = short(tmp_path / "moved", "trainer.validate_every=3")
        fit(cfg)
        assert steps_of(cfg, "validation/loss") == [1, 2]
        assert logged(cfg, "train/loss") == logged(short_run[0], "train/loss")


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


class Sends(pl.Callback):
    """Sends this process signals at the end of a step, before anything else happens there."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


class TestStopping:
    @pytest.mark.parametrize("number", HEARD)
    def test_a_signal_stops_after_its_step_with_a_checkpoint_and_the_same_command_goes_on(
        self, quick, fit, short_run, monkeypatch, capsys, number
    ):
        from runtime import training

        def sending(cfg, build=training.build_trainer):
            trainer = build(cfg)
            # a launcher passes on what the process had already: still one
            trainer.callbacks.insert(0, Sends(2, number, signal.SIGTERM))
            return trainer

        monkeypatch.setattr(training, "build_trainer", sending)
        cfg, before = quick(SELDOM), [signal.getsignal(each) for each in HEARD]
        with pytest.raises(SystemExit) as ended:
            fit(cfg)
        assert ended.value.code == STOPPED == 75
        assert saved(cfg) == {2}
        assert f"stopped at step 2 ({number.name}); the same command goes on: python " in capsys.readouterr().out
        assert RunDirectory(cfg.run).finished_step() is None
        assert [signal.getsignal(each) for each in HEARD] == before
        fit(cfg)
        assert all(logged(cfg, name) == logged(short_run[0], name) for name in FIGURES)
        assert saved(cfg) == {2, 4}

    def test_signals_are_left_alone_where_nothing_saves(self, quick, fit):
        fit(quick("callback=[]", "trainer.max_steps=1"))
        assert not SIGNALS.is_on

    def test_time_that_is_up_ends_an_attempt_without_finishing_the_run(self, quick, fit, short_run, capsys):
        cfg = quick(SELDOM, "trainer.max_time=1e-9", "trainer.keep=9")
        for step in (1, 2, 3):
            assert fit(cfg) is None
            assert f"stopped at step {step} (trainer.max_time is over)" in capsys.readouterr().out
        assert fit(cfg) is not None
        assert saved(cfg) == {1, 2, 3, 4}
        assert logged(cfg, "train/loss") == logged(short_run[0], "train/loss")

    def test_minutes_save_between_steps(self, quick, fit):
        cfg = quick(SELDOM, "trainer.save_minutes=1e-9", "trainer.keep=9")
        fit(cfg)
        assert saved(cfg) == {1, 2, 3, 4}

    @pytest.mark.parametrize(
        ("owner", "method", "error"),
        [(SceneDiffusion, "validation_step", RuntimeError), (Pictures, "_keep", KeyboardInterrupt)],
        ids=["validation", "images"],
    )
    def test_what_a_kill_cuts_short_comes_again(
        self, short_run, short, fit, tmp_path, monkeypatch, owner, method, error
    ):
        def killed(*_):
            raise error("killed")

        cfg = short(tmp_path / "killed")
        with monkeypatch.context() as broken:
            broken.setattr(owner, method, killed)
            with pytest.raises((error, SystemExit)):
                fit(cfg)
        assert names(cfg, "checkpoints") == ["step=1.ckpt", "step=2.ckpt"]
        fit(cfg)
        assert names(cfg, "pictures") == names(short_run[0], "pictures")
        assert all(logged(cfg, name) == logged(short_run[0], name) for name in FIGURES)
        rows = [row[:2] for row in read_metrics(folder_of(cfg) / "metrics.csv")]
        assert len(set(rows)) == len(rows)


class TestBest:
    EACH = (SELDOM, "trainer.validate_every=1", "trainer.keep=1")

    def test_the_lowest_loss_is_best_and_stays_beside_the_newest(self, quick, fit):
        # the learning rate is so high that things get worse
        worse = ("optimizer.learning_rate=0.3", "optimizer.schedule=constant", "trainer.max_steps=5")
        cfg = quick(*self.EACH, "trainer.keep_best=validation/loss", *worse)
        fit(cfg)
        losses = {step + 1: value for step, value in logged(cfg, "validation/loss")}
        best = min(losses, key=losses.get)
        assert best < 5
        assert saved(cfg) == {best, 5}
        kept = json.loads((RunDirectory(cfg.run).checkpoints / BEST).read_text())
        assert kept == {"name": "validation/loss", "step": best, "value": losses[best]}

    def test_the_highest_score_is_best_and_what_a_run_went_on_from_counts(self, quick, fit):
        settings = (*self.EACH, "trainer.keep_best=layout/layout_iou")
        cfg = quick(*settings)
        fit(cfg)
        scores = dict(logged(cfg, "layout/layout_iou"))
        best = max(scores, key=scores.get)  # the first of equals
        assert saved(cfg) == {best, 4}
        note = {"name": "layout/layout_iou", "step": best, "value": 2}
        (RunDirectory(cfg.run).checkpoints / BEST).write_text(json.dumps(note))
        fit(quick(*settings, "trainer.max_steps=6"))
        assert saved(cfg) == {best, 6}

    def test_a_figure_that_nothing_logs_is_refused_by_name(self, quick, fit):
        with pytest.raises(ValueError, match=r"trainer\.keep_best=layout/x: .*layout/layout_iou.*validation/loss"):
            fit(quick("trainer.keep_best=layout/x"))


@pytest.mark.parametrize(
    "order", ["checkpoint,pictures,layout_score,progress", "layout_score,pictures,progress,checkpoint"]
)
def test_what_saves_comes_before_what_measures_and_what_keeps_the_best_after(quick, order):
    from runtime.build import build_callbacks

    callbacks = build_callbacks(quick(f"callback=[{order}]", "trainer.keep_best=x"), PassedOver())
    kinds = [type(callback) for callback in callbacks]
    assert kinds[:3] == [ResumeWholeSteps, Checkpoint, Progress]
    assert set(kinds[3:5]) == {Pictures, LayoutScore}
    assert kinds[5:] == [KeepBest, PassedOver]
