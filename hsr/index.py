"""`HSRIndex`: one class over every index structure, for one set of keys or one per key-value head."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hsr import brute_numba, checks, selection, storage
from hsr.backend import choose
from hsr.errors import ArgumentError
from hsr.growth import Segment, grown
from hsr.report import Hits, Report
from hsr.rows import concatenate, stacked
from hsr.scaling import without_overflow
from hsr.topk_numba import largest, sampled_thresholds

MOST = 1 << 30  # most keys in one structure, whose positions are int32
SCRATCH = 1 << 26  # most (query, key) pairs one structure call may face; its scratch is that large, untouched


class HSRIndex:
    """Report every key of a closed half-space ``<q, k> >= b``: no false negatives for any finite input.

    A key whose score lies within the float64 rounding band of the threshold (see `hsr.exact`) may be reported too.  The
    index keeps its own copy of the keys; float16 and bfloat16 are held, exactly, as float32.

    Args:
        keys: (n, d), or (g, n, d) for g key-value heads, n >= 1; float64, float32, float16 or bfloat16; a numpy array
            or a torch CPU tensor.
        method: a name of the dispatch table (`hsr.methods`), or "auto": chosen from n, d and the pruning power
            measured on a sample; `explain` says why.
        buffer: appended keys that collect, scored exactly, before they are built into a structure.

    Raises:
        ArgumentError: wrong rank or dtype, n = 0, NaN or infinity, an unknown method.
        BackendUnavailable: the method asked for cannot serve these keys.

    Source: Algorithm 1 of arXiv 2410.10165 (init, query, insert).
    """

    def __init__(self, keys: Any, method: str = "auto", *, buffer: int = 256) -> None:
        array = checks.floats("keys", keys, (2, 3))
        if 0 in array.shape:
            raise ArgumentError(f"keys must hold at least one key, head and dimension; got shape {array.shape}")
        self._buffer = checks.whole("buffer", buffer, 1)
        self._dtype = checks.dtype_name("keys", keys)
        self._heads_axis = array.ndim == 3
        self._store = (array if self._heads_axis else array[None]).copy()  # (g, capacity, d)
        self._n = array.shape[-2]
        self._largest = float(np.abs(self._store).max())
        self._choice = selection.suggest(self._store[0]) if method == "auto" else selection.asked(method)
        self._build = choose("build", self._choice.method, d=self.d, n=self.n)
        self._segments = tuple(self._built(head) for head in self._store)

    @property
    def n(self) -> int:
        """Number of keys (per head)."""
        return self._n

    @property
    def d(self) -> int:
        """Width of a key."""
        return self._store.shape[2]

    @property
    def heads(self) -> int:
        """Number of key-value heads g; 1 for keys (n, d)."""
        return self._store.shape[0]

    @property
    def dtype(self) -> str:
        """Name of the dtype the keys came in; queries and appended keys must have it."""
        return self._dtype

    @property
    def method(self) -> str:
        """The method that serves this index."""
        return self._choice.method

    @property
    def largest(self) -> float:
        """Largest magnitude of any key entry."""
        return self._largest

    @property
    def keys(self) -> np.ndarray:
        """The keys (n, d) or (g, n, d), as a read-only view of what the index holds."""
        view = self._store[:, : self._n]
        view.flags.writeable = False
        return view if self._heads_axis else view[0]

    def query(self, queries: Any, threshold: Any, *, prefix: Any = None) -> Report:
        """Every key with ``<q, k> >= threshold`` (unscaled products).

        Args:
            queries: (m, d) for keys (n, d); (h, m, d) for keys (g, n, d), head i reading key-value head i // (h / g).
            threshold: a scalar, or one per query (m,) or (h, m); -inf reports all keys, +inf none.
            prefix: None, or whole numbers 0..n (a scalar or one per query): only the first ``prefix`` keys count.

        Returns:
            Report: CSR over the flattened queries.

        Raises:
            ArgumentError: wrong rank, width, dtype or head count; NaN or infinity in queries, NaN in threshold.
        """
        return self._query(queries, threshold, prefix, collect=True)

    def count(self, queries: Any, threshold: Any, *, prefix: Any = None) -> np.ndarray:
        """How many keys `query` would report: int64, shape (m,) or (h, m).  Arguments and errors as for `query`."""
        return self._query(queries, threshold, prefix, collect=False).counts

    def topk(self, queries: Any, r: Any, *, prefix: Any = None) -> Report:
        """The r keys of largest ``<q, k>`` per query (all of a shorter prefix), in descending order.

        A half-space that should hold them is placed from a sample of the keys and reported; where it holds fewer, it is
        widened to all keys.  So the result is exact; keys that tie within the rounding band are interchangeable.

        Args:
            queries: as for `query`.
            r: at least 1; a whole number, or an array of them, one per query (m,) or (h, m).
            prefix: as for `query`.

        Raises:
            ArgumentError: as for `query`, or r out of range.
        """
        rows, shape = self._rows(queries)
        limits = checks.lengths("prefix", prefix, shape, self.n)
        wanted = np.minimum(checks.lengths("r", r, shape, self.n, least=1), limits)
        bounds = sampled_thresholds(self._store, rows, limits, wanted, self.largest).reshape(shape)
        found = self._query(queries, bounds, limits, collect=True)
        short = found.counts < wanted
        if short.any():
            found = self._query(queries, np.where(short, -np.inf, bounds), limits, collect=True)
        return largest(found, wanted.ravel())

    def append(self, keys: Any) -> None:
        """Add keys (t, d) or (g, t, d), seen by every later query; nothing changes if the argument is refused.

        Raises:
            ArgumentError: rank, width, head count or dtype differ from the index, or a value is not finite.
        """
        array = checks.floats("keys", keys, (3,) if self._heads_axis else (2,))
        self._require_dtype("keys", keys)
        array = array if self._heads_axis else array[None]
        if array.shape[0] != self.heads or array.shape[2] != self.d:
            wanted = f"({self.heads}, t, {self.d})" if self._heads_axis else f"(t, {self.d})"
            raise ArgumentError(f"keys must be {wanted} to match the index; got {tuple(keys.shape)}")
        n = self._n + array.shape[1]
        store = self._store
        if n > store.shape[1]:
            store = np.empty((self.heads, max(n, 2 * store.shape[1]), self.d), store.dtype)
            store[:, : self._n] = self._store[:, : self._n]
        store[:, self._n : n] = array
        segments = tuple(
            grown(old, head[:n], self._buffer, self._build) for old, head in zip(self._segments, store, strict=True)
        )
        self._largest = max(self._largest, float(np.abs(array).max(initial=0.0)))
        self._store, self._segments, self._n = store, segments, n

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file (see `hsr.storage`); an existing file stays until the new one is whole."""
        settings = {
            "method": self._choice.method,
            "reasons": list(self._choice.reasons),
            "buffer": self._buffer,
            "dtype": self._dtype,
            "heads_axis": self._heads_axis,
        }
        storage.save(Path(path), settings, self._store[:, : self._n], self._segments)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HSRIndex:
        """Read an index written by `save`.

        Raises:
            StorageError: not such a file, another version, truncated or altered.
            FileNotFoundError: no such file.
        """
        settings, store, segments = storage.load(Path(path))
        index = cls.__new__(cls)
        index._buffer, index._dtype = settings["buffer"], settings["dtype"]
        index._heads_axis = settings["heads_axis"]
        index._store, index._n, index._segments = store, store.shape[1], segments
        index._largest = float(np.abs(store).max())
        index._choice = selection.Choice(settings["method"], tuple(settings["reasons"]))
        index._build = choose("build", index.method, d=index.d, n=index.n)
        return index

    def explain(self) -> dict[str, Any]:
        """What this index is: sizes, the method and why it was chosen, its segments, bytes held per key."""
        held = sum(storage.nbytes(segment.structure) for head in self._segments for segment in head)
        return {
            "keys": (self.heads, self.n, self.d),
            "dtype": self.dtype,
            "method": self.method,
            "reasons": self._choice.reasons,
            "segments": [(segment.start, segment.stop) for segment in self._segments[0]],
            "buffered": self.n - self._segments[0][-1].stop,
            "index_bytes_per_key": held / (self.heads * self.n),
            "key_bytes_per_key": self.d * self._store.itemsize,
        }

    def __repr__(self) -> str:
        return f"HSRIndex(heads={self.heads}, n={self.n}, d={self.d}, dtype={self.dtype}, method={self.method})"

    def _built(self, keys: np.ndarray) -> tuple[Segment, ...]:
        starts = range(0, self.n, MOST)
        return tuple(Segment(a, min(a + MOST, self.n), self._build(keys[a : min(a + MOST, self.n)])) for a in starts)

    def _require_dtype(self, name: str, array: Any) -> None:
        found = checks.dtype_name(name, array)
        if found != self._dtype:
            raise ArgumentError(f"{name} must have the index's dtype {self._dtype}; got {found}")

    def _rows(self, queries: Any) -> tuple[np.ndarray, tuple[int, ...]]:
        """queries -> (g, G m, d) float64, one block per key-value head, and their leading shape."""
        array = checks.floats("queries", queries, (3,) if self._heads_axis else (2,))
        self._require_dtype("queries", queries)
        if array.shape[-1] != self.d:
            raise ArgumentError(f"queries must have width {self.d} to match keys; got shape {array.shape}")
        if self._heads_axis:
            checks.grouped("queries", array.shape[0], self.heads)
        size = math.prod(array.shape[:-1]) // self.heads
        return array.astype(np.float64).reshape(self.heads, size, self.d), array.shape[:-1]

    def _query(self, queries: Any, threshold: Any, prefix: Any, *, collect: bool) -> Report:
        rows, shape = self._rows(queries)
        bounds = checks.thresholds(threshold, shape).ravel()
        limits = checks.lengths("prefix", prefix, shape, self.n).reshape(self.heads, -1)
        flat, shrunk, shift = without_overflow(rows.reshape(-1, self.d), bounds, self.largest)
        rows, bounds = flat.reshape(rows.shape), shrunk.reshape(limits.shape)
        parts = [part for head in range(self.heads) for part in self._head(head, rows, bounds, limits, collect)]
        hits = stacked(parts)
        if collect and shift is not None:
            with np.errstate(over="ignore"):
                hits = hits._replace(scores=np.ldexp(hits.scores, np.repeat(shift, np.diff(hits.offsets))))
        return Report(hits.offsets, hits.indices, hits.scores, shape, self.n, hits.scanned, hits.visited, self.method)

    def _head(
        self, head: int, rows: np.ndarray, bounds: np.ndarray, limits: np.ndarray, collect: bool
    ) -> Iterator[Hits]:
        """One head's hits, in blocks of queries small enough for the scratch."""
        step = max(1, SCRATCH // self.n)
        for first in range(0, max(rows.shape[1], 1), step):
            block = slice(first, first + step)
            yield self._block(head, rows[head, block], bounds[head, block], limits[head, block], collect)

    def _block(self, head: int, rows: np.ndarray, bounds: np.ndarray, limits: np.ndarray, collect: bool) -> Hits:
        runs = list(self._segments[head])
        covered = runs[-1].stop
        if covered < self.n:
            runs.append(Segment(covered, self.n, brute_numba.Brute(self._largest)))
        if len(runs) == 1:  # it holds every key, so the limits are its own
            return runs[0].structure.report(self._store[head, : self.n], rows, bounds, limits, collect)
        parts = [
            run.structure.report(
                self._store[head, run.start : run.stop],
                rows,
                bounds,
                np.clip(limits - run.start, 0, run.stop - run.start),
                collect,
            )
            for run in runs
        ]
        return concatenate(parts, [run.start for run in runs], np.int32 if self.n <= MOST else np.int64)
