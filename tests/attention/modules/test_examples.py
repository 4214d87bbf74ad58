"""The examples in the docstrings of the modules run, and every public name has a place that shows it."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import attention.modules

NAMES = [found.name for found in pkgutil.iter_modules(attention.modules.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"attention.modules.{name}")
    output: list[str] = []
    for example in doctest.DocTestFinder().find(module):
        doctest.DocTestRunner().run(example, out=output.append)
    assert not output, "".join(output)


@pytest.mark.parametrize("name", ["CompositionalAttention", "DecoupledAttention", "SparseKAttention"])
def test_every_module_shows_an_example(name: str) -> None:
    assert ">>> layer = " in getattr(attention.modules, name).__doc__
