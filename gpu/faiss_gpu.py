"""faiss over torch tensors, on the CPU or in place on a GPU: what clusters and candidates share.

Nothing that faiss finds is proven: it compares float32 sums, and its inverted lists skip keys.  Nor can it report a
half-space on a GPU: `GpuIndexIVF.range_search_preassigned` throws, and k-NN stops at 2,048 neighbours.  Exact reporting
therefore has kernels of its own, and this is where selectors take clusters and candidates from.

Streams: faiss runs in the order of torch's current stream (`faiss.contrib.torch_utils`).  Threads: its resources serve
one call at a time, so calls for GPUs take turns; what they launched still overlaps.  A call may not be captured in a
CUDA graph.

Source: https://github.com/facebookresearch/faiss, faiss/gpu/GpuDistance.cu and StandardGpuResources.cpp.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import faiss
import faiss.contrib.torch_utils  # after torch: teaches faiss to take tensors and to keep to torch's stream
import torch

from hsr.checks import grouped, whole
from hsr.errors import ArgumentError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 2048  # neighbours that a search on a GPU can select, and lists that it can probe
SCRATCH = 512 << 20  # bytes faiss keeps on each GPU in use; a search that needs more allocates it, waiting for the GPU

_resources: dict[int, Any] = {}
_turn = threading.Lock()


def refuses(*, device: str = "cpu", **call: object) -> str | None:
    """Why the faiss that is installed cannot serve a device; None if it can."""
    if device not in ("cpu", "cuda"):
        return f"runs on cpu and cuda, the arrays are on {device}"
    if device == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        return "needs a faiss built for GPUs (faiss-gpu); the one that is installed serves the CPU alone"
    return None


class Found(NamedTuple):
    """Keys found for queries (..., m, d), by descending score; ties come in no particular order."""

    scores: torch.Tensor  # (..., m, k) float32: <q, k>, unscaled; -inf where no key was found
    ids: torch.Tensor  # (..., m, k) int64: position of the key in its head; -1 where no key was found


@dataclass(frozen=True)
class Layout:
    """Shape, dtype and place of the keys that queries must match."""

    g: int
    n: int
    d: int
    dtype: torch.dtype
    device: torch.device
    heads_axis: bool

    def blocks(self, queries: torch.Tensor) -> torch.Tensor:
        """queries (m, d) or (h, m, d) -> (g, G m, d), contiguous: the rows that read each key-value head.

        Raises:
            ArgumentError: rank, width, dtype, device or number of heads do not match the keys.
        """
        wanted = f"(h, m, {self.d})" if self.heads_axis else f"(m, {self.d})"
        _require_tensor("queries", queries)
        if queries.ndim != 2 + self.heads_axis or queries.shape[-1] != self.d:
            raise ArgumentError(f"queries must be {wanted} to match keys; got {tuple(queries.shape)}")
        if queries.dtype != self.dtype or queries.device != self.device:
            raise ArgumentError(
                f"queries must be {self.dtype} on {self.device} to match keys; got {queries.dtype} on {queries.device}"
            )
        if self.heads_axis:
            grouped("queries", queries.shape[0], self.g)
        rows = math.prod(queries.shape[:-1]) // self.g
        return queries.detach().reshape(self.g, rows, self.d).contiguous()

    def search(self, queries: torch.Tensor, k: int, head: Callable[..., None]) -> Found:
        """Have ``head(resources, i, rows (G m, d), scores (G m, k), ids (G m, k))`` fill the last two for each head.

        Raises:
            ArgumentError: as for `blocks`, or k out of 1..n, or above 2,048 on a GPU.
        """
        rows = self.blocks(queries)
        k = self.selected("k", k, self.n)
        scores = torch.empty((*rows.shape[:2], k), dtype=torch.float32, device=self.device)
        ids = torch.empty((*rows.shape[:2], k), dtype=torch.int64, device=self.device)
        with resources(self.device) as held:
            for i in range(self.g if rows.shape[1] else 0):
                head(held, i, rows[i], scores[i], ids[i])
        shape = (*queries.shape[:-1], k)
        return Found(scores.masked_fill_(ids < 0, -torch.inf).view(shape), ids.view(shape))

    def selected(self, name: str, value: int, limit: int) -> int:
        """A whole number in 1..limit, and on a GPU at most 2,048."""
        found = whole(name, value, 1, limit)
        if self.device.type == "cuda" and found > MOST:
            raise ArgumentError(f"{name} must be at most {MOST}, the most that faiss selects on a GPU; got {found}")
        return found


def keys_of(keys: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """keys (n, d) or (g, n, d) -> a view (g, n, d) and their layout.

    Raises:
        ArgumentError: not a tensor of float32, float16 or bfloat16 on the CPU or a GPU, wrong rank, empty, a head whose
            rows are not contiguous (heads may lie apart, as in a cache with room), NaN or infinity.
    """
    _require_tensor("keys", keys)
    if keys.ndim not in (2, 3) or 0 in keys.shape:
        raise ArgumentError(f"keys must be (n, d) or (g, n, d) and not empty; got shape {tuple(keys.shape)}")
    if keys.dtype not in DTYPES:
        raise ArgumentError(f"keys must be {', '.join(map(str, DTYPES))}; got {keys.dtype}")
    blocks = keys.detach() if keys.ndim == 3 else keys.detach()[None]
    if not blocks[0].is_contiguous():
        raise ArgumentError(f"keys must have contiguous rows in each head (n, d); got strides {keys.stride()}")
    if not bool(torch.isfinite(blocks).all()):
        raise ArgumentError("keys must be finite; got NaN or infinity")
    g, n, d = blocks.shape
    return blocks, Layout(g, n, d, keys.dtype, keys.device, keys.ndim == 3)


@contextmanager
def resources(device: torch.device) -> Iterator[Any]:
    """faiss's resources of a GPU, for one call at a time; None on the CPU."""
    if device.type == "cpu":
        yield None
        return
    with _turn, torch.cuda.device(device):
        index = torch.cuda.current_device()
        if index not in _resources:
            fresh = faiss.StandardGpuResources()
            fresh.setTempMemory(SCRATCH)
            fresh.setPinnedMemory(0)  # its use is keys that lie on the host
            _resources[index] = fresh
        yield _resources[index]


def neighbours(
    held: Any, queries: torch.Tensor, keys: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor, metric: int
) -> None:
    """queries (m, d), keys (n, d) -> the k best of each query, into scores (m, k) float32 and ids (m, k) int64.

    All are contiguous; queries and keys have one dtype, on the CPU float32.
    """
    k = scores.shape[1]
    if held is None:
        found = faiss.knn(queries, keys, k, metric=metric)
        scores.copy_(found[0])
        ids.copy_(found[1])
    else:
        faiss.knn_gpu(held, queries, keys, k, D=scores, I=ids, metric=metric)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(f"{name} must be a torch tensor; got {type(value).__name__}")
