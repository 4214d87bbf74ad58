"""The exact membership test that every numba method ends in.

Products of float32 values are exact in float64, so only the summation rounds.  Any two float64 summation orders of
``<q, k>`` differ by at most ``2 g sum_i |q_i k_i|`` with ``g = d u / (1 - d u)``, ``u = 2**-53`` (float64 keys: one
more ``u`` for the product), plus underflow.  A key is reported iff its score lies within that band of the threshold or
above, so no order of summation, fast-math included, can lose a key that another order would report.
"""

from __future__ import annotations

import numpy as np
from numba import njit

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
