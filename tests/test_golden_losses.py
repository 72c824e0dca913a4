"""A change that should alter no number keeps the losses of a short run."""

import json

import pytest

from scripts.golden_losses import FILE, losses


def test_twenty_steps_give_the_recorded_losses(tmp_path):
    recorded = json.loads(FILE.read_text())
    assert len(recorded) == 20
    assert losses(tmp_path) == pytest.approx(recorded, rel=1e-3)
