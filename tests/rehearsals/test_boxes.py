"""The published recipes of boxes."""

import pytest

from tests.rehearsals.recipes import BOXES


@pytest.mark.parametrize("name", BOXES)
def test_a_recipe_trains_resumes_is_evaluated_and_exported(name, rehearse):
    rehearse(name, BOXES[name])
