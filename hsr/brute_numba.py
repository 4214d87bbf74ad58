"""The method ``brute``: score every key.  Right for few keys, and the yardstick for the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit, prange

from hsr.exact import reaches, score, widest_band
from hsr.report import Hits
from hsr.rows import gathered, scratch


@njit(parallel=True, cache=True)
def _report(keys, queries, thresholds, widest, limits, wide_indices, wide_scores, counts):
    collect = wide_indices.shape[1] > 0
    for i in prange(queries.shape[0]):
        query, threshold = queries[i], thresholds[i]
        found = 0
        for j in range(limits[i]):
            total = score(query, keys, j)
            if reaches(query, keys, j, total, threshold, widest[i]):
                if collect:
                    wide_indices[i, found] = j
                    wide_scores[i, found] = total
                found += 1
        counts[i] = found


@dataclass(frozen=True)
class Brute:
    """Every key is scored in float64."""

    largest: float  # largest magnitude of any key entry

    def report(
        self, keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray, limits: np.ndarray, collect: bool
    ) -> Hits:
        """See `hsr.structure.Structure`."""
        m = len(queries)
        wide_indices, wide_scores = scratch(m, len(keys) if collect else 0)
        counts = np.empty(m, np.int64)
        widest = widest_band(queries, self.largest)
        _report(keys, queries, thresholds, widest, limits, wide_indices, wide_scores, counts)
        starts = np.arange(m) * wide_indices.shape[1]
        flat = wide_indices.ravel(), wide_scores.ravel()
        offsets, indices, scores = gathered(counts[None], starts[None], *flat, collect)
        return Hits(offsets, indices, scores, limits.copy(), np.zeros(m, np.int64))


def build(keys: np.ndarray) -> Brute:
    """See `hsr.structure.Build`."""
    return Brute(float(np.abs(keys).max()))
