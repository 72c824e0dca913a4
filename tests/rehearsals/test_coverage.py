"""No experiment and no protocol without a rehearsal."""

from runtime.composition import CONF
from tests.rehearsals.recipes import BOXES, REGIONS, SCENE_GRAPHS, SHAPES

RECIPES = BOXES | REGIONS | SCENE_GRAPHS | SHAPES


def names(group):
    return {path.stem for path in (CONF / group).glob("*.yaml")}


def test_every_experiment_that_trains_has_a_rehearsal():
    assert set(RECIPES) == names("experiment")


def test_every_protocol_has_a_rehearsal():
    assert {protocol for recipe in RECIPES.values() for protocol in recipe.protocols} == names("protocol")
