"""Estimating the scores of coded keys and drawing a sample by them, on the CPU; `hsr.lifted` has the meaning.

Scores lie in scratch that the caller keeps: estimates (g, rows, G, n) float32 without their query's base, which may be
much larger than their spread.  Work is cut into tasks of CHUNK keys, dealt out to the threads in turn, because heads
and stretches of a text differ in how many keys they report.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from hsr.coded_scan import KEYS, QUERIES, block_sums
from hsr.exp_block import FAST, exp32

CHUNK = 2048  # keys in a task
BLOCKS = CHUNK // KEYS
NONE = np.float32(-1e30)  # the estimate of a key that is not up for sampling
BITS = 24  # chances are multiples of 2**-BITS, which float32 holds and int32 adds exactly
SURE = np.int32(1 << BITS)
GRAIN = np.float32(2.0**-BITS)


@njit(cache=True)
def mixed(x):
    """A uint32 whose bits all depend on all of x's (the finaliser of MurmurHash3, Appleby 2008)."""
    x = np.uint32(x)
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    x = np.uint32((x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(cache=True)
def number(key, counter):
    """The int32 in 0 .. SURE - 1 that belongs to a uint32 key and a counter: a generator without state."""
    return np.int32(mixed((np.uint32(counter) * np.uint32(0x9E3779B1)) ^ np.uint32(key)) >> np.uint32(32 - BITS))


@njit(cache=True)
def generators(seed, steps):
    """Generator keys (g, rows) uint32: a hash of (seed, head, step) for steps (g, rows) int64."""
    keys = np.empty(steps.shape, np.uint32)
    first = mixed(np.uint32(seed) ^ mixed(np.uint32(seed >> 32) + np.uint32(1)))
    for head in range(steps.shape[0]):
        second = mixed(first ^ mixed(np.uint32(head) + np.uint32(0x9E3779B9)))
        for row in range(steps.shape[1]):
            keys[head, row] = mixed(second ^ mixed(np.uint32(steps[head, row]) + np.uint32(0x7F4A7C15)))
    return keys


@njit(fastmath=FAST, cache=True)
def _scale(sums, i, factor, target):
    """target (64,) = factor * sums[i]; the largest."""
    top = np.float32(-np.inf)
    for j in range(KEYS):
        score = factor * np.float32(sums[i, j])
        target[j] = score
        top = max(top, score)
    return top


@njit(fastmath=FAST, cache=True)
def _largest(scores):
    top = scores[0]
    for j in range(1, KEYS):
        top = max(top, scores[j])
    return top


@njit(fastmath=FAST, cache=True)
def _weight(scores, top):
    """The sum of exp(scores - top); no score (64,) is above top."""
    total = np.float32(0.0)
    for j in range(KEYS):
        total += exp32(scores[j] - top)
    return np.float64(total)


@njit(parallel=True, cache=True)
def estimate(codes, words, tiles, slope, spans, threads, estimates, tops, totals):
    """Fill estimates, and per task their largest (tops) and the sum of exponentials relative to it (totals).

    codes (g, blocks, words, 64, 4), tiles (g, rows * tiles a row, 4, planes, 4), slope (g, rows, G) float64,
    spans (g, rows, 2) int64: the keys up for sampling; tops, totals (g, rows, chunks, G) float64.
    """
    g, rows, heads = slope.shape
    chunks = tops.shape[2]
    per_row = (heads + QUERIES - 1) // QUERIES
    tasks = g * rows * chunks
    for thread in prange(threads):
        sums = np.empty((QUERIES, KEYS), np.int32)
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            start, stop = spans[head, row]
            first, last = max(start // KEYS, chunk * BLOCKS), min((stop + KEYS - 1) // KEYS, (chunk + 1) * BLOCKS)
            tops[head, row, chunk], totals[head, row, chunk] = -np.inf, 0.0
            for block in range(first, last):
                whole = start <= block * KEYS and (block + 1) * KEYS <= stop
                for tile in range(per_row):
                    block_sums(codes[head], block, tiles[head], row * per_row + tile, words, sums)
                    for i in range(min(QUERIES, heads - tile * QUERIES)):
                        h = tile * QUERIES + i
                        target = estimates[head, row, h, block * KEYS : (block + 1) * KEYS]
                        top = _scale(sums, i, np.float32(slope[head, row, h]), target)
                        if not whole:
                            target[: max(start - block * KEYS, 0)] = NONE
                            target[max(min(stop - block * KEYS, KEYS), 0) :] = NONE
                            top = _largest(target)
                        if top > tops[head, row, chunk, h]:
                            totals[head, row, chunk, h] *= np.exp(tops[head, row, chunk, h] - np.float64(top))
                            tops[head, row, chunk, h] = top
                        totals[head, row, chunk, h] += _weight(target, np.float32(tops[head, row, chunk, h]))


@njit(fastmath=FAST, cache=True)
def _expected(scores, threshold):
    """How many of the scores (64,) reach the threshold, and the sum of exp(score - threshold) over the others."""
    sure, total = np.int32(0), np.float32(0.0)
    for j in range(KEYS):
        sure += np.int32(scores[j] >= threshold)
        total += exp32(min(scores[j] - threshold, np.float32(0.0)))
    return sure, total - np.float32(sure)


@njit(parallel=True, cache=True)
def expected(estimates, thresholds, spans, threads, certain, sampled):
    """How many keys the thresholds (g, rows, G) report for sure, and how many more on average.

    Fills certain, sampled (g, rows, chunks, G) float64: the keys at or above the threshold, and the sum of
    ``exp(estimate - threshold)`` over those below.
    """
    g, rows, heads, _ = estimates.shape
    chunks = certain.shape[2]
    tasks = g * rows * chunks
    for thread in prange(threads):
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            start, stop = spans[head, row]
            first, last = max(start // KEYS, chunk * BLOCKS), min((stop + KEYS - 1) // KEYS, (chunk + 1) * BLOCKS)
            certain[head, row, chunk], sampled[head, row, chunk] = 0.0, 0.0
            for h in range(heads):
                threshold = np.float32(thresholds[head, row, h])
                for block in range(first, last):
                    scores = estimates[head, row, h, block * KEYS : (block + 1) * KEYS]
                    sure, chance = _expected(scores, threshold)
                    certain[head, row, chunk, h] += sure
                    sampled[head, row, chunk, h] += chance


@njit(cache=True)
def _raise(scores, threshold, x):
    """x (64,): the largest of itself and ``scores - threshold``, at most 0."""
    for j in range(KEYS):
        x[j] = max(x[j], min(scores[j] - threshold, np.float32(0.0)))


@njit(fastmath=FAST, cache=True)
def _chances(x, counts):
    """counts (64,) int32 = exp(x) in units of 2**-BITS, rounded up; their sum."""
    total = np.int32(0)
    for j in range(KEYS):
        counts[j] = np.int32(np.ceil(exp32(x[j]) * np.float32(SURE)))
        total += counts[j]
    return total


@njit(fastmath=FAST, cache=True)
def _variance(counts):
    """The sum of pi (1 - pi)."""
    total = np.float32(0.0)
    for j in range(KEYS):
        pi = np.float32(counts[j]) * GRAIN
        total += pi * (np.float32(1.0) - pi)
    return np.float64(total)


@njit(parallel=True, cache=True)
def draw(estimates, thresholds, spans, keys, systematic, threads, ids, pis, counts, variances):
    """Report the keys of the lifted half-spaces, one list for the G heads of a row.

    thresholds (g, rows, G) float64, keys (g, rows) uint32 of the generator; fills ids (g, rows, n) int32 and pis
    (g, rows, n) float32 from the start of each chunk on, counts (g, rows, chunks) int64, and variances (g, rows,
    chunks, 2) of the number drawn: what it would be for independent draws, and what it is.
    """
    g, rows, heads, _ = estimates.shape
    chunks = counts.shape[2]
    tasks = g * rows * chunks
    for thread in prange(threads):
        x, chances = np.empty(KEYS, np.float32), np.empty(KEYS, np.int32)
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            start, stop = spans[head, row]
            first, last = max(start // KEYS, chunk * BLOCKS), min((stop + KEYS - 1) // KEYS, (chunk + 1) * BLOCKS)
            report = ids[head, row], pis[head, row]
            place = chunk * CHUNK
            variances[head, row, chunk] = 0.0
            for block in range(first, last):
                x[:] = np.float32(-np.inf)
                for h in range(heads):
                    scores = estimates[head, row, h, block * KEYS : (block + 1) * KEYS]
                    _raise(scores, np.float32(thresholds[head, row, h]), x)
                total = _chances(x, chances)
                if block * KEYS < start or stop < (block + 1) * KEYS:
                    chances[: max(start - block * KEYS, 0)] = 0
                    chances[max(min(stop - block * KEYS, KEYS), 0) :] = 0
                    total = chances.sum()
                variance, part = _variance(chances), np.float64(total & (SURE - 1)) * GRAIN
                variances[head, row, chunk, 0] += variance
                if systematic:
                    variances[head, row, chunk, 1] += part * (1.0 - part)
                    place = _systematic(chances, total, keys[head, row], block, report, place)
                else:
                    variances[head, row, chunk, 1] += variance
                    place = _independent(chances, keys[head, row], block, report, place)
            counts[head, row, chunk] = place - chunk * CHUNK


@njit(cache=True)
def _systematic(chances, total, key, block, report, place):
    """One random offset for a block: a key is drawn where the running sum of chances, ``total``, passes a whole number.

    Returns the next place.  No branch depends on the numbers: a key that is not drawn is overwritten by the next.
    """
    ids, pis = report
    running = number(key, block)
    if running + total < SURE:
        return place
    for j in range(KEYS):
        running += chances[j]
        ids[place], pis[place] = block * KEYS + j, np.float32(chances[j]) * GRAIN
        place += running >> np.int32(BITS)
        running &= SURE - np.int32(1)
    return place


@njit(cache=True)
def _independent(chances, key, block, report, place):
    """A random number per key: ``ln u_j <= ln pi_j`` is the lifted half-space itself."""
    ids, pis = report
    for j in range(KEYS):
        ids[place], pis[place] = block * KEYS + j, np.float32(chances[j]) * GRAIN
        place += number(key, block * KEYS + j) < chances[j]
    return place
