"""What tests of Triton kernels share: where they run, on a GPU or under the interpreter, and what to ignore there."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

pytestmark = [  # of the interpreter: numpy computes masked lanes too, and takes arrays of one element for scalars
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

HERE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.gpu)]  # the interpreter's bfloat16 is wrong


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(HERE)


@pytest.fixture
def poisoned_allocations(monkeypatch):
    """Outputs and scratch begin as NaN or as a sentinel: what a kernel leaves out shows."""
    empty = torch.empty

    def poisoned(*shape, **kind):
        found = empty(*shape, **kind)
        return found.fill_(torch.nan if found.is_floating_point() else 113)

    monkeypatch.setattr(torch, "empty", poisoned)


@contextmanager
def waiting_is_an_error():
    """Whatever waits for the GPU raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
