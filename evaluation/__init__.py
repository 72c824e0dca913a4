"""What `evaluate.py` does, a file a stage: plan, generate, measure, aggregate, report.

Metrics themselves are in `metrics`, images come from `sampling`; nothing here trains.
"""
