"""The scripts as people run them: train, killed and resumed, converted, prepared, and refused."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from loggers.metrics_csv import read_metrics
from tests.cluster.runs import until


@pytest.mark.parametrize(("name", "content"), [("none", None), ("cut.safetensors", b"cut"), ("cut.pt", b"\x80\x02cut")])
def test_broken_weights_are_refused_in_one_line(run, tmp_path, name, content):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    for method in ("boxes", "regions", "scene_graph"):
        given = (f"conditioning={method}", "backbone=tiny_sdxl", f"weights={file}", f"out={tmp_path / 'o.safetensors'}")
        [line] = run("convert.py", *given, status=2).strip().splitlines()
        assert f"conditioning.{method}.weights: {file}" in line


def test_a_run_directory_holds_all_of_a_run(trained, run):
    folder, command = trained
    assert {"config.yaml", "metrics.csv", "pictures", "checkpoints", "finished.json"} <= {
        path.name for path in folder.iterdir()
    }
    steps = [step for step, name, _ in read_metrics(folder / "metrics.csv") if name == "train/loss"]
    assert steps == list(range(12))
    assert "finished at step 12" in run("train.py", *command)


def test_killed_and_started_again_it_ends_as_if_unbroken(trained, data, tmp_path, run, start, losses, small):
    folder = tmp_path / "killed"
    process = start("train.py", f"run={folder}", data, *small)
    until(process, lambda: max(losses(folder), default=0) >= 6)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    out = run("train.py", f"run={folder}", data, *small)
    assert "goes on from step=" in out
    assert losses(folder) == losses(trained[0])
    ends = [
        torch.load(place / "checkpoints" / "step=12.ckpt", weights_only=True)["state_dict"]
        for place in (trained[0], folder)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_whole_checkpoint(data, tmp_path, run, small):
    folder = tmp_path / "full"
    kept = [setting for setting in small if not setting.startswith(("callback.", "trainer.max_steps"))]
    few = (f"run={folder}", data, *kept, "callback=[checkpoint]", "logger=[csv]", "trainer.save_every=1")
    run("train.py", *few, "trainer.max_steps=3")
    size = (folder / "checkpoints" / "step=3.ckpt").stat().st_size
    error = run("train.py", *few, "trainer.max_steps=5", status=2, largest_file=size // 2)
    lines = [line for line in error.splitlines() if line.startswith("train.py: ")]
    assert lines == [
        f"train.py: {folder}/checkpoints/step=4.ckpt: File too large; nothing was left behind: "
        "make room and give the same command again"
    ]
    assert "Traceback" not in error
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    assert torch.load(folder / "checkpoints" / "step=3.ckpt", weights_only=True)["global_step"] == 3


def test_a_run_becomes_an_adapter_file(trained, tmp_path, run, refusal):
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


def test_shapes_become_shards_and_a_changed_byte_is_found(tmp_path, run):
    shards = tmp_path / "shards"
    run("prepare.py", "source=shapes", "source.count=20", f"out={shards}", "shard_size=8")
    assert "3 shards, 20 samples" in run("prepare.py", "task=check", f"shards={shards}")
    file = shards / "000001.tar"
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(content)
    error = run("prepare.py", "task=check", f"shards={shards}", status=2)
    assert "000001.tar" in error or "prepare it again" in error


def test_bad_folders_are_refused_in_one_line(trained, data, tmp_path, refusal, small):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    assert "holds no run" in refusal("train.py", f"run={occupied}", data, *small)
    assert [path.name for path in occupied.iterdir()] == ["thesis.txt"]
    assert "holds no run" in refusal("evaluate.py", f"run={tmp_path / 'nothing'}", data)
    assert "index" in refusal(
        "train.py",
        f"run={tmp_path / 'r'}",
        *small,
        f"data.shards={occupied}",
        "data.make=null",
        "data.validation_shards=null",
    )
    assert not (tmp_path / "r").exists()
    other = refusal("train.py", *[a for a in trained[1] if not a.startswith("batch_size")], "batch_size=8")
    assert "batch_size was 4, now 8" in other
