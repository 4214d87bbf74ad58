"""The method ``sketch``: an int8 code per key and axis, a deterministic bound, and exact refinement of what it keeps.

Transform coding.  Keys are divided by a power of two (largest magnitude below 1), centred, rotated to their principal
axes and rounded to 8 bits with one step per axis:

    k = mean + axes (steps * code) + residual,      e = ||residual||, measured in the key's own space.

A query is rotated alike, ``z = steps * (axes^T q)``, and rounded to ``sigma * a`` with a in int8.  Then

    <q, k> = <q, mean> + sigma <a, code> + <z - sigma a, code> + <q, residual>
          <= <q, mean> + sigma <a, code> + ||z - sigma a|| ||code|| + ||q|| e                       (Cauchy-Schwarz)

so a key can reach the threshold only if the integer ``<a, code>`` reaches a bound that depends on the largest
``||code||`` and ``e`` of its block of 64 keys alone.  One integer comparison per key decides; the few that pass are
scored exactly. Nothing rests on the axes being orthonormal or the steps being good: those only decide how many pass.

Layout: codes (blocks, d / 4, 64, 4) as uint8 (code + 128), which `hsr.int8_scan` reads contiguously; the last block is
padded.  Bytes per key: d.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from numba.cpython.unsafe.numbers import trailing_zeros

from hsr.exact import reaches, score, widest_band
from hsr.int8_scan import AXES, KEYS, QUERIES, popcount, scan_block
from hsr.prefetch import prefetch_row
from hsr.report import Hits
from hsr.rows import offsets_of, packed
from hsr.scaling import exponent, unit

OFFSET = 128  # codes are stored unsigned, as code + OFFSET
LEVELS = 127  # codes and quantised queries lie in -127..127
OUTLIER = 8.0  # robust standard deviations an axis covers; keys beyond are clipped and carry a larger residual
CHUNK_BYTES = 1 << 18  # codes that one task reads over and over, once per tile of queries: it stays in the L2 cache
AHEAD = 8  # rows of keys asked for before they are scored
FAR = 1 << 30  # beyond any sum of products of codes


@dataclass(frozen=True)
class Sketch:
    """Codes of one run of keys; all in the domain of keys times ``2**-exponent``."""

    mean: np.ndarray  # (d,) float64
    axes: np.ndarray  # (d, d) float64, columns are the principal axes
    steps: np.ndarray  # (d,) float64, quantisation step per axis
    codes: np.ndarray  # (blocks, groups, 64, 4) uint8
    residual: np.ndarray  # (blocks,) float64, largest ||k - reconstruction|| of the block, rounded up
    norm: np.ndarray  # (blocks,) float64, largest ||code|| of the block
    exponent: int
    largest: float  # largest magnitude of any key entry, in the caller's domain

    def report(
        self, keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray, limits: np.ndarray, collect: bool
    ) -> Hits:
        """See `hsr.structure.Structure`."""
        m = len(queries)
        blocks = max(1, CHUNK_BYTES // self.codes[0].size)
        chunks = -(-len(self.codes) // blocks)
        tiles = np.zeros((-(-m // QUERIES), QUERIES, *self.codes.shape[1::2]), np.int8)
        sigma, bound, loose = np.empty(m), np.empty(m), np.empty((m, 2))
        unit_queries, unit_thresholds = unit(queries, thresholds, self.exponent)
        _quantise(unit_queries, unit_thresholds, self.mean, self.axes, self.steps, tiles, sigma, bound, loose)
        masks = np.empty((len(self.codes), len(tiles), QUERIES), np.uint64)
        passed, found = np.zeros((m, chunks), np.int64), np.zeros((m, chunks), np.int64)
        _scan(self.codes, self.residual, self.norm, tiles, sigma, bound, loose, limits, blocks, masks, passed)
        starts = offsets_of(passed.ravel())
        size = int(starts[-1]) if collect else 0
        wide_indices, wide_scores = np.empty(size, np.int32), np.empty(size)
        widest = widest_band(queries, self.largest)
        _refine(keys, queries, thresholds, widest, masks, blocks, starts, wide_indices, wide_scores, found)
        return Hits(*packed(found, starts, wide_indices, wide_scores), passed.sum(axis=1), limits.copy())


@njit(cache=True)  # on one thread: the scan that follows costs n / d times as much
def _quantise(queries, bounds, mean, axes, steps, tiles, sigma, bound, loose):
    """Round unit queries (m, d), bounds (m,) to tiles (tiles, 4, groups, 4) int8; fill sigma, bound and loose (m, 2).

    A key can reach its threshold only if
    ``sum_i (code_i + 128) a_i >= (bound - loose_0 residual - loose_1 norm) / sigma``.
    """
    d = len(mean)
    for j in range(len(queries)):
        z = np.zeros(d)
        square, base = 0.0, 0.0
        for i in range(d):
            q = queries[j, i]
            square += q * q
            base += q * mean[i]
            for c in range(d):
                z[c] += q * axes[i, c]
        z *= steps
        scale = np.abs(z).max() / LEVELS
        if scale < 1e-290:  # the query is (nearly) orthogonal to every axis: all its codes are 0
            scale = 1.0
        total, left = 0.0, 0.0
        row = tiles[j // QUERIES, j % QUERIES]
        for i in range(d):
            a = np.rint(z[i] / scale)
            row[i // AXES, i % AXES] = np.int8(a)
            total += a
            left += (z[i] - scale * a) ** 2
        norm = np.sqrt(square)
        # float64 rounding of <q, mean>, of z against codes and of sigma times the sum: each below 4 d**2 u ||q||
        slack = 16.0 * (d + 8) ** 2 * 2.0**-53 * (1.0 + norm)
        sigma[j], bound[j] = scale, bounds[j] - base - slack + scale * OFFSET * total
        loose[j, 0], loose[j, 1] = norm * (1 + 1e-9), np.sqrt(left) * (1 + 1e-9)


@njit(parallel=True, cache=True)
def _scan(codes, residual, norm, tiles, sigma, bound, loose, limits, blocks, masks, passed):
    """Mark the keys that pass in masks (blocks, tiles, 4) and count them in passed (m, chunks); a chunk is a task."""
    m = len(sigma)
    for chunk in prange(passed.shape[1]):
        first, last = chunk * blocks, min((chunk + 1) * blocks, len(codes))
        least = np.empty(QUERIES, np.int32)
        for tile in range(len(tiles)):
            start = tile * QUERIES
            width = min(QUERIES, m - start)
            least[:] = FAR
            for block in range(first, last):
                for i in range(width):
                    j = start + i
                    needed = (bound[j] - loose[j, 0] * residual[block] - loose[j, 1] * norm[block]) / sigma[j]
                    least[i] = np.int32(min(max(np.floor(needed), -FAR), FAR))
                scan_block(codes, block, tiles, tile, least, masks[block, tile])
                for i in range(width):
                    visible = limits[start + i] - block * KEYS
                    if visible < KEYS:
                        masks[block, tile, i] &= (np.uint64(1) << np.uint64(max(visible, 0))) - np.uint64(1)
                    passed[start + i, chunk] += popcount(masks[block, tile, i])


@njit(parallel=True, cache=True)
def _refine(keys, queries, thresholds, widest, masks, blocks, starts, wide_indices, wide_scores, found):
    """Score what passed; what reaches its threshold goes to the scratch from starts[i * chunks + chunk] on."""
    m, chunks = found.shape
    collect = len(wide_indices) > 0
    for chunk in prange(chunks):
        first, last = chunk * blocks, min((chunk + 1) * blocks, len(masks))
        kept = np.empty(blocks * KEYS, np.int32)
        for i in range(m):
            query, size = queries[i], 0
            for block in range(first, last):
                mask = masks[block, i // QUERIES, i % QUERIES]
                while mask != 0:
                    kept[size] = block * KEYS + np.int64(trailing_zeros(mask))
                    mask &= mask - np.uint64(1)
                    size += 1
            for c in range(min(size, AHEAD)):
                prefetch_row(keys, kept[c])
            target = starts[i * chunks + chunk]
            for c in range(size):
                if c + AHEAD < size:
                    prefetch_row(keys, kept[c + AHEAD])
                total = score(query, keys, kept[c])
                if collect:
                    wide_indices[target], wide_scores[target] = kept[c], total  # the next overwrites all but a member
                target += reaches(query, keys, kept[c], total, thresholds[i], widest[i])
            found[i, chunk] = target - starts[i * chunks + chunk]


def build(keys: np.ndarray) -> Sketch:
    """See `hsr.structure.Build`.  O(n d^2) time, d bytes a key."""
    n, d = keys.shape
    power = int(exponent(keys))
    mean, axes = _principal_axes(keys, power)
    groups, blocks = -(-d // AXES), -(-n // KEYS)
    steps = _steps(keys, power, mean, axes)
    codes = np.full((blocks, groups, KEYS, AXES), OFFSET, np.uint8)
    residual, norm = np.empty(blocks), np.empty(blocks)
    rounding = 16 * (d + 8) ** 2 * 2.0**-53  # of the reconstruction below; unit keys have norm at most sqrt(d)
    for rows in _slices(n):
        part = np.ldexp(keys[rows].astype(np.float64), -power) - mean
        code = np.rint(np.divide(part @ axes, steps, where=steps > 0, out=np.zeros_like(part)))
        np.clip(code, -LEVELS, LEVELS, out=code)
        part -= (code * steps) @ axes.T
        span = slice(rows.start // KEYS, -(-rows.stop // KEYS))
        residual[span] = _block_largest(np.sqrt((part**2).sum(axis=1))) * (1 + 1e-9) + rounding
        norm[span] = _block_largest(np.sqrt((code**2).sum(axis=1))) * (1 + 1e-9)
        _pack(code, codes[span])
    return Sketch(mean, axes, steps, codes, residual, norm, power, float(np.abs(keys).max()))


def _slices(n: int) -> list[slice]:
    """Runs of at most 2**14 keys, whole blocks but for the last."""
    step = 1 << 14
    return [slice(first, min(first + step, n)) for first in range(0, n, step)]


def _principal_axes(keys: np.ndarray, power: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and eigenvectors (d, d) of the covariance, leading first, of the unit keys."""
    n, d = keys.shape
    total, moment = np.zeros(d), np.zeros((d, d))
    for rows in _slices(n):
        part = np.ldexp(keys[rows].astype(np.float64), -power)
        total += part.sum(axis=0)
        moment += part.T @ part
    mean = total / n
    return mean, np.ascontiguousarray(np.linalg.eigh(moment / n - np.outer(mean, mean))[1][:, ::-1])


