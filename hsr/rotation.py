"""Keys in the coordinates of a head's axes.

Few keys are multiplied here: a BLAS that is woken for a block of them leaves threads behind that spin for some 30 ms
and take the cores from a decode loop's next steps.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hsr.exp_block import FAST

FEW = 256  # keys


def rotated(keys: np.ndarray, mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Keys (g, n, d), mean (g, d), axes (g, d, d), all of one dtype -> ``(keys - mean) axes``, (g, n, d)."""
    centred = keys - mean[:, None]
    if keys.shape[1] > FEW:
        return np.matmul(centred, axes)
    products = np.zeros_like(centred)
    _multiply(centred, axes, products)
    return products


@njit(fastmath=FAST, cache=True)
def _multiply(rows, axes, products):
    g, n, d = rows.shape
    for head in range(g):
        for j in range(n):
            for i in range(d):
                x = rows[head, j, i]
                for t in range(d):
                    products[head, j, t] += x * axes[head, i, t]
