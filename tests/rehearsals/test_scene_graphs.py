"""The published recipes of scene graphs."""

import pytest

from tests.rehearsals.recipes import SCENE_GRAPHS


@pytest.mark.parametrize("name", SCENE_GRAPHS)
def test_a_recipe_trains_resumes_is_evaluated_and_exported(name, rehearse):
    rehearse(name, SCENE_GRAPHS[name])
