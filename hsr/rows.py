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
def gathered(found, starts, wide_indices, wide_scores, collect):
    """Scratch with gaps -> offsets (m + 1,), indices, scores; the latter are empty where hits were only counted.

    Query i left found[p, i] hits of its part p (found is (parts, m)) in the flat scratch from starts[p, i] on.
    """
    parts, m = found.shape
    offsets = np.zeros(m + 1, np.int64)
    for i in range(m):
        offsets[i + 1] = offsets[i] + found[:, i].sum()
    size = offsets[m] if collect else 0
    indices, scores = np.empty(size, np.int32), np.empty(size, np.float64)
    targets = offsets.copy()
    for p in range(parts if collect else 0):
        for i in range(m):
            source, target = np.uint64(starts[p, i]), np.uint64(targets[i])
            for j in range(np.uint64(found[p, i])):  # spelled out: slices would count references, parts may be short
                indices[target + j] = wide_indices[source + j]
                scores[target + j] = wide_scores[source + j]
            targets[i] += found[p, i]
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
