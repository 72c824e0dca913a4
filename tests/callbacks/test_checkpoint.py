"""When a run saves, which checkpoints stay, and how it stops before its end: real signals, real clocks."""

import json
import os
import signal

import pytest
import pytorch_lightning as pl

from callbacks.checkpoint import BEST, Checkpoint, KeepBest
from callbacks.layout_score import LayoutScore
from callbacks.observer import PassedOver
from callbacks.pictures import Pictures
from callbacks.progress import Progress
from callbacks.signals import HEARD, SIGNALS
from loggers.metrics_csv import read_metrics
from runtime.run_directory import RunDirectory
from runtime.training import STOPPED


@pytest.fixture
def quick(short, tmp_path):
    """quick(*overrides): the short run with a validation, a score and no pictures, in a folder of this test."""

    def with_overrides(*overrides):
        return short(
            tmp_path / "run", "callback=[layout_score,checkpoint]", "logger=[csv]", *overrides, without=["callback"]
        )

    return with_overrides


def saved(cfg):
    return {int(file.stem.partition("=")[2]) for file in RunDirectory(cfg.run).checkpoints.glob("step=*.ckpt")}


def logged(cfg, name):
    return {
        step: value
        for step, metric, value in read_metrics(RunDirectory(cfg.run).path / "metrics.csv")
        if metric == name
    }


class Sends(pl.Callback):
    """Sends this process signals at the end of a step, before anything else happens there."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.fixture
def sending(monkeypatch):
    """sending(step, *signals): every run of this test gets them."""
    from runtime import training

    build = training.build_trainer

    def set_up(step, *numbers):
        def trainer(cfg):
            built = build(cfg)
            built.callbacks.insert(0, Sends(step, *numbers))
            return built

        monkeypatch.setattr(training, "build_trainer", trainer)

    return set_up


@pytest.mark.parametrize("number", HEARD)
def test_a_signal_stops_after_its_step_with_a_checkpoint_and_the_same_command_goes_on(
    quick, fit, short_run, sending, capsys, number
):
    cfg = quick("trainer.save_every=1000")
    before = [signal.getsignal(each) for each in HEARD]
    sending(2, number, signal.SIGTERM)  # a launcher passes on what the process had already: still one
    with pytest.raises(SystemExit) as ended:
        fit(cfg)
    assert ended.value.code == STOPPED == 75
    assert saved(cfg) == {2}
    assert f"stopped at step 2 ({number.name}); the same command goes on: python " in capsys.readouterr().out
    assert RunDirectory(cfg.run).finished_step() is None
    assert [signal.getsignal(each) for each in HEARD] == before
    fit(cfg)
    for name in ("train/loss", "validation/loss", "layout/layout_iou"):
        assert logged(cfg, name) == logged(short_run[0], name)
    assert saved(cfg) == {2, 4}


def test_signals_are_left_alone_where_nothing_saves(quick, fit, sending):
    fit(quick("callback=[]", "trainer.max_steps=1"))
    assert not SIGNALS.is_on


def test_time_that_is_up_ends_an_attempt_without_finishing_the_run(quick, fit, short_run, capsys):
    cfg = quick("trainer.save_every=1000", "trainer.max_time=1e-9", "trainer.keep=9")
    for step in (1, 2, 3):
        assert fit(cfg) is None
        assert f"stopped at step {step} (trainer.max_time is over)" in capsys.readouterr().out
    assert fit(cfg) is not None
    assert saved(cfg) == {1, 2, 3, 4}
    assert logged(cfg, "train/loss") == logged(short_run[0], "train/loss")


def test_minutes_save_between_steps(quick, fit):
    cfg = quick("trainer.save_every=1000", "trainer.save_minutes=1e-9", "trainer.keep=9")
    fit(cfg)
    assert saved(cfg) == {1, 2, 3, 4}


def test_the_best_checkpoint_stays_beside_the_newest(quick, fit):
    # the learning rate is so high that things get worse
    cfg = quick(
        "trainer.save_every=1000",
        "trainer.validate_every=1",
        "trainer.keep=1",
        "trainer.keep_best=validation/loss",
        "optimizer.learning_rate=0.3",
        "optimizer.schedule=constant",
        "trainer.max_steps=5",
    )
    fit(cfg)
    losses = {step + 1: value for step, value in logged(cfg, "validation/loss").items()}
    best = min(losses, key=losses.get)
    assert best < 5
    assert saved(cfg) == {best, 5}
    kept = json.loads((RunDirectory(cfg.run).checkpoints / BEST).read_text())
    assert kept == {"name": "validation/loss", "step": best, "value": losses[best]}


def test_the_highest_score_is_best_and_what_a_run_went_on_from_counts(quick, fit):
    settings = (
        "trainer.save_every=1000",
        "trainer.validate_every=1",
        "trainer.keep=1",
        "trainer.keep_best=layout/layout_iou",
    )
    cfg = quick(*settings)
    fit(cfg)
    scores = logged(cfg, "layout/layout_iou")
    best = max(scores, key=scores.get)  # the first of equals
    assert saved(cfg) == {best, 4}
    (RunDirectory(cfg.run).checkpoints / BEST).write_text(
        json.dumps({"name": "layout/layout_iou", "step": best, "value": 2})
    )
    fit(quick(*settings, "trainer.max_steps=6"))
    assert saved(cfg) == {best, 6}


def test_a_figure_that_nothing_logs_is_refused_by_name(quick, fit):
    with pytest.raises(
        ValueError, match=r"trainer.keep_best=layout/x: no such .*layout/layout_iou.*validation/loss\); name"
    ):
        fit(quick("trainer.keep_best=layout/x"))


@pytest.mark.parametrize(
    "names", ["checkpoint,pictures,layout_score,progress", "layout_score,pictures,progress,checkpoint"]
)
def test_what_saves_comes_before_what_measures_and_what_keeps_the_best_after(quick, names):
    from runtime.build import build_callbacks

    callbacks = build_callbacks(quick(f"callback=[{names}]", "trainer.keep_best=x"), PassedOver())
    kinds = [type(callback) for callback in callbacks]
    assert kinds[2:4] == [Checkpoint, Progress]
    assert set(kinds[4:6]) == {Pictures, LayoutScore}
    assert kinds[6:] == [KeepBest, PassedOver]
