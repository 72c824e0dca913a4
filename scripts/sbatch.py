"""Writes the batch script that trains a run under SLURM; `scripts/train.sbatch` is what it gives for four nodes of eight A100.

    python -m scripts.sbatch --nodes 4 --gpus 8 --time 24:00:00 --out train.sbatch -- experiment=gligen_coco_sd14 run=DIR

What stands after `--` goes to `train.py` behind `trainer=slurm`, and so does what `sbatch` is given behind the script. Without
`--out` the script is printed.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def render(
    overrides: Sequence[str],
    *,
    nodes: int,
    gpus: int,
    time: str,
    cpus: int = 12,
    partition: str | None = None,
    account: str | None = None,
    constraint: str | None = None,
    name: str = "train",
    warning: int = 120,
    activate: str = "source .venv/bin/activate",
    within: str = "",
    logs: str = "logs",
) -> str:
    """The script.

    Args:
        overrides: of `train.py`, beside `trainer=slurm`.
        nodes: machines.
        gpus: of each machine, a process for each; 0: one process of each machine, without a GPU.
        time: limit, as SLURM writes it.
        cpus: cores of a process, for itself and its loader's workers.
        partition: where the cluster has several.
        account: whom it is charged to.
        constraint: features that nodes must have, such as a100.
        name: of the job, and of its log.
        warning: seconds before the limit at which the run saves and has itself requeued.
        activate: shell commands that make python the right one.
        within: what runs python on a node, such as `apptainer exec --nv image.sif`.
        logs: folder of the jobs' output.

    Returns:
        The text of the script.

    Raises:
        ValueError: a time that SLURM would not read, or a number that no job can have.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", time):
        raise ValueError(f"--time {time}: not of the form HOURS:MINUTES:SECONDS or DAYS-HOURS")
    for option, value, least in (("nodes", nodes, 1), ("gpus", gpus, 0), ("cpus", cpus, 1), ("warning", warning, 1)):
        if value < least:
            raise ValueError(f"--{option} {value}: must be at least {least}")
    asked = {
        "job-name": name,
        "partition": partition,
        "account": account,
        "constraint": constraint,
        "nodes": nodes,
        "ntasks-per-node": max(gpus, 1),
        "gpus-per-node": gpus or None,
        "cpus-per-task": cpus,
        "time": time,
        "signal": f"USR1@{warning}",
        "output": f"{logs}/%x-%j.out",
    }
    options = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None]
    words = [*shlex.split(within), "python", "train.py", "trainer=slurm", *overrides]
    return "\n".join(
        [
            "#!/bin/bash",
            "# Made by scripts/sbatch.py; the folder of the logs has to be there: mkdir -p " + shlex.quote(logs),
            *options,
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            "",
            "set -euo pipefail",
            activate,
            "export OMP_NUM_THREADS=1",
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it from the batch script by itself",
            "",
            "# one process for each GPU; all end when one fails; the signal reaches python, which must be srun's own child",
            f'exec srun --kill-on-bad-exit=1 {shlex.join(words)} "$@"',
            "",
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """Prints the script, or writes it."""
    parser = argparse.ArgumentParser(prog="python -m scripts.sbatch", description="Write a batch script for SLURM.")
    parser.add_argument("--nodes", type=int, required=True, help="machines")
    parser.add_argument("--gpus", type=int, required=True, help="of each machine; 0: none")
    parser.add_argument("--time", required=True, help="limit, such as 24:00:00")
    parser.add_argument("--cpus", type=int, default=12, help="cores of a process (%(default)s)")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--constraint", help="features of the nodes, such as a100")
    parser.add_argument("--name", default="train", help="of the job (%(default)s)")
    parser.add_argument("--warning", type=int, default=120, help="seconds before the limit to save (%(default)s)")
    parser.add_argument("--activate", default="source .venv/bin/activate", help="before python (%(default)s)")
    parser.add_argument("--within", default="", help="what runs python, such as 'apptainer exec --nv image.sif'")
    parser.add_argument("--logs", default="logs", help="folder of the output (%(default)s)")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("overrides", nargs="*", help="of train.py, after --")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    try:
        text = render(given.pop("overrides"), **given)
    except ValueError as error:
        parser.error(str(error))
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
