"""What tests of Triton kernels share: where they run, on a GPU or under the interpreter, and what to ignore there."""

from __future__ import annotations

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
