"""The published recipes of regions."""

import pytest

from tests.rehearsals.recipes import REGIONS


@pytest.mark.parametrize("name", REGIONS)
def test_a_recipe_trains_resumes_is_evaluated_and_exported(name, rehearse):
    rehearse(name, REGIONS[name])
