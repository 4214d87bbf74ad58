"""Exact powers of two that keep every product finite.

Filters work on *unit* data, largest magnitude in [1/2, 1), so that float32 neither overflows nor underflows where it
matters; the exact refinement works on the caller's own values, with a query shifted down only where a product could
overflow float64.
"""

from __future__ import annotations

import numpy as np

HEADROOM = 1000  # products and sums stay below 2**HEADROOM


def exponent(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The e with ``max|values| * 2**-e`` in [1/2, 1), per slice of ``axis``; 0 where all values are zero."""
    return np.frexp(np.abs(values).max(axis=axis))[1].astype(np.int64)


def unit(queries: np.ndarray, thresholds: np.ndarray, key_exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """queries (m, d) float64, thresholds (m,) float64 -> both in the unit domain of keys times 2**-key_exponent."""
    shift = exponent(queries, axis=1)
    return np.ldexp(queries, -shift[:, None]), np.ldexp(thresholds, -(shift + key_exponent))


def overflow_shift(queries: np.ndarray, key_exponent: int) -> np.ndarray:
    """The power of two (m,) int64 by which a query must shrink so that ``<q, k>`` cannot overflow float64."""
    width = int(queries.shape[1]).bit_length()
    return np.maximum(exponent(queries, axis=1) + key_exponent + width - HEADROOM, 0)
