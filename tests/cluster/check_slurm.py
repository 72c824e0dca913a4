"""Training under a real SLURM: `make test-cluster`, not part of `make test`. As root on Debian or Ubuntu.

SLURM runs on this machine, with nodes on the loopback address that share its cores; processes talk over gloo.
"""

import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from scripts.sbatch import render
from tests.cluster.runs import PYTHON, REPO, SMALL, difference, environment, logged, steps_of

CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.channels_last=false")
STEPS = 80
PATIENCE = 600  # s


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """slurm(*command): what a command of SLURM prints."""
    folder = tmp_path_factory.mktemp("slurm")
    up = subprocess.run(["bash", "tests/cluster/slurm.sh", "up", folder], cwd=REPO, capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    said = environment(SLURM_CONF=up.stdout.strip().splitlines()[-1], GLOO_SOCKET_IFNAME="lo")

    def run(*command, status=0):
        done = subprocess.run([*map(str, command)], cwd=REPO, env=said, capture_output=True, text=True)
        assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    try:
        yield run
    finally:
        run("scancel", "--full", "--user=root")
        subprocess.run(["bash", "tests/cluster/slurm.sh", "down", folder], cwd=REPO, check=True)


def submit(slurm, folder: Path, *overrides: str, nodes: int = 2) -> str:
    """Submits the script that `scripts.sbatch` renders; gives the job's number."""
    folder.mkdir(parents=True, exist_ok=True)
    activate = f"export PATH={PYTHON.parent}:$PATH"
    text = render(
        [*SMALL, *CPU, f"trainer.max_steps={STEPS}", "trainer.save_every=30", "trainer.validate_every=30", *overrides],
        nodes=nodes,
        gpus=0,
        cpus=1,
        time="00:30:00",
        activate=activate,
        logs=str(folder),
    )
    file = folder / "train.sbatch"
    file.write_text(text)
    return re.search(r"\d+", slurm("sbatch", file))[0]


def state(slurm, job: str) -> str:
    return re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))[1]


def until(what, slurm, job: str, log: Path):
    """Waits for something of a job; shows its log where it does not come."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        wrong = state(slurm, job) in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") or time.monotonic() > deadline
        assert not wrong, f"{slurm('scontrol', 'show', 'job', job)}\n{log.read_text() if log.exists() else 'no log'}"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def whole(slurm, tmp_path_factory):
    """A run of two nodes that nothing has interrupted, and the folder of its data."""
    folder = tmp_path_factory.mktemp("whole")
    job = submit(slurm, folder, f"run={folder}/run", f"paths.data={folder}/data")
    until(lambda: state(slurm, job) == "COMPLETED", slurm, job, folder / f"train-{job}.out")
    return folder / "run", folder / "data"


def test_two_nodes_train_one_run(whole):
    run, _ = whole
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "finished.json", "metrics.csv"]
    assert [step for step, name in logged(run) if name == "train/loss"] == list(range(STEPS))


def test_a_signal_ahead_of_the_limit_saves_and_requeues_and_the_end_is_that_of_the_unbroken_run(slurm, whole, tmp_path):
    run = tmp_path / "run"
    job = submit(slurm, tmp_path, f"run={run}", f"paths.data={whole[1]}", "data.workers=1")
    log = tmp_path / f"train-{job}.out"
    until(lambda: steps_of(run) >= 25, slurm, job, log)
    slurm("scancel", "--signal=USR1", job)
    until(lambda: "is requeued" in log.read_text(), slurm, job, log)
    until(lambda: state(slurm, job) == "COMPLETED", slurm, job, log)
    text = log.read_text()
    assert "Restarts=1" in slurm("scontrol", "show", "job", job)
    stopped = int(re.search(r"stopped at step (\d+) \(SIGUSR1\)", text)[1])
    assert 25 <= stopped < STEPS
    assert f"goes on from step={stopped}.ckpt" in text
    assert "Traceback" not in text, text
    assert difference(whole[0], run, STEPS) == ""


def test_a_cancelled_job_saves_and_stays_cancelled_and_the_same_command_goes_on(slurm, whole, tmp_path):
    run = tmp_path / "run"
    settings = (f"run={run}", f"paths.data={whole[1]}", "trainer.save_every=1000", "data.workers=1")
    job = submit(slurm, tmp_path, *settings)
    until(lambda: steps_of(run) >= 10, slurm, job, tmp_path / f"train-{job}.out")
    slurm("scancel", job)
    deadline = time.monotonic() + PATIENCE
    while state(slurm, job) != "CANCELLED":
        assert time.monotonic() < deadline
        time.sleep(0.3)
    log = (tmp_path / f"train-{job}.out").read_text()
    [saved] = run.glob("checkpoints/*.ckpt")
    assert f"stopped at {saved.stem.replace('=', ' ')} (SIGTERM)" in log
    assert "is not requeued" in log
    again = submit(slurm, tmp_path, *settings)
    until(lambda: state(slurm, again) == "COMPLETED", slurm, again, tmp_path / f"train-{again}.out")
    assert difference(whole[0], run, STEPS) == ""


def test_a_sweep_is_a_job_of_slurm_for_each_value(slurm, whole, tmp_path):
    slurm(
        "python",
        "train.py",
        "-m",
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=debug",
        "hydra.launcher.timeout_min=10",
        "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.mem_gb=null",
        "seed=0,1",
        *SMALL,
        "trainer.max_steps=5",
        f"paths.data={whole[1]}",
        f"paths.runs={tmp_path}",
        "run=${paths.runs}/seed_${seed}",
    )
    runs = [tmp_path / f"seed_{seed}" for seed in (0, 1)]
    assert all((run / "finished.json").is_file() for run in runs)
    assert logged(runs[0]) != logged(runs[1])


def test_a_job_array_prepares_what_one_process_does(slurm, tmp_path):
    prepare = ["python", "prepare.py", "source=shapes", "source.count=40", "shard_size=4"]
    slurm(*prepare, f"out={tmp_path / 'one'}")
    command = shlex.join([*prepare, f"out={tmp_path / 'array'}"])
    wrapped = f"export PATH={PYTHON.parent}:$PATH; srun {command}"
    answer = slurm("sbatch", "--array=0-3", "--wait", f"--output={tmp_path}/%a.out", f"--wrap={wrapped}")
    assert "Submitted" in answer
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "array")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert len(files[0]) > 10
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
