"""Attention over every key in plain numpy: the baseline of the ends, and in float64 their judge."""

from __future__ import annotations

import numpy as np

from attention import ReLUPower, Softmax

ROWS = 256  # of a prompt scored at a time: at 8192 keys their float32 scores are 8 MiB

Weight = Softmax | ReLUPower


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: Weight) -> np.ndarray:
    """q (m, d), k (n, d), v (n, dv) -> (m, dv); with m > 1, row i sees the first ``i + n - m + 1`` keys."""
    m, n = len(q), len(k)
    output = np.empty((m, v.shape[1]), q.dtype)
    for first in range(0, m, ROWS):
        rows = slice(first, min(first + ROWS, m))
        seen = n - m + rows.stop
        scores = q[rows] @ k[:seen].T
        scores *= q.dtype.type(1 / np.sqrt(q.shape[1]))
        hidden = (
            np.arange(n - m + first, seen) > np.arange(n - m + first, seen)[:, None]
        )  # (rows, rows), the diagonal's
        scores[:, n - m + first :][hidden] = -np.inf
        weights = weighed(scores, weight)
        total = weights.sum(axis=1, keepdims=True)
        output[rows] = weights @ v[:seen] / np.where(total > 0, total, 1)
    return output


def weighed(scores: np.ndarray, weight: Weight) -> np.ndarray:
    """Scaled scores (rows, n), -inf where hidden -> weights, up to a factor per row; the scores are overwritten."""
    if isinstance(weight, Softmax):
        scores -= scores.max(axis=1, keepdims=True)
        return np.exp(scores, out=scores)
    scores -= scores.dtype.type(weight.b)
    np.maximum(scores, 0, out=scores)
    return scores if weight.alpha == 1 else scores**weight.alpha
