"""Estimating the scores of coded keys and drawing a sample by them, on the CPU; `hsr.lifted` has the meaning.

Scores lie in scratch that the caller keeps: estimates (g, rows, G, n) float32 without their query's base, which may be
much larger than their spread.  Work is cut into tasks of CHUNK keys, dealt out to the threads in turn, because heads
and stretches of a text differ in how many keys they report.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from hsr.coded_scan import KEYS, QUERIES, block_sums
from hsr.exp_block import exp_block

CHUNK = 2048  # keys in a task
BLOCKS = CHUNK // KEYS
NONE = np.float32(-1e30)  # the estimate of a key that is not up for sampling
UNIFORM = 2.0**-32
ROOM = 1.0 + 2.0**-16  # more than a float32 sum of 64 terms can be off, relatively


@njit(cache=True)
def mixed(x):
    """A uint32 whose bits all depend on all of x's (the finaliser of MurmurHash3, Appleby 2008)."""
    x = np.uint32(x)
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    x = np.uint32((x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(cache=True)
def uniform(key, counter):
    """The number in (0, 1) that belongs to a uint32 key and a counter: a generator without state."""
    return (np.float64(mixed((np.uint32(counter) * np.uint32(0x9E3779B1)) ^ np.uint32(key))) + 0.5) * UNIFORM


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
        x, bits = np.empty(KEYS, np.float32), np.empty(KEYS, np.int32)
        powers = bits.view(np.float32)
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            start, stop = spans[head, row]
            first, last = max(start // KEYS, chunk * BLOCKS), min((stop + KEYS - 1) // KEYS, (chunk + 1) * BLOCKS)
            tops[head, row, chunk], totals[head, row, chunk] = -np.inf, 0.0
            for block in range(first, last):
                for tile in range(per_row):
                    block_sums(codes[head], block, tiles[head], row * per_row + tile, words, sums)
                    for i in range(min(QUERIES, heads - tile * QUERIES)):
                        h = tile * QUERIES + i
                        factor = np.float32(slope[head, row, h])
                        target = estimates[head, row, h, block * KEYS : (block + 1) * KEYS]
                        for j in range(KEYS):
                            target[j] = factor * np.float32(sums[i, j])
                        for j in range(max(start - block * KEYS, 0)):
                            target[j] = NONE
                        for j in range(min(stop - block * KEYS, KEYS), KEYS):
                            target[j] = NONE
                        top = np.float32(tops[head, row, chunk, h])
                        for j in range(KEYS):
                            top = max(top, target[j])
                        for j in range(KEYS):
                            x[j] = target[j] - top
                        exp_block(x, bits, powers)
                        total = np.float32(0.0)
                        for j in range(KEYS):
                            total += powers[j]
                        kept = totals[head, row, chunk, h] * np.exp(tops[head, row, chunk, h] - np.float64(top))
                        tops[head, row, chunk, h], totals[head, row, chunk, h] = top, kept + total


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
        x, bits = np.empty(KEYS, np.float32), np.empty(KEYS, np.int32)
        powers = bits.view(np.float32)
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            start, stop = spans[head, row]
            first, last = max(start // KEYS, chunk * BLOCKS), min((stop + KEYS - 1) // KEYS, (chunk + 1) * BLOCKS)
            certain[head, row, chunk], sampled[head, row, chunk] = 0.0, 0.0
            for h in range(heads):
                threshold = np.float32(thresholds[head, row, h])
                for block in range(first, last):
                    source = estimates[head, row, h, block * KEYS : (block + 1) * KEYS]
                    sure, total = 0, np.float32(0.0)
                    for j in range(KEYS):
                        sure += source[j] >= threshold
                        x[j] = min(source[j] - threshold, np.float32(0.0))
                    exp_block(x, bits, powers)
                    for j in range(KEYS):
                        total += powers[j]
                    certain[head, row, chunk, h] += sure
                    sampled[head, row, chunk, h] += total - sure


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
        x, bits = np.empty(KEYS, np.float32), np.empty(KEYS, np.int32)
        powers = bits.view(np.float32)
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            start, stop = spans[head, row]
            first, last = max(start // KEYS, chunk * BLOCKS), min((stop + KEYS - 1) // KEYS, (chunk + 1) * BLOCKS)
            place = chunk * CHUNK
            variances[head, row, chunk] = 0.0
            for block in range(first, last):
                x[:] = np.float32(-np.inf)
                for h in range(heads):
                    threshold = np.float32(thresholds[head, row, h])
                    source = estimates[head, row, h, block * KEYS : (block + 1) * KEYS]
                    for j in range(KEYS):
                        x[j] = max(x[j], source[j] - threshold)
                for j in range(KEYS):
                    x[j] = min(x[j], np.float32(0.0))
                exp_block(x, bits, powers)
                for j in range(max(start - block * KEYS, 0)):
                    powers[j] = 0.0
                for j in range(min(stop - block * KEYS, KEYS), KEYS):
                    powers[j] = 0.0
                total, variance = np.float32(0.0), np.float32(0.0)
                for j in range(KEYS):
                    total += powers[j]
                    variance += powers[j] * (np.float32(1.0) - powers[j])
                part = total - np.floor(total)
                variances[head, row, chunk, 0] += variance
                variances[head, row, chunk, 1] += part * (np.float32(1.0) - part) if systematic else variance
                report = ids[head, row], pis[head, row]
                if systematic:
                    place = _systematic(powers, total, keys[head, row], block, report, place)
                else:
                    place = _independent(powers, keys[head, row], block, report, place)
            counts[head, row, chunk] = place - chunk * CHUNK


@njit(cache=True)
def _systematic(chances, total, key, block, report, place):
    """One random offset for a block: a key is drawn where the running sum of chances, ``total``, passes a whole number.

    Returns the next place.
    """
    ids, pis = report
    running = uniform(key, block)
    if running + total * ROOM < 1.0:
        return place
    for j in range(KEYS):
        running += np.float64(chances[j])
        if running >= 1.0:
            running -= 1.0
            ids[place], pis[place] = block * KEYS + j, chances[j]
            place += 1
    return place


@njit(cache=True)
def _independent(chances, key, block, report, place):
    """A random number per key: ``ln u_j <= ln pi_j`` is the lifted half-space itself."""
    ids, pis = report
    for j in range(KEYS):
        if uniform(key, block * KEYS + j) <= np.float64(chances[j]):
            ids[place], pis[place] = block * KEYS + j, chances[j]
            place += 1
    return place
