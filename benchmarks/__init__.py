"""Measurements: both sides in one run, ratios rather than times. Nothing here is a test."""
