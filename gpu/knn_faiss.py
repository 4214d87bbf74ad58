"""Candidates by scoring every key: faiss's brute-force k-NN by inner product."""

from __future__ import annotations

from typing import Any

import faiss
import torch

from gpu.faiss_gpu import Found, keys_of, neighbours
from gpu.faiss_gpu import refuses as refuses


class Scored:
    """See `candidates`."""

    def __init__(self, keys: torch.Tensor) -> None:
        blocks, self.layout = keys_of(keys)
        self._keys = blocks if keys.is_cuda else blocks.float()

    def search(self, queries: torch.Tensor, k: int) -> Found:
        """The k keys of largest ``<q, k>``: queries (h, m, d) -> scores (h, m, k) float32, ids (h, m, k) int64.

        Query head i reads key-value head i // (h / g); for keys (n, d), queries (m, d) -> (m, k) and (m, k).  Queries
        have the keys' dtype and device, and any strides: they are few, and are copied where they are not contiguous.
        They are not looked at for NaN, which would wait for the GPU.

        Raises:
            ArgumentError: rank, width, dtype, device or heads do not match; k not in 1..n, or above 2,048 on a GPU.
        """
        return self.layout.search(queries, k, self._head)

    def explain(self) -> dict[str, Any]:
        """Sizes, what a search reads, and what is not guaranteed."""
        return {
            "keys": (self.layout.g, self.layout.n, self.layout.d),
            "dtype": str(self.layout.dtype),
            "device": str(self.layout.device),
            "reads": "every key of the head, and writes a score for it",
            "guaranteed": "nothing: the k largest float32 scores, where keys that tie within rounding change places",
            "reports": "no half-space: faiss has no range search on a GPU (range_search_preassigned throws)",
        }

    def _head(self, held: Any, i: int, rows: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor) -> None:
        neighbours(held, rows.to(self._keys.dtype), self._keys[i], scores, ids, faiss.METRIC_INNER_PRODUCT)


def candidates(keys: torch.Tensor) -> Scored:
    """keys (n, d) or (g, n, d), float32, float16 or bfloat16 -> what answers ``search(queries, k)``.

    On a GPU the keys are read in place and not copied: what is written into them later is what is searched.  On the CPU
    float16 and bfloat16 are held as float32, exactly, and float32 in place.  Scores are float32 sums of exact products;
    they may overflow to infinity.  Nothing is guaranteed beyond that, see ``explain()``.

    Raises:
        ArgumentError: keys not such a tensor, empty, with rows that are not contiguous, NaN or infinite.
    """
    return Scored(keys)
