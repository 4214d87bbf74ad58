"""Exact powers of two that keep every product finite.

Filters work on *unit* data, largest magnitude in [1/2, 1), so that float32 neither overflows nor underflows where it
matters; the exact refinement works on the caller's own values, with a query shifted down only where a product could
overflow float64.
"""

from __future__ import annotations

import math

import numpy as np

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
