"""Parts of labelling that know shapes, for tests of what is around them."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def parts():
    """The module `shapes_parts.py`; tests are no package to import it from."""
    spec = importlib.util.spec_from_file_location("shapes_parts", Path(__file__).with_name("shapes_parts.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
