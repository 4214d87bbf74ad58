"""Weighted attention over listed keys, with the sums from which a sample's variance is estimated.

A *part* of a row's keys leaves, for each of the G query heads, sums relative to its largest score: of the weights
``w / pi``, of the risks ``a = (1 - pi) (w / pi)^2``, whose expectation is the variance of the weights' sum under
independent draws, and of what else the names below say; vectors of both times ``v - c``, c the centre of the values.
Parts merge.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from hsr.exp_block import BLOCK, FAST, exp32
from hsr.lifted_numba import CHUNK

GROUP = 4  # values added at a time
TOP, TOTAL, RISK, FAR, FAR_SQUARED, CHANCE, CHANCE_WEIGHT = range(7)
ROUNDING = 8e-6  # of a weight and of float32 sums of 64 terms, relative
SUMS = 7  # largest score, then sums of w / pi, a, a |v - c|^2, its square, 1 - pi, (1 - pi) w / pi


@njit(cache=True)
def _copy(row, target):
    for i in range(len(row)):
        target[i] = row[i]


@njit(fastmath=FAST, cache=True)
def _score(rows, size, query, scale, scores):
    """scores (G, 64) of the first rows (64, d)."""
    heads, d = query.shape
    for c in range(size):
        for h in range(heads):
            total = 0.0
            for i in range(d):
                total += query[h, i] * np.float64(rows[c, i])
            scores[h, c] = scale * total


@njit(fastmath=FAST, cache=True)
def _weigh(scores, pis, top, weights, risks):
    """Fill weights and risks (64,) from scores of at most top; the sums of w / pi, a, 1 - pi, (1 - pi) w / pi."""
    total = risk = chance = both = 0.0
    for c in range(len(pis)):
        pi = np.float64(pis[c])
        weight = np.float64(exp32(np.float32(scores[c] - top))) / pi
        weights[c], risks[c] = weight, (1.0 - pi) * weight * weight
        total += weight
        risk += (1.0 - pi) * weight * weight
        chance += 1.0 - pi
        both += (1.0 - pi) * weight
    return total, risk, chance, both


@njit(cache=True)
def _centre(value, unit, centre, row):
    """row (dv,) = value * unit - centre."""
    for t in range(len(row)):
        row[t] = value[t] * unit - centre[t]


@njit(fastmath=FAST, cache=True)
def _square(row):
    square = row.dtype.type(0)
    for t in range(len(row)):
        square += row[t] * row[t]
    return square


@njit(fastmath=FAST, cache=True)
def _risky(risks, squares):
    """The sums of a |v - c|^2 and of its square."""
    far = far_squared = 0.0
    for c in range(len(squares)):
        x = np.float64(risks[c]) * np.float64(squares[c])
        far += x
        far_squared += x * x
    return far, far_squared


@njit(fastmath=FAST, cache=True)
def _add(weights, risks, rows, size, sums, vectors):
    """Add the rows (size, dv), times weights and times risks (64,), to vectors (2, dv) float64."""
    sums[:] = 0.0
    for c in range(0, size, GROUP):
        a, b, d, e = weights[c], weights[c + 1], weights[c + 2], weights[c + 3]
        p, q, r, s = risks[c], risks[c + 1], risks[c + 2], risks[c + 3]
        for t in range(rows.shape[1]):
            x, y, z, w = rows[c, t], rows[c + 1, t], rows[c + 2, t], rows[c + 3, t]
            sums[0, t] += (a * x + b * y) + (d * z + e * w)
            sums[1, t] += (p * x + q * y) + (r * z + s * w)
    for i in range(2):
        for t in range(rows.shape[1]):
            vectors[i, t] += sums[i, t]


@njit(cache=True)
def _fade(part, vector, top):
    """Make a part's sums (SUMS,) and vectors (2, dv) relative to a larger score."""
    fade = np.exp(part[TOP] - top)
    part[TOP] = top
    part[TOTAL] *= fade
    part[RISK] *= fade * fade
    part[FAR] *= fade * fade
    part[FAR_SQUARED] *= (fade * fade) ** 2
    part[CHANCE_WEIGHT] *= fade
    for t in range(vector.shape[1]):
        vector[0, t] *= fade
        vector[1, t] *= fade * fade


@njit(cache=True)
def _absorb(ids, pis, cache, query, tools, scalars, vectors):
    """Add the listed keys, at most 64 of them, to a part: scalars (G, SUMS), vectors (G, 2, dv) float64."""
    keys, values, centre, unit, scale = cache
    scores, weights, risks, near, rows, squares, sums = tools
    size = len(ids)
    for c in range(size):  # nothing but loads and stores: more rows are under way at once than with prefetching
        _copy(keys[ids[c]], near[c])
    for c in range(size):
        _centre(values[ids[c]], unit, centre, rows[c])
    _score(near, size, query, scale, scores)
    for c in range(size):
        squares[c] = _square(rows[c])
    for h in range(len(query)):
        top = scores[h, :size].max()
        part = scalars[h]
        if top > part[TOP]:
            _fade(part, vectors[h], top)
        total, risk, chance, both = _weigh(scores[h], pis, part[TOP], weights, risks)
        far, far_squared = _risky(risks, squares[:size])
        weights[size : size + GROUP] = 0.0  # the last group of values may be short
        risks[size : size + GROUP] = 0.0
        part[TOTAL] += total
        part[RISK] += risk
        part[FAR] += far
        part[FAR_SQUARED] += far_squared
        part[CHANCE] += chance
        part[CHANCE_WEIGHT] += both
        _add(weights, risks, rows, size, sums, vectors[h])


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
def _tools(heads, d, width, like):
    """Buffers of one thread: scores, a head's weights and risks, keys, centred values, their squares and sums."""
    return (
        np.empty((heads, BLOCK)),
        np.empty(BLOCK, like.dtype),
        np.empty(BLOCK, like.dtype),
        np.empty((BLOCK, d), like.dtype),
        np.zeros((BLOCK, width), like.dtype),
        np.empty(BLOCK, like.dtype),
        np.empty((2, width), like.dtype),
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
        tools = _tools(heads, keys.shape[2], values.shape[2], values)
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
            _absorb(ids[:size], ones[:size], cache, queries[head, row], tools, part, vector)
            for h in range(heads):
                lifted[head, row, h] = _log_add(lifted[head, row, h], tools[0][h, :size], lift[head], ids)


@njit(parallel=True, cache=True)
def attend_drawn(keys, values, centre, units, queries, scale, ids, pis, counts, threads, scalars, vectors):
    """The drawn keys of each row: parts 1 and on, each of every so many chunks.  Arguments as for `attend_certain`."""
    g, rows, heads, _ = queries.shape
    parts, chunks = scalars.shape[2] - 1, counts.shape[2]
    tasks = g * rows * parts
    for thread in prange(threads):
        tools = _tools(heads, keys.shape[2], values.shape[2], values)
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
                _absorb(block_ids[:size], block_pis[:size], cache, queries[head, row], tools, sums, vector)


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
