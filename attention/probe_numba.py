"""A lower bound on a row's log-sum-exp from a few keys scored exactly."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from hsr.exact import score
from hsr.roster import Held


@njit(cache=True)
def _place(j, early, samples, late):
    """The place of sampled key j: the early ones, samples between them and the late ones, the late ones."""
    if j < early:
        return j
    if j < early + samples:
        return early + (j - early) * (late - early) // samples
    return late + j - early - samples


@njit(parallel=True, cache=True)
def _probe(keys, dead, queries, limits, scale, sinks, recent, spread, lse):
    rows = queries.shape[1]
    for task in prange(queries.shape[0] * rows):
        head, row = task // rows, task % rows
        query, head_keys, limit = queries[head, row], keys[head], limits[head, row]
        early, late = min(sinks, limit), max(limit - recent, min(sinks, limit))
        samples = min(spread, late - early)
        size = early + samples + limit - late
        s = np.empty(size)
        count = 0
        for j in range(size):
            place = _place(j, early, samples, late)
            if not (len(dead) and dead[place]):
                s[count] = score(query, head_keys, place)
                count += 1
        s = s[:count]
        if len(s):
            top = s.max()
            lse[head, row] = scale * top + np.log(np.sum(np.exp(scale * (s - top))))


def lse_floor(held: Held, queries: np.ndarray, scale: float, sinks: int, recent: int, spread: int) -> np.ndarray:
    """held keys (g, capacity, d), queries (h, m, d) float64 -> at most the LSE (h, m) of the living keys.

    Scored are those that live of the first ``sinks`` keys held, the last ``recent``, and ``spread`` evenly spaced
    between: where attention mass usually lies.  A row that scores none gives -inf.
    """
    lse = np.full(held.limits.shape, -np.inf)
    heads, _, d = held.keys.shape
    grouped = queries.reshape(heads, -1, d), held.limits.reshape(heads, -1)
    _probe(held.keys, held.dead, *grouped, scale, sinks, recent, spread, lse.reshape(heads, -1))
    return lse
