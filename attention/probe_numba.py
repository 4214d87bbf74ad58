"""A lower bound on a row's log-sum-exp from a few keys scored exactly."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from hsr.exact import score


@njit(parallel=True, cache=True)
def _probe(keys, queries, limits, scale, sinks, recent, spread, lse):
    rows = queries.shape[1]
    for task in prange(queries.shape[0] * rows):
        head, row = task // rows, task % rows
        query, head_keys, limit = queries[head, row], keys[head], limits[head, row]
        early, late = min(sinks, limit), max(limit - recent, min(sinks, limit))
        between = late - early
        samples = min(spread, between)
        s = np.empty(early + samples + limit - late)
        for j in range(early):
            s[j] = score(query, head_keys, j)
        for j in range(samples):
            s[early + j] = score(query, head_keys, early + j * between // samples)
        for j in range(limit - late):
            s[early + samples + j] = score(query, head_keys, late + j)
        if len(s):
            top = s.max()
            lse[head, row] = scale * top + np.log(np.sum(np.exp(scale * (s - top))))


def lse_floor(
    keys: np.ndarray, queries: np.ndarray, limits: np.ndarray, scale: float, sinks: int, recent: int, spread: int
) -> np.ndarray:
    """keys (g, n, d), queries (g, rows, d) float64, limits (g, rows) int64 -> at most the LSE (g, rows).

    Scored are the first ``sinks`` keys, the last ``recent``, and ``spread`` evenly spaced between: where attention mass
    usually lies.  A row that sees no key gives -inf.
    """
    lse = np.full(limits.shape, -np.inf)
    _probe(keys, queries, limits, scale, sinks, recent, spread, lse)
    return lse
