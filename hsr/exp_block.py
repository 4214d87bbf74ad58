"""The exponential of a float32, in a form that compilers turn into vector instructions where it stands in a loop."""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 64  # numbers that loops over it take at once
FAST = {"reassoc", "nnan", "nsz", "contract"}  # what lets sums and largest values of a block be vector instructions
STEPS, ROUGH_ONE = np.float32(2.0**23), np.float32((127 - 0.0573) * 2.0**23)  # bits of a doubling; of about 1
ONE, LOG2_E = np.float32(1.0), np.float32(1.4426950408889634)
LEAST = np.float32(-126.0)  # 2**LEAST is the smallest normal float32; smaller powers are rounded up to it
C1, C2, C3 = np.float32(0.6931513094889897), np.float32(0.24016448050299116), np.float32(0.055799798562592345)
C4, C5 = np.float32(0.009017193192588702), np.float32(0.00186705259449102)  # 2**f on [0, 1), within 1e-7; 1 at f = 0


@njit(fastmath={"contract"}, cache=True)
def exp32(x):
    """exp(x) of a float32 x <= 0, at least 2**-126; exact at 0, else off by 3e-7 and by rounding x / ln 2."""
    y = max(x * LOG2_E, LEAST)
    whole = np.floor(y)
    f = y - whole
    bits = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))  # of 2**whole
    return bits.view(np.float32) * (ONE + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * C5)))))


@njit(fastmath={"contract"}, cache=True)
def rough_power(y):
    """2**y of a float32 y <= 0, within 4 %: straight lines between powers of two, lowered to be right on average."""
    return np.int32(max(y, LEAST) * STEPS + ROUGH_ONE).view(np.float32)


@njit(cache=True)
def exp_block(x, powers):
    """powers (64,) float32 = exp(x), x (64,) float32 of at most 0."""
    for j in range(BLOCK):
        powers[j] = exp32(x[j])
