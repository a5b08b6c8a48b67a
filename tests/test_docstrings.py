import doctest
import importlib
import pkgutil

import pytest

import pml_distill

MODULES = [m.name for m in pkgutil.walk_packages(pml_distill.__path__, "pml_distill.") if "__main__" not in m.name]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
