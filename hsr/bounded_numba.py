"""Bounding the weights of coded keys and listing those that could matter, on the CPU; `hsr.bounded` has the meaning.

Scores, bounds and thresholds are in nats and relative to their query's base.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from hsr.coded_scan import KEYS, QUERIES, block_sums
from hsr.covering import HIGH
from hsr.exp_block import exp_block
from hsr.lifted_numba import BLOCKS, CHUNK

BINS = 1024
STEPS = 16.0  # bins per nat
PAIRS = QUERIES // 2  # queries a tile


@njit(parallel=True, cache=True)
def score(codes, words, tiles, slope, spans, threads, scores):
    """Fill scores (g, rows, G, n) float32 of the keys in spans (g, rows, 2), whole blocks; slope (g, rows, G)."""
    g, rows, heads = slope.shape
    chunks = (scores.shape[3] + CHUNK - 1) // CHUNK
    per_row = (heads + PAIRS - 1) // PAIRS
    tasks = g * rows * chunks
    for thread in prange(threads):
        sums = np.empty((QUERIES, KEYS), np.int32)
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            start, stop = spans[head, row]
            first, last = max(start // KEYS, chunk * BLOCKS), min((stop + KEYS - 1) // KEYS, (chunk + 1) * BLOCKS)
            for block in range(first, last):
                for tile in range(per_row):
                    block_sums(codes[head], block, tiles[head], row * per_row + tile, words, sums)
                    for i in range(min(PAIRS, heads - tile * PAIRS)):
                        factor = np.float32(slope[head, row, tile * PAIRS + i])
                        target = scores[head, row, tile * PAIRS + i, block * KEYS : (block + 1) * KEYS]
                        for j in range(KEYS):
                            target[j] = factor * np.float32(HIGH * sums[2 * i, j] + sums[2 * i + 1, j])


@njit(cache=True)
def _place(total, score, reach):
    """The bin of a key that scores at most ``score + reach``: bin b > 0 holds bounds down to total - (b + 1) / 16."""
    below = (total - (np.float64(score) + reach)) * STEPS
    return np.int64(min(max(np.floor(below), 0.0), BINS - 1.0))


@njit(parallel=True, cache=True)
def survey(scores, length, fixed, lengths, spans, totals, bins):
    """Per query: a lower bound on all weight, and how many keys have their upper bound in each bin below it.

    A score is within ``fixed + length * lengths[key]``: length, fixed (g, rows, G), lengths (g, n).  totals, float64
    (g, rows, G), comes with the log-sum-exp of other keys and leaves with that of all; fills bins (g, rows, G, BINS)
    int64.  Keys of infinite length are left to `choose`, which lists them.
    """
    g, rows, heads, _ = scores.shape
    for task in prange(g * rows * heads):
        head, row, h = task // (rows * heads), task // heads % rows, task % heads
        start, stop = spans[head, row]
        values, reach, slack = scores[head, row, h], length[head, row, h], fixed[head, row, h]
        x, powers = np.empty((2, KEYS), np.float32)
        top = -np.inf
        for j in range(start, stop):
            top = max(top, np.float64(values[j]) - (reach * lengths[head, j] + slack))
        total = 0.0
        for first in range(start, stop if np.isfinite(top) else start, KEYS):
            x[:] = np.float32(-np.inf)
            for j in range(first, min(stop, first + KEYS)):
                x[j - first] = np.float32(np.float64(values[j]) - (reach * lengths[head, j] + slack) - top)
            exp_block(x, powers)
            for j in range(KEYS):
                total += np.float64(powers[j]) - TINY
        if total > TINY:
            totals[head, row, h] = np.logaddexp(totals[head, row, h], top + np.log(total * (1.0 - ROUNDING)))
        bins[head, row, h] = 0
        for j in range(start, stop):
            if np.isfinite(lengths[head, j]):
                bins[head, row, h, _place(totals[head, row, h], values[j], reach * lengths[head, j] + slack)] += 1


TINY = 2.0**-126  # what `exp32` makes of all that is smaller
ROUNDING = 1e-5  # of a power and of its float32 exponent, relative: exponents of up to 88 nats round by 5e-6


@njit(parallel=True, cache=True)
def choose(scores, length, fixed, lengths, spans, totals, cuts, threads, ids, counts):
    """List the keys that are in a bin below a head's cut, one list for the G heads of a row.

    cuts (g, rows, G) int64; fills ids (g, rows, n) int32 from the start of each chunk on and counts (g, rows, chunks).
    """
    g, rows, heads, _ = scores.shape
    chunks = counts.shape[2]
    tasks = g * rows * chunks
    for thread in prange(threads):
        for task in range(thread, tasks, threads):
            head, row, chunk = task // (rows * chunks), task // chunks % rows, task % chunks
            start, stop = spans[head, row]
            place = chunk * CHUNK
            for j in range(max(start, chunk * CHUNK), min(stop, (chunk + 1) * CHUNK)):
                kept = not np.isfinite(lengths[head, j])
                for h in range(heads):
                    radius = length[head, row, h] * lengths[head, j] + fixed[head, row, h]
                    kept |= _place(totals[head, row, h], scores[head, row, h, j], radius) < cuts[head, row, h]
                ids[head, row, place] = j
                place += kept
            counts[head, row, chunk] = place - chunk * CHUNK
