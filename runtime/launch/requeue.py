"""Asking SLURM to run a job again."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping


def requeue(environment: Mapping[str, str]) -> str:
    """Has SLURM run this process's job again, where it is SLURM's and still runs.

    A job that SLURM is ending already is left to it: what was cancelled stays cancelled, what was preempted it runs again itself.

    Args:
        environment: What SLURM said; an element of a job array is requeued by itself.

    Returns:
        What came of it, in a line.
    """
    number, array = environment.get("SLURM_JOB_ID"), environment.get("SLURM_ARRAY_JOB_ID")
    if number is None:
        return "not requeued: no SLURM job"
    job = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array is not None else number
    try:
        state = _said("squeue", "--noheader", "--format=%T", f"--jobs={job}")
        if state != "RUNNING":
            return f"SLURM job {job} is not requeued: it is {state or 'gone'}, and SLURM's to run again"
        _said("scontrol", "requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        return f"SLURM job {job} is not requeued ({' '.join(reason.split())}); submit it again"
    return f"SLURM job {job} is requeued"


def _said(*command: str) -> str:
    """What a command prints; its own message where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()
