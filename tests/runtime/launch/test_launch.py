"""What launchers start, where the processes meet, and that they agree: on real processes, as people start them."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from loggers.metrics_csv import read_metrics
from runtime.build import build_strategy, build_trainer
from runtime.launch.device import accumulation, world_size
from runtime.launch.launch import PORTS, decided, first, first_node, join, meeting_place, nodes_of, place, refuse_unseen
from runtime.launch.ranks import Ranks, ranks_of
from runtime.launch.requeue import requeue
from runtime.run_directory import RunError
from tests.cluster.runs import SMALL, steps_of, until
from tests.ranks import free_port

REPO = Path(__file__).parents[3]
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "2",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "4711",
}


@pytest.fixture
def started(monkeypatch):
    """started(environment): as if a launcher had said so."""

    def by(environment):
        for name in {*SRUN, *TORCHRUN}:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    by({})
    return by


def trainer_of(**settings):
    usual = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "accumulate": 1, "micro_batch": None, "launcher": None}
    return OmegaConf.create(usual | settings)


class TestMeeting:
    def test_srun_and_torchrun_say_the_same_of_the_same_processes(self):
        there = [meeting_place(said, ranks_of(said)) for said in (SRUN, TORCHRUN)]
        ports = [int(each.pop("MASTER_PORT")) for each in there]
        assert there[0] == there[1]
        assert ports[0] in PORTS
        assert ports[1] == 4711
        assert max(PORTS) < 32768  # the first that Linux hands out

    def test_steps_and_restarts_of_a_job_and_other_jobs_meet_elsewhere(self):
        said = [
            SRUN,
            SRUN | {"SLURM_STEP_ID": "1"},
            SRUN | {"SLURM_RESTART_COUNT": "1"},
            SRUN | {"SLURM_JOB_ID": "123457"},
        ]
        assert len({meeting_place(each, ranks_of(each))["MASTER_PORT"] for each in said}) == 4

    @pytest.mark.parametrize(
        ("names", "host"),
        [
            ("n1", "n1"),
            ("n[1-2]", "n1"),
            ("a[07-09,12],b1", "a07"),
            ("x1,x2", "x1"),
            ("r[3,5]-ib,q1", "r3-ib"),
            ("c-1-[2]", "c-1-2"),
        ],
    )
    def test_the_first_node_of_a_list(self, names, host):
        assert first_node(names) == host

    @pytest.mark.parametrize(
        ("said", "way"),
        [
            (SRUN | {"SLURM_STEP_NUM_NODES": "4"}, "--ntasks-per-node"),
            (SRUN | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4,2"}, "--ntasks-per-node"),
            (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, "--nproc-per-node"),
        ],
    )
    def test_nodes_with_different_numbers_of_processes_are_refused(self, said, way):
        with pytest.raises(RunError, match=way):
            nodes_of(said, ranks_of(said))

    def test_processes_that_are_told_no_place_to_meet_are_refused(self):
        said = {"RANK": "0", "WORLD_SIZE": "2"}
        with pytest.raises(RunError, match=r"MASTER_ADDR: not set, with WORLD_SIZE=2; start with torchrun or srun"):
            meeting_place(said, ranks_of(said))


class TestSettings:
    @pytest.mark.parametrize("said", [SRUN, TORCHRUN])
    @pytest.mark.parametrize("asked", [{}, {"devices": "auto"}, {"devices": 2, "num_nodes": 3}, {"devices": [0, 1]}])
    def test_what_the_launcher_has_started_decides(self, started, said, asked):
        started(said)
        trainer = trainer_of(**asked)
        place(trainer, ranks_of(os.environ))
        assert trainer.num_nodes == 3
        assert trainer.devices in (2, [0, 1])
        assert world_size(trainer) == 6
        assert accumulation(24, trainer_of(micro_batch=2)) == 2

    @pytest.mark.parametrize(("asked", "named"), [({"devices": 4}, "devices=4"), ({"num_nodes": 2}, "num_nodes=2")])
    def test_settings_that_contradict_it_are_refused(self, started, asked, named):
        started(TORCHRUN)
        with pytest.raises(
            RunError, match=rf"trainer.{named}: torchrun has started 6 processes on 3 nodes; leave it out"
        ):
            place(trainer_of(**asked), ranks_of(os.environ))

    def test_one_process_of_a_launcher_is_one(self, started):
        started({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        trainer = trainer_of(devices="auto")
        place(trainer, ranks_of(os.environ))
        assert (trainer.devices, world_size(trainer)) == (1, 1)

    def test_slurm_alone_is_refused_without_srun(self, started):
        with pytest.raises(
            RunError, match=r"trainer.launcher=slurm: srun has not started this process; write `srun python"
        ):
            place(trainer_of(launcher="slurm"), ranks_of(os.environ))
        started(SRUN)
        place(trainer_of(launcher="slurm"), ranks_of(os.environ))

    def test_processes_that_nobody_started_are_refused(self, started):
        with pytest.raises(RunError, match=r"trainer.devices=2: 2 processes were asked for and one was started; start"):
            join(trainer_of(devices=2))
        with pytest.raises(RunError, match=r"trainer.num_nodes=2: .* torchrun --nnodes=2 "):
            join(trainer_of(num_nodes=2))
        assert join(trainer_of()) == Ranks()

    def test_lightnings_own_ways_under_slurm_are_not_taken(self, started, short, tmp_path):
        started(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"})
        trainer = build_trainer(short(tmp_path, "callback=[]", "logger=[]", without=["callback"]))
        assert type(trainer._accelerator_connector.cluster_environment).__name__ == "LightningEnvironment"
        assert trainer.world_size == 1

    @pytest.mark.parametrize("name", ["channels_last", "compile"])
    def test_what_fsdp_cannot_share_out_is_refused(self, started, name):
        started(TORCHRUN)
        with pytest.raises(RunError, match=rf"trainer.{name}=true: .* set trainer.{name}=false"):
            place(trainer_of(strategy="fsdp", **{name: True}), ranks_of(os.environ))

    @pytest.mark.parametrize("name", ["auto", "ddp", "fsdp"])
    def test_a_process_by_itself_shares_nothing(self, name):
        assert build_strategy(name, 1) == "auto"
        assert type(build_strategy(name, 2)).__name__ == ("SharedOut" if name == "fsdp" else "DDPStrategy")


def test_alone_everything_is_decided_here(tmp_path):
    done = []
    assert decided(lambda: 3) == 3
    first(lambda: done.append(1))
    refuse_unseen(tmp_path)
    assert done == [1]


def test_outside_slurm_nothing_is_requeued():
    assert requeue({}) == "not requeued: no SLURM job"


TWO = """
import os, sys, time
from pathlib import Path
from omegaconf import OmegaConf
from runtime.launch.launch import decided, first, join, refuse_unseen
from runtime.command import refuse
import torch.distributed as dist

