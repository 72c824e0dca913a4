"""Scripts as processes of their own, and one short run that several files share."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loggers.metrics_csv import read_metrics
from tests.forked import Forked

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


def started(script: str, *arguments: str, largest_file: int | None = None, **said: str) -> Forked:
    """The script as a process, `said` in its environment; with `largest_file` it cannot write longer ones."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **said}
    return Forked(script, *arguments, environment=environment, largest_file=largest_file)


def ended(script: str, *arguments: str, status: int = 0, largest_file: int | None = None) -> str:
    process = started(script, *arguments, largest_file=largest_file)
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, f"{out}\n{err}"
    return out if status == 0 else err


@pytest.fixture(scope="session")
def start():
    """start(script, *arguments, largest_file=, **environment): the script as a process."""
    return started


@pytest.fixture(scope="session")
def run():
    """run(script, *arguments, status=0): what the script says on stdout, or where it is to fail on stderr."""
    return ended


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Settings of a run of 12 tiny steps."""
    return SMALL


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    return f"paths.data={tmp_path_factory.mktemp('data')}"


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory, run) -> tuple[Path, tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    command = (f"run={folder}", data, *SMALL)
    out = run("train.py", *command)
    assert "finished at step 12" in out
    return folder, command


def read_of(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


@pytest.fixture(scope="session")
def read():
    return read_of


def losses_of(folder: Path) -> dict[int, float]:
    return {step: value for step, name, value in read_metrics(folder / "metrics.csv") if name == "train/loss"}


@pytest.fixture(scope="session")
def losses():
    return losses_of


def refusal_of(script: str, *arguments: str) -> str:
    error = ended(script, *arguments, status=2)
    lines = [line for line in error.splitlines() if line.startswith(f"{script}: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


@pytest.fixture(scope="session")
def refusal():
    return refusal_of
