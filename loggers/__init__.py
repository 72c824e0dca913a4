"""Where figures go beside TensorBoard and W&B: a plain file in the run directory."""

from loggers.metrics_csv import MetricsCsv

__all__ = ["MetricsCsv"]
