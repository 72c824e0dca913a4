"""Metrics: how well pictures show the Scenes that they were asked for.

The interface is `metrics.base.Metric`, one module for each metric. Nothing is imported here: a metric may need
packages or weights that others do not. Protocols and reports are not here but in `evaluation`.
"""
