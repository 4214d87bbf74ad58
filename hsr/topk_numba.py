"""Exact top-k through half-space reporting: place the half-space from a sample, check its count, cut to r."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from hsr.exact import score
from hsr.report import Report
from hsr.roster import Held
from hsr.rows import offsets_of
from hsr.scaling import without_overflow

SAMPLE = 1024  # keys scored per query to place the half-space
DEVIATIONS = 4.0  # by how many standard deviations of the sample's count the half-space is widened


@njit(cache=True)
def _sampled(dead, limit):
    """How many of the sampled keys live."""
    size = min(limit, SAMPLE)
    if len(dead) == 0:
        return size
    count = 0
    for j in range(size):
        count += not dead[j * limit // size]
    return count


@njit(parallel=True, cache=True)
def _place(keys, dead, queries, limits, living, wanted, thresholds):
    rows = len(queries) // len(keys)
    for i in prange(len(queries)):
        size, count = min(limits[i], SAMPLE), _sampled(dead, limits[i])
        expected = wanted[i] * count / max(living[i], 1)
        rank = np.int64(np.ceil(expected + DEVIATIONS * np.sqrt(expected))) + 1
        if rank >= count:
            thresholds[i] = -np.inf
        else:
            query, head = queries[i], keys[i // rows]
            scores = np.empty(count)
            placed = 0
            for j in range(size):
                place = j * limits[i] // size
                if not (len(dead) and dead[place]):
                    scores[placed] = score(query, head, place)
                    placed += 1
            thresholds[i] = np.partition(scores, count - rank)[count - rank]


def sampled_thresholds(
    keys: np.ndarray, held: Held, queries: np.ndarray, wanted: np.ndarray, largest: float
) -> np.ndarray:
    """keys (g, n, d), queries (g, rows, d) float64, held and wanted of g rows int64 -> thresholds (g rows,) float64.

    Each half-space is likely to hold at least ``wanted`` of the living among the first ``limits`` keys, and not many
    more.  The sample is evenly spaced, hence deterministic.
    """
    flat = queries.reshape(-1, queries.shape[2])
    flat, placed, shift = without_overflow(flat, np.zeros(len(flat)), largest)
    _place(keys, held.dead, flat, held.limits.ravel(), held.living.ravel(), wanted.ravel(), placed)
    with np.errstate(over="ignore"):
        return placed if shift is None else np.ldexp(placed, shift)


@njit(parallel=True, cache=True)
def _cut(offsets, indices, scores, targets, cut_indices, cut_scores):
    for i in prange(len(targets) - 1):
        row_indices, row_scores = indices[offsets[i] : offsets[i + 1]], scores[offsets[i] : offsets[i + 1]]
        by_index = np.argsort(row_indices)
        order = by_index[np.argsort(-row_scores[by_index], kind="mergesort")]
        wanted = targets[i + 1] - targets[i]
        cut_indices[targets[i] : targets[i + 1]] = row_indices[order[:wanted]]
        cut_scores[targets[i] : targets[i + 1]] = row_scores[order[:wanted]]


def largest(report: Report, wanted: np.ndarray) -> Report:
    """The ``wanted`` (rows,) best keys of each row, in descending order of score, ties to the lower index."""
    targets = offsets_of(wanted)
    indices, scores = np.empty(targets[-1], report.indices.dtype), np.empty(targets[-1])
    _cut(report.offsets, report.indices, report.scores, targets, indices, scores)
    return Report(targets, indices, scores, report.shape, report.n, report.scanned, report.visited, report.method)
