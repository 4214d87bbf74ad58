"""Hypothesis strategies for keys, queries and thresholds, chosen to hurt."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from hsr.backend import ROWS
from hsr.reference import products

DTYPES = ("float64", "float32", "float16", "bfloat16")
# largest power of ten at which a vector of each dtype is still finite, and the smallest at which it is not all zero
RANGE = {"float64": (-320, 307), "float32": (-44, 37), "float16": (-7, 3), "bfloat16": (-40, 37)}


class Case(NamedTuple):
    keys: Any  # (n, d), numpy, or torch for bfloat16
    queries: Any  # (m, d)
    plain_keys: np.ndarray  # the same in float64
    plain_queries: np.ndarray
    thresholds: np.ndarray  # (m,) float64


def served(method: str, d: int) -> int:
    """The width d, or 2 for an index method that serves only the plane."""
    (row,) = (row for row in ROWS if (row.op, row.method) == ("build", method))
    return 2 if row.refusal("cpu", d=d) else d


def as_dtype(values: np.ndarray, dtype: str) -> Any:
    """Values rounded to a dtype; bfloat16 exists in torch only."""
    if dtype == "bfloat16":
        import torch

        return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    with np.errstate(over="ignore"):
        limit = float(np.finfo(dtype).max)
        return np.clip(values, -limit, limit).astype(dtype)


def plain(array: Any) -> np.ndarray:
    """float64 numpy of a numpy or torch array."""
    return (array if isinstance(array, np.ndarray) else array.double().numpy()).astype(np.float64)


def _spread(rng: np.random.Generator, shape: tuple[int, int], kind: str, dtype: str) -> np.ndarray:
    low, high = RANGE[dtype]
    x = rng.standard_normal(shape)
    if kind == "lattice":
        return rng.integers(-2, 3, shape).astype(np.float64)
    if kind == "repeated":
        return x[rng.integers(0, max(1, shape[0] // 8 + 1), shape[0])]
    if kind == "clustered":
        return x * 0.01 + 3 * rng.standard_normal((8, shape[1]))[rng.integers(0, 8, shape[0])]
    if kind == "offset":
        return x + 100 * rng.standard_normal(shape[1])
    if kind == "outlier":
        x[rng.integers(shape[0])] *= 10.0 ** (high - 2)
    if kind == "huge":
        return x * 10.0 ** (high - 1)
    if kind == "tiny":
        return x * 10.0**low
    if kind == "mixed":
        return x * 10.0 ** rng.integers(low // 2, high // 2, shape)
    if kind == "flat":
        x[:, rng.integers(shape[1])] = 1.0
    if kind == "zero":
        x[rng.random(shape[0]) < 0.5] = 0.0
    return x


KINDS = ("gaussian", "lattice", "repeated", "clustered", "offset", "outlier", "huge", "tiny", "mixed", "flat", "zero")


@st.composite
def cases(draw: st.DrawFn, dtype: str, method: str) -> Case:
    """Keys, queries and thresholds of one dtype, of a width that the method serves.

    Ties, duplicates, zeros, huge, tiny and subnormal values are included.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.one_of(st.integers(1, 12), st.integers(13, 420)))
    d, m = served(method, draw(st.integers(1, 20))), draw(st.integers(1, 6))
    step = draw(st.sampled_from((1, 2)))  # 2: not contiguous
    keys = as_dtype(_spread(rng, (n, step * d), draw(st.sampled_from(KINDS)), dtype), dtype)[:, ::step]
    queries = as_dtype(_spread(rng, (m, step * d), draw(st.sampled_from(KINDS)), dtype), dtype)[:, ::step]
    plain_keys, plain_queries = plain(keys), plain(queries)
    s, e = products(plain_queries, plain_keys)
    with np.errstate(over="ignore"):
        scores = np.ldexp(s, e)
    choice = st.sampled_from(("tie", "above", "below", "between", "zero", "all", "none"))
    thresholds = np.empty(m)
    for i in range(m):
        tie = scores[i, draw(st.integers(0, n - 1))]
        tie = float(np.clip(tie, -1e308, 1e308))
        thresholds[i] = {
            "tie": tie,
            "above": np.nextafter(tie, np.inf),
            "below": np.nextafter(tie, -np.inf),
            "between": tie * 0.75,
            "zero": 0.0,
            "all": -np.inf,
            "none": np.inf,
        }[draw(choice)]
    return Case(keys, queries, plain_keys, plain_queries, thresholds)
