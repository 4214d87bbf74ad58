"""The exact membership test that every numba method ends in.

Products of float32 values are exact in float64, so only the summation rounds.  Any two float64 summation orders of
``<q, k>`` differ by at most ``2 g sum_i |q_i k_i|`` with ``g = d u / (1 - d u)``, ``u = 2**-53`` (float64 keys: one
more ``u`` for the product), plus underflow.  A key is reported iff its score lies within that band of the threshold or
above, so no order of summation, fast-math included, can lose a key that another order would report.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hsr.prefetch import prefetch_bytes

AHEAD = 16  # rows asked for before they are scored
BAND = 2.3e-16  # a little over 2 u, per addition and product
UNDERFLOW = 1e-323  # two roundings to a subnormal, per dimension


@njit(fastmath={"reassoc", "contract", "nsz"}, cache=True)
def score(query, keys, j):
    """query (d,) float64, keys (n, d) float32 or float64 -> ``<q, k_j>``, float64.

    It takes the matrix, not the row: a view of the row would cost more than the product.
    """
    total = 0.0
    for i in range(query.shape[0]):
        total += query[i] * np.float64(keys[j, i])
    return total


@njit(cache=True)
def band(query, keys, j):
    """The rounding band of ``score(query, keys, j)``."""
    magnitude = 0.0
    for i in range(query.shape[0]):
        magnitude += abs(query[i] * np.float64(keys[j, i]))
    return (query.shape[0] + 1) * (BAND * magnitude + UNDERFLOW)


@njit(cache=True)
def reaches(query, keys, j, total, threshold, widest):
    """Whether ``total = score(query, keys, j)`` reaches the threshold or its band; ``widest`` bounds every band."""
    inside = total >= threshold  # as a value: whether a filtered key passes is a coin toss that no branch predicts
    if (total < threshold) & (total + widest >= threshold):
        inside = total + band(query, keys, j) >= threshold
    return inside


@njit(fastmath={"reassoc", "contract", "nsz"}, cache=True)
def score_lists(queries, keys, kept, bounds, totals):
    """totals[c] = `score` of query i and key kept[c], for c in bounds[i]..bounds[i + 1] of each query i in turn.

    queries (m, d) float64, kept (w,) int32, bounds (m + 1,) int64, totals (w,) float64.  Rows are asked for ahead.  The
    loops are all in here because a call with array arguments counts references, which takes longer than a product.
    """
    d, width, first = keys.shape[1], keys.shape[1] * keys.itemsize, np.uintp(keys.ctypes.data)
    start, stop = bounds[0], bounds[-1]
    for c in range(start, min(start + AHEAD, stop)):
        prefetch_bytes(first + np.uintp(kept[c]) * np.uintp(width), width)
    for i in range(len(queries)):
        for c in range(bounds[i], bounds[i + 1]):
            prefetch_bytes(first + np.uintp(kept[min(c + AHEAD, stop - 1)]) * np.uintp(width), width)
            place, total = np.uint64(kept[c]), 0.0  # unsigned indices spare their tests
            for r in range(d):
                total += queries[i, r] * np.float64(keys[place, np.uint64(r)])
            totals[c] = total


@njit(cache=True)
def settle(query, keys, threshold, widest, start, stop, kept, totals):
    """Move those of kept[start:stop] that `reaches` by its totals to the front, with their totals -> how many."""
    found = start
    for c in range(start, stop):
        place, total = kept[c], totals[c]
        kept[found], totals[found] = place, total  # the next key overwrites all but a member
        inside = total >= threshold
        if inside != (total + widest >= threshold):  # `reaches`: calling it would count references
            inside = total + band(query, keys, place) >= threshold
        found += inside
    return found - start


@njit(cache=True)
def widest_of(query, largest):
    """`widest_band` of one query (d,) float64."""
    magnitude = 0.0
    for i in range(query.shape[0]):
        magnitude += abs(query[i])
    return (query.shape[0] + 1) * (1.01 * BAND * (magnitude * largest) + UNDERFLOW)


def widest_band(queries: np.ndarray, largest: float) -> np.ndarray:
    """queries (m, d) float64, largest magnitude of any key entry -> (m,) float64, at least the band of every key."""
    width = queries.shape[1] + 1
    magnitude = np.abs(queries).sum(axis=1) * largest  # first: a tiny query times BAND would underflow
    return width * (1.01 * BAND * magnitude + UNDERFLOW)
