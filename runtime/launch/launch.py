"""Processes that train together: who started them, where they meet, and what rank 0 decides for all.

A launcher (torchrun, srun, submitit under SLURM) has started every process and said which it is; several processes on this
machine that nobody has started are started through torchrun. They meet before anything is written, so that all know the same
folder and the same checkpoint. What a launcher's variables mean is in `ranks.py`.
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_utilities.core.rank_zero import rank_zero_only  # Lightning's own, without 8 s of its imports
from omegaconf import DictConfig

from runtime.launch.device import device_of, world_size
from runtime.launch.ranks import Ranks, ranks_of
from runtime.run_directory import RunError

Found = TypeVar("Found")

SEEN_WITHIN = 20  # s that a node may take to see a new file; network file systems keep listings for a while
LINGER = 3  # s that rank 0 gets to end first: launchers end the others of a rank that has failed
PORTS = range(15_000, 30_000)  # below those that the system hands out by itself


def launcher_of(environment: Mapping[str, str]) -> str | None:
    """Who started this process: torchrun (or what speaks as it does), slurm, submitit; None where nobody says so."""
    for name, variable in (
        ("torchrun", "RANK"),
        ("slurm", "SLURM_STEP_NUM_TASKS"),
        ("submitit", "SUBMITIT_LOCAL_NTASKS"),
    ):
        if variable in environment:
            return name
    return None


def nodes_of(environment: Mapping[str, str], ranks: Ranks) -> int:
    """Machines that the processes run on.

    Args:
        environment: What the launcher said.
        ranks: Which process this is.

    Returns:
        Their number.

    Raises:
        RunError: The processes do not lie evenly on the machines.
    """
    if launcher_of(environment) == "slurm":
        nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
        each = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
        if ranks.count % nodes or len(set(re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", each))) > 1:
            raise RunError(
                f"srun: {ranks.count} tasks on {nodes} nodes ({each}): every node needs as many; give --nodes and "
                "--ntasks-per-node in place of --ntasks"
            )
        return nodes
    local = int(environment.get("LOCAL_WORLD_SIZE", ranks.count))
    if ranks.count % local:
        raise RunError(
            f"torchrun: {ranks.count} processes, {local} of them here: every node needs as many; give each the same "
            "--nproc-per-node"
        )
    return ranks.count // local


def relaunch(cfg: DictConfig) -> None:
    """Starts the processes of this machine where there are to be several and nobody has started them; then it does not return.

    Args:
        cfg: The run's configuration; of `trainer` what `world_size` reads.

    Raises:
        RunError: They lie on several machines, which nobody can start from one.
    """
    if cfg.plan or HydraConfig.get().mode == RunMode.MULTIRUN or not _is_alone(cfg.trainer):
        return
    count = world_size(cfg.trainer)
    os.environ.setdefault(
        "PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    )  # torchrun passes them on
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *sys.argv]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *start])


def join(trainer: DictConfig) -> Ranks:
    """Has the processes meet; in a single one it does nothing. A second call finds them joined.

    Args:
        trainer: `accelerator`, `timeout_minutes`, and what `world_size` reads.

    Returns:
        Which process this is.

    Raises:
        RunError: Fewer processes were started than the settings ask for.
    """
    ranks = ranks_of(os.environ)
    if ranks.count == 1:
        if _is_alone(trainer):
            raise RunError(
                f"trainer.devices={trainer.devices}: {world_size(trainer)} processes were asked for and one was started; start "
                "train.py by itself, without -m, or with torchrun or srun (hydra.launcher.tasks_per_node), or set "
                "trainer.devices=1"
            )
        return ranks
    if not dist.is_initialized():
        os.environ.update(meeting_place(os.environ, ranks))
        on_gpu = device_of(trainer).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(ranks.local)
        # flags and messages go round on the CPU in any case: they need not wait for the GPU
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            rank=ranks.rank,
            world_size=ranks.count,
            timeout=timedelta(minutes=trainer.get("timeout_minutes", 30)),
        )
        atexit.register(_leave)
    rank_zero_only.rank = ranks.rank
    return ranks


def meeting_place(environment: Mapping[str, str], ranks: Ranks) -> dict[str, str]:
    """The variables by which torch and Lightning find the other processes, in torchrun's words.

    Args:
        environment: What the launcher said; MASTER_ADDR and MASTER_PORT are kept where they are given.
        ranks: Which process this is.

    Returns:
        RANK, WORLD_SIZE and their kin, MASTER_ADDR and MASTER_PORT. Under srun the first node of the step, and a port that
        follows from job, step and restart, so that two jobs on a node seldom meet.

    Raises:
        RunError: The launcher has not said where.
    """
    nodes = nodes_of(environment, ranks)
    each = ranks.count // nodes
    found = {
        "RANK": ranks.rank,
        "WORLD_SIZE": ranks.count,
        "LOCAL_RANK": ranks.local,
        "LOCAL_WORLD_SIZE": each,
        "GROUP_RANK": environment.get("GROUP_RANK", environment.get("SLURM_NODEID", ranks.rank // each)),
    }
    if launcher_of(environment) == "slurm":
        names = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "localhost"))
        numbers = [int(environment.get(f"SLURM_{name}", 0)) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
        place = sum(number * weight for number, weight in zip(numbers, (101, 7, 1), strict=True)) % len(PORTS)
        found |= {"MASTER_ADDR": first_node(names), "MASTER_PORT": PORTS[place]}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        found |= {name: environment[name]} if name in environment else {}
        if name not in found:
            raise RunError(
                f"{name}: not set, with WORLD_SIZE={ranks.count}; start with torchrun or srun, which say where to meet"
            )
    return {name: str(value) for name, value in found.items()}


def first_node(names: str) -> str:
    """The first host of SLURM's list, such as a07 of "a[07-09,12],b1"."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,]*)", names)
    return "".join(part or "" for part in found.groups()) if found else names