def _steps(keys: np.ndarray, power: int, mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Quantisation step (d,) per axis: the axis' range, or OUTLIER robust deviations if that is less, over LEVELS."""
    largest = np.zeros(len(mean))
    for rows in _slices(len(keys)):
        part = np.abs((np.ldexp(keys[rows].astype(np.float64), -power) - mean) @ axes)
        np.maximum(largest, part.max(axis=0), out=largest)
    sample = np.ldexp(keys[:: max(1, len(keys) // 4096)].astype(np.float64), -power) - mean
    deviation = 1.4826 * np.median(np.abs(sample @ axes), axis=0)
    return np.where(deviation > 0, np.minimum(largest, OUTLIER * deviation), largest) / LEVELS


def _block_largest(values: np.ndarray) -> np.ndarray:
    """values (n,) -> the largest of each block of 64."""
    return np.maximum.reduceat(values, np.arange(0, len(values), KEYS))


def _pack(code: np.ndarray, target: np.ndarray) -> None:
    """code (n, d) in -127..127 -> target (blocks, groups, 64, 4) uint8; padding stays at code 0."""
    n, d = code.shape
    blocks, groups = target.shape[:2]
    padded = np.full((blocks * KEYS, groups * AXES), OFFSET, np.uint8)
    padded[:n, :d] = code + OFFSET
    target[...] = padded.reshape(blocks, KEYS, groups, AXES).transpose(0, 2, 1, 3)
