"""Attention problems that look like a model's heads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attention import Softmax
from attention.reference import dense


class Problem(NamedTuple):
    q: np.ndarray  # (h, m, d)
    k: np.ndarray  # (g, n, d)
    v: np.ndarray  # (g, n, dv)

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        return dense(*self, Softmax(), self.q.shape[2] ** -0.5)


def like_heads(g: int, group: int, m: int, n: int, d: int = 32, seed: int = 0, sharp: float = 2.0) -> Problem:
    """Keys and queries with a few strong axes, a sink, near keys that are alike, and values that follow them."""
    rng = np.random.default_rng(seed)
    axes = np.geomspace(2, 0.2, d)
    slow = np.cumsum(rng.standard_normal((g, n, d)), axis=1) / np.sqrt(np.arange(1, n + 1))[:, None]
    k = axes * (0.7 * rng.standard_normal((g, n, d)) + 0.7 * slow)
    v = 0.5 * k @ rng.standard_normal((g, d, d)) / np.sqrt(d) + rng.standard_normal((g, n, d))
    common = rng.standard_normal((g, 1, 1, d))
    q = sharp * (rng.standard_normal((g, group, m, d)) + common).reshape(g * group, m, d)
    k[:, 0] += 3 * common[:, 0, 0] / sharp
    v[:, 0] *= 0.05
    return Problem(q.astype(np.float32), k.astype(np.float32), v.astype(np.float32))
