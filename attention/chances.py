"""From histograms of codes to the chances of a systematic draw, for all lines at once; `attention.listed_reference`."""

from __future__ import annotations

import math

import numpy as np

from attention.key_lists import budget, edges
from attention.listed_reference import CODES, RESERVED, ROUNDING, STEPS, STRIDE, UNITS
from hsr.lifted_numba import BITS, mixed

POWERS = 2.0 ** (np.arange(CODES) / STEPS)


def head_thresholds(histograms: np.ndarray, density: float, m: int, n: int, causal: bool) -> np.ndarray:
    """Of one head: histograms (T, 256) -> (T,) float64, all alike unless causal."""
    kept = budget(density, m, n)
    if causal:
        return paced(histograms, kept, edges(m, n))
    return np.repeat(thresholds(histograms.sum(axis=0)[None], np.array([kept])), len(histograms))


def paced(histograms: np.ndarray, kept: float, edge: np.ndarray) -> np.ndarray:
    """histograms (T, 256), edges (T,) -> (T,) float64, see `attention.listed_reference.paced`.

    All but the last loop is of every block alike: what each would spend, and what it expects of those to come.
    """
    candidates, later = STRIDE * np.arange(CODES), np.arange(len(histograms))[::-1, None]
    certain, rest = (part[:, np.minimum(candidates, CODES)] for part in _sums(histograms))
    own = np.ceil(UNITS * (certain + rest * 2.0 ** (-candidates / STEPS)) - ROUNDING)
    left = math.floor(UNITS * kept)
    least = left // (RESERVED * max(int(np.count_nonzero(edge)), 1))
    rate = (1 - 1 / RESERVED) * later / np.maximum(np.cumsum(edge), 1)[:, None]
    ahead = own + np.cumsum(own * edge[:, None], axis=0) * rate + later * least
    ahead[own <= least] = -np.inf
    ahead[:, -1] = -np.inf
    found = np.empty(len(histograms))
    for block in range(len(histograms)):
        fits = ahead[block] <= left
        found[block] = candidates[fits.argmax()]
        left -= int(own[block, fits].max())
    return found


def thresholds(histograms: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """histograms (lines, 256), kept (lines,) -> (lines,) float64, see `attention.listed_reference.threshold`."""
    lines = len(histograms)
    certain, rest = _sums(histograms)
    fits = certain + rest * 2.0 ** (-np.arange(CODES + 1) / STEPS) <= kept[:, None]
    b = np.where(fits.any(axis=1), fits.argmax(axis=1), CODES)
    every = np.arange(lines)
    left = kept - certain[every, b]
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = STEPS * np.log2(rest[every, b] / left)
    most = np.where(fits[every, b], b.astype(np.float64), np.inf)  # by rounding alone could it lie above
    return np.where(fits[:, 0], 0.0, np.where(left > 0, np.minimum(exact, most), most))


def _sums(histograms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lines, 256) -> for every b in 0..256, keys with codes of at least b, and the sum of the others' 2^(c / 8)."""
    certain, rest = np.zeros((2, len(histograms), CODES + 1))
    certain[:, :CODES] = np.cumsum(histograms[:, ::-1], axis=1)[:, ::-1]
    rest[:, 1:] = np.cumsum(histograms * POWERS, axis=1)
    return certain, rest


def chances(t: np.ndarray) -> np.ndarray:
    """u[line, c] for thresholds (lines,): (lines, 256) int32, 1 .. 2^24."""
    grain = 2.0**BITS
    return np.clip(np.rint(grain * np.exp2((np.arange(CODES) - t[:, None]) / STEPS)), 1, grain).astype(np.int32)


def log_weights(u: np.ndarray) -> np.ndarray:
    """``-ln(u / 2^24)`` of chances in units of 2^-24, float32."""
    return (-np.log(u / 2.0**BITS)).astype(np.float32)


def lengths(histograms: np.ndarray, u: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many keys each line will list: histograms and u (lines, 256), starts (lines,) -> (lines,) int64."""
    return (starts + (histograms.astype(np.int64) * u).sum(axis=1)) >> BITS


def starts(seed: int, heads: int, blocks: int) -> np.ndarray:
    """Where the draws of lines begin, (heads, blocks) int64, see `attention.listed_reference.start`."""
    found = np.empty((heads, blocks), np.int64)
    first = mixed(np.uint32(seed & 0xFFFFFFFF) ^ mixed(np.uint32((seed >> 32) + 1)))
    for head in range(heads):
        second = mixed(first ^ mixed(np.uint32(head + 0x9E3779B9)))
        for block in range(blocks):
            found[head, block] = mixed(second ^ mixed(np.uint32(block + 0x9E3779B9))) >> (32 - BITS)
    return found
