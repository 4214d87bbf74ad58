"""Turning per-query scratch rows and per-segment results into one CSR."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit, prange

from hsr.report import Hits


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """counts (m,) int64 -> offsets (m + 1,) int64."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


@njit(cache=True)
def scratch(rows, width):
    """Indices (rows, width) int32 and scores (rows, width) float64, of which only what is written costs memory.

    numba's allocator leaves untouched pages uncommitted; numpy's asks for huge pages, and clearing one 2 MiB page a row
    takes longer than most queries.
    """
    return np.empty((rows, width), np.int32), np.empty((rows, width), np.float64)


@njit(parallel=True, cache=True)
def _pack(offsets, wide_indices, wide_scores, indices, scores):
    for i in prange(wide_indices.shape[0]):
        found = offsets[i + 1] - offsets[i]
        indices[offsets[i] : offsets[i + 1]] = wide_indices[i, :found]
        scores[offsets[i] : offsets[i + 1]] = wide_scores[i, :found]


def pack(
    counts: np.ndarray, wide_indices: np.ndarray, wide_scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """counts (m,), scratch indices (m, w) int32 and scores (m, w) float64 -> offsets, indices, scores.

    Scratch of width 0 means that nothing was collected.
    """
    offsets = offsets_of(counts)
    size = int(offsets[-1]) if wide_indices.shape[1] else 0
    indices, scores = np.empty(size, np.int32), np.empty(size, np.float64)
    if size:
        _pack(offsets, wide_indices, wide_scores, indices, scores)
    return offsets, indices, scores


@njit(cache=True)
def _place(starts, base, offsets, source_indices, source_scores, indices, scores):
    for i in range(len(offsets) - 1):
        target = starts[i]
        for j in range(offsets[i], offsets[i + 1]):
            indices[target] = source_indices[j] + base
            scores[target] = source_scores[j]
            target += 1


def concatenate(parts: Sequence[Hits], bases: Sequence[int], index_dtype: type[np.integer]) -> Hits:
    """Hits of consecutive runs of keys for the same queries -> one Hits, indices shifted by each run's first key."""
    counts = np.array([np.diff(part.offsets) for part in parts])  # (runs, m)
    offsets = offsets_of(counts.sum(axis=0))
    size = sum(len(part.indices) for part in parts)
    indices, scores = np.empty(size, index_dtype), np.empty(size, np.float64)
    starts = offsets[:-1] + np.cumsum(counts, axis=0) - counts  # (runs, m)
    for part, base, start in zip(parts, bases, starts, strict=True):
        if len(part.indices):
            _place(start, base, part.offsets, part.indices, part.scores, indices, scores)
    scanned, visited = np.sum([(part.scanned, part.visited) for part in parts], axis=0)
    return Hits(offsets, indices, scores, scanned, visited)


def stacked(parts: Sequence[Hits]) -> Hits:
    """Hits of consecutive blocks of queries -> one Hits over all of them."""
    if len(parts) == 1:
        return parts[0]
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    indices, scores, scanned, visited = (np.concatenate(column) for column in list(zip(*parts, strict=True))[1:])
    return Hits(offsets_of(counts), indices, scores, scanned, visited)
