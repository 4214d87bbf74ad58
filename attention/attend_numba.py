"""Weighted values over reported keys, parallel over rows, accumulated in float64."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from attention.weights import ReLUPower, Softmax


@njit(parallel=True, cache=True)
def _attend(offsets, indices, scores, values, error, scale, alpha, b, output, lse, slope):
    """alpha = 0 is Softmax, else max(s - b, 0) ** alpha; rows are split evenly over the heads of values (g, n, dv)."""
    rows = len(offsets) - 1
    width = values.shape[2]
    for row in prange(rows):
        head = row * values.shape[0] // rows
        first, last = offsets[row], offsets[row + 1]
        top = -np.inf if alpha == 0 else 0.0  # the largest score, or the largest s - b
        for j in range(first, last):
            top = max(top, scale * scores[j] - b)
        power = 0  # taken out of s - b where its power alpha could overflow, or all could vanish
        if alpha > 0 and abs(math.frexp(top)[1]) * alpha > 300:
            power = math.frexp(top)[1]
        total, rise = 0.0, 0.0
        sums = np.zeros(width)
        for j in range(first, last):
            s = scale * scores[j]
            if alpha == 0:
                w = np.exp(s - top)
                rise += w
            else:
                above = max(s - b, 0.0)
                w = math.ldexp(above, -power) ** alpha
                rise += alpha * math.ldexp(above + error[row], -power) ** (alpha - 1)
            total += w
            value = values[head, indices[j]]
            for c in range(width):
                sums[c] += w * value[c]
        if total > 0.0:
            for c in range(width):
                output[row, c] = sums[c] / total
            lse[row] = np.log(total) + (top if alpha == 0 else alpha * power * math.log(2.0))
            slope[row] = math.ldexp(rise / total, -power)


def attend(
    offsets: np.ndarray,
    indices: np.ndarray,
    scores: np.ndarray,
    values: np.ndarray,
    error: np.ndarray,
    weight: Softmax | ReLUPower,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See `attention.reference.attend`."""
    rows = len(offsets) - 1
    output, lse, slope = np.zeros((rows, values.shape[2])), np.full(rows, -np.inf), np.zeros(rows)
    alpha, b = (weight.alpha, float(weight.b)) if isinstance(weight, ReLUPower) else (0, 0.0)
    _attend(offsets, indices, scores, values, error, scale, alpha, b, output, lse, slope)
    return output, lse, slope
