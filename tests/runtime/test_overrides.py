"""Comparing a configuration with one whose keys are right."""

import re

import pytest
from omegaconf import OmegaConf

from runtime.overrides import ConfigError, check_keys, contains, suggestion

RIGHT = OmegaConf.create(
    {
        "run": "runs/a",
        "trainer": {"max_steps": 5, "fast": False},
        "objective": {
            "gamma": 5.0,
            "extra": {},
            "weights": None,
            "sizes": [1],
            "from_root": "${trainer.max_steps}",
        },
        "logger": {},
    }
)


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"objective": {"gamma": 5}},  # an integer for a float
        {"objective": {"gamma": None}},
        {"objective": {"weights": {"any": "thing"}}},
        {"objective": {"extra": {"any": "thing"}}},
        {"objective": {"sizes": []}},
        {"objective": {"from_root": 3}},
        {"run": "???", "trainer": {"max_steps": "${run}"}},  # not known yet
    ],
)
def test_what_may_stand_there(same: dict) -> None:
    check_keys(OmegaConf.create(same), RIGHT)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trainer": {"max_stepz": 5}}, "trainer.max_stepz: no such key; did you mean trainer.max_steps?"),
        ({"traner": {}}, "traner: no such key; did you mean trainer?"),
        ({"gamma": 5}, "gamma: no such key; did you mean objective.gamma?"),
        ({"trainer": {"qqq": 5}}, "trainer.qqq: no such key; trainer has fast, max_steps"),
        ({"logger": {"csv": {}}}, "logger.csv: no such key; logger has no keys"),
        ({"trainer": {"max_steps": 5.5}}, "trainer.max_steps: must be an integer, got 5.5"),
        ({"trainer": {"max_steps": True}}, "trainer.max_steps: must be an integer, got True"),
        ({"trainer": {"fast": 1}}, "trainer.fast: must be true or false, got 1"),
        ({"objective": {"gamma": "a"}}, "objective.gamma: must be a number, got 'a'"),
        ({"objective": {"sizes": 3}}, "objective.sizes: must be a list, got 3"),
        ({"objective": {"from_root": "a"}}, "objective.from_root: must be an integer, got 'a'"),
        ({"run": 3}, "run: must be text (quote it), got 3"),
        ({"trainer": 3}, "trainer: must be a node with keys of its own, got 3"),
        ({"run": "${nope}"}, "run: Interpolation key 'nope' not found"),
    ],
)
def test_what_may_not(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_keys(OmegaConf.create(wrong), RIGHT)


def test_the_message_names_where_the_key_was_set() -> None:
    with pytest.raises(ConfigError, match=r"^here: trainer\.qqq: no such key"):
        check_keys(OmegaConf.create({"trainer": {"qqq": 1}}), RIGHT, where="here: {}".format)


def test_the_experiment_is_suggested_at_a_root_that_has_runs() -> None:
    assert suggestion("experimnt", RIGHT) == "did you mean experiment?"


def test_contains() -> None:
    assert contains(RIGHT, "trainer.max_steps")
    assert not contains(RIGHT, "trainer.max_steps.more")
    assert not contains(RIGHT, "trainer.nope")
