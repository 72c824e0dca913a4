"""After `evaluate.py -m`: one table, page and plots over all jobs of the sweep.

Every job that ends leaves a note of its folder in the sweep's; Hydra calls back when all have ended, here or through a launcher.
This module is imported before the settings are checked, so what draws the page is imported late.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from files.atomic import write_atomically

JOBS = "jobs"


def keep_job(out: Path) -> None:
    """Notes in the sweep's folder where the job that runs now has left its numbers.

    Args:
        out: The job's folder.
    """
    hydra = HydraConfig.get()
    note = {"out": str(out.resolve()), "overrides": list(hydra.overrides.task)}
    write_atomically(Path(hydra.sweep.dir) / JOBS / f"{hydra.job.num}.json", json.dumps(note).encode() + b"\n")


class SweepTable(Callback):
    """Writes the table when a sweep has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collects what the jobs have left.

        Args:
            config: Of the sweep.
            **kwargs: What else Hydra says.
        """
        folder = Path(config.hydra.sweep.dir)
        if not (folder / JOBS).is_dir():
            return

        from evaluation.report.sweep import jobs_of, write_sweep

        print(write_sweep(jobs_of(folder), folder))
