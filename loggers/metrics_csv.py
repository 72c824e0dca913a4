"""`metrics.csv`: one line for each figure, appended as it comes, so that a killed run loses nothing and a resumed one goes on.

Lightning's own CSV logger deletes the file when a run is resumed, and rewrites it whenever a new name appears.
"""

from __future__ import annotations

import csv
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

COLUMNS = ("step", "name", "value")


class MetricsCsv(Logger):
    """Append figures to a file with the columns step, name and value.

    Args:
        file: the file; its folder is made when it is needed.
    """

    def __init__(self, *, file: str | Path) -> None:
        super().__init__()
        self.file = Path(file)
        self._kept: set[tuple[int | None, str]] = set()

    @property
    def name(self) -> str:
        """The file's name."""
        return self.file.name

    @property
    def version(self) -> str:
        """Empty: a run has one file."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append figures; Lightning's own count of epochs is left out."""
        rows = [(step, name, float(value)) for name, value in metrics.items() if name != "epoch"]
        begins = not self.file.is_file()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", newline="", encoding="utf-8") as lines:
            writer = csv.writer(lines)
            if begins:
                writer.writerow(COLUMNS)
            writer.writerows(row for row in rows if row[:2] not in self._kept)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's settings are in its config.yaml."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop what was logged after the step that a run resumes from, and a line that a crash cut short.

        A figure of a step is logged under the number of steps before it (its loss, its validation) or after it (a score). The
        attempt begins with the validation and scores of its step: what is there of them stays, and none is written twice.
        """
        rows = read_metrics(self.file)
        torn = self.file.is_file() and not self.file.read_bytes().endswith(b"\n")
        if torn or any(at > step for at, _, _ in rows):
            self.file.unlink()
            for at, name, value in rows:
                if at <= step:
                    self.log_metrics({name: value}, at)
        self._kept = {(at, name) for at, name, _ in rows if at in (step - 1, step)}


def read_metrics(file: str | Path) -> list[tuple[int, str, float]]:
    """Return (step, name, value) of every complete line, none where there is no file; other lines are passed over and counted."""
    if not Path(file).is_file():
        return []
    with Path(file).open(newline="", encoding="utf-8", errors="replace") as lines:
        rows = [row for row in csv.reader(lines) if len(row) == len(COLUMNS)]
    figures, strange = [], 0
    for step, name, value in rows[1:]:
        try:
            figures += [(int(step), name, float(value))] if value else []
        except ValueError:
            strange += 1
    if strange:
        warnings.warn(f"{file}: {strange} lines hold no figure; passed over", stacklevel=2)
    return figures
