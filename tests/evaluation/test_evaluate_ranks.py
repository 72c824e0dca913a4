"""An evaluation in parts: over ranks, killed and resumed, with metrics of every kind; the numbers do not know."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from datamodules.shards import ShardSet
from evaluation.evaluate import evaluate
from evaluation.settings import evaluated_config, job_name, places_of, protocol_of
from models.conditioning.adapter_file import save_adapter
from runtime.composition import CONF, compose
from scenes import save_scene

PROBES = '''
"""Metrics of every kind that the seam allows, without a model; each notes the pictures that it was given."""

from pathlib import Path

import numpy as np

from metrics.base import Metric, NotAvailable, bootstrap_interval


class Probe(Metric):
    name = "probe"

    def __init__(self, log, stop=None, threshold=1.0):
        self.log, self.stop, self.threshold = Path(log), stop, threshold

    def settings(self):
        return {"threshold": self.threshold}

    def measure(self, images, scenes, *, again=()):
        seen = self.log.read_text().split() if self.log.is_file() else []
        if self.stop is not None and len(seen) >= self.stop:
            raise KeyboardInterrupt
        with self.log.open("a") as file:
            file.write("".join(f"{scene.id}\\n" for scene in scenes))
        pairs = again or images
        return [
            {"scene": s.id, "feature": self.feature(a, b), "brightness": float(a.mean()), "note": ["a", {"b": None}]}
            for a, b, s in zip(images, pairs, scenes, strict=True)
        ]

    def feature(self, image, other):
        return image.mean(axis=(0, 1)).astype(np.float32) * np.float32(self.threshold)

    def compute(self, rows, *, true=()):
        return {self.name: bootstrap_interval(float(row["feature"][0]) for row in rows)}


class Distance(Probe):
    name = "distance"
    compares = True

    def compute(self, rows, *, true=()):
        assert [row["scene"] for row in rows] == [row["scene"] for row in true]
        return {self.name: bootstrap_interval(float(np.abs(a["feature"] - b["feature"]).sum()) for a, b in zip(rows, true))}


class Pairs(Probe):
    name = "between"
    pairs = True

    def feature(self, image, other):
        return np.abs(image.astype(np.float64) - other).mean(axis=(0, 1))


class Absent(Probe):
    name = "absent"

    def to(self, device):
        raise NotAvailable("metric.absent.weights: nowhere.pt is not there; fetch it")


class Scored(Probe):
    name = "scored"
    requires = frozenset({"scores"})


class Failing(Probe):
    name = "failing"

    def measure(self, images, scenes, *, again=()):
        return [{"scene": scene.id, "failure": "the judge said nothing"} for scene in scenes]

    def compute(self, rows, *, true=()):
        return {self.name: bootstrap_interval([None for row in rows])}
'''
TINY = (
    "backbone.weights=null",
    "backbone.unet_config.norm_num_groups=8",
    "backbone.unet_config.block_out_channels=[16,24]",
    "backbone.unet_config.attention_head_dim=[2,3]",
    "backbone.text_config.hidden_size=32",
    "backbone.text_config.intermediate_size=64",
)
SCENES = ("protocol.scenes=5", "protocol.make.source.count=6", "protocol.batch_size=2")


@pytest.fixture
def probes(tmp_path, monkeypatch):
    """A folder of configs with the probes above as metrics; which scenes each was given is in `<name>.log` beside."""
    (tmp_path / "probe_metrics.py").write_text(PROBES)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "conf" / "metric"
    folder.mkdir(parents=True)
    for kind in ("Probe", "Distance", "Pairs", "Absent", "Scored", "Failing"):
        name = kind.lower()
        node = {
            "_target_": f"probe_metrics.{kind}",
            "log": str(tmp_path / f"{name}.log"),
            "stop": None,
            "threshold": 1.0,
        }
        (folder / f"{name}.yaml").write_text(f"# @package metric.{name}\n{yaml.safe_dump(node)}")
    return tmp_path / "conf"


@pytest.fixture
def evaluated(short_run, small_data, probes):
    """evaluated(out, *overrides, rank, ranks): the result of an evaluation of the short run as one of several processes."""

    def run(out, *overrides, rank=0, ranks=1, what=(f"run={short_run[0].run}",), scenes=SCENES):
        shards = probes.parent / "split"  # its own: others make fewer scenes in the folder that all share
        given = [*what, f"paths.data={small_data}", f"protocol.shards={shards}", f"out={out}", *scenes, *overrides]
        cfg = compose("evaluate", given, config_dir=str(probes))
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        return evaluate(cfg, evaluated_config(cfg), environment=place if ranks > 1 else {})

    return run


def kept(out):
    return json.loads((Path(out) / "metrics.json").read_text())


def seen(probes, name):
    file = probes.parent / f"{name}.log"
    return file.read_text().split() if file.is_file() else []


EVERY = ("metric=[shapes,probe,distance,pairs]", "protocol.seeds=[0,1]")


def test_one_process_two_ranks_and_a_killed_evaluation_give_equal_numbers(evaluated, probes, tmp_path):
    evaluated(tmp_path / "whole", *EVERY)
    values = kept(tmp_path / "whole")["values"]
    assert set(values["with_scene"]) >= {"layout_iou", "probe", "distance", "between"}
    assert "between" not in values["ceiling"]  # there is one true picture of a scene
    assert values["ceiling"]["distance"]["mean"] == 0
    assert values["with_scene"]["between"]["mean"] > 0
    assert values["with_scene"]["probe"]["count"] == 10  # a picture of each seed
    assert values["with_scene"]["layout_iou"]["count"] == 5  # scenes, over whose pictures the mean is taken first

    first = evaluated(tmp_path / "ranks", *EVERY, rank=1, ranks=2)
    assert first["pending"] > 0
    assert not (tmp_path / "ranks" / "metrics.json").exists()
    assert "values" in evaluated(tmp_path / "ranks", *EVERY, rank=0, ranks=2)
    assert kept(tmp_path / "ranks")["values"] == values

    (probes.parent / "probe.log").unlink()
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "killed", *EVERY, "metric.probe.stop=4")
    done = sorted((tmp_path / "killed" / "rows" / "with_scene").glob("probe.*/*.jsonl"))
    assert len(done) == 1
    done[0].write_bytes(done[0].read_bytes()[:-9])  # and the last line is torn
    picture = next((tmp_path / "killed" / "with_scene" / "pictures").glob("*.png"))
    picture.unlink()
    before = seen(probes, "probe")
    evaluated(tmp_path / "killed", *EVERY)
    assert kept(tmp_path / "killed")["values"] == values
    scenes = len({*before})
    assert scenes == 4
    arms = 2 * 2 + 2  # with and without the scene under two seeds; ceiling and floor
    assert len(seen(probes, "probe")) == arms * 5 + 2  # the batch of the torn line is measured again


def test_nothing_is_done_twice_and_true_pictures_are_measured_once(evaluated, probes, tmp_path):
    shared = f"true_rows={tmp_path / 'true'}"
    evaluated(tmp_path / "a", "metric=[distance]", shared)
    count = len(seen(probes, "distance"))
    evaluated(tmp_path / "a", "metric=[distance]", shared)
    assert len(seen(probes, "distance")) == count == 4 * 5
    evaluated(tmp_path / "b", "metric=[distance]", shared, "++sampler.steps=3")
    assert len(seen(probes, "distance")) == count + 2 * 5  # drawn ones alone
    evaluated(tmp_path / "a", "metric=[distance]", shared, "metric.distance.threshold=2.0")
    assert len(seen(probes, "distance")) == 2 * count + 2 * 5  # another setting is another row


def test_rows_of_pictures_that_have_changed_are_made_again(evaluated, probes, tmp_path, small_data):
    folder = tmp_path / "given"
    folder.mkdir()
    split = ShardSet(small_data / "shapes" / "validation")
    for place in range(5):
        Image.fromarray(split[place].image).save(folder / f"{split.scene(place).id}.png")
    shards = ("protocol.scenes=5", f"protocol.shards={small_data / 'shapes' / 'validation'}", "metric=[probe]")
    given = {"what": (f"images={folder}",), "scenes": shards}  # without a run
    evaluated(tmp_path / "out", "protocol.arms=[ceiling]", **given)
    values = kept(tmp_path / "out")["values"]
    assert values["pictures"] == values["ceiling"]
    name = split.scene(3).id
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / f"{name}.png")
    evaluated(tmp_path / "out", "protocol.arms=[ceiling]", **given)
    again = kept(tmp_path / "out")
    assert again["values"]["pictures"]["probe"]["mean"] < values["pictures"]["probe"]["mean"]
    assert again["values"]["ceiling"] == values["ceiling"]
    assert again["weights_sha256"] is None


def test_what_cannot_be_measured_is_said_and_the_rest_runs(evaluated, tmp_path, capsys):
    evaluated(tmp_path, "metric=[absent,scored,pairs,probe,failing]", "protocol.arms=[with_scene]")
    said = capsys.readouterr().out
    found = kept(tmp_path)
    assert found["not_measured"] == {
        "absent": "metric.absent.weights: nowhere.pt is not there; fetch it",
        "scored": found["not_measured"]["scored"],
        "pairs": "needs two pictures of a scene; give protocol.seeds=[0,1]",
    }
    assert found["not_measured"]["scored"].startswith("requires scores, and ")
    assert "absent: not measured: metric.absent.weights" in said
    assert set(found["values"]["with_scene"]) >= {"probe"}
    assert found["failures"]["with_scene"]["failing"]["count"] == 5
    page = (tmp_path / "report.html").read_text()
    assert "nowhere.pt is not there" in page
    assert "the judge said nothing" in page


def test_an_adapter_file_without_a_run_draws_scene_files(evaluated, short_run, tmp_path):
    module = short_run[1]
    file, folder = tmp_path / "regions.safetensors", tmp_path / "scenes"
    with module.averaged():
        save_adapter(module.conditioning.named["regions"], file, backbone=module.backbone)
    folder.mkdir()
    for scene in module.trainer.datamodule.held_out(2).scenes:
        save_scene(scene, folder / f"{scene.id}.json")
    what = (f"weights={file}", "backbone=shapes", *TINY, "sampler=dpm_solver", "sampler.steps=2")
    result = evaluated(
        tmp_path / "file", "metric=[shapes,distance]", f"scenes={folder}", what=what, scenes=("protocol.scenes=null",)
    )
    assert set(result["values"]) == {"with_scene", "without_scene"}
    assert "has none" in result["not_measured"]["distance"]
    assert result["protocol"]["scenes"] == 2
    assert result["run"] == str(file)
    assert (tmp_path / "file" / "report.html").is_file()


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "protocol").glob("*.yaml")))
def test_a_protocol_composes_with_its_metrics_and_says_its_numbers(name):
    cfg = compose("evaluate", ["run=r", f"protocol={name}"])
    assert cfg.protocol.name == name
    assert cfg.metric
    names = set()
    for system in cfg.protocol.published.values():
        assert system.source
        assert all(isinstance(value, float) for value in system["values"].values())
        names |= set(system["values"])
    # a published FID or AP is ours only where the very implementation is
    others = set(protocol_of(cfg)["implementations"])
    assert others <= names
    assert names & {"fid", "fid_clean", "ap", "ap50", "ap75"} <= others


def test_a_protocols_settings_lie_over_the_runs_and_under_the_command_lines(short_run):
    run, shown = f"run={short_run[0].run}", ("metric=[]", "protocol=rich_context_coco", "protocol.size=64")
    cfg = compose("evaluate", [run, *shown])
    drawn = evaluated_config(cfg)
    assert (drawn.sampler.steps, drawn.sampler.guidance, drawn.backbone.resolution) == (25, 4.5, 64)
    assert drawn.sampler.scheduler == short_run[0].sampler.scheduler
    drawn = evaluated_config(compose("evaluate", [run, *shown, "++sampler.steps=7", "++backbone.resolution=48"]))
    assert (drawn.sampler.steps, drawn.sampler.guidance, drawn.backbone.resolution) == (7, 4.5, 48)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["protocol.seeds=[0,0]"], r"protocol.seeds=\[0, 0\]: must be one or more different"),
        (["protocol.arms=[with]"], "with is no arm"),
        (["protocol.picture_format=bmp"], "protocol.picture_format=bmp: no such format"),
        (
            ["protocol=gligen_coco2014", "~protocol.implementations.fid.beside"],
            r"protocol.implementations.fid=.*: give",
        ),
    ],
)
def test_a_wrong_protocol_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        evaluated_config(compose("evaluate", ["run=r", *overrides]))


def test_more_scenes_than_a_filter_leaves_are_refused(evaluated, tmp_path):
    with pytest.raises(ValueError, match=r"protocol.expected: .* holds 6 scenes, and shapes has 3"):
        evaluated(tmp_path, "protocol.expected=3")


def test_jobs_of_a_sweep_have_folders_of_their_own():
    jobs = [[f"run={run}", f"++sampler.guidance={scale}", "protocol=shapes"] for run in "ab" for scale in (1, 3)]
    assert [job_name(job) for job in jobs] == ["sampler.guidance=1", "sampler.guidance=3"] * 2
    assert len({job_name(job, has_out=True) for job in jobs}) == 4
    assert job_name(["run=a", "trainer.accelerator=cpu"]) == "as_the_run"
    assert len(job_name([f"protocol.filters=[{'x' * 400}]"])) < 200
    cfg = compose("evaluate", ["run=runs/a"])
    places = places_of(cfg, "sampler.guidance=3")
    assert (str(places.out), str(places.true_rows)) == (
        "runs/a/evaluation/shapes/sampler.guidance=3",
        "runs/a/evaluation/shapes/rows",
    )
