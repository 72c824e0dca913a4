"""The scripts as people run them: train, killed and resumed, evaluated, sampled, prepared, converted, and refused."""

import csv
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from loggers.metrics_csv import read_metrics

REPO = Path(__file__).parents[1]
SMALL = (
    "batch_size=4",
    "trainer.max_steps=12",
    "trainer.save_every=4",
    "trainer.log_every=1",
    "trainer.validate_every=6",
    "optimizer.warmup_steps=2",
    "data.make.source.count=48",
    "data.make_validation.source.count=8",
    "callback.layout_score.scenes=2",
    "callback.pictures.scenes=2",
    "sampler.steps=2",
)


def start(script: str, *arguments: str, largest_file: int | None = None, **said: str) -> subprocess.Popen:
    """The script as a process, `said` in its environment.

    With `largest_file` it cannot write longer ones: what a full disk does, for root too.
    """
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest_file, largest_file))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **said}
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=REPO,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=None if largest_file is None else limit,
    )


def run(script: str, *arguments: str, status: int = 0, largest_file: int | None = None) -> str:
    process = start(script, *arguments, largest_file=largest_file)
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, f"{out}\n{err}"
    return out if status == 0 else err


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    return f"paths.data={tmp_path_factory.mktemp('data')}"


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    command = (f"run={folder}", data, *SMALL)
    out = run("train.py", *command)
    assert "finished at step 12" in out
    return folder, command


def test_a_run_directory_holds_all_of_a_run(trained):
    folder, command = trained
    assert {"config.yaml", "metrics.csv", "pictures", "checkpoints", "finished.json"} <= {
        path.name for path in folder.iterdir()
    }
    steps = [step for step, name, _ in read_metrics(folder / "metrics.csv") if name == "train/loss"]
    assert steps == list(range(12))
    assert "finished at step 12" in run("train.py", *command)


