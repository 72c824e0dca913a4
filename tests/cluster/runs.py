"""What the checks of this folder share: a training that takes some tens of milliseconds a step, and what it leaves."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loggers.metrics_csv import read_metrics

REPO = Path(__file__).parents[2]
PYTHON = REPO / ".venv" / "bin" / "python"
SMALL = (  # the shapes experiment at tiny size
    "backbone.weights=null",
    "backbone.unet_config.norm_num_groups=8",
    "backbone.unet_config.block_out_channels=[16,24]",
    "backbone.unet_config.attention_head_dim=[2,3]",
    "backbone.text_config.hidden_size=32",
    "backbone.text_config.intermediate_size=64",
    "conditioning.regions.width=24",
    "conditioning.regions.hidden=32",
    "conditioning.regions.place_width=8",
    "data.make.source.count=96",
    "data.make_validation.source.count=8",
    "callback=[checkpoint]",
    "logger=[csv]",
    "batch_size=4",
    "trainer.log_every=1",
    "optimizer.warmup_steps=2",
)


def environment(**said: str) -> dict[str, str]:
    """This process's, without what a test run set for itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "SLURM", "COV"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": f"{PYTHON.parent}:{kept['PATH']}", **said}


def logged(run: Path) -> dict[tuple[int, str], float]:
    """Every figure of a run but its speed; none of them twice."""
    rows = [row for row in read_metrics(run / "metrics.csv") if not row[1].startswith("speed/")]
    found = {(step, name): value for step, name, value in rows}
    assert len(found) == len(rows), "a figure is there twice"
    return found


def steps_of(run: Path) -> int:
    """Steps that have been logged."""
    return max((step for step, name, _ in read_metrics(run / "metrics.csv") if name == "train/loss"), default=-1) + 1


def until(process: Any, holds: Callable[[], bool], within: float = 300) -> None:
    """Waits for something that a process which goes on is to bring about."""
    deadline = time.monotonic() + within
    while process.poll() is None and not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def difference(one: Path, other: Path, step: int) -> str:
    """What differs between two finished runs; nothing where they are equal bit for bit."""
    figures = [logged(run) for run in (one, other)]
    for key in sorted(figures[0].keys() | figures[1].keys()):
        if figures[0].get(key) != figures[1].get(key):
            return f"{key}: {figures[0].get(key)} and {figures[1].get(key)}"
    ends = [torch.load(run / "checkpoints" / f"step={step}.ckpt", weights_only=True) for run in (one, other)]
    weights = [end["state_dict"] for end in ends]
    moments = [
        {
            (place, name): value
            for place, state in end["optimizer_states"][0]["state"].items()
            for name, value in state.items()
        }
        for end in ends
    ]
    for what, (left, right) in (("weights", weights), ("moments", moments)):
        if left.keys() != right.keys():
            return f"{what}: other names"
        for key in left:
            if not torch.equal(left[key], right[key]):
                return f"{what}: {key}"
    return ""
