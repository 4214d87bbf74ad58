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

from hsr.exact import score_lists, settle, widest_of
from hsr.int8_scan import AXES, KEYS, QUERIES, popcount, scan_run
from hsr.report import Hits
from hsr.rows import gathered
from hsr.scaling import exponent, unit_into

OFFSET = 128  # codes are stored unsigned, as code + OFFSET
LEVELS = 127  # codes and quantised queries lie in -127..127
OUTLIER = 8.0  # robust standard deviations an axis covers; keys beyond are clipped and carry a larger residual
CHUNK_BYTES = 1 << 19  # codes that one task reads over and over, once per tile of queries: it stays in the L2 cache
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
        model, coded = (self.mean, self.axes, self.steps), (self.codes, self.residual, self.norm)
        asks = queries, thresholds, limits
        return Hits(*_report(model, coded, keys, asks, self.exponent, self.largest, collect))


@njit(cache=True)
def _quantise(model, query, threshold, key_exponent, code, terms, i):
    """Round one query (d,) to code (groups, 4) int8 and fill terms[:, i] float64.

    A key can reach its threshold only if
    ``sum_i (code_i + 128) a_i >= terms_0 - terms_1 residual - terms_2 norm``.
    """
    mean, axes, steps = model
    d = len(mean)
    unit_query, z = np.empty(d), np.zeros(d)
    lowered = unit_into(query, threshold, key_exponent, unit_query)
    square, base = 0.0, 0.0
    for r in range(d):
        q = unit_query[r]
        square += q * q
        base += q * mean[r]
        for c in range(d):
            z[c] += q * axes[r, c]
    largest = 0.0
    for c in range(d):
        z[c] *= steps[c]
        largest = max(largest, abs(z[c]))
    sigma = largest / LEVELS
    if sigma < 1e-290:  # the query is (nearly) orthogonal to every axis: all its codes are 0
        sigma = 1.0
    total, left = 0.0, 0.0
    for c in range(d):
        a = np.rint(z[c] / sigma)
        code[c // AXES, c % AXES] = np.int8(a)
        total += a
        left += (z[c] - sigma * a) ** 2
    norm = np.sqrt(square)
    # float64 rounding of <q, mean>, of z against codes, of sigma times the sum: each below 4 d**2 u ||q||; the terms
    # below are sums of four roundings of at most 2 d (1 + ||q||)
    slack = 16.0 * (d + 8) ** 2 * 2.0**-53 * (1.0 + norm)
    terms[0, i] = (lowered - base - slack) / sigma + OFFSET * total
    terms[1, i], terms[2, i] = norm * (1 + 1e-9) / sigma, np.sqrt(left) * (1 + 1e-9) / sigma


@njit(cache=True)
def _quantise_tile(model, asks, key_exponent, tile, codes, terms):
    """`_quantise` a tile of queries: codes (tiles, w, groups, 4) int8, terms (tiles, 3, w) float64."""
    queries, thresholds, _ = asks
    width = codes.shape[1]
    for i in range(width):
        j = tile * width + i
        if j < len(queries):
            _quantise(model, queries[j], thresholds[j], key_exponent, codes[tile, i], terms[tile], i)


@njit(parallel=True, cache=True)
def _quantise_all(model, asks, key_exponent, codes, terms):
    for tile in prange(len(codes)):
        _quantise_tile(model, asks, key_exponent, tile, codes, terms)


@njit(cache=True)
def _bound(terms, residual, norm, first, least):
    """terms (3, w) of a tile -> least (w, run) int32: the least sum that lets a key of each block pass."""
    for i in range(len(least)):
        base, loose, rounded = terms[0, i], terms[1, i], terms[2, i]
        for b in range(least.shape[1]):
            block = np.uint64(first + b)
            needed = np.floor(base - loose * residual[block] - rounded * norm[block])
            least[i, b] = np.int32(min(max(needed, -FAR), FAR))


@njit(cache=True)
def _list(masks, i, first, limit, blocks, listed):
    """List the blocks of a run that have hits of query i, and their masks -> how many hits.

    masks (w, run) uint64, blocks (run,) int32, listed (run,) uint64; only keys below limit count.
    """
    size, passed, run = 0, 0, masks.shape[1]
    for b in range(max(limit // KEYS - first, 0), run):  # few, unless limits differ
        visible = max(limit - (first + b) * KEYS, 0)
        masks[i, b] &= (np.uint64(1) << np.uint64(visible)) - np.uint64(1)
    for b in range(run):
        mask = masks[i, b]
        blocks[size], listed[size] = first + b, mask  # the next block overwrites all but a hit
        size += mask != 0
        passed += popcount(mask)
    return passed


@njit(parallel=True, cache=True)
def _scan(coded, limits, tiles, terms, run, blocks, listed, passed):
    """Fill passed (chunks, m), and for each query the blocks (m, blocks + 1) with hits and their masks, by chunk."""
    codes, residual, norm = coded
    width = tiles.shape[1]
    for chunk in prange(len(passed)):
        first, last = chunk * run, min((chunk + 1) * run, len(codes))
        least, masks = np.empty((width, last - first), np.int32), np.empty((width, last - first), np.uint64)
        for tile in range(len(tiles)):
            _bound(terms[tile], residual, norm, first, least)
            scan_run(codes, first, tiles, tile, least, masks)
            for i in range(min(width, len(limits) - tile * width)):
                j = tile * width + i
                passed[chunk, j] = _list(masks, i, first, limits[j], blocks[j, first:last], listed[j, first:last])


@njit(cache=True)
def _spread(blocks, listed, first, start, stop, kept):
    """Fill kept[start:stop] int32 with the hits of the listed masks from first on; no branch depends on a mask."""
    p, mask = first, listed[first]
    for c in range(start, stop):
        kept[c] = blocks[p] * KEYS + np.int64(trailing_zeros(mask))
        mask &= mask - np.uint64(1)
        p += mask == 0
        mask = listed[p] if mask == 0 else mask


@njit(parallel=True, cache=True)
def _refine(keys, asks, largest, run, blocks, listed, starts, kept, totals, found):
    """Score what passed: kept[starts[chunk, i]:starts[chunk, i + 1]] int32, of which found[chunk, i] are members."""
    queries, thresholds, _ = asks
    for chunk in prange(len(found)):
        bounds = starts[chunk]
        for i in range(len(queries)):
            _spread(blocks[i], listed[i], chunk * run, bounds[i], bounds[i + 1], kept)
        score_lists(queries, keys, kept, bounds, totals)
        for i in range(len(queries)):
            widest = widest_of(queries[i], largest)
            found[chunk, i] = settle(queries[i], keys, thresholds[i], widest, bounds[i], bounds[i + 1], kept, totals)


@njit(cache=True)
def _report(model, coded, keys, asks, key_exponent, largest, collect):
    """Search for all queries; asks: queries (m, d), thresholds (m,), limits (m,) -> the fields of `Hits`."""
    codes, limits = coded[0], asks[2]
    m, count, groups = len(limits), len(codes), codes.shape[1]
    width = QUERIES if m > 1 else 1
    run = max(1, CHUNK_BYTES // (groups * KEYS * AXES))
    tiles, chunks = (m + width - 1) // width, (count + run - 1) // run
    rounded, terms = np.zeros((tiles, width, groups, AXES), np.int8), np.zeros((tiles, 3, width))
    if m == 1:
        _quantise_tile(model, asks, key_exponent, 0, rounded, terms)
    else:
        _quantise_all(model, asks, key_exponent, rounded, terms)
    blocks, listed = np.empty((m, count + 1), np.int32), np.empty((m, count + 1), np.uint64)
    passed, found = np.empty((chunks, m), np.int64), np.empty((chunks, m), np.int64)
    _scan(coded, limits, rounded, terms, run, blocks, listed, passed)
    starts, size = np.empty((chunks, m + 1), np.int64), 0
    for chunk in range(chunks):
        for i in range(m):
            starts[chunk, i] = size
            size += passed[chunk, i]
        starts[chunk, m] = size
    kept, totals = np.empty(size, np.int32), np.empty(size)
    _refine(keys, asks, largest, run, blocks, listed, starts, kept, totals, found)
    offsets, indices, scores = gathered(found, starts, kept, totals, collect)
    return offsets, indices, scores, passed.sum(axis=0), limits.copy()


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
