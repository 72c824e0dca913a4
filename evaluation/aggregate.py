"""The fourth stage of an evaluation: values of metrics by arm from the rows on disk, whichever process made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.conditions import Arm, measured_arms
from evaluation.image_sets import Generated
from evaluation.plan import Evaluation
from evaluation.rows import RowStore, gathered, row_keys, scene_marks, store_name
from evaluation.scene_scores import SceneScores
from metrics.base import Metric, NotAvailable, Row


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an evaluation found.

    Attributes:
        values: By arm and name.
        of_scenes: The scores of each scene.
        failures: By arm and metric, a line for each picture that could not be scored.
        pending: How many rows other processes have still to make.
    """

    values: dict[str, dict[str, Any]]
    of_scenes: SceneScores
    failures: dict[str, dict[str, list[str]]]
    pending: int


def missing_pictures(arms: Mapping[str, Arm], evaluation: Evaluation) -> int:
    """Looks what the other processes have drawn, and counts what is still to come."""
    count = 0
    for arm in arms.values():
        for pictures in arm.sets:
            if isinstance(pictures, Generated):
                pictures.manifest.reload()
                count += sum(pictures.stamp(place) is None for place in range(len(evaluation.split.scenes)))
    return count


def aggregate(evaluation: Evaluation, arms: Mapping[str, Arm]) -> Scores:
    """Compute the values of all metrics from the rows that every process has left.

    Args:
        evaluation: What was measured; a metric that gives no value is noted in it.
        arms: The pictures by arm.

    Returns:
        The scores; with `pending` above zero the others are of no use.
    """
    marks = scene_marks(evaluation.split.scenes)
    wanted = evaluation.protocol["arms"]
    shown = [name for name in arms if name != "ceiling" or "ceiling" in wanted]
    values: dict[str, dict[str, Any]] = {name: {} for name in shown}
    failures: dict[str, dict[str, list[str]]] = {}
    scores = SceneScores(evaluation.split.scenes)
    pending = 0
    for name in evaluation.nodes:
        try:
            metric = evaluation.metric(name)
            rows, missing = _rows(evaluation, name, metric, arms, marks)
        except NotAvailable:
            continue
        if missing:
            pending += 0 if name in evaluation.not_measured else missing
        if missing or pending:
            continue
        true = rows.get("ceiling", [])
        try:
            found = {
                arm: metric.compute(of_arm, true=_repeated(true, len(of_arm)) if metric.compares else ())
                for arm, of_arm in rows.items()
                if arm in shown
            }
        except NotAvailable as error:
            evaluation.leave_out(name, error)
            continue
        if found:
            evaluation.not_measured.pop(name, None)  # measured before, when it could be
        for arm, of_metric in found.items():
            for key, value in of_metric.items():
                values[arm][key if key not in values[arm] else f"{name}.{key}"] = value
            scores.add(arm, metric, rows[arm])
            if failed := [f"{row['scene']}: {row['failure']}" for row in rows[arm] if "failure" in row]:
                failures.setdefault(arm, {})[name] = failed
    return Scores(values=values, of_scenes=scores, failures=failures, pending=pending)


def write_references(folder: Path, evaluation: Evaluation, arms: Mapping[str, Arm]) -> None:
    """Writes `PROTOCOL.METRIC.npz` for each metric that can compare with statistics of the true pictures."""
    marks = scene_marks(evaluation.split.scenes)
    named = [
        name for name in evaluation.nodes if name not in evaluation.not_measured and evaluation.metric(name).references
    ]
    for name in named:
        metric = evaluation.metric(name)
        path = folder / f"{evaluation.protocol['name']}.{name}.npz"
        metric.save_reference(
            path, _rows(evaluation, name, metric, arms, marks)[0]["ceiling"], split=evaluation.split.name
        )
        print(f"{path}: statistics of {len(marks)} true pictures; compare with them by metric.{name}.reference={path}")
    if not named:
        print(
            f"references={folder}: none of {', '.join(evaluation.nodes)} compares with statistics; name one, such as metric=[fid]"
        )


def _rows(
    evaluation: Evaluation, name: str, metric: Metric, arms: Mapping[str, Arm], marks: Sequence[str]
) -> tuple[dict[str, list[Row]], int]:
    """The rows of a metric by arm, seed after seed, in the order of the scenes; and how many are missing."""
    found: dict[str, list[Row]] = {}
    missing = 0
    for arm in measured_arms(metric, arms, evaluation.protocol["arms"]):
        store = RowStore(arm.rows / store_name(name, metric))
        found[arm.name] = []
        for sets in arm.scored(metric):
            rows, absent = gathered(store, row_keys(marks, sets))
            found[arm.name] += rows
            missing += absent
    return found, missing


def _repeated(true: list[Row], count: int) -> list[Row]:
    """The rows of the true pictures as often as there are seeds."""
    return true * (count // len(true)) if true else true
