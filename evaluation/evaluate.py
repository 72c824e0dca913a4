"""What `evaluate.py` does once its configuration is checked: plan, generate, measure, aggregate, report.

Any number of processes share the work and none waits for another: each draws and measures its batches of scenes, and whichever
finds everything there at its end writes the report.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from evaluation.aggregate import aggregate, missing_pictures, write_references
from evaluation.generate import generate_arms
from evaluation.image_sets import Generated
from evaluation.measure import measure_arms
from evaluation.plan import plan
from evaluation.report.outcome import write_outcome


def evaluate(
    cfg: DictConfig,
    run_cfg: DictConfig | None,
    *,
    job: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Draws or reads pictures, scores them beside ceiling and floor, and writes `metrics.json` and `report.html`.

    Args:
        cfg: What `evaluate.py` was asked for.
        run_cfg: What pictures are drawn with, as `evaluated_config` gives it; None where pictures are given.
        job: The name of a sweep's job.
        environment: Tells this process's rank.

    Returns:
        What `metrics.json` has, and "out", its folder; where other processes still have something to make, "out" and
        "pending", how many pictures or rows.

    Raises:
        ValueError: The split cannot be read, or pictures are missing or of other settings.
    """
    evaluation = plan(cfg, run_cfg, job=job, environment=environment)
    arms, about = generate_arms(cfg, run_cfg, evaluation)
    measure_arms(evaluation, arms)
    if pending := missing_pictures(arms, evaluation):
        return {"out": evaluation.places.out, "pending": pending}
    with evaluation.timed("computing"):
        scores = aggregate(evaluation, arms)
    if scores.pending:
        return {"out": evaluation.places.out, "pending": scores.pending}
    for arm in arms.values():
        for pictures in arm.sets:
            if isinstance(pictures, Generated):
                pictures.manifest.finish()
    if cfg.references is not None:
        write_references(Path(cfg.references), evaluation, arms)
    return write_outcome(cfg, run_cfg, evaluation, about, scores, {name: arm.sets[0] for name, arm in arms.items()})
