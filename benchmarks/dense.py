"""The dense baselines of the index: score every key with BLAS or faiss, keep those that reach the threshold.

Each is given its best case: keys laid out as it likes them, scratch allocated beforehand, one threshold for all queries
(faiss knows no other).
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np

from benchmarks.gate import Answer

BLOCK = 1 << 11  # keys of a block whose scores, for 64 queries, stay in the L2 cache (512 KiB)

Form = Callable[[np.ndarray, np.float32], Answer]  # queries (m, d) float32, threshold -> answer


class Numpy:
    """The sensible ways of writing it in numpy; which is fastest depends on d and m, so a run measures them all."""

    def __init__(self, keys: np.ndarray, most: int) -> None:
        """Keys (n, d) float32, for at most ``most`` queries a call."""
        self._rows = keys
        self._columns = np.ascontiguousarray(keys.T)  # (d, n)
        self._scores = np.empty((most, len(keys)), np.float32)
        self._tile = np.empty(most * BLOCK, np.float32)

    def forms(self, m: int) -> dict[str, Form]:
        """The forms for m queries a call."""
        forms: dict[str, Form] = {"K @ q": self.rows, "q @ KT": self.columns}
        if m > 1:
            forms |= {"Q @ K.T": self.product, "Q @ KT by blocks": self.blocks}
        return forms

    def rows(self, queries: np.ndarray, threshold: np.float32) -> Answer:
        """One matrix-vector product per query, keys by row."""
        return self._each(queries, threshold, lambda query, out: np.dot(self._rows, query, out=out))

    def columns(self, queries: np.ndarray, threshold: np.float32) -> Answer:
        """One matrix-vector product per query, keys by column."""
        return self._each(queries, threshold, lambda query, out: np.dot(query, self._columns, out=out))

    def _each(
        self, queries: np.ndarray, threshold: np.float32, product: Callable[[np.ndarray, np.ndarray], object]
    ) -> Answer:
        scores, found = self._scores[0], []
        kept = []
        for query in queries:
            product(query, scores)
            found.append(np.flatnonzero(scores >= threshold))
            kept.append(scores[found[-1]])
        offsets = np.cumsum([0, *map(len, found)])
        return Answer(offsets, np.concatenate(found), np.concatenate(kept))

    def product(self, queries: np.ndarray, threshold: np.float32) -> Answer:
        """One matrix product for all queries."""
        scores = self._scores[: len(queries)]
        np.dot(queries, self._rows.T, out=scores)
        flat = np.flatnonzero(scores >= threshold)
        offsets = np.searchsorted(flat, np.arange(len(queries) + 1) * len(self._rows))
        return Answer(offsets, flat % len(self._rows), scores.ravel()[flat])

    def blocks(self, queries: np.ndarray, threshold: np.float32) -> Answer:
        """One matrix product per block of keys, so that scores are read back from the cache."""
        m, n = len(queries), len(self._rows)
        rows, keys, kept = [], [], []
        for start in range(0, n, BLOCK):
            width = min(BLOCK, n - start)
            tile = self._tile[: m * width].reshape(m, width)
            np.dot(queries, self._columns[:, start : start + width], out=tile)
            flat = np.flatnonzero(tile >= threshold)
            rows.append((flat // width).astype(np.int16))
            keys.append(flat % width + start)
            kept.append(tile.ravel()[flat])
        row = np.concatenate(rows)
        order = np.argsort(row, kind="stable")
        offsets = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=m))))
        return Answer(offsets, np.concatenate(keys)[order], np.concatenate(kept)[order])


class Faiss:
    """``IndexFlatIP.range_search``."""

    def __init__(self, keys: np.ndarray) -> None:
        """Keys (n, d) float32."""
        self._index = faiss.IndexFlatIP(keys.shape[1])
        self._index.add(keys)

    def search(self, queries: np.ndarray, threshold: np.float32) -> Answer:
        """Its range is open, so the closed half-space at b is asked for as the open one just below b."""
        below = float(np.nextafter(threshold, np.float32(-np.inf)))
        offsets, scores, indices = self._index.range_search(queries, below)
        return Answer(offsets.astype(np.int64), indices, scores)
