"""After `evaluate.py -m`: one table, page and plots over all jobs of the sweep.

Every job that ends leaves a note of its folder in the sweep's; Hydra calls back when all have ended, here or through a launcher.
This module is imported before the settings are checked, so what draws the page is imported late.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

JOBS = "jobs"


def keep_job(out: Path) -> None:
    """Notes in the sweep's folder where the job that runs now has left its numbers.

    Args:
        out: The job's folder.
    """
    hydra = HydraConfig.get()
    note = {"out": str(out.resolve()), "overrides": list(hydra.overrides.task)}
    folder = Path(hydra.sweep.dir) / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hydra.job.num}.json"
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(json.dumps(note) + "\n", encoding="utf-8")
    os.replace(draft, file)


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
