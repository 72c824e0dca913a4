"""What metrics say of single scenes, by arm: for the report's pictures, for charts over complexity, and as a table in CSV.

A metric's own columns where it scores scene by scene, else the plain numbers of its rows.
"""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from files.atomic import write_atomically
from metrics.base import Metric, Row, SceneMetric
from scenes.scene import Scene

Score = float | None


class SceneScores:
    """Scores by arm, scene and column.

    Args:
        scenes: The scenes in their order.
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = scenes
        self._scores: dict[str, list[dict[str, Score]]] = {}
        self._failures: dict[str, list[list[str]]] = {}

    def add(self, arm: str, metric: Metric, rows: Sequence[Row]) -> None:
        """Takes the rows of a metric; of several seeds the first one's.

        Args:
            arm: What was scored.
            metric: The metric.
            rows: A row for each scene, or for each scene under each seed, seed after seed.
        """
        count = len(self.scenes)
        scores = self._scores.setdefault(arm, [{} for _ in range(count)])
        failures = self._failures.setdefault(arm, [[] for _ in range(count)])
        columns = metric.columns if isinstance(metric, SceneMetric) else None
        for score, failed, row in zip(scores, failures, rows[:count], strict=False):
            names = columns if columns is not None else [key for key, value in row.items() if _is_number(value)]
            score.update({name: row.get(name) for name in names})
            if "failure" in row:
                failed.append(f"{metric.name}: {row['failure']}")

    def of(self, arm: str, place: int) -> dict[str, Score]:
        """The scores of a scene's picture."""
        return self._scores[arm][place] if arm in self._scores else {}

    def failures(self, arm: str, place: int) -> list[str]:
        """Why metrics could not score a scene's picture."""
        return self._failures[arm][place] if arm in self._failures else []

    def columns(self, arm: str) -> list[str]:
        """The names of all scores of an arm, in the order of the metrics."""
        return list(dict.fromkeys(name for row in self._scores.get(arm, ()) for name in row))

    def by_objects(self, arm: str, column: str) -> list[tuple[float, float, int]]:
        """(number of objects, mean score, scenes) for each number of objects that a scored scene has."""
        found: dict[int, list[float]] = {}
        for scene, scores in zip(self.scenes, self._scores.get(arm, ()), strict=False):
            if (score := scores.get(column)) is not None and score == score:
                found.setdefault(len(scene.objects), []).append(float(score))
        return [(count, statistics.fmean(found[count]), len(found[count])) for count in sorted(found)]

    def write(self, path: str | Path) -> None:
        """Writes a line for each scene: id, numbers of objects and relations, and `arm/column` for every score."""
        names = [(arm, column) for arm in self._scores for column in self.columns(arm)]
        file = io.StringIO()
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["scene", "objects", "relations", *(f"{arm}/{column}" for arm, column in names)])
        for place, scene in enumerate(self.scenes):
            scores = (self.of(arm, place).get(column) for arm, column in names)
            said = ["" if score is None else repr(float(score)) for score in scores]
            table.writerow([scene.id, len(scene.objects), len(scene.relations), *said])
        write_atomically(path, file.getvalue().encode())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
