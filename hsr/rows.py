"""Turning per-query scratch rows and per-segment results into one CSR."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

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


@njit(cache=True)  # on one thread: waking the others takes longer than most copies
def _pack(found, starts, offsets, wide_indices, wide_scores, indices, scores):
    m, parts = found.shape
    for i in range(m):
        target = offsets[i]
        for part in range(parts):
            source, size = starts[i * parts + part], found[i, part]
            indices[target : target + size] = wide_indices[source : source + size]
            scores[target : target + size] = wide_scores[source : source + size]
            target += size


@njit(cache=True)
def gathered(found, width, wide_indices, wide_scores):
    """`packed` for compiled callers: hits of part p of query i start at (i * parts + p) * width."""
    m, parts = found.shape
    offsets = np.zeros(m + 1, np.int64)
    for i in range(m):
        offsets[i + 1] = offsets[i] + found[i].sum()
    size = offsets[m] if width > 0 else 0
    indices, scores = np.empty(size, np.int32), np.empty(size, np.float64)
    if size > 0:
        _pack(found, np.arange(m * parts) * width, offsets, wide_indices, wide_scores, indices, scores)
    return offsets, indices, scores


def packed(
    found: np.ndarray, starts: np.ndarray, wide_indices: np.ndarray, wide_scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scratch with gaps -> offsets (m + 1,), indices, scores.

    Query i left found[i, p] hits of its part p (found is (m, parts)) in the flat scratch from starts[i * parts + p] on.
    Scratch of length 0 means that hits were only counted.
    """
    offsets = offsets_of(found.sum(axis=1))
    size = int(offsets[-1]) if len(wide_indices) else 0
    indices, scores = np.empty(size, np.int32), np.empty(size, np.float64)
    if size:
        _pack(found, starts, offsets, wide_indices, wide_scores, indices, scores)
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
