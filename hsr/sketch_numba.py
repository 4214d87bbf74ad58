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
from hsr.int8_scan import AXES, KEYS, QUERIES, scan_block
from hsr.report import Hits
from hsr.rows import offsets_of, scratch
from hsr.scaling import exponent, unit

OFFSET = 128  # codes are stored unsigned, as code + OFFSET
LEVELS = 127  # codes and quantised queries lie in -127..127
OUTLIER = (
    8.0  # an axis covers this many robust standard deviations; keys beyond are clipped and carry a larger residual
)
CHUNK_BYTES = 1 << 18  # codes that one task reads over and over, once per tile of queries: it stays in the L2 cache
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
        codes, sigma, base, loose = self._quantised(queries, thresholds)
        blocks = max(1, CHUNK_BYTES // self.codes[0].size)
        chunks = -(-len(self.codes) // blocks)
        wide_indices, wide_scores = scratch(chunks, m * min(blocks * KEYS, len(keys)) if collect else 0)
        counts, scanned = np.zeros((m, chunks), np.int64), np.zeros((m, chunks), np.int64)
        _scan(
            keys, queries, thresholds, widest_band(queries, self.largest), limits,
            self.codes, self.residual, self.norm, codes, sigma, base, loose,
            blocks, collect, wide_indices, wide_scores, counts, scanned,
        )  # fmt: skip
        offsets = offsets_of(counts.sum(axis=1))
        size = int(offsets[-1]) if collect else 0
        indices, scores = np.empty(size, np.int32), np.empty(size, np.float64)
        if collect:
            _gather(counts, offsets, wide_indices, wide_scores, indices, scores)
        return Hits(offsets, indices, scores, scanned.sum(axis=1), limits.copy())

    def _quantised(
        self, queries: np.ndarray, thresholds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tiles of int8 queries (tiles, 4, groups, 4), and per query (tiles * 4,): sigma, bound, and two slack factors.

        A key of a block can reach the threshold only if ``sum (code + 128) a >= (bound - f0 residual - f1 norm) /
        sigma``.
        """
        m, d = queries.shape
        unit_queries, bound = unit(queries, thresholds, self.exponent)
        z = (unit_queries @ self.axes) * self.steps
        sigma = np.abs(z).max(axis=1, initial=0.0) / LEVELS
        sigma[sigma < 1e-290] = 1.0  # the query is (nearly) orthogonal to every axis: all its codes are 0
        a = np.rint(z / sigma[:, None])
        norms = np.sqrt((unit_queries**2).sum(axis=1))
        loose = np.stack([norms, np.sqrt(((z - sigma[:, None] * a) ** 2).sum(axis=1))], axis=1) * (1 + 1e-9)
        # float64 rounding of <q, mean>, of z against codes and of sigma times the sum: each below 4 d**2 u ||q||
        slack = 16 * (d + 8) ** 2 * 2.0**-53 * (1 + norms)
        bound = bound - unit_queries @ self.mean - slack + sigma * OFFSET * a.sum(axis=1)
        tiles = -(-m // QUERIES)
        groups = self.codes.shape[1]
        padded = np.zeros((tiles * QUERIES, groups * AXES), np.int8)
        padded[:m, :d] = a
        return padded.reshape(tiles, QUERIES, groups, AXES), sigma, bound, loose


@njit(parallel=True, cache=True)
def _scan(
    keys, queries, thresholds, widest, limits, codes, residual, norm, tiles, sigma, bound, loose,
    blocks, collect, wide_indices, wide_scores, counts, scanned,
):  # fmt: skip
    """One task per chunk of ``blocks`` blocks; hits of a chunk lie query after query in its row of the scratch."""
    m = queries.shape[0]
    for chunk in prange(counts.shape[1]):
        first, last = chunk * blocks, min((chunk + 1) * blocks, codes.shape[0])
        kept = np.empty((QUERIES, blocks * KEYS), np.int32)
        least, masks, found = np.empty(QUERIES, np.int32), np.empty(QUERIES, np.uint64), np.empty(QUERIES, np.int64)
        written = 0
        for tile in range(tiles.shape[0]):
            start = tile * QUERIES
            width = min(QUERIES, m - start)
            reach = 0
            for i in range(width):
                reach = max(reach, limits[start + i])
            least[:] = FAR
            found[:] = 0
            for block in range(first, min(last, (reach + KEYS - 1) // KEYS)):
                for i in range(width):
                    j = start + i
                    needed = (bound[j] - loose[j, 0] * residual[block] - loose[j, 1] * norm[block]) / sigma[j]
                    least[i] = np.int32(min(max(np.floor(needed), -FAR), FAR))
                scan_block(codes, block, tiles, tile, least, masks)
                for i in range(width):
                    mask = masks[i]
                    while mask != 0:
                        key = block * KEYS + np.int64(trailing_zeros(mask))
                        mask &= mask - np.uint64(1)
                        if key < limits[start + i]:
                            kept[i, found[i]] = key
                            found[i] += 1
            for i in range(width):
                j = start + i
                counted = 0
                for c in range(found[i]):
                    key = kept[i, c]
                    total = score(queries[j], keys[key])
                    if reaches(queries[j], keys[key], total, thresholds[j], widest[j]):
                        counted += 1
                        if collect:
                            wide_indices[chunk, written] = key
                            wide_scores[chunk, written] = total
                            written += 1
                counts[j, chunk] = counted
                scanned[j, chunk] = found[i]


@njit(parallel=True, cache=True)
def _gather(counts, offsets, wide_indices, wide_scores, indices, scores):
    """From one row per chunk, query after query, to one CSR: counts (m, chunks), offsets (m + 1,)."""
    m, chunks = counts.shape
    for chunk in prange(chunks):
        source = 0
        for i in range(m):
            target = offsets[i]
            for before in range(chunk):
                target += counts[i, before]
            for _ in range(counts[i, chunk]):
                indices[target] = wide_indices[chunk, source]
                scores[target] = wide_scores[chunk, source]
                target += 1
                source += 1


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
