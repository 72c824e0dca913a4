"""The last lines of a run: figures of its log, and commands that exist."""

import shlex
import shutil

from omegaconf import OmegaConf

from loggers.metrics_csv import read_metrics
from runtime.composition import compose
from runtime.summary import ended


def test_a_run_ends_with_its_figures_and_with_commands_that_exist(short_run, tmp_path):
    run = tmp_path / "short"
    shutil.copytree(short_run[0].run, run)
    cfg = OmegaConf.merge(short_run[0], {"run": str(run)})
    first, *lines = ended(cfg, 4).splitlines()
    assert first == f"{run}: finished at step 4"
    said = {}
    for line in lines:
        said.setdefault(line[:11].strip(), []).append(line[11:])
    losses = [value for _, name, value in read_metrics(run / "metrics.csv") if name == "train/loss"]
    assert said["loss"] == [f"{sum(losses) / len(losses):.4f}, mean of the last {len(losses)} entries"]
    assert said["layout"][0].endswith("(layout_iou, step 4)")
    assert "samples/s" in said["speed"][0]
    assert f"{run / 'pictures' / 'step=0000004.png'}" in said["look at"][0]
    *commands, last = said["next"]
    for command in commands:
        _, script, *arguments = shlex.split(command)
        compose(script.removesuffix(".py"), arguments)
    assert last == "the same command with trainer.max_steps=8 trains on"


def test_a_run_without_a_log_still_says_what_comes_next(tmp_path):
    cfg = compose("train", [f"run={tmp_path / 'bare'}", "conditioning=none"])
    told = ended(cfg, 10)
    assert "loss" not in told
    assert "convert.py" not in told
    assert f"python evaluate.py run={tmp_path / 'bare'}" in told
