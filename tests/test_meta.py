"""What must hold for every package and every row of the dispatch table, whatever they are."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from hsr.backend import ROWS, Row
from tests.blocked import BLOCKED

PACKAGES = ("hsr", "attention", "attention.modules", "gpu", "proofs_checks", "benchmarks")
OPTIONAL = ("faiss", "torch", "transformers", "triton")
WITHOUT = (
    BLOCKED
    + """\
import numpy as np
import hsr
report = hsr.HSRIndex(np.eye(3)).query(np.eye(3), 0.5)
assert report.indices.tolist() == [0, 1, 2]
assert not set({blocked!r}) & set(sys.modules)
"""
)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_names_are_public_names_and_no_public_name_is_left_out(package: str) -> None:
    module = importlib.import_module(package)
    named = getattr(module, "__all__", [])
    public = {
        name for name, value in vars(module).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert len(set(named)) == len(named)
    assert set(named) == public - {"annotations"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op}-{row.method}")
def test_a_row_names_a_module_that_has_its_function(row: Row) -> None:
    assert importlib.util.find_spec(row.module) is not None
    missing = [package for package in row.needs if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{row.module} needs {', '.join(missing)}")
    assert callable(row.function())


def test_rows_are_unique() -> None:
    assert len({(row.op, row.method) for row in ROWS}) == len(ROWS)


def test_the_index_works_without_the_optional_packages() -> None:
    program = WITHOUT.format(blocked=OPTIONAL)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
