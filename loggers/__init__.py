"""Loggers of figures: a plain file in the run directory, TensorBoard, Weights & Biases; each goes on in a resumed run."""

from loggers.metrics_csv import MetricsCsv
from loggers.tensorboard import TensorBoard
from loggers.weights_and_biases import WeightsAndBiases

__all__ = ["MetricsCsv", "TensorBoard", "WeightsAndBiases"]
