"""`hsr.HSRIndex` over keys on a GPU: int8 codes decide which keys may lie in a half-space, float64 decides which do.

A query is a few launches over n codes (`gpu.half_space`), then one that reads the candidates alone.  The host waits for
a few bytes three times: whether the arguments are finite, how many candidates there are, and how many of them stayed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from gpu import half_space, tensors
from gpu.int8_codes import Int8Codes
from hsr import HSRIndex, checks
from hsr.backend import named
from hsr.errors import ArgumentError, BackendUnavailable
from hsr.report import Report

WIDEST = 512  # beyond, a sum of products of codes could leave int32
PAIRS = 1 << 31  # most (query, key) pairs that one scan has bits for
BLOCK = 1 << 25  # scores that `topk` holds at once


class CudaIndex(HSRIndex):
    """See `HSRIndex`, which hands CUDA tensors over to this class; what differs is said here.

    Keys (n, d) or (g, n, d), n >= 0, d in 1..512, float16, bfloat16 or float32, are copied in their dtype.  Queries and
    a report's arrays are tensors on the keys' device, thresholds and prefixes such tensors or single numbers.  The
    rows of a report are in ascending order of ids, those of `topk` in descending order of scores.

    A deleted key costs a query its code, and its memory is not given back.  There is no `save`, and no `held`.

    Args:
        keys: as above.
        method: "auto" or "int8".
    """

    def __init__(self, keys: Any, method: str = "auto") -> None:
        if method not in ("auto", "int8"):
            raise ArgumentError(f"method must be auto or int8 for keys on a GPU; got {method!r}")
        if not isinstance(keys, torch.Tensor):
            raise ArgumentError(f"keys must be a torch tensor; got {type(keys).__name__}")
        array = tensors.floats("keys", keys, (2, 3), keys.device)
        if 0 in (array.shape[0] if array.ndim == 3 else 1, array.shape[-1]) or array.shape[-1] > WIDEST:
            raise ArgumentError(
                f"keys must hold at least one head and have width 1..{WIDEST} on {keys.device.type}; "
                f"got shape {tuple(array.shape)}"
            )
        self._device, self._dtype, self._heads_axis = keys.device, checks.dtype_name("keys", keys), keys.ndim == 3
        self._codes = Int8Codes(array if self._heads_axis else array[None])
        self._gone = 0

    @property
    def n(self) -> int:
        """Number of ids given: keys ever added (per head)."""
        return self._codes.n

    @property
    def alive(self) -> int:
        """Number of keys that were not deleted (per head)."""
        return self.n - self._gone

    @property
    def d(self) -> int:
        """Width of a key."""
        return self._codes.d

    @property
    def heads(self) -> int:
        """Number of key-value heads g; 1 for keys (n, d)."""
        return len(self._codes.keys)

    @property
    def method(self) -> str:
        """The table's name for this class."""
        return "int8"

    @property
    def largest(self) -> float:
        """Largest magnitude of any key entry, deleted ones included; read from the GPU."""
        return float(self._codes.largest)

    @property
    def keys(self) -> Any:
        """The living keys (alive, d) or (g, alive, d), in the order of their `ids`: a copy, on the GPU."""
        held = self._codes.keys[:, : self.n]
        living = held[:, self.ids] if self._gone else held.clone()
        return living if self._heads_axis else living[0]

    @property
    def ids(self) -> Any:
        """(alive,) int64, ascending, on the GPU: the ids of the living keys."""
        return torch.nonzero(~self._codes.dead)[:, 0]

    @property
    def codes(self) -> Int8Codes:
        """The keys and their codes; for reading."""
        return self._codes

    def count(self, queries: Any, threshold: Any, *, prefix: Any = None) -> Any:
        """How many keys `query` would report: int64 on the GPU, shape (m,) or (h, m)."""
        return self._query(queries, threshold, prefix, collect=False).counts

    def topk(self, queries: Any, r: Any, *, prefix: Any = None) -> Report:
        """The r keys of largest ``<q, k>`` per query, in descending order; see `HSRIndex.topk`.

        Every key is read: float64 products a block of keys at a time, and `torch.topk` over them.
        """
        rows, shape = self._rows(queries)
        flat = self.heads, rows.shape[1]
        limits = tensors.lengths("prefix", prefix, shape, self.n, self._device).reshape(flat)
        wanted = tensors.lengths("r", r, shape, self.n, self._device, least=1).reshape(flat)
        most = int(wanted.max()) if wanted.numel() else 0
        best, ids = self._best(rows.double(), limits, most)
        living = torch.nn.functional.pad((~self._codes.dead).cumsum(0), (1, 0))[limits]
        counts = torch.minimum(wanted, living).flatten()
        taken = torch.arange(best.shape[2], device=self._device) < counts[:, None]
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        found = ids.reshape(taken.shape)[taken].int(), best.reshape(taken.shape)[taken]
        seen = limits.flatten()
        return Report(offsets, *found, shape, self.n, seen, torch.zeros_like(seen), self.method)

    def append(self, keys: Any) -> None:
        """Add keys (t, d) or (g, t, d), coded in place; see `HSRIndex.append`."""
        array = tensors.floats("keys", keys, (3,) if self._heads_axis else (2,), self._device, self._dtype)
        array = array if self._heads_axis else array[None]
        if array.shape[0] != self.heads or array.shape[2] != self.d:
            wanted = f"({self.heads}, t, {self.d})" if self._heads_axis else f"(t, {self.d})"
            raise ArgumentError(f"keys must be {wanted} to match the index; got {tuple(keys.shape)}")
        self._codes.append(array)

    def delete(self, ids: Any) -> None:
        """Remove keys by id, in every head, from all that later calls report or count; see `HSRIndex.delete`.

        Args:
            ids: a sequence or array on the host, or a tensor, which the host reads.
        """
        places = torch.from_numpy(checks.distinct("ids", ids.cpu() if isinstance(ids, torch.Tensor) else ids, self.n))
        places = places.to(self._device)
        gone = places[self._codes.dead[places]]
        if len(gone):
            raise ArgumentError(f"ids must be those of living keys; got {int(gone[0])}, which was deleted before")
        self._codes.bury(places)
        self._gone += len(places)

    def held(self, prefix: np.ndarray) -> Any:
        """Refused: policies that sample keys run on the CPU."""
        raise BackendUnavailable(f"an index on {self._device} lends no keys to policies; build it over keys on the CPU")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Refused."""
        raise BackendUnavailable(f"an index on {self._device} cannot be saved; build it over keys on the CPU")

    def explain(self) -> dict[str, Any]:
        """Sizes, the method and why, its work, bytes per key held, dead or alive."""
        codes = self._codes
        return {
            "keys": (self.heads, self.n, self.d),
            "alive": self.alive,
            "dead": self._gone,
            "dtype": self.dtype,
            "method": "int8-cuda",
            "reasons": (
                f"keys on {self._device}: every int8 code is read, float64 decides about those that pass the bound",
                "no other method reports half-spaces there: faiss has no range search on a GPU",
            ),
            "work": named("index", self.method).work,
            "room": codes.room,
            "index_bytes_per_key": codes.codes.shape[2] + codes.steps.itemsize + codes.slack.itemsize,
            "key_bytes_per_key": self.d * codes.keys.itemsize,
        }

    def _rows(self, queries: Any) -> tuple[Any, tuple[int, ...]]:
        """queries -> (g, G m, d), contiguous, one block per key-value head, and their leading shape."""
        array = tensors.floats("queries", queries, (3,) if self._heads_axis else (2,), self._device, self._dtype)
        if array.shape[-1] != self.d:
            raise ArgumentError(f"queries must have width {self.d} to match keys; got shape {tuple(array.shape)}")
        if self._heads_axis:
            checks.grouped("queries", array.shape[0], self.heads)
        shape = tuple(array.shape[:-1])
        return array.contiguous().reshape(self.heads, math.prod(shape) // self.heads, self.d), shape

    def _query(self, queries: Any, threshold: Any, prefix: Any, *, collect: bool) -> Report:
        rows, shape = self._rows(queries)
        flat = rows.shape[:2]
        bounds = tensors.thresholds(threshold, shape, self._device).reshape(flat)
        limits = tensors.lengths("prefix", prefix, shape, self.n, self._device).reshape(flat)
        parts = [self._scanned(*asked, collect) for asked in self._asked(rows, bounds, limits)]
        counts, indices, scores, scanned = (torch.cat(part) for part in zip(*parts, strict=True))
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return Report(offsets, indices, scores, shape, self.n, scanned, limits.flatten(), self.method)

    def _asked(
        self, rows: torch.Tensor, bounds: torch.Tensor, limits: torch.Tensor
    ) -> Iterator[tuple[Int8Codes, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Codes and arguments of each scan, in the order of the report's rows: one, unless pairs are very many."""
        step = max(1, PAIRS // max(self.n, 1))
        if rows.shape[1] * self.heads <= step:
            yield self._codes, rows, bounds, limits
            return
        for head in range(self.heads):
            for first in range(0, rows.shape[1], step):
                part = slice(head, head + 1), slice(first, first + step)
                yield self._codes.of_head(head), rows[part], bounds[part], limits[part]

    def _scanned(
        self, codes: Int8Codes, rows: torch.Tensor, bounds: torch.Tensor, limits: torch.Tensor, collect: bool
    ) -> tuple[torch.Tensor, ...]:
        """rows (g, rows, d) -> counts (g rows,), indices and scores (nnz,) or empty, keys refined (g rows,)."""
        if rows.numel() == 0:
            none = torch.empty(0, dtype=torch.int64, device=self._device)
            return none, none.int(), none.double(), none
        found = half_space.marked(codes, rows, bounds, limits.int())
        starts = found.row_starts
        pairs = torch.empty(int(starts[-1]), dtype=torch.int64, device=self._device)
        found.listed(pairs)
        scores, keep = half_space.refined(codes, rows, bounds, pairs)
        passed = torch.nn.functional.pad(keep.cumsum(0), (1, 0))[starts]
        places = torch.nonzero(keep)[:, 0] if collect else starts[:0]
        return passed.diff(), (pairs[places] & half_space.ID).int(), scores[places], starts.diff()

    def _best(self, rows: torch.Tensor, limits: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """rows (g, rows, d) float64, limits (g, rows) -> the best scores (g, rows, most), -inf where none, and ids."""
        best = torch.full((*rows.shape[:2], most), -math.inf, dtype=torch.float64, device=self._device)
        ids = torch.zeros_like(best, dtype=torch.int64)
        step = max(1, BLOCK // max(1, rows.shape[0] * max(rows.shape[1], self.d)))
        for first in range(0, self.n, step):
            stop = min(first + step, self.n)
            place = torch.arange(first, stop, device=self._device)
            scores = rows @ self._codes.keys[:, first:stop].double().transpose(1, 2)
            hidden = self._codes.dead[first:stop] | (place >= limits[..., None])
            scores = torch.cat([best, scores.masked_fill(hidden, -math.inf)], 2)
            best, order = scores.topk(most, 2)
            ids = torch.cat([ids, place.expand(*rows.shape[:2], -1)], 2).gather(2, order)
        return best, ids


index = CudaIndex  # the table's entry
