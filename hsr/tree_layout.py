"""The arrays of the tree: what `hsr.tree_numba` says of leaves, groups and codes, computed once from the keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from hsr.box_bounds import EXTRA, FAN
from hsr.int8_scan import AXES, KEYS
from hsr.kd_order import kd_order
from hsr.scaling import exponent

LEAF = KEYS  # keys per leaf
NORM = 2.0  # weight of the norm among the split coordinates; measured on Gaussian and clustered keys
SAMPLE = 1024  # keys whose median is the centre
OFFSET = 128  # codes are stored unsigned, as code + OFFSET
LEVELS = 127  # codes and quantised queries lie in -127..127
FLAT = 2.0**-20  # an axis' scale is at least this part of the largest: a query over it stays finite in float32
FINE = 2.0**-90  # smallest step of a leaf's codes, for the same reason


class Layout(NamedTuple):
    """Keys in kd-tree order, their codes, and the bounds of every node."""

    exponent: int  # unit keys are keys times 2**-exponent
    rows: np.ndarray  # (n,) int32, the key at each place of the tree's order
    keys: np.ndarray  # (n, d) float32 or float64, the keys in that order
    codes: np.ndarray  # (count, ceil(d / 4), LEAF, 4) uint8
    groups: np.ndarray  # (groups, 2 d + 3, FAN) float32: middles, half widths, largest |k - c|^2, reach, 1 / step
    starts: np.ndarray  # (levels + 1,) int64, first group of each level, leaves' groups first
    centre: np.ndarray  # (d,) float64, c in the unit domain
    scales: np.ndarray  # (d,) float64, relative steps of the axes, at most 1


@njit(cache=True)
def relative_rounding(d):
    """Relative rounding of a float32 inner product of width d, keys and query rounded first; over twice the need."""
    return (d + 8) * 2.0**-23


@njit(parallel=True, cache=True)
def _measure(copies, rows, centre, low, high, far):
    """low, high (count, d): the corners of each leaf of copies (n, d); far (count,): its largest |k - c|^2."""
    n, d = copies.shape
    for leaf in prange(len(far)):
        low[leaf], high[leaf], far[leaf] = np.inf, -np.inf, 0.0
        for place in range(leaf * LEAF, min((leaf + 1) * LEAF, n)):
            square = 0.0
            for i in range(d):
                value = copies[rows[place], i]
                low[leaf, i], high[leaf, i] = min(low[leaf, i], value), max(high[leaf, i], value)
                square += (np.float64(value) - centre[i]) ** 2
            far[leaf] = max(far[leaf], square)


@njit(parallel=True, cache=True)
def _encode(copies, rows, middle, scales, inverse, codes):
    """codes (count, groups, LEAF, 4): how many of the leaf's steps copies (n, d) lie from middle (count, d)."""
    n, d = copies.shape
    for leaf in prange(len(codes)):
        for place in range(leaf * LEAF, min((leaf + 1) * LEAF, n)):
            for i in range(d):
                steps = (np.float64(copies[rows[place], i]) - middle[leaf, i]) / scales[i] * inverse[leaf]
                codes[leaf, i // AXES, place % LEAF, i % AXES] = np.uint8(np.rint(steps) + OFFSET)


def _grouped(bounds: np.ndarray) -> np.ndarray:
    """Bounds (nodes, width) -> (groups, width, FAN), the last node repeated to fill."""
    padded = np.pad(bounds, ((0, -len(bounds) % FAN), (0, 0)), mode="edge")
    return padded.reshape(-1, FAN, bounds.shape[1]).transpose(0, 2, 1)


def _levels(bounds: np.ndarray, combine: Callable[..., np.ndarray]) -> list[np.ndarray]:
    """Bounds of the leaves (count, width) -> grouped bounds of every level."""
    levels = [_grouped(bounds)]
    while len(levels[-1]) > 1:
        levels.append(_grouped(combine(levels[-1], axis=2)))
    return levels


def layout(keys: np.ndarray) -> Layout:
    """Keys (n, d) float32 or float64 -> their layout."""
    n, d = keys.shape
    power = int(exponent(keys))
    copies = np.ldexp(keys, -power).astype(np.float32)
    centre = np.median(copies[:: max(1, n // SAMPLE)], axis=0).astype(np.float64)
    distance = np.linalg.norm(copies - centre.astype(np.float32), axis=1)
    rows = np.arange(n, dtype=np.int32)
    kd_order(np.column_stack([copies, np.float32(NORM) * distance]), rows, LEAF)

    count = -(-n // LEAF)
    corners, far = np.empty((2, count, d), np.float32), np.empty(count)
    _measure(copies, rows, centre, corners[0], corners[1], far)
    lows = _levels(corners[0], np.min)
    low, high = np.concatenate(lows), np.concatenate(_levels(corners[1], np.max))
    starts = np.cumsum([0] + [len(level) for level in lows])
    groups = np.zeros((len(low), 2 * d + EXTRA, FAN), np.float32)
    middle, extent = low / 2 + high / 2, np.maximum(np.abs(low), np.abs(high))
    groups[:, :d] = middle
    groups[:, d : 2 * d] = np.maximum(high - middle, middle - low) + np.float32(relative_rounding(d)) * extent
    groups[:, 2 * d] = np.concatenate(_levels(far[:, None], np.max))[:, 0] * (1 + relative_rounding(d))
    groups[:, 2 * d + 1] = np.linalg.norm(extent.astype(np.float64), axis=1) * (1 + relative_rounding(d))

    centres = middle[: starts[1]].transpose(0, 2, 1).reshape(-1, d)[:count].astype(np.float64)
    half = np.maximum(corners[1] - centres, centres - corners[0])  # (count, d)
    scales = half.mean(axis=0)
    scales = np.maximum(scales / scales.max(), FLAT) if scales.max() > 0 else np.ones(d)
    inverse = (1 / np.maximum((half / scales).max(axis=1) / (LEVELS - 0.01), FINE)).astype(np.float32)
    groups[: starts[1], 2 * d + 2] = _grouped(inverse[:, None])[:, 0]
    codes = np.full((count, -(-d // AXES), LEAF, AXES), OFFSET, np.uint8)
    _encode(copies, rows, centres, scales, inverse.astype(np.float64), codes)
    return Layout(power, rows, keys[rows], codes, groups, starts, centre, scales)