ranks = join(OmegaConf.create({"accelerator": "cpu", "devices": 1, "num_nodes": 1}))
shared, own = Path(sys.argv[1]), Path(sys.argv[2])
assert dist.get_world_size() == 2
made = shared / "made"
def make():
    if ranks.rank > 0:
        assert made.exists()
    else:
        time.sleep(0.2)
        made.touch()
first(make)
said = decided(lambda: f"by rank {ranks.rank}")
assert said == "by rank 0", said
refuse_unseen(shared)
dist.barrier()
assert list(shared.glob(".seen*")) == []
os.chdir(own / str(ranks.rank))
Path("run").mkdir(exist_ok=True) if ranks.rank == 0 else None
try:
    if sys.argv[3] == "unseen":
        refuse_unseen(Path("run"), within=0.5)
    else:
        def refuses():
            raise ValueError("rank 0 refuses")
        decided(refuses)
    raise AssertionError("not refused")
except ValueError as error:
    assert ranks.rank == 0
    print(f"refused: {error}")
    sys.exit(2)
"""


@pytest.mark.parametrize("what", ["unseen", "refusal"])
def test_two_processes_agree_and_a_folder_that_one_does_not_see_is_refused(what, tmp_path):
    for rank in (0, 1):
        (tmp_path / "own" / str(rank)).mkdir(parents=True)
    (tmp_path / "shared").mkdir()
    file = tmp_path / "two.py"
    file.write_text(TWO)
    command = [sys.executable, file, tmp_path / "shared", tmp_path / "own", what]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [start(*command, RANK=str(rank), LOCAL_RANK=str(rank), **meeting) for rank in (0, 1)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    told = r"run=run: rank 0 on \S+ has made it, and it is not seen on \S+ \(rank 1\); give a folder"
    assert re.match(f"refused: {told if what == 'unseen' else 'rank 0 refuses'}", said[0][0])
    assert said[1][0] == ""


def start(*command, **said):
    """A process in the project's folder, with `said` in its environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **said}
    pipe = subprocess.PIPE
    return subprocess.Popen([*map(str, command)], cwd=REPO, env=environment, text=True, stdout=pipe, stderr=pipe)


def test_processes_of_one_command_share_a_folder_and_stop_and_go_on_together(tmp_path):
    runs = tmp_path / "runs"
    command = [sys.executable, "train.py", *SMALL, f"paths.data={tmp_path / 'data'}", "trainer.devices=2"]
    command += ["trainer.save_every=1000", "trainer.validate_every=1000"]
    process = start(
        *command, f"run={runs}/${{now:%H%M%S.%f}}", "trainer.max_steps=5000"
    )  # the time differs between processes
    until(process, lambda: any(steps_of(run) >= 5 for run in runs.glob("*")))
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    [run] = runs.iterdir()
    [stopped] = re.findall(r"stopped at step (\d+) \(SIGTERM\)", out) or [error]
    assert [file.name for file in (run / "checkpoints").iterdir()] == [f"step={stopped}.ckpt"]

    steps = int(stopped) + 3
    out, error = start(*command, f"run={run}", f"trainer.max_steps={steps}").communicate(timeout=300)
    assert out.count(f"goes on from step={stopped}.ckpt") == out.count(f"finished at step {steps}") == 1, error
    losses = [step for step, name, _ in read_metrics(run / "metrics.csv") if name == "train/loss"]
    assert losses == list(range(steps))
