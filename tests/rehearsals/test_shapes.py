"""The recipes that draw their own data."""

import pytest

from tests.rehearsals.recipes import SHAPES


@pytest.mark.parametrize("name", SHAPES)
def test_a_recipe_trains_resumes_is_evaluated_and_exported(name, rehearse):
    rehearse(name, SHAPES[name])
