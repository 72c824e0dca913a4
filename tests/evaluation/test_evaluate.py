"""An evaluation over a real short run: which arms there are, and what they are called."""

import json
import re
import shutil
import time

import pytest
from PIL import Image

from evaluation.conditions import Arm, measured_arms
from evaluation.evaluate import evaluate
from evaluation.plan import open_split
from labelling.vision_language import RecordedAnswers
from metrics.sg_iou import SgIou
from runtime.composition import compose
from runtime.run_directory import load_run_config

SCENES = ("protocol.scenes=3", "protocol.make.source.count=4")


@pytest.fixture
def evaluated(short_run, small_data, tmp_path):
    """evaluated(*overrides): `metrics.json` and the report of an evaluation of the short run."""

    def run(*overrides, protocol=SCENES):
        cfg = compose("evaluate", [f"run={short_run[0].run}", f"paths.data={small_data}", *protocol, *overrides])
        evaluate(cfg, load_run_config(cfg.run, cfg))
        return json.loads((tmp_path / "metrics.json").read_text()), (tmp_path / "report.html").read_text()

    return run


def test_real_pictures_are_called_so(evaluated, tmp_path):
    kept, report = evaluated("images=real", f"out={tmp_path}")
    assert list(kept["values"]) == ["real", "ceiling", "floor"]
    assert kept["values"]["real"] == kept["values"]["ceiling"]
    assert "of the real pictures" in report
    assert "with the scene" not in report


def test_the_pictures_of_a_folder_are_called_given(evaluated, small_data, tmp_path):
    split = open_split(compose("evaluate", ["images=d", f"paths.data={small_data}", *SCENES]), None)
    for place, scene in enumerate(split.scenes):
        Image.fromarray(split.true.read(place)[:, ::-1]).save(tmp_path / f"{scene.id}.png")
    kept, report = evaluated(f"images={tmp_path}", f"out={tmp_path}")
    assert list(kept["values"]) == ["pictures", "ceiling", "floor"]
    assert kept["values"]["pictures"]["layout_iou"]["mean"] < kept["values"]["ceiling"]["layout_iou"]["mean"]
    assert kept["protocol"]["images"] == str(tmp_path)
    assert "of the given pictures" in report
    assert f"images={tmp_path}" in report


def test_the_bench_of_scene_graphs_takes_all_of_its_shards_and_no_metric(evaluated, small_data, tmp_path):
    shards = small_data / "shapes" / "validation"
    kept, report = evaluated(
        "images=real",
        f"out={tmp_path}",
        protocol=("protocol=compsg_bench", "metric=[]", "protocol.size=null", f"protocol.shards={shards}"),
    )
    assert kept["protocol"]["name"] == "compsg_bench"
    assert kept["protocol"]["scenes"] == 8
    assert kept["protocol"]["filters"] == ["more than 4 relations"]
    assert kept["values"] == {"real": {}, "ceiling": {}}
    assert "compsg_bench" in report


def pictures(out, arm, suffix=""):
    ids = json.loads((out / arm / "manifest.json").read_text())["pictures"]
    return {name: (out / arm / "pictures" / f"{name}.png").read_bytes() for name in ids if name.endswith(suffix)}


def test_refined_pictures_lie_beside_those_before_and_are_made_of_them_alone(evaluated, tiny_refiner, tmp_path):
    small = ("refiner=sdxl", f"refiner.path={tiny_refiner}", "refiner.dtype=float32", "refiner.steps=4")
    shown = f"out={tmp_path}"
    evaluated(shown)
    plain = pictures(tmp_path, "with_scene")
    for arm in ("with_scene", "without_scene"):
        shutil.rmtree(tmp_path / arm)
    kept, report = evaluated(shown, *small)
    both = pictures(tmp_path, "with_scene")
    assert {name: both[f"{name}_non_refined"] for name in plain} == plain
    assert all(both[name] != plain[name] for name in plain)
    assert len(both) == 2 * len(plain)
    assert kept["protocol"]["refiner"]["strength"] == 0.3
    assert "refiner" in report
    for name in list(plain)[1:]:
        (tmp_path / "with_scene" / "pictures" / f"{name}.png").unlink()
    # what is missing is made again of the picture before, by itself
    evaluated(shown, *small, "protocol.batch_size=1")
    assert pictures(tmp_path, "with_scene") == both
    with pytest.raises(ValueError, match="were made with"):
        evaluated(shown, *small, "refiner.strength=0.5")


def test_tables_and_pictures_go_to_wandb_in_the_run_of_the_training(evaluated, short_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    shutil.copytree(short_run[0].run, run)
    (run / "wandb").mkdir()
    (run / "wandb" / "run_id").write_text("cafe0123\n")
    kept, _ = evaluated(f"run={run}", f"out={tmp_path}", "logger=wandb")
    (file,) = (run / "wandb").glob("offline-run-*/run-cafe0123.wandb")
    for _ in range(300):  # its writer is another process
        if b"shapes/with_scene/layout_iou" in (content := file.read_bytes()):
            break
        time.sleep(0.1)
    assert b"shapes/with_scene/layout_iou" in content
    (folder,) = (run / "wandb").glob("offline-run-*/files/media/table/shapes")
    tables = {path.name.partition("_")[0]: json.loads(path.read_text()) for path in folder.glob("*.table.json")}
    listed = {(arm, name): mean for arm, name, mean, *_ in tables["values"]["data"]}
    assert listed["with_scene", "layout_iou"] == pytest.approx(kept["values"]["with_scene"]["layout_iou"]["mean"])
    scenes = tables["scenes"]
    assert scenes["columns"][:5] == ["scene", "caption", "true", "with the scene", "without the scene"]
    assert len(scenes["data"]) == 3
    # three pictures a scene, each scene's phrases as the classes of its boxes
    assert len(set(re.findall(rb"media/images/\w+\.png", content))) == 9
    assert len(set(re.findall(rb"media/classes/\w+\.classes\.json", content))) == 3


def test_other_loggers_are_refused():
    with pytest.raises(ValueError, match="^logger=csv: an evaluation writes metrics.json and report.html"):
        compose("evaluate", ["images=real", "logger=csv"])


def test_given_pictures_are_not_refined(evaluated, tmp_path):
    with pytest.raises(ValueError, match="^refiner: images=real are scored as they are"):
        evaluated("images=real", "refiner=sdxl", f"out={tmp_path}")


@pytest.mark.parametrize(("bounds", "measured"), [(False, ["with_scene"]), (True, ["with_scene", "ceiling", "floor"])])
def test_a_judge_sees_real_images_only_where_it_is_told_to(bounds, measured, tmp_path):
    arms = {name: Arm(name=name, sets=(), rows=tmp_path) for name in ("with_scene", "ceiling", "floor")}
    metric = SgIou(model=RecordedAnswers(), prompt="{entities}{predicates}", bounds=bounds)
    assert [arm.name for arm in measured_arms(metric, arms, list(arms))] == measured
    assert [arm.name for arm in measured_arms(metric, {"real": arms["ceiling"]}, ["with_scene"])] == ["ceiling"]
