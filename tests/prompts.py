"""Prompts and shared lists of keys for tests: awkward lengths, groups of heads, values that hurt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from attention.key_lists import KeyLists, edges, row_blocks

LENGTHS = (1, 2, 127, 128, 129, 256, 3 * 128 + 37)
BEFORE = (0, 0, 1, 5, 127, 128, 131, 300)  # keys older than the first row
KINDS = ("gaussian", "sharp", "zero", "huge", "tiny", "constant", "repeated", "lattice")


class Prompt(NamedTuple):
    q: np.ndarray  # (H, m, d)
    k: np.ndarray  # (g, n, d)
    v: np.ndarray  # (g, n, dv)

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.q), self.q.shape[1], self.k.shape[1]


def made(rng: np.random.Generator, m: int, n: int, g: int, group: int, d: int, dv: int, kind: str) -> Prompt:
    q, k, v = rng.standard_normal((g * group, m, d)), rng.standard_normal((g, n, d)), rng.standard_normal((g, n, dv))
    if kind == "sharp":
        q *= 10
    if kind == "zero":
        q[:, rng.random(m) < 0.5], k[:, rng.random(n) < 0.5], v[:, rng.random(n) < 0.5] = 0, 0, 0
    if kind == "huge":
        q, k, v = q * 1e2, k * 10.0 ** rng.integers(-3, 2, (g, n, 1)), v * 1e20
    if kind == "tiny":
        q, k, v = q * 1e-20, k * 1e-20, v * 1e-20
    if kind == "constant":
        v[:] = v[:, :1]
    if kind == "repeated":
        again = rng.integers(0, n // 8 + 1, n)
        k, v = k[:, again], v[:, again]
    if kind == "lattice":
        q, k, v = np.round(q), np.round(k), np.round(v)
    return Prompt(q, k, v)


@st.composite
def prompts(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32", "float64")) -> Prompt:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, before = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(BEFORE))
    g, group, d, dv = (draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 3), (1, 3, 16, 64), (1, 5, 16)))
    prompt = made(rng, m, m + before, g, group, d, dv, draw(st.sampled_from(KINDS)))
    dtype = draw(st.sampled_from(dtypes))
    return Prompt(*(x.astype(dtype) for x in prompt))


def some_lists(rng: np.random.Generator, shape: tuple[int, int, int], share: float) -> KeyLists:
    """Tokens, blocks and means of every line, no key twice; arrays are longer than their offsets say."""
    heads, m, n = shape
    tokens, blocks, means = [], [], []
    for line in range(heads * row_blocks(m)):
        whole = edges(m, n)[line % row_blocks(m)] // 128
        kind = rng.integers(0, 4, whole)  # of each key block: tokens, whole, mean, none
        single = [128 * J + rng.permutation(128)[: int(128 * share)] for J in np.flatnonzero(kind == 0)]
        tokens.append(rng.permutation(np.concatenate([np.empty(0, int), *single])))
        blocks.append(np.flatnonzero(kind == 1))
        means.append(np.flatnonzero(kind == 2))
    parts = []
    for kind in (tokens, blocks, means):
        ids = np.append(np.concatenate(kind), [-9, 1 << 30])
        parts.append((np.cumsum([0] + [len(x) for x in kind], dtype=np.int64), ids.astype(np.int32)))
    weights = np.append(rng.standard_normal(parts[0][0][-1]), [np.nan, np.nan]).astype(np.float32)
    return KeyLists(*parts[0], weights, *parts[1], *parts[2])
