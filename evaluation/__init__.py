"""Evaluation beyond the models: which pictures are made already, and how scores are written down and shown.

Nothing here generates a picture or computes a score: models and metrics do, and `evaluate.py` joins them.
"""
