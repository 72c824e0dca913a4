"""Where figures go: a plain file in the run directory, TensorBoard; each goes on in a resumed run."""

from loggers.metrics_csv import MetricsCsv
from loggers.tensorboard import TensorBoard

__all__ = ["MetricsCsv", "TensorBoard"]
