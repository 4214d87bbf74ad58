"""The order in which a kd-tree meets its keys, every split at a multiple of a leaf."""

from __future__ import annotations

import numpy as np
from numba import njit, prange


@njit(cache=True)
def _select(values, rows, start, stop, middle):
    """Order values[start:stop], and rows alike, so that nothing before ``middle`` exceeds anything from it on."""
    first, last = start, stop - 1
    while first < last:
        a, b, c = values[first], values[(first + last) >> 1], values[last]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = first, last
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                rows[i], rows[j] = rows[j], rows[i]
                i += 1
                j -= 1
        if middle <= j:
            last = j
        elif middle >= i:
            first = i
        else:
            return


@njit(cache=True)
def _widest(features, rows, start, stop):
    """The feature that spreads most over rows[start:stop]."""
    d = features.shape[1]
    low, high = np.full(d, np.inf, np.float32), np.full(d, -np.inf, np.float32)
    for j in range(start, stop):
        row = rows[j]
        for i in range(d):
            low[i] = min(low[i], features[row, i])
            high[i] = max(high[i], features[row, i])
    return np.argmax(high - low)


@njit(parallel=True, cache=True)
def kd_order(features, rows, leaf):
    """Put rows (n,) int32 into the kd-tree order of features (n, f) float32, splits at multiples of ``leaf``."""
    n = len(features)
    values = np.empty(n, np.float32)
    span = leaf
    while span < n:
        span *= 2
    while span > leaf:
        half = span // 2
        for block in prange((n + span - 1) // span):
            start = block * span
            stop, middle = min(start + span, n), start + half
            if middle < stop:
                axis = _widest(features, rows, start, stop)
                for j in range(start, stop):
                    values[j] = features[rows[j], axis]
                _select(values, rows, start, stop, middle)
        span = half
