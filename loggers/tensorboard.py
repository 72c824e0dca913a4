"""TensorBoard's event files, in which a resumed run goes on without a point twice.

Lightning's own logger opens another file beside those that are there, so that what was logged after the last checkpoint
before a kill, and comes again, would be there twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog


class TensorBoard(TensorBoardLogger):
    """Lightning's logger with `rewind`; its arguments are Lightning's."""

    _kept: frozenset[tuple[int | None, str]] = frozenset()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log figures, except those that are there from before."""
        super().log_metrics({name: value for name, value in metrics.items() if (step, name) not in self._kept}, step)

    def rewind(self, step: int) -> None:
        """Have TensorBoard pass over what was logged after the step that a run resumes from; before anything is logged.

        As in `MetricsCsv.rewind`, figures of the step itself are kept, and none is written twice.
        """
        files = sorted(Path(self.log_dir).glob("events.out.tfevents.*"))
        if files:
            self._kwargs["purge_step"] = step + 1
            self._kept = frozenset((at, name) for at in (step - 1, step) for name in _names_at(files, at))


def _names_at(files: Sequence[Path], step: int) -> set[str]:
    """Return the tags at a step of event files that no later session of them passes over; torn ends are left out."""
    names: set[str] = set()
    for file in files:
        for event in LegacyEventFileLoader(str(file)).Load():
            if event.session_log.status == SessionLog.START and event.step <= step:
                names.clear()
            elif event.step == step:
                names.update(value.tag for value in event.summary.value)
    return names
