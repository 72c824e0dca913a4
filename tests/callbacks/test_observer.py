"""What only shows or measures costs no training: real failures of images, metrics and loggers, on one rank and on two."""

import os
import time

import pytest
import pytorch_lightning as pl
import torch

from callbacks.checkpoint import Checkpoint
from callbacks.observer import Observer, PassedOver, described
from metrics.base import SceneMetric
from runtime.run_directory import RunDirectory
from tests.ranks import on_ranks
from tests.run_files import folder_of, logged, names, saved, steps_of, stored


class Fails(SceneMetric):
    name, columns = "fails", ("fails",)
    error, rank = ZeroDivisionError, None  # on which alone

    def score(self, image, scene):
        if self.rank is None or int(os.environ["RANK"]) == self.rank:
            raise self.error(f"no score of {scene.id}")
        return {"fails": 1.0}


FailsOn0, FailsOn1 = (type(f"FailsOn{rank}", (Fails,), {"rank": rank}) for rank in (0, 1))
Interrupts = type("Interrupts", (Fails,), {"error": KeyboardInterrupt})
SCORED_BY = "callback.layout_score.metric._target_=tests.callbacks.test_observer.{}"


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "callbacks.observer"]


def test_images_and_scores_that_fail_are_passed_over_and_told_once(short, fit, short_run, tmp_path, caplog):
    (tmp_path / "in the way").write_text("")
    cfg = short(tmp_path / "run", f"callback.pictures.folder={tmp_path / 'in the way'}", SCORED_BY.format("Fails"))
    fit(cfg)
    assert RunDirectory(cfg.run).finished_step() == 4
    for name in ("train/loss", "validation/loss"):
        assert logged(cfg, name) == logged(short_run[0], name)
    end, whole = stored(cfg)["state_dict"], stored(short_run[0])["state_dict"]
    assert all(torch.equal(end[key], whole[key]) for key in whole)
    for name in ("pictures", "layout_score"):
        assert logged(cfg, f"passed_over/{name}") == [(2, 1), (4, 2)]
    lines = told(caplog)
    [image] = [line for line in lines if line.startswith("pictures:")]
    assert all(part in image for part in ("step 2", "FileExistsError", "callbacks/pictures.py:"))
    [score] = [line for line in lines if line.startswith("layout_score:")]
    assert "ZeroDivisionError: no score of " in score
    assert lines[-1].startswith("passed over: layout_score 2 times")
    assert "pictures 2 times" in lines[-1]


def test_a_logger_that_fails_is_passed_over_and_the_others_go_on(short, fit, tmp_path, caplog):
    (tmp_path / "folder").mkdir()
    cfg = short(tmp_path / "run", f"logger.csv.file={tmp_path / 'folder'}")
    fit(cfg)
    assert RunDirectory(cfg.run).finished_step() == 4
    lines = told(caplog)
    assert len([line for line in lines if line.startswith("csv logger: passed over")]) == 1
    assert "IsADirectoryError" in lines[0]
    [events] = folder_of(cfg).glob("tensorboard/events.*")
    assert all(name in events.read_bytes() for name in (b"passed_over/csv_logger", b"validation/loss"))


@pytest.mark.parametrize(("every", "steps"), [(1000, set()), (2, {2})], ids=["none was due", "one was due"])
def test_an_interrupt_is_not_passed_over_and_its_step_is_saved(quick, fit, every, steps):
    cfg = quick(SCORED_BY.format("Interrupts"), f"trainer.save_every={every}")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(cfg)
    assert saved(cfg) == steps


def test_where_nothing_is_validated_nothing_is_drawn_and_it_is_said_once(short, fit, tmp_path, capsys):
    nothing = ("data.validation_shards=null", "data.validation_samples=0", "data.make_validation=null")
    cfg = short(tmp_path / "run", *nothing, without=["data.make_validation"])
    fit(cfg)
    assert capsys.readouterr().out.count("data.validation_samples=0") == 1
    assert not (tmp_path / "run" / "pictures").exists()
    assert logged(cfg, "layout/layout_iou") == logged(cfg, "validation/loss") == []
    assert steps_of(cfg, "train/loss") == [0, 1, 2, 3]


def test_scenes_held_out_of_training_serve_validation_images_and_scores(short, fit, tmp_path, capsys):
    held = ("data.validation_shards=null", "data.validation_samples=3", "data.make_validation=null")
    cfg = short(tmp_path / "run", *held, without=["data.make_validation"])
    module = fit(cfg)
    assert "validates  on 3 scenes held out of training: 3 of the 64 in " in capsys.readouterr().out
    assert len(module.trainer.datamodule.validation_set) == 3
    assert steps_of(cfg, "layout/layout_iou") == [2, 4]
    assert steps_of(cfg, "validation/loss") == [1, 3]
    assert len(names(cfg, "pictures")) == 2


def test_no_rank_waits_for_one_that_failed(short, fit, tmp_path):
    each = ("callback=[checkpoint,layout_score,pictures]", "logger=[csv]", "trainer.devices=2", "trainer.strategy=ddp")
    scored = ("callback.layout_score.scenes=5", "callback.layout_score.at_once=1", "trainer.max_steps=2")
    fails, without = SCORED_BY.format("FailsOn{}"), ["callback.layout_score"]
    cfgs = [short(tmp_path / f"{n}", *each, *scored, fails.format(n), without=without) for n in (0, 1)]

    def both(rank):
        callbacks = [fit(cfg).trainer.callbacks for cfg in cfgs]
        return [[c.counts["layout_score"] for c in of_run if isinstance(c, PassedOver)] for of_run in callbacks]

    assert on_ranks(both, timeout=300) == [[[1], [1]]] * 2
    for cfg in cfgs:
        assert logged(cfg, "passed_over/layout_score") == [(2, 1)]
        assert (folder_of(cfg) / "pictures" / "step=0000002.png").is_file()
        assert RunDirectory(cfg.run).finished_step() == 2


class Raising(Observer):
    def __init__(self, error):
        self.error = error

    def on_train_start(self, trainer, pl_module):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_asks_a_run_to_end_goes_through(error):
    passed_over, callback = PassedOver(), Raising(error)
    passed_over.watch("raising", callback)
    with pytest.raises(type(error)):
        callback.on_train_start(None, None)
    assert not passed_over.counts


def test_a_cause_that_is_new_is_told_and_an_old_one_is_only_counted(caplog):
    passed_over, callback = PassedOver(), Raising(ValueError("first"))
    passed_over.watch("raising", callback)
    for _ in range(3):
        callback.on_train_start(None, None)
    callback.error = OSError("second")
    callback.on_train_start(None, None)
    causes = [record.getMessage().partition("goes on: ")[2].partition(" (")[0] for record in caplog.records]
    assert causes == ["ValueError: first", "OSError: second"]
    assert passed_over.counts["raising"] == 4


class Slow:
    def __init__(self):
        self.asked = 0

    def log_metrics(self, metrics, step=None):
        self.asked += 1
        time.sleep(0.05)
        raise ConnectionError("away")


def test_a_logger_that_is_slow_to_fail_is_left_alone_for_a_while():
    passed_over, logger = PassedOver(), Slow()
    passed_over.watch_logger("slow", logger)
    for _ in range(10):
        logger.log_metrics({}, step=1)
    assert logger.asked == 1
    assert passed_over.counts["slow logger"] == 10


def test_what_saves_and_others_callbacks_are_not_observers():
    assert not issubclass(Checkpoint, Observer)
    assert not issubclass(pl.Callback, Observer)
    assert described(ValueError("of\nmany   lines")) == "ValueError: of many lines"
