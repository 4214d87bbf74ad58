"""Candidates from inverted lists: faiss clusters the keys and a search scores those of a few clusters alone."""

from __future__ import annotations

import math
from typing import Any

import faiss
import torch

from gpu.faiss_gpu import MOST, Found, Layout, keys_of, resources
from gpu.faiss_gpu import refuses as refuses
from hsr.checks import whole


class Inverted:
    """See `candidates`."""

    def __init__(self, keys: torch.Tensor, nlist: int | None, nprobe: int | None, seed: int) -> None:
        blocks, self.layout = keys_of(keys)
        default = math.isqrt(self.layout.n)
        self.nlist = default if nlist is None else whole("nlist", nlist, 1, self.layout.n)
        self.nprobe = min(-(-self.nlist // 8), MOST) if nprobe is None else self._probes(nprobe)
        seed = whole("seed", seed, 0, 2**31 - 1)
        with resources(self.layout.device) as held:
            self._indexes = [self._built(held, block.float(), seed) for block in blocks]

    def search(self, queries: torch.Tensor, k: int, *, nprobe: int | None = None) -> Found:
        """Up to k keys of large ``<q, k>`` from the nprobe lists whose centroids score best.

        queries (h, m, d) -> scores (h, m, k) float32, ids (h, m, k) int64; -inf and -1 where the lists held fewer.
        Heads, strides and NaN as for `gpu.knn_faiss.Scored.search`; float16 and bfloat16 queries become float32.

        Raises:
            ArgumentError: rank, width, dtype, device or heads do not match; k not in 1..n, nprobe not in 1..nlist, or
                either above 2,048 on a GPU.
        """
        probes = self.nprobe if nprobe is None else self._probes(nprobe)

        def head(held: Any, i: int, rows: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor) -> None:
            self._indexes[i].nprobe = probes
            self._indexes[i].search(rows.float(), scores.shape[1], D=scores, I=ids)

        return self.layout.search(queries, k, head)

    def explain(self) -> dict[str, Any]:
        """Sizes, what a search reads, and what is not guaranteed."""
        return {
            "keys": (self.layout.g, self.layout.n, self.layout.d),
            "dtype": str(self.layout.dtype),
            "device": str(self.layout.device),
            "lists": self.nlist,
            "probed": self.nprobe,
            "reads": f"{self.nlist} centroids, then about {self.nprobe / self.nlist:.1%} of the keys, as float32",
            "guaranteed": "nothing: a key of a list that is not probed is missed, however well it scores",
            "reports": "no half-space: faiss has no range search on a GPU (range_search_preassigned throws)",
        }

    def _probes(self, nprobe: int) -> int:
        return self.layout.selected("nprobe", nprobe, self.nlist)

    def _built(self, held: Any, keys: torch.Tensor, seed: int) -> Any:
        """One head's trained and filled index; keys (n, d) float32."""
        index = _empty(held, self.layout, self.nlist)
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1  # fewer than faiss would like are the caller's choice; it warns on stderr
        index.train(keys)
        index.add(keys)
        return index


def candidates(keys: torch.Tensor, *, nlist: int | None = None, nprobe: int | None = None, seed: int = 0) -> Inverted:
    """keys (n, d) or (g, n, d), float32, float16 or bfloat16 -> what answers ``search(queries, k, nprobe=None)``.

    Candidates are approximate and nothing is guaranteed: a key of a list that is not probed is missed.  With nprobe =
    nlist every key is scored.  The index holds the keys as float32, 4 d + 8 bytes each.  faiss trains on at most 256
    keys a list and, on a GPU, fetches all of them to the host for that.

    Args:
        keys: as for `gpu.knn_faiss.candidates`, but copied.
        nlist: clusters per head, 1..n; None for the square root of n.
        nprobe: lists that a search scores unless it says otherwise, 1..nlist; None for an eighth of them.
        seed: of the clustering.

    Raises:
        ArgumentError: keys as for `gpu.knn_faiss.candidates`; nlist, nprobe or seed out of range.
    """
    return Inverted(keys, nlist, nprobe, seed)


def _empty(held: Any, layout: Layout, nlist: int) -> Any:
    if held is None:
        quantizer = faiss.IndexFlatIP(layout.d)
        return faiss.IndexIVFFlat(quantizer, layout.d, nlist, faiss.METRIC_INNER_PRODUCT)
    library: Any = faiss  # faiss-cpu has none of these names
    config = library.GpuIndexIVFFlatConfig()
    config.device = layout.device.index
    return library.GpuIndexIVFFlat(held, layout.d, nlist, faiss.METRIC_INNER_PRODUCT, config)
