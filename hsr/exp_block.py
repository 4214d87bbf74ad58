"""Exponentials of a block of 64 float32, in a form that compilers turn into vector instructions."""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 64
LOG2_E = np.float32(1.4426950408889634)
LEAST = np.float32(-126.0)  # 2**LEAST is the smallest normal float32; smaller powers are rounded up to it
C1, C2, C3 = np.float32(0.6931513094889897), np.float32(0.24016448050299116), np.float32(0.055799798562592345)
C4, C5 = np.float32(0.009017193192588702), np.float32(0.00186705259449102)  # 2**f on [0, 1), within 1e-7; 1 at f = 0


@njit(cache=True)
def exp_block(x, bits, powers):
    """x (64,) float32, all at most 0 and overwritten -> powers (64,) float32: exp(x) within 3e-7, exp(0) exactly.

    bits (64,) int32 and its float32 view ``powers`` are one buffer: what is stored as an exponent's bits is read as a
    power of two.
    """
    fractions = x
    for j in range(BLOCK):
        y = max(x[j] * LOG2_E, LEAST)
        whole = np.floor(y)
        fractions[j] = y - whole
        bits[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    for j in range(BLOCK):
        f = fractions[j]
        powers[j] *= np.float32(1.0) + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * C5))))
