"""Runs that tests of several callbacks look at."""

import pytest

EVERY = ("trainer.save_every=3", "trainer.validate_every=3", "trainer.log_every=2", "trainer.keep=1")


@pytest.fixture(scope="session")
def accumulated(short, fit, tmp_path_factory):
    """A run of 4 steps of 2 micro-batches, with everything every 3 steps and one checkpoint kept."""
    cfg = short(tmp_path_factory.mktemp("runs") / "accumulated", "trainer.accumulate=2", *EVERY)
    return cfg, fit(cfg)


@pytest.fixture
def quick(short, tmp_path):
    """quick(*overrides): the short run with a validation, a score and no pictures, in a folder of this test."""
    few = ("callback=[layout_score,checkpoint]", "logger=[csv]")
    return lambda *overrides: short(tmp_path / "run", *few, *overrides, without=["callback"])
