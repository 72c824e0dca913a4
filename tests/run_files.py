"""What tests look at in the folder of a run, which is given by its folder or its configuration."""

import shutil
from pathlib import Path

import torch

from loggers.metrics_csv import read_metrics
from runtime.run_directory import RunDirectory


def folder_of(run):
    return Path(getattr(run, "run", run))


def logged(run, name):
    """(step, value) of a figure, in the order of metrics.csv."""
    return [(step, value) for step, metric, value in read_metrics(folder_of(run) / "metrics.csv") if metric == name]


def steps_of(run, name):
    return [step for step, _ in logged(run, name)]


def names(run, folder):
    return sorted(path.name for path in (folder_of(run) / folder).iterdir())


def saved(run):
    """The steps whose checkpoints are there."""
    return {int(file.stem.partition("=")[2]) for file in folder_of(run).glob("checkpoints/step=*.ckpt")}


def stored(run, step=None):
    """The checkpoint of a step, by default the newest."""
    directory = RunDirectory(folder_of(run))
    file = directory.newest_checkpoint() if step is None else directory.checkpoints / f"step={step}.ckpt"
    return torch.load(file, weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def moments(checkpoint):
    """Parameter -> name -> tensor of the optimizer's state."""
    [optimizer] = checkpoint["optimizer_states"]
    return optimizer["state"]


def equal_moments(one, other):
    one, other = moments(one), moments(other)
    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


def broken_off(run, copy, step):
    """A copy of a finished run as a kill after a step leaves it."""
    shutil.copytree(folder_of(run), copy)
    (copy / "finished.json").unlink()
    for later in saved(copy) - {step}:
        (copy / "checkpoints" / f"step={later}.ckpt").unlink()
