"""Weighted attention over listed keys, with the sums from which a sample's variance is estimated.

A *part* of a row's keys leaves, for each of the G query heads, sums relative to its largest score: of the weights
``w / pi``, of the risks ``a = (1 - pi) (w / pi)^2``, whose expectation is the variance of the weights' sum under
independent draws, and of what else the names below say; vectors of both times ``v - c``, c the centre of the values.
Parts merge.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from hsr.exp_block import BLOCK, exp_block
from hsr.lifted_numba import CHUNK
from hsr.prefetch import prefetch_row

AHEAD = 8  # keys whose rows are asked for before they are needed
TOP, TOTAL, RISK, FAR, FAR_SQUARED, CHANCE, CHANCE_WEIGHT = range(7)
ROUNDING = 8e-6  # of a weight and of float32 sums of 64 terms, relative
SUMS = 7  # largest score, then sums of w / pi, a, a |v - c|^2, its square, 1 - pi, (1 - pi) w / pi


@njit(fastmath={"reassoc", "contract", "nsz"}, cache=True)
def _score(query, h, keys, j):
    total = 0.0
    for i in range(query.shape[1]):
        total += query[h, i] * np.float64(keys[j, i])
    return total


@njit(fastmath={"reassoc", "contract", "nsz"}, cache=True)
def _add(vector, weights, risks, c, sums, spreads):
    """Add a centred value (dv,) to sums and spreads (G, dv) with the weights (G, 64); returns its squared length."""
    square = vector[0] * vector[0]
    for t in range(1, len(vector)):
        square += vector[t] * vector[t]
    for h in range(len(sums)):
        weight, risk = weights[h, c], risks[h, c]
        for t in range(len(vector)):
            sums[h, t] += weight * vector[t]
        for t in range(len(vector)):
            spreads[h, t] += risk * vector[t]
    return square


@njit(cache=True)
def _absorb(ids, pis, cache, query, tools, scalars, vectors):
    """Add the listed keys, at most 64 of them, to a part: scalars (G, SUMS), vectors (G, 2, dv) float64."""
    keys, values, centre, unit, scale = cache
    scores, x, bits, weights, risks, vector, sums, spreads = tools
    size, heads = len(ids), len(query)
    powers = bits.view(np.float32)
    for c in range(min(AHEAD, size)):
        prefetch_row(keys, ids[c])
    for c in range(size):
        if c + AHEAD < size:
            prefetch_row(keys, ids[c + AHEAD])
        prefetch_row(values, ids[c])
        for h in range(heads):
            scores[h, c] = scale * _score(query, h, keys, ids[c])
    for h in range(heads):
        top = scores[h, :size].max()
        if top > scalars[h, TOP]:
            fade = np.exp(scalars[h, TOP] - top)
            scalars[h, TOP] = top
            scalars[h, TOTAL] *= fade
            scalars[h, RISK] *= fade * fade
            scalars[h, FAR] *= fade * fade
            scalars[h, FAR_SQUARED] *= (fade * fade) ** 2
            scalars[h, CHANCE_WEIGHT] *= fade
            for t in range(vectors.shape[2]):
                vectors[h, 0, t] *= fade
                vectors[h, 1, t] *= fade * fade
        x[:] = 0.0
        for c in range(size):
            x[c] = np.float32(scores[h, c] - scalars[h, TOP])
        exp_block(x, bits, powers)
        for c in range(size):
            chance = np.float64(pis[c])
            weight = np.float64(powers[c]) / chance
            weights[h, c], risks[h, c] = weight, (1.0 - chance) * weight * weight
            scalars[h, TOTAL] += weight
            scalars[h, RISK] += (1.0 - chance) * weight * weight
            scalars[h, CHANCE] += 1.0 - chance
            scalars[h, CHANCE_WEIGHT] += (1.0 - chance) * weight
    sums[:], spreads[:] = 0.0, 0.0
    for c in range(size):
        for t in range(len(vector)):
            vector[t] = values[ids[c], t] * unit - centre[t]
        square = _add(vector, weights, risks, c, sums, spreads)
        for h in range(heads):
            far = np.float64(risks[h, c]) * np.float64(square)
            scalars[h, FAR] += far
            scalars[h, FAR_SQUARED] += far * far
    for h in range(heads):
        for t in range(len(vector)):
            vectors[h, 0, t] += sums[h, t]
            vectors[h, 1, t] += spreads[h, t]


@njit(cache=True)
def _log_add(lse, scores, lift, ids):
    """A log-sum-exp, with that of the lifted scores (t,) of some keys."""
    top = lse
    for c in range(len(scores)):
        top = max(top, scores[c] + lift[ids[c]])
    total = np.exp(lse - top)
    for c in range(len(scores)):
        total += np.exp(scores[c] + lift[ids[c]] - top)
    return top + np.log(total)


@njit(cache=True)
def _tools(heads, width, like):
    """Buffers of one thread: scores, a block of exponents, weights, risks, a centred value, its weighted sums."""
    return (
        np.empty((heads, BLOCK)),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.int32),
        np.empty((heads, BLOCK), like.dtype),
        np.empty((heads, BLOCK), like.dtype),
        np.empty(width, like.dtype),
        np.empty((heads, width), like.dtype),
        np.empty((heads, width), like.dtype),
    )


@njit(parallel=True, cache=True)
def attend_certain(keys, values, centre, units, lift, queries, scale, spans, limits, scalars, vectors, lifted):
    """The keys before and after each row's span, with pi = 1: part 0 of the row.

    keys (g, n, d), values (g, n, dv), centre (g, dv) times units (g,), by which values are multiplied; lift (g, n);
    queries (g, rows, G, d) float64; spans (g, rows, 2) and limits (g, rows): keys 0 .. start - 1 and stop .. limit - 1.
    Fills scalars (g, rows, parts, G, SUMS), vectors (g, rows, parts, G, 2, dv) and lifted (g, rows, G), the
    log-sum-exp of ``score + lift``.
    """
    g, rows, heads, _ = queries.shape
    for task in prange(g * rows):
        head, row = task // rows, task % rows
        tools = _tools(heads, values.shape[2], values)
        cache = keys[head], values[head], centre[head], units[head], scale
        start, stop = spans[head, row]
        ids, ones = np.empty(BLOCK, np.int32), np.ones(BLOCK, np.float32)
        part, vector = scalars[head, row, 0], vectors[head, row, 0]
        part[:], vector[:] = 0.0, 0.0
        part[:, TOP] = -np.inf
        lifted[head, row] = -np.inf
        place, end = 0, limits[head, row]
        while place < end:
            size = 0
            while size < BLOCK and place < end:
                if place == start:
                    place = max(stop, start)
                    if place >= end:
                        break
                ids[size] = place
                size += 1
                place += 1
            if size == 0:
                break
            _absorb(ids[:size], ones, cache, queries[head, row], tools, part, vector)
            for h in range(heads):
                lifted[head, row, h] = _log_add(lifted[head, row, h], tools[0][h, :size], lift[head], ids)


@njit(parallel=True, cache=True)
def attend_drawn(keys, values, centre, units, queries, scale, ids, pis, counts, threads, scalars, vectors):
    """The drawn keys of each row: parts 1 and on, each of every so many chunks.  Arguments as for `attend_certain`."""
    g, rows, heads, _ = queries.shape
    parts, chunks = scalars.shape[2] - 1, counts.shape[2]
    tasks = g * rows * parts
    for thread in prange(threads):
        tools = _tools(heads, values.shape[2], values)
        block_ids, block_pis = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32)
        for task in range(thread, tasks, threads):
            head, row, part = task // (rows * parts), task // parts % rows, task % parts + 1
            cache = keys[head], values[head], centre[head], units[head], scale
            sums, vector = scalars[head, row, part], vectors[head, row, part]
            sums[:], vector[:] = 0.0, 0.0
            sums[:, TOP] = -np.inf
            size = 0
            for chunk in range(part - 1, chunks, parts):
                for place in range(chunk * CHUNK, chunk * CHUNK + counts[head, row, chunk]):
                    block_ids[size], block_pis[size] = ids[head, row, place], pis[head, row, place]
                    size += 1
                    if size == BLOCK:
                        _absorb(block_ids, block_pis, cache, queries[head, row], tools, sums, vector)
                        size = 0
            if size > 0:
                _absorb(block_ids[:size], block_pis, cache, queries[head, row], tools, sums, vector)


@njit(cache=True)
def merge(scalars, vectors, centre, units, variance, output, lse, moments):
    """Parts -> output (g, rows, G, dv), lse (g, rows, G), moments (g, rows, G, 3).

    Moments: the variance of the weights' sum relative to its square; the mean squared error of the output; how many
    draws carry it, ``(sum of a |v - c|^2)^2 / sum of squares``.  By as much as independent draws would vary more in
    number than these did, variance (g, rows, 2), the first two are lowered: at the mean weight, and mean value, of a
    draw.
    """
    g, rows, parts, heads, _ = scalars.shape
    width = vectors.shape[5]
    shift, spread, sums = np.empty(width), np.empty(width), np.empty(SUMS)
    for task in range(g * rows * heads):
        head, row, h = task // (rows * heads), task // heads % rows, task % heads
        top = scalars[head, row, :, h, TOP].max()
        shift[:], spread[:], sums[:] = 0.0, 0.0, 0.0
        for part in range(parts):
            fade = np.exp(scalars[head, row, part, h, TOP] - top)
            part_sums = scalars[head, row, part, h]
            sums[TOTAL] += fade * part_sums[TOTAL]
            sums[RISK] += fade * fade * part_sums[RISK]
            sums[FAR] += fade * fade * part_sums[FAR]
            sums[FAR_SQUARED] += fade**4 * part_sums[FAR_SQUARED]
            sums[CHANCE] += part_sums[CHANCE]
            sums[CHANCE_WEIGHT] += fade * part_sums[CHANCE_WEIGHT]
            for t in range(width):
                shift[t] += fade * vectors[head, row, part, h, 0, t]
                spread[t] += fade * fade * vectors[head, row, part, h, 1, t]
        total = sums[TOTAL]
        square = cross = common = 0.0
        for t in range(width):
            shift[t] /= total
            output[head, row, h, t] = (centre[head, t] + shift[t]) / units[head]
            square += shift[t] * shift[t]
            cross += shift[t] * spread[t]
            common += (spread[t] - shift[t] * sums[RISK]) ** 2
        excess = variance[head, row, 0] - variance[head, row, 1]
        typical = sums[CHANCE_WEIGHT] / sums[CHANCE] if sums[CHANCE] > 0.0 else 0.0
        lse[head, row, h] = top + np.log(total)
        far = sums[FAR] - 2.0 * cross + square * sums[RISK]
        if sums[RISK] > 0.0:
            far -= typical**2 * excess * common / sums[RISK] ** 2
        moments[head, row, h, 0] = max(sums[RISK] - typical**2 * excess, 0.0) / total**2
        moments[head, row, h, 1] = max(far, 0.0) / (total * np.float64(units[head])) ** 2
        moments[head, row, h, 2] = sums[FAR] ** 2 / sums[FAR_SQUARED] if sums[FAR_SQUARED] > 0.0 else sums[CHANCE]
