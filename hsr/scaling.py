"""Exact powers of two that keep every product finite.

Filters work on *unit* data, largest magnitude in [1/2, 1), so that float32 neither overflows nor underflows where it
matters; the exact refinement works on the caller's own values, with a query shifted down only where a product could
overflow float64.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from hsr.exact import UNDERFLOW

HEADROOM = 1000  # products and sums stay below 2**HEADROOM
SMALLEST = 2.0**-1074  # the smallest positive float64


def exponent(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The e with ``max|values| * 2**-e`` in [1/2, 1), per slice of ``axis``; 0 where all values are zero."""
    return np.frexp(np.abs(values).max(axis=axis))[1].astype(np.int64)


def unit(queries: np.ndarray, thresholds: np.ndarray, key_exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """queries (m, d) float64, thresholds (m,) float64 -> both in the unit domain of keys times 2**-key_exponent."""
    shift = exponent(queries, axis=1)
    with np.errstate(over="ignore"):  # a threshold beyond float64 is beyond every score
        return np.ldexp(queries, -shift[:, None]), np.ldexp(thresholds, -(shift + key_exponent))


@njit(cache=True)
def unit_into(query, threshold, key_exponent, unit_query):
    """`unit` of one query: fill unit_query (d,) float64 -> the threshold, lowered and kept finite."""
    d, largest = len(query), 0.0
    for i in range(d):
        largest = max(largest, abs(query[i]))
    shift = math.frexp(largest)[1]
    half = shift // 2
    once, again = math.ldexp(1.0, -half), math.ldexp(1.0, half - shift)  # 2**-shift alone may overflow
    for i in range(d):
        unit_query[i] = query[i] * once * again
    lowered = math.ldexp(threshold - (d + 1) * UNDERFLOW, -(shift + key_exponent))  # float64 may score 0 below 0
    return min(max(lowered, -2.0 * d - 2.0), 2.0 * d + 2.0)  # no unit score exceeds d in magnitude


def without_overflow(
    queries: np.ndarray, thresholds: np.ndarray, largest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """queries (m, d), thresholds (m,), largest magnitude of any key entry -> both times 2**-shift, and shift (m,).

    The shift is None where no ``<q, k>`` can overflow float64, nearly always.  A shrunk entry may lose bits to
    underflow, at most 2**-1074 each; the threshold is lowered by what that can take from a score.
    """
    width = queries.shape[1]
    if float(np.abs(queries).max(initial=0.0)) * largest * width < 2.0**HEADROOM:
        return queries, thresholds, None
    shift = np.maximum(exponent(queries, axis=1) + math.frexp(largest)[1] + width.bit_length() - HEADROOM, 0)
    lost = np.where(shift > 0, 2 * (width + 1) * SMALLEST * max(largest, 1.0), 0.0)
    return np.ldexp(queries, -shift[:, None]), np.ldexp(thresholds, -shift) - lost, shift
