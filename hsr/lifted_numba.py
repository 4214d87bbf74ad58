"""Estimating the scores of coded keys and drawing a sample by them, on the CPU; `hsr.lifted` has the meaning.

Scores lie in scratch that the caller keeps: estimates (g, rows, G, n) int16, in multiples of their query's ``unit`` and
without its base, which may be much larger than their spread.  Work is cut into tasks of CHUNK keys, dealt out to the
threads in turn, because heads and stretches of a text differ in how many keys they report.

Loops over a block's keys are spelled out, and in functions of their own: sums and largest values become vector
instructions there, and a call with array arguments for every block would count references, which takes longer than one.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from hsr.coded_scan import BYTES, KEYS, QUERIES, block_sums
from hsr.exp_block import FAST, LOG2_E, exp32, rough_power
from hsr.prefetch import prefetch_bytes

CHUNK = 2048  # keys in a task
BLOCKS = CHUNK // KEYS
BITS = 24  # chances are multiples of 2**-BITS, which float32 holds and int32 adds exactly
SURE = np.int32(1 << BITS)
GRAIN = np.float32(2.0**-BITS)
PART = 16  # keys of a block that are passed over together if none of them is drawn
AHEAD = 4  # blocks whose codes are asked for before they are read
LEAST = np.int32(-(2**31))
FAR = np.float32(-1e30)


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
def _estimate(codes, words, tiles, factors, shift, span, estimates, tops, totals):
    """The part of `estimate` that is one task's: of one row, the keys of span (first and last + 1)."""
    start, stop = span
    half = np.int32((1 << shift) >> 1)
    codes_at, width = np.uintp(codes.ctypes.data), codes.shape[1] * KEYS * BYTES
    sums = np.empty((QUERIES, KEYS), np.int32)  # made here, so that the compiler knows that it overlaps nothing
    rates = np.empty(len(factors), np.float32)
    for h in range(len(factors)):
        rates[h], tops[h], totals[h] = factors[h] * LOG2_E, LEAST, 0.0
    for block in range(start // KEYS, (stop + KEYS - 1) // KEYS):
        begin, end = max(start - block * KEYS, 0), min(stop - block * KEYS, KEYS)
        outside = np.int32(KEYS - (end - begin))
        place = np.uint64(block * KEYS)  # an index that may be negative would be tested for every key
        prefetch_bytes(codes_at + np.uintp((block + AHEAD) * width), width)
        for tile in range(len(tiles)):
            block_sums(codes, block, tiles, tile, words, sums)
            for i in range(min(QUERIES, len(factors) - tile * QUERIES)):
                h = tile * QUERIES + i
                if outside > 0:
                    sums[i, :begin], sums[i, end:] = LEAST, LEAST
                best = LEAST
                for j in range(KEYS):
                    estimates[h, place + np.uint64(j)] = (sums[i, j] + half) >> np.int32(shift)
                    best = max(best, sums[i, j])
                if best > tops[h]:
                    totals[h] *= np.exp(np.float64(factors[h]) * (np.float64(tops[h]) - np.float64(best)))
                    tops[h] = best
                if outside > 0:  # each adds the power of 0, which is taken off
                    sums[i, :begin], sums[i, end:] = tops[h], tops[h]
                rate, best, total = rates[h], tops[h], np.float32(0.0)
                for j in range(KEYS):
                    total += rough_power(rate * np.float32(sums[i, j] - best))
                totals[h] += total - np.float32(outside) * rough_power(np.float32(0.0))


@njit(parallel=True, cache=True)
def estimate(codes, words, tiles, slope, shift, spans, threads, estimates, tops, totals):
    """Fill estimates; per task their largest (tops) and, within 4 %, the sum of exponentials relative to it (totals).

    codes (g, blocks, words, 64, 4), tiles (g, rows * tiles a row, 4, planes, 4), slope (g, rows, G) float64, the score
    of a sum of 1, whose last ``shift`` bits are not kept; spans (g, rows, 2) int64: the keys up for sampling, of others
    estimates mean nothing; tops, totals (g, rows, chunks, G) float64.
    """
    g, rows, heads = slope.shape
    chunks = tops.shape[2]
    per_row = (heads + QUERIES - 1) // QUERIES
    tasks = g * rows * chunks
    for thread in prange(threads):
        factors, best = np.empty(heads, np.float32), np.empty(heads, np.int32)
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            span = max(spans[head, row, 0], chunk * CHUNK), min(spans[head, row, 1], (chunk + 1) * CHUNK)
            factors[:] = slope[head, row]
            asked = tiles[head, row * per_row : (row + 1) * per_row]
            total = totals[head, row, chunk]
            _estimate(codes[head], words, asked, factors, shift, span, estimates[head, row], best, total)
            for h in range(heads):
                top = np.float64(factors[h]) * np.float64(best[h])
                tops[head, row, chunk, h] = top if span[0] < span[1] else -np.inf


@njit(fastmath=FAST, cache=True)
def _expected(estimates, unit, threshold, span):
    """How many estimates (n,) of the span reach the threshold; the sum of exp(score - threshold) over the others."""
    certain = sampled = 0.0
    for first in range(span[0], span[1], KEYS):
        sure, total = np.int32(0), np.float32(0.0)
        for j in range(np.uint64(first), np.uint64(min(first + KEYS, span[1]))):
            off = unit * np.float32(estimates[j]) - threshold
            sure += np.int32(off >= 0)
            chance = exp32(min(off, np.float32(0.0)))
            total += chance if off < 0 else np.float32(0.0)  # a sum of both would drown the chances that are small
        certain += sure
        sampled += total
    return certain, sampled


@njit(parallel=True, cache=True)
def expected(estimates, unit, thresholds, spans, threads, certain, sampled):
    """How many keys the thresholds (g, rows, G) report for sure, and how many more on average.

    unit (g, rows, G); fills certain, sampled (g, rows, chunks, G) float64: the keys at or above the threshold, and the
    sum of ``exp(estimate - threshold)`` over those below.
    """
    g, rows, heads, _ = estimates.shape
    chunks = certain.shape[2]
    tasks = g * rows * chunks
    for thread in prange(threads):
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            span = max(spans[head, row, 0], chunk * CHUNK), min(spans[head, row, 1], (chunk + 1) * CHUNK)
            for h in range(heads):
                rate, threshold = np.float32(unit[head, row, h]), np.float32(thresholds[head, row, h])
                found = _expected(estimates[head, row, h], rate, threshold, span)
                certain[head, row, chunk, h], sampled[head, row, chunk, h] = found


@njit(fastmath=FAST, cache=True)
def _draw(estimates, units, thresholds, span, key, systematic, ids, pis, place):
    """The part of `draw` that is one task's -> how many keys are drawn, the variances of their number.

    No branch depends on the numbers: a key that is not drawn is overwritten by the next.
    """
    start, stop = span
    first, independent, real = place, 0.0, 0.0
    x, chances = np.empty(KEYS, np.float32), np.empty(KEYS, np.int32)
    for block in range(start // KEYS, (stop + KEYS - 1) // KEYS):
        origin = np.uint64(block * KEYS)  # an index that may be negative would be tested for every key
        for j in range(KEYS):
            x[j] = FAR
        for h in range(len(units)):
            for j in range(KEYS):
                x[j] = max(x[j], units[h] * np.float32(estimates[h, origin + np.uint64(j)]) - thresholds[h])
        for j in range(KEYS):
            chances[j] = np.int32(np.ceil(exp32(min(x[j], np.float32(0.0))) * np.float32(SURE)))
        if block * KEYS < start or stop < (block + 1) * KEYS:
            chances[: max(start - block * KEYS, 0)] = 0
            chances[max(min(stop - block * KEYS, KEYS), 0) :] = 0
        total, variance = np.int32(0), np.float32(0.0)
        for j in range(KEYS):
            pi = np.float32(chances[j]) * GRAIN
            x[j] = pi
            total += chances[j]
            variance += pi * (np.float32(1.0) - pi)
        independent += variance
        if systematic:
            left = np.float64(total & (SURE - 1)) * GRAIN
            real += left * (1.0 - left)
            running = number(key, block)
            for part in range(0, KEYS if running + total >= SURE else 0, PART):
                some = np.int32(0)
                for j in range(PART):
                    some += chances[part + j]
                if running + some < SURE:
                    running += some
                    continue
                for j in range(part, part + PART):
                    running += chances[j]
                    ids[place], pis[place] = block * KEYS + j, x[j]
                    place += running >> np.int32(BITS)
                    running &= SURE - np.int32(1)
        else:
            real += variance
            for j in range(KEYS):
                ids[place], pis[place] = block * KEYS + j, x[j]
                place += number(key, block * KEYS + j) < chances[j]
    return place - first, independent, real


@njit(parallel=True, cache=True)
def draw(estimates, unit, thresholds, spans, keys, systematic, threads, ids, pis, counts, variances):
    """Report the keys of the lifted half-spaces, one list for the G heads of a row.

    unit, thresholds (g, rows, G) float64, keys (g, rows) uint32 of the generator; fills ids (g, rows, n) int32 and pis
    (g, rows, n) float32 from the start of each chunk on, counts (g, rows, chunks) int64, and variances (g, rows,
    chunks, 2) of the number drawn: what it would be for independent draws, and what it is.

    Systematic: one random offset for a block, and a key is drawn where the running sum of chances passes a whole
    number.  Independent: a random number per key, ``ln u_j < ln pi_j`` being the lifted half-space itself.
    """
    g, rows, heads, _ = estimates.shape
    chunks = counts.shape[2]
    tasks = g * rows * chunks
    for thread in prange(threads):
        units, lows = np.empty((2, heads), np.float32)
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            span = max(spans[head, row, 0], chunk * CHUNK), min(spans[head, row, 1], (chunk + 1) * CHUNK)
            units[:], lows[:] = unit[head, row], thresholds[head, row]
            given = estimates[head, row], units, lows, span, keys[head, row], systematic
            found = _draw(*given, ids[head, row], pis[head, row], chunk * CHUNK)
            counts[head, row, chunk] = found[0]
            variances[head, row, chunk, 0], variances[head, row, chunk, 1] = found[1], found[2]