def read(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


def losses(folder: Path) -> dict[int, float]:
    return {step: value for step, name, value in read_metrics(folder / "metrics.csv") if name == "train/loss"}


def test_killed_and_started_again_it_ends_as_if_unbroken(trained, data, tmp_path):
    folder = tmp_path / "killed"
    process = start("train.py", f"run={folder}", data, *SMALL)
    deadline = time.monotonic() + 300
    while process.poll() is None and max(losses(folder), default=0) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    out = run("train.py", f"run={folder}", data, *SMALL)
    assert "goes on from step=" in out
    assert losses(folder) == losses(trained[0])
    ends = [
        torch.load(place / "checkpoints" / "step=12.ckpt", weights_only=True)["state_dict"]
        for place in (trained[0], folder)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_whole_checkpoint(data, tmp_path):
    folder = tmp_path / "full"
    kept = [setting for setting in SMALL if not setting.startswith(("callback.", "trainer.max_steps"))]
    small = (f"run={folder}", data, *kept, "callback=[checkpoint]", "logger=[csv]", "trainer.save_every=1")
    run("train.py", *small, "trainer.max_steps=3")
    size = (folder / "checkpoints" / "step=3.ckpt").stat().st_size
    error = run("train.py", *small, "trainer.max_steps=5", status=2, largest_file=size // 2)
    lines = [line for line in error.splitlines() if line.startswith("train.py: ")]
    assert lines == [
        f"train.py: {folder}/checkpoints/step=4.ckpt: File too large; nothing was left behind: "
        "make room and give the same command again"
    ]
    assert "Traceback" not in error
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    assert torch.load(folder / "checkpoints" / "step=3.ckpt", weights_only=True)["global_step"] == 3


def test_evaluation_gives_the_same_numbers_again_and_in_other_batches(trained, data, tmp_path):
    folder = trained[0]
    common = (f"run={folder}", data, "protocol.scenes=6", "protocol.make.source.count=6")
    results, pictures = [], []
    for name, size in (("a", 6), ("b", 6), ("c", 4)):
        run("evaluate.py", *common, f"out={tmp_path / name}", f"protocol.batch_size={size}")
        results.append(json.loads((tmp_path / name / "metrics.json").read_text())["values"])
        files = sorted((tmp_path / name / "with_scene" / "pictures").glob("*.png"))
        pictures.append(np.stack([read(file) for file in files]))
        assert (tmp_path / name / "report.html").stat().st_size > 10_000
    assert results[0] == results[1]
    assert np.array_equal(pictures[0], pictures[1])
    assert abs(pictures[0] - pictures[2]).max() <= 1
    for arm, values in results[0].items():
        for name, value in values.items():
            assert results[2][arm][name]["mean"] == pytest.approx(value["mean"], abs=1e-3)


def test_two_processes_at_once_evaluate_as_one_does(trained, data, tmp_path):
    common = (f"run={trained[0]}", data, "protocol.scenes=6", "protocol.make.source.count=6", "protocol.batch_size=2")
    run("evaluate.py", *common, f"out={tmp_path / 'whole'}")
    processes = [
        start("evaluate.py", *common, f"out={tmp_path / 'parts'}", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert parts["values"] == whole["values"]
    assert parts["weights_sha256"] == whole["weights_sha256"]
    assert not list((tmp_path / "parts").glob("*/journal-*"))


def test_a_sweep_of_evaluations_ends_with_one_table(trained, data, tmp_path):
    out = run(
        "evaluate.py",
        "-m",
        f"run={trained[0]}",
        data,
        "protocol.scenes=4",
        "protocol.make.source.count=6",
        "sampler.guidance=1,3",
        "sampler.grounding_fraction=0.5,1.0",
        f"out={tmp_path / 'jobs'}",
        f"paths.runs={tmp_path / 'runs'}",
    )
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    settings = [(row["sampler.guidance"], row["sampler.grounding_fraction"]) for row in rows]
    assert settings == [("1", "0.5"), ("1", "1.0"), ("3", "0.5"), ("3", "1.0")]
    assert len({row["out"] for row in rows}) == 4
    for row in rows:
        kept = json.loads((Path(row["out"]) / "metrics.json").read_text())
        assert float(kept["protocol"]["guidance"]) == float(row["sampler.guidance"])
        assert float(row["layout_iou"]) == kept["values"]["with_scene"]["layout_iou"]["mean"]
    assert out.splitlines()[-1] == str(folder / "sweep.html")
    assert "Layout IoU over grounding fraction" in (folder / "sweep.html").read_text()
    assert len(list((tmp_path / "jobs" / "rows" / "ceiling").iterdir())) == 1  # measured once for all jobs


def test_real_pictures_are_the_upper_bound(trained, data, tmp_path):
    run(
        "evaluate.py",
        f"run={trained[0]}",
        data,
        "protocol.scenes=6",
        "protocol.make.source.count=6",
        "images=real",
        f"out={tmp_path}",
    )
    values = json.loads((tmp_path / "metrics.json").read_text())["values"]
    assert set(values) == {"real", "ceiling", "floor"}
    assert values["real"] == values["ceiling"]
    assert values["ceiling"]["layout_iou"]["mean"] > 0.95


def test_a_scene_file_becomes_a_picture(trained, tmp_path):
    out = tmp_path / "sheet.png"
    run("sample.py", f"run={trained[0]}", "scene=examples/four_shapes.json", f"out={out}", "seeds=[0,1]")
    with Image.open(out) as sheet:
        assert sheet.size[0] > 512


def test_a_picture_is_made_again_from_itself_byte_for_byte(trained, tmp_path):
    run_cfg, picture = f"run={trained[0]}", tmp_path / "picture.png"
    phrases = ("phrases=[red circle,blue square]", "boxes=[[.1,.1,.4,.5],[.5,.5,1,1]]")
    run("sample.py", run_cfg, *phrases, "seeds=[0,1]", "guidances=[1,2]", f"out={picture}")
    out = run("sample.py", f"again={picture}")
    second = tmp_path / "picture_again.png"
    assert out.splitlines()[-1] == f"{second}: equal to {picture} byte for byte"
    assert second.read_bytes() == picture.read_bytes()
    other = run("sample.py", f"again={picture}", "sampler.steps=1", f"out={tmp_path / 'other.png'}")
    assert other.splitlines()[-1] == str(tmp_path / "other.png")
    assert not np.array_equal(read(tmp_path / "other.png"), read(picture))


def test_two_ranks_at_once_draw_a_split_exactly_once(trained, data, tmp_path):
    shards = Path(data.partition("=")[2]) / "shapes" / "validation"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = (f"run={trained[0]}", f"split={shards}", "limit=7", "batch_size=2", "picture_format=png")
    assert "made 7 pictures; of 7 all are there" in run("sample.py", *common, f"out={whole}")
    processes = [
        start("sample.py", *common, f"out={parts}", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [f"rank {rank} of 2 made {count} pictures" in said[rank] for rank, count in ((0, 4), (1, 3))] == [True, True]
    assert sorted(path.name for path in parts.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert not list(parts.glob("journal-*"))
    for file in whole.glob("*.png"):
        assert abs(read(file) - read(parts / file.name)).max() <= 1
    assert "rank 0 of 1 made 0 pictures" in run("sample.py", *common, f"out={parts}")


def test_a_run_becomes_an_adapter_file(trained, tmp_path):
    file = tmp_path / "regions.safetensors"
    out = run("convert.py", f"run={trained[0]}", f"out={file}")
    assert out.startswith(f"{file}: regions, ")
    stored = torch.load(trained[0] / "checkpoints" / "step=12.ckpt", weights_only=True)["state_dict"]
    names = {key.removeprefix("adapters.regions.") for key in stored if key.startswith("adapters.regions.")}
    names -= {"position_net.null_text_feature"}  # a buffer that only files of the published variants have
    assert load_file(file).keys() == names
    error = refusal("convert.py", "conditioning=boxes", "backbone=tiny_sd15", f"weights={file}", f"out={file}")
    assert "holds weights of the method regions" in error
    assert load_file(file).keys() == names


def test_shapes_become_shards_and_a_changed_byte_is_found(tmp_path):
    shards = tmp_path / "shards"
    run("prepare.py", "source=shapes", "source.count=20", f"out={shards}", "shard_size=8")
    assert "3 shards, 20 samples" in run("prepare.py", "task=check", f"shards={shards}")
    file = shards / "000001.tar"
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(content)
    error = run("prepare.py", "task=check", f"shards={shards}", status=2)
    assert "000001.tar" in error or "prepare it again" in error


def refusal(script: str, *arguments: str) -> str:
    error = run(script, *arguments, status=2)
    lines = [line for line in error.splitlines() if line.startswith(f"{script}: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def test_bad_folders_are_refused_in_one_line(trained, data, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    assert "holds no run" in refusal("train.py", f"run={occupied}", data, *SMALL)
    assert [path.name for path in occupied.iterdir()] == ["thesis.txt"]
    assert "holds no run" in refusal("evaluate.py", f"run={tmp_path / 'nothing'}", data)
    assert "index" in refusal(
        "train.py",
        f"run={tmp_path / 'r'}",
        *SMALL,
        f"data.shards={occupied}",
        "data.make=null",
        "data.validation_shards=null",
    )
    assert not (tmp_path / "r").exists()
    other = refusal("train.py", *[a for a in trained[1] if not a.startswith("batch_size")], "batch_size=8")
    assert "batch_size was 4, now 8" in other


def test_a_scene_that_cannot_be_drawn_is_refused_by_its_field(trained, tmp_path):
    # every other kind of bad scene: tests/scenes/test_scene_json.py
    scene = json.loads((REPO / "examples" / "four_shapes.json").read_text())
    scene["relations"] = [{"subject": 0, "predicate": "above", "object": 7}]
    file = tmp_path / "scene.json"
    file.write_text(json.dumps(scene))
    out = tmp_path / "never.png"
    assert "relations[0].object" in refusal("sample.py", f"run={trained[0]}", f"scene={file}", f"out={out}")
    assert not out.exists()