def place(trainer: DictConfig, ranks: Ranks) -> None:
    """Writes into the settings what the launcher has started.

    Args:
        trainer: `devices`, `num_nodes` are set; left at 1 or auto they agree with anything.
        ranks: Which process this is.

    Raises:
        RunError: The settings ask for something else, or a process does not see its GPU.
    """
    launcher = launcher_of(os.environ)
    if (wanted := trainer.get("launcher")) is not None and launcher not in (wanted, "torchrun"):
        raise RunError(
            f"trainer.launcher={wanted}: srun has not started this process; write `srun python train.py …` into the batch "
            "script (python -m scripts.sbatch makes one), or choose trainer=ddp"
        )
    if launcher is None:
        return
    for name in ("channels_last", "compile"):
        if trainer.get("strategy") == "fsdp" and ranks.count > 1 and trainer.get(name):
            raise RunError(f"trainer.{name}=true: weights that fsdp shares out cannot be so; set trainer.{name}=false")
    nodes = nodes_of(os.environ, ranks)
    for name, started in (("num_nodes", nodes), ("devices", ranks.count // nodes)):
        asked = trainer[name] if isinstance(trainer[name], int | str) else len(trainer[name])
        if str(asked) not in ("1", "auto", str(started)):
            raise RunError(
                f"trainer.{name}={trainer[name]}: {launcher} has started {ranks.count} processes on {nodes} nodes; leave "
                "it out, or start as many"
            )
        if isinstance(trainer[name], int | str):
            trainer[name] = started
    if device_of(trainer).type == "cuda" and torch.cuda.device_count() <= ranks.local:
        raise RunError(
            f"trainer.accelerator={trainer.accelerator}: process {ranks.local} of this node sees "
            f"{torch.cuda.device_count()} GPUs; ask for --gpus-per-node in place of --gpus-per-task, with --gpu-bind=none"
        )


def decided(decide: Callable[[], Found]) -> Found:
    """What rank 0 finds, on every rank.

    Args:
        decide: Called on rank 0 alone; what it gives is sent to the others.

    Returns:
        What it gave. Where it raised, that error is raised on rank 0, and the others end with status 2 in silence.
    """
    if not dist.is_initialized():
        return decide()
    error, sent = None, [None, False]
    if dist.get_rank() == 0:
        try:
            sent = [decide(), True]
        except Exception as raised:
            error = raised
    dist.broadcast_object_list(sent, src=0)
    if error is not None:
        raise error
    if not sent[1]:
        _end_after_rank_0()
    return sent[0]  # type: ignore[return-value]


def first(work: Callable[[], object]) -> None:
    """Has rank 0 work before the others do: what it makes they find."""
    if not dist.is_initialized():
        work()
        return
    if dist.get_rank() == 0:
        work()
    dist.barrier()
    if dist.get_rank() > 0:
        work()
    dist.barrier()


def refuse_unseen(folder: Path, within: float = SEEN_WITHIN) -> None:
    """Finds out whether every process sees the run's folder.

    Args:
        folder: Rank 0 has made it.
        within: s that each may take.

    Raises:
        RunError: Some do not; their machines are named.
    """
    if not dist.is_initialized():
        return
    token = f".seen-{secrets.token_hex(8)}"
    token = decided(lambda: (folder / token).write_text(token) and token)
    deadline = time.monotonic() + within
    while not (seen := folder.is_dir() and token in os.listdir(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    found: list[tuple[str, int, bool]] = [("", 0, False)] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), dist.get_rank(), seen))
    if dist.get_rank() == 0:
        (folder / token).unlink()
    blind = [f"{host} (rank {rank})" for host, rank, seen in found if not seen]
    if not blind:
        return
    if dist.get_rank() > 0:
        _end_after_rank_0()
    raise RunError(
        f"run={folder}: rank 0 on {found[0][0]} has made it, and it is not seen on {', '.join(blind)}; give a folder that "
        "all nodes share, by its whole path"
    )


def _is_alone(trainer: DictConfig) -> bool:
    """Whether one process was started and more are asked for; refused where they would lie on several machines."""
    if launcher_of(os.environ) == "torchrun" or trainer.get("launcher") is not None:
        return False
    if ranks_of(os.environ).count > 1 or world_size(trainer) == 1:
        return False
    if trainer.num_nodes > 1:
        raise RunError(
            f"trainer.num_nodes={trainer.num_nodes}: this process was started by itself; start one on every node with torchrun "
            f"--nnodes={trainer.num_nodes} --nproc-per-node=N --rdzv-backend=c10d --rdzv-endpoint=HOST train.py …, or with srun"
        )
    return True


def _end_after_rank_0() -> None:
    time.sleep(LINGER)
    sys.exit(2)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
