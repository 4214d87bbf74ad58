"""Torch tensors for tests that run on the CPU and, marked ``gpu``, on a GPU: ties, duplicates, gaps between heads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from hsr.backend import named  # noqa: E402

MISSING = "needs a CUDA device" if not torch.cuda.is_available() else named("kmeans", "faiss").refusal("cuda")
MARKS = (pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "faiss serves the GPU"))
GPU = pytest.param("cuda", marks=MARKS)
DEVICES = ["cpu", GPU]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ("gaussian", "lattice", "repeated", "offset", "zero", "mixed")


def spread(random, shape, kind):
    x = random.standard_normal(shape)
    if kind == "lattice":
        return random.integers(-2, 3, shape).astype(float)
    if kind == "repeated":
        return x[:, random.integers(0, shape[1] // 8 + 1, shape[1])]
    if kind == "offset":
        return x + 30 * random.standard_normal(shape[2])
    if kind == "zero":
        return x * (random.random((*shape[:2], 1)) < 0.5)
    return x * 10.0 ** random.integers(-2, 2, (*shape[:2], 1)) if kind == "mixed" else x


@st.composite
def problems(draw):
    """Keys in a cache with room to spare, queries with strides, k: numpy float64, ties and duplicates among them."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g, G, m = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 4))
    n, d = draw(st.one_of(st.integers(1, 5), st.integers(6, 300))), draw(st.integers(1, 40))
    keys = spread(random, (g, n, d), draw(st.sampled_from(KINDS)))
    queries = spread(random, (g * G, max(m, 1), d), draw(st.sampled_from(KINDS)))[:, :m]
    return keys, queries, draw(st.integers(1, n))


def tensors(problem, device, dtype):
    keys, queries, k = problem
    g, n, d = keys.shape
    room = torch.full((g, n + 3, d), torch.nan, dtype=dtype, device=device)
    room[:, :n] = torch.from_numpy(keys).to(dtype)
    strided = torch.from_numpy(queries).to(dtype).to(device).transpose(0, 1).contiguous().transpose(0, 1)
    return room[:, :n], strided, k


def plain(tensor):
    return tensor.double().cpu().numpy()


def clustered(n, d, centres, seed=0, device="cpu", dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    middle = 2 * torch.randn(centres, d, generator=random)
    x = middle[torch.randint(centres, (n,), generator=random)] + torch.randn(n, d, generator=random)
    return x.to(dtype).to(device)
