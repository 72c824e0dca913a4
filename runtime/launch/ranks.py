"""Which of several processes this is, where a launcher started them and nothing else does: torchrun, accelerate, srun, submitit.

Training asks Lightning. Drawing needs no more than its own number: every rank takes its share and writes files of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

# Of srun only what a step of it sets: a batch script that starts python by itself is one process, whatever it reserved.
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID"),
)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One of `count` processes.

    Attributes:
        rank: Its number, from 0.
        count: How many there are.
        local: Its number on this machine, from 0.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every `count`-th item from this rank's own on: the shares of all ranks tile the items."""
        return list(items[self.rank :: self.count])

    def block(self, items: Sequence[Item]) -> list[Item]:
        """As many neighbouring items for each rank: the blocks of all ranks, one behind the other, are the items."""
        first, end = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return list(items[first:end])


def ranks_of(environment: Mapping[str, str], *, arrays: bool = False) -> Ranks:
    """What a launcher said.

    Args:
        environment: The process's environment variables.
        arrays: Whether the elements of a SLURM job array are to share the work, each with its own processes; else each
            element is taken for a job of its own.

    Returns:
        The process's place; the only one where no launcher said anything.

    Raises:
        ValueError: A launcher's variables are no numbers, or contradict one another.
    """
    within = _launched(environment)
    if not arrays or "SLURM_ARRAY_TASK_ID" not in environment:
        return within
    names = ("ID", "COUNT", "MIN", "STEP")
    said = {f"SLURM_ARRAY_TASK_{name}": environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names}
    try:
        number, count, first, step = (int(value) for value in said.values())
        place, left = divmod(number - first, step)
    except (ValueError, ZeroDivisionError):
        place, count, left = -1, 0, 0
    if left or not 0 <= place < count:
        told = " ".join(f"{name}={value}" for name, value in said.items())
        raise ValueError(f"{told}: no place in a job array without gaps; give one such as --array=0-7")
    return Ranks(rank=place * within.count + within.rank, count=count * within.count, local=within.local)


def _launched(environment: Mapping[str, str]) -> Ranks:
    """The place among the processes of one job."""
    for names in _NAMES:
        if not all(name in environment for name in names[:2]):
            continue
        said = {name: environment[name] for name in names if name in environment}
        try:
            rank, count, local = (int(said.get(name, 0)) for name in names)
        except ValueError:
            rank = count = local = -1
        if not 0 <= rank < count or local < 0:
            told = " ".join(f"{name}={value}" for name, value in said.items())
            raise ValueError(f"{told}: no place among processes; start with torchrun or srun, or unset {names[0]}")
        return Ranks(rank=rank, count=count, local=local)
    return Ranks()
