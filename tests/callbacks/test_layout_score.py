"""The layout score of photographs: with a real detector, with one whose file is not there, on one rank and on two."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.shards import write_shards
from datamodules.sources.base import Source
from datamodules.sources.shapes import Shapes
from loggers.metrics_csv import read_metrics
from runtime.run_directory import RunDirectory
from tests.ranks import on_ranks

SHARED = Path(os.environ.get("SCENOGRAPH_SHARED", Path(__file__).parents[3] / "shared"))
YOLOX = SHARED / "models" / "yolox_nano.onnx"
with_detector = pytest.mark.skipif(not YOLOX.exists(), reason="no detector here; set SCENOGRAPH_SHARED to its folder")


class Named(Source):
    """Shapes every other of which has a name that the detector knows."""

    provides = Shapes.provides
    image_format = "png"

    def __len__(self):
        return 48

    def __iter__(self):
        for scene, image in Shapes(count=48):
            labels = ["triangle" if number % 2 else "person" for number in range(len(scene.objects))]
            objects = (replace(item, label=label) for item, label in zip(scene.objects, labels, strict=True))
            yield replace(scene, objects=tuple(objects)), image


@pytest.fixture
def watched(short, tmp_path):
    """watched(folder, detector's file, *overrides): a short run with a detector's score, held-out scenes from its shards."""
    shards = write_shards(Named(), tmp_path / "named")

    own = ("data.make=null", "data.validation_shards=null", "data.make_validation=null", f"data.shards={shards}")
    few = ("callback=[layout_score_detector,checkpoint]", "logger=[csv]", "trainer.max_steps=2")

    def with_overrides(name, file, *overrides):
        detector = f"callback.layout_score.metric.detector.file={file}"
        return short(tmp_path / name, *own, *few, detector, *overrides, without=["data", "callback.pictures"])

    return with_overrides


def figures(cfg):
    rows = read_metrics(RunDirectory(cfg.run).path / "metrics.csv")
    return {name: value for _, name, value in rows if name.startswith("layout/")}


@with_detector
def test_figures_and_the_boxes_that_they_are_of_reach_the_log(watched, fit):
    cfg = watched("run", YOLOX, "callback.layout_score.scenes=4")
    module = fit(cfg)
    found = figures(cfg)
    items = [item for scene in module.trainer.datamodule.held_out(4).scenes for item in scene.objects]
    known = sum(item.label == "person" for item in items)
    assert (found["layout/boxes"], found["layout/boxes_known"]) == (len(items), known)
    assert 0 < known < len(items)
    assert 0 <= found["layout/ap50"] <= 1
    assert not [name for name, value in found.items() if value != value]


def test_without_the_detector_s_file_training_goes_on_and_says_once_where_it_goes(watched, fit, tmp_path, caplog):
    cfg = watched("run", tmp_path / "nowhere.onnx")
    fit(cfg)
    assert RunDirectory(cfg.run).finished_step() == 2
    assert figures(cfg) == {}
    [told] = [record.getMessage() for record in caplog.records if record.name.startswith("callbacks.")]
    assert re.fullmatch(r".*callback\.layout_score\.metric\.detector\.file=.*nowhere\.onnx.*", told)  # one line


@with_detector
def test_where_one_rank_lacks_the_detector_none_scores_and_none_waits(watched, fit, tmp_path):
    two = ("trainer.devices=2", "trainer.strategy=ddp")

    def both(rank):
        file = tmp_path / f"{rank}.onnx"
        if rank == 0:
            file.symlink_to(YOLOX)
        fit(watched("run", file, *two))

    on_ranks(both, timeout=300)
    cfg = watched("run", tmp_path / "0.onnx", *two)
    assert RunDirectory(cfg.run).finished_step() == 2
    assert figures(cfg) == {}
