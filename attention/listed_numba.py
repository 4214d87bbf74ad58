"""Attention over lists of keys that blocks of rows share, on the CPU; `attention.listed_reference` has the meaning.

Parallel over lines.  The keys of a line are gathered in tiles, its band behind the listed ones, so that what a row sees
of a tile is a beginning of it.  Products are those of BLAS in the inputs' dtype, of so few rows at a time that BLAS
starts no threads of its own; sums are float64 from tile to tile.
"""

from __future__ import annotations

import math

import numpy as np
from numba import get_num_threads, njit, prange

from attention.block_sampled_numba import ALONE, power
from attention.key_lists import KEYS, ROWS, KeyLists, edges, row_blocks
from attention.listed_reference import pooled
from hsr.exp_block import FAST

TILE = 128  # keys gathered at a time
LN_KEYS = math.log(KEYS)
NONE = np.empty(0, np.int32)


@njit(cache=True)
def _places(line, n, tokens, blocks, means, edge, last):
    """Where the keys of a line stand, band last: (t,) int64; each kind is (offsets, ids), a mean is key n + J."""
    (token_offsets, singles), (block_offsets, wholes), (mean_offsets, pools) = tokens, blocks, means
    count = token_offsets[line + 1] - token_offsets[line] + mean_offsets[line + 1] - mean_offsets[line]
    places = np.empty(count + KEYS * (block_offsets[line + 1] - block_offsets[line]) + last - edge, np.int64)
    at = 0
    for i in range(token_offsets[line], token_offsets[line + 1]):
        places[at] = singles[i]
        at += 1
    for i in range(mean_offsets[line], mean_offsets[line + 1]):
        places[at] = n + pools[i]
        at += 1
    for i in range(block_offsets[line], block_offsets[line + 1]):
        for j in range(KEYS):
            places[at] = np.int64(wholes[i]) * KEYS + j
            at += 1
    for j in range(edge, last):
        places[at] = j
        at += 1
    return places


@njit(fastmath=FAST, cache=True)
def _weigh(scores, extra, seen, tops, totals, sums):
    """scores (rows, t) become weights; row i sees the first seen[i] keys, the others weigh nothing.

    extra (t,) are log weights.  Brings tops (rows,), the largest score so far, up to date, and, relative to it, totals
    (rows,) and sums (rows, dv) float64 of weights and weighted values.
    """
    for i in range(len(scores)):
        count, best = min(max(seen[i], 0), scores.shape[1]), tops[i]
        for j in range(count):
            scores[i, j] += extra[j]
            best = max(best, scores[i, j])
        if best > tops[i]:
            factor = math.exp(np.float64(tops[i]) - np.float64(best)) if totals[i] > 0 else 0.0
            totals[i] *= factor
            for c in range(sums.shape[1]):
                sums[i, c] *= factor
            tops[i] = best
        total = scores.dtype.type(0)
        for j in range(count):
            weight = power(scores[i, j] - best)
            scores[i, j] = weight
            total += weight
        for j in range(count, scores.shape[1]):
            scores[i, j] = 0
        totals[i] += total


@njit(parallel=True, cache=True)
def _listed(q, k, v, scale, n, tokens, log_weights, blocks, means, edge, threads, output, lse):
    """q (H, m, d), k (g, n or more, d), v (g, n or more, dv) of one dtype; fills output (H, m, dv), lse (H, m)."""
    heads, m, d = q.shape
    per, width, rate = len(edge), v.shape[2], q.dtype.type(scale)
    step = max(ALONE // (TILE * max(d, width)), 1)  # rows of a product
    for thread in prange(threads):
        keys, values = np.empty((TILE, d), k.dtype), np.empty((TILE, width), v.dtype)
        scores, products = np.empty(step * TILE, q.dtype), np.empty(step * width, q.dtype)
        asked, extra = np.empty((ROWS, d), q.dtype), np.empty(TILE, q.dtype)
        tops, totals, sums = np.empty(ROWS, q.dtype), np.empty(ROWS), np.empty((ROWS, width))
        seen = np.empty(ROWS, np.int64)
        for line in range(thread, heads * per, threads):
            head, block = line // per, line % per
            source, first = head * len(k) // heads, block * ROWS
            rows = min(ROWS, m - first)
            places = _places(line, n, tokens, blocks, means, edge[block], n - m + first + rows)
            single, pools = tokens[0][line + 1] - tokens[0][line], means[0][line + 1] - means[0][line]
            for i in range(rows):
                for c in range(d):
                    asked[i, c] = q[head, first + i, c] * rate
            tops[:], totals[:], sums[:] = -np.inf, 0.0, 0.0
            for begin in range(0, len(places), TILE):
                count = min(TILE, len(places) - begin)
                for j in range(count):
                    place = np.uint64(places[begin + j])
                    for c in range(d):
                        keys[j, c] = k[source, place, c]
                    for c in range(width):
                        values[j, c] = v[source, place, c]
                    at = begin + j
                    known = at < single and len(log_weights) > 0
                    extra[j] = log_weights[tokens[0][line] + at] if known else 0.0
                    if single <= at < single + pools:
                        extra[j] = LN_KEYS
                for i in range(rows):
                    seen[i] = len(places) - (rows - 1 - i) - begin
                for start in range(0, rows, step):
                    some = min(step, rows - start)
                    part = scores[: some * count].reshape(some, count)
                    np.dot(asked[start : start + some], keys[:count].T, part)
                    stop = start + some
                    _weigh(part, extra, seen[start:stop], tops[start:stop], totals[start:stop], sums[start:stop])
                    product = products[: some * width].reshape(some, width)
                    np.dot(part, values[:count], product)
                    for i in range(some):
                        for c in range(width):
                            sums[start + i, c] += product[i, c]
            for i in range(rows):
                for c in range(width):
                    output[head, first + i, c] = sums[i, c] / totals[i]
                lse[head, first + i] = math.log(totals[i]) + tops[i]


def listed(q: np.ndarray, k: np.ndarray, v: np.ndarray, lists: KeyLists, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """See `attention.listed_reference.listed`."""
    heads, m, _ = q.shape
    n, lines = k.shape[1], heads * row_blocks(m)
    nothing = np.zeros(lines + 1, np.int64)
    kinds = (lists.token_offsets, lists.tokens), (lists.block_offsets, lists.blocks), (lists.mean_offsets, lists.means)
    tokens, blocks, means = ((nothing, NONE) if offsets is None else (offsets, ids) for offsets, ids in kinds)
    if lists.means is not None:
        k, v = (np.concatenate([x, np.array([pooled(head) for head in x], x.dtype)], axis=1) for x in (k, v))
    weights = np.empty(0, np.float32) if lists.log_weights is None else lists.log_weights
    output, lse = np.empty((heads, m, v.shape[2]), q.dtype), np.empty((heads, m))
    arrays = (np.ascontiguousarray(x) for x in (q, k, v))
    _listed(*arrays, scale, n, tokens, weights, blocks, means, edges(m, n), get_num_threads(), output, lse)
    return output, lse
