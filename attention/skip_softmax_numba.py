"""Attention that skips key blocks of small weight, on the CPU; `attention.skip_softmax_reference` has the meaning.

Parallel over lines.  Products are those of BLAS in float64 whatever the inputs, so that a certificate has float64's
rounding to cover, of so few rows at a time that BLAS starts no threads of its own.
"""

from __future__ import annotations

import math

import numpy as np
from numba import get_num_threads, njit, prange

from attention.block_sampled_numba import ALONE
from attention.key_lists import ROWS, row_blocks
from attention.skip_softmax_reference import BLOCK, Skipped


@njit(cache=True)
def _needed(scores, seen, level, tops, bests):
    """Whether any row needs the block: scores (rows, t), of which row i sees seen[i]; fills bests (rows,)."""
    needed = False
    for i in range(len(scores)):
        best = -np.inf
        for j in range(seen[i]):
            best = max(best, scores[i, j])
        bests[i] = best
        needed |= not best < tops[i] + level
    return needed


@njit(cache=True)
def _weigh(scores, seen, bests, tops, totals, bounds, sums):
    """Scores become weights relative to the largest so far, to which tops, totals, bounds and sums are brought."""
    for i in range(len(scores)):
        if bests[i] > tops[i]:
            factor = math.exp(tops[i] - bests[i])
            tops[i] = bests[i]
            totals[i] *= factor
            bounds[i] *= factor
            for c in range(sums.shape[1]):
                sums[i, c] *= factor
        for j in range(seen[i]):
            scores[i, j] = math.exp(scores[i, j] - tops[i])
            totals[i] += scores[i, j]
        for j in range(seen[i], scores.shape[1]):
            scores[i, j] = 0.0


@njit(parallel=True, cache=True)
def _attend(q, k, v, scale, level, threads, output, lse, log_dropped, kept, skipped):
    """q (H, m, d), k (g, n, d), v (g, n, dv); fills the rest, as `Skipped` has it, skipped (H, T)."""
    heads, m, d = q.shape
    n, width, per = k.shape[1], v.shape[2], skipped.shape[1]
    step = max(ALONE // (BLOCK * max(d, width)), 1)  # rows of a product
    for thread in prange(threads):
        keys, values = np.empty((BLOCK, d)), np.empty((BLOCK, width))
        room, products, asked = np.empty(ROWS * BLOCK), np.empty(step * width), np.empty((ROWS, d))
        tops, totals, bounds, bests = np.empty(ROWS), np.empty(ROWS), np.empty(ROWS), np.empty(ROWS)
        sums, seen = np.empty((ROWS, width)), np.empty(ROWS, np.int64)
        for line in range(thread, heads * per, threads):
            head, block = line // per, line % per
            source, first = head * len(k) // heads, block * ROWS
            rows = min(ROWS, m - first)
            for i in range(rows):
                for c in range(d):
                    asked[i, c] = q[head, first + i, c] * scale
            tops[:], totals[:], bounds[:], sums[:] = -np.inf, 0.0, 0.0, 0.0
            kept[head, first : first + rows] = 0
            last = n - m + first + rows
            for begin in range(0, last, BLOCK):
                count = min(BLOCK, last - begin)
                for j in range(count):
                    for c in range(d):
                        keys[j, c] = k[source, begin + j, c]
                scores = room[: rows * count].reshape(rows, count)
                for start in range(0, rows, step):
                    stop = min(start + step, rows)
                    np.dot(asked[start:stop], keys[:count].T, scores[start:stop])
                for i in range(rows):
                    seen[i] = min(max(n - m + first + i + 1 - begin, 0), count)
                if not _needed(scores, seen, level, tops, bests):
                    skipped[head, block] += 1
                    for i in range(rows):
                        bounds[i] += seen[i] * math.exp(bests[i] - tops[i])
                    continue
                _weigh(scores, seen, bests, tops, totals, bounds, sums)
                for j in range(count):
                    for c in range(width):
                        values[j, c] = v[source, begin + j, c]
                for i in range(rows):
                    kept[head, first + i] += seen[i]
                for start in range(0, rows, step):
                    some = min(step, rows - start)
                    product = products[: some * width].reshape(some, width)
                    np.dot(scores[start : start + some], values[:count], product)
                    for i in range(some):
                        for c in range(width):
                            sums[start + i, c] += product[i, c]
            for i in range(rows):
                for c in range(width):
                    output[head, first + i, c] = sums[i, c] / totals[i]
                lse[head, first + i] = math.log(totals[i]) + tops[i]
                log_dropped[head, first + i] = math.log(bounds[i]) + tops[i] if bounds[i] > 0 else -np.inf


def skip_softmax(q: np.ndarray, k: np.ndarray, v: np.ndarray, level: float, scale: float) -> Skipped:
    """See `attention.skip_softmax_reference.skip_softmax`."""
    heads, m, _ = q.shape
    shape = heads, m
    found = Skipped(
        np.empty((*shape, v.shape[2])), np.empty(shape), np.empty(shape), np.empty(shape, np.int64),
        np.zeros((heads, row_blocks(m)), np.int64),
    )  # fmt: skip
    arrays = (np.ascontiguousarray(x) for x in (q, k, v))
    _attend(*arrays, float(scale), float(level), get_num_threads(), *found)
    return found
