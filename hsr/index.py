"""`HSRIndex`: one class over every index structure, for one set of keys or one per key-value head."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hsr import brute_numba, checks, selection, storage
from hsr.backend import choose, named, preferred
from hsr.errors import ArgumentError
from hsr.growth import Segment, covered, grown, merge_start, with_room
from hsr.report import Hits, Report
from hsr.roster import Held, Roster
from hsr.rows import concatenate, stacked
from hsr.scaling import without_overflow
from hsr.topk_numba import largest, sampled_thresholds

MOST = 1 << 30  # most keys in one structure, whose positions are int32
SCRATCH = 1 << 26  # most (query, key) pairs one structure call may face; its scratch is that large, untouched


class HSRIndex:
    """Report every key of a closed half-space ``<q, k> >= b``: no false negatives for any finite input.

    A key whose score lies within the float64 rounding band of the threshold (see `hsr.exact`) may be reported too.  The
    index keeps its own copy of the keys; float16 and bfloat16 are held, exactly, as float32.

    A key's id is its position in the order of adding: 0 to n - 1, whatever is deleted; reports and ``prefix`` speak of
    ids.  Appends and deletions cost a bounded number of builds per key, not a build each (see `hsr.growth`,
    `hsr.roster`).

    Args:
        keys: (n, d), or (g, n, d) for g key-value heads, n >= 1; float64, float32, float16 or bfloat16; a numpy array
            or a torch CPU tensor.  A CUDA tensor is served by the table's row ``index``, see `gpu.index`.
        method: a name of the dispatch table (`hsr.methods`), or "auto": chosen from n, d and the pruning power
            measured on a sample; `explain` says why.
        buffer: appended keys that collect, scored exactly, before they are built into a structure.

    Raises:
        ArgumentError: wrong rank or dtype, n = 0, NaN or infinity, an unknown method.
        BackendUnavailable: the method asked for cannot serve these keys.

    Source: Algorithm 1 of arXiv 2410.10165 (init, query, insert, remove); insertion by the logarithmic method (Bentley
    and Saxe 1980), removal by global rebuilding (Overmars 1983).
    """

    def __new__(cls, keys: Any = None, *args: Any, **settings: Any) -> HSRIndex:
        """An index, or one of the subclass that serves keys on a GPU; Python then calls that one's constructor."""
        device = checks.device(keys) if cls is HSRIndex else "cpu"
        return object.__new__(preferred("index", device=device) if device == "cuda" else cls)  # type: ignore[arg-type]

    def __init__(self, keys: Any, method: str = "auto", *, buffer: int = 256) -> None:
        array = checks.floats("keys", keys, (2, 3))
        if 0 in array.shape:
            raise ArgumentError(f"keys must hold at least one key, head and dimension; got shape {array.shape}")
        self._buffer = checks.whole("buffer", buffer, 1)
        self._dtype = checks.dtype_name("keys", keys)
        self._heads_axis = array.ndim == 3
        self._store = (array if self._heads_axis else array[None]).copy()  # (g, capacity, d)
        self._roster = Roster.of(array.shape[-2])
        self._largest = float(np.abs(self._store).max())
        self._choice = selection.suggest(self._store[0]) if method == "auto" else selection.asked(method)
        self._build = choose("build", self._choice.method, d=self.d, n=self.n)
        self._segments = tuple(self._built(head) for head in self._store)

    @property
    def n(self) -> int:
        """Number of ids given, which is that of keys ever added (per head): the columns of a report."""
        return self._roster.n

    @property
    def alive(self) -> int:
        """Number of keys that were not deleted (per head)."""
        return self._roster.alive

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
        """Largest magnitude of any key entry; after deletions, at least that until the next rebuild."""
        return self._largest

    @property
    def keys(self) -> np.ndarray:
        """The living keys (alive, d) or (g, alive, d), in the order of their `ids`; read-only.

        A view of what the index holds, or a copy while there are dead keys in it.
        """
        held = self._held
        living = np.compress(self._roster.keep, held, axis=1) if self._roster.deaths else held
        living.flags.writeable = False
        return living if self._heads_axis else living[0]

    @property
    def ids(self) -> np.ndarray:
        """(alive,) int64, ascending: the ids of the living keys; ``keys[..., i, :]`` has the id ``ids[i]``."""
        return self._roster.ids[self._roster.keep]

    def query(self, queries: Any, threshold: Any, *, prefix: Any = None) -> Report:
        """Every key with ``<q, k> >= threshold`` (unscaled products).

        Args:
            queries: (m, d) for keys (n, d); (h, m, d) for keys (g, n, d), head i reading key-value head i // (h / g).
            threshold: a scalar, or one per query (m,) or (h, m); -inf reports all keys, +inf none.
            prefix: None, or whole numbers 0..n (a scalar or one per query): only ids below ``prefix`` count.

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
        """The r keys of largest ``<q, k>`` per query (all, where fewer live in the prefix), in descending order.

        A half-space that should hold them is placed from a sample of the keys and reported; where it holds fewer, it is
        widened to all keys.  So the result is exact; keys that tie within the rounding band are interchangeable.

        Args:
            queries: as for `query`.
            r: 1..n; a whole number, or an array of them, one per query (m,) or (h, m).
            prefix: as for `query`.

        Raises:
            ArgumentError: as for `query`, or r out of range.
        """
        rows, shape = self._rows(queries)
        limits = checks.lengths("prefix", prefix, shape, self.n)
        held = self.held(limits)
        wanted = np.minimum(checks.lengths("r", r, shape, self.n, least=1), held.living)
        bounds = sampled_thresholds(self._store, held, rows, wanted, self.largest).reshape(shape)
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
        old, stored = self._roster.stored, self._roster.stored + array.shape[1]
        store = with_room(self._store, old, stored)
        store[:, old:stored] = array
        if self._roster.deaths and merge_start(self._segments[0], stored, self._buffer) == 0:
            self._rebuild(store, np.append(self._roster.keep, np.ones(stored - old, bool)))  # the dead go for free
            return
        segments = tuple(
            grown(head, keys[:stored], self._buffer, self._build)
            for head, keys in zip(self._segments, store, strict=True)
        )
        self._largest = max(self._largest, float(np.abs(array).max(initial=0.0)))
        self._store, self._segments = store, segments
        self._roster.extend(stored - old)

    def delete(self, ids: Any) -> None:
        """Remove keys by id, in every head, from all that later calls report or count; the ids are not given again.

        When half of the keys held are dead, the index is rebuilt over the living; until then a dead key costs a query
        what a living one does, counting included.

        Args:
            ids: (t,), a sequence or array of whole numbers in 0..n-1, each once; nothing changes if it is refused.

        Raises:
            ArgumentError: not whole numbers, out of range, repeated, or deleted before.
        """
        places = self._roster.found(checks.distinct("ids", ids, self.n))
        if 2 * (self._roster.deaths + len(places)) < self._roster.stored:
            self._roster.bury(places)
            return
        keep = self._roster.keep
        keep[places] = False
        self._rebuild(self._store, keep)

    def held(self, prefix: np.ndarray) -> Held:
        """The keys as they are held, for a caller that samples ids below prefix (...) int64, in 0..n."""
        limits = self._roster.places(prefix)
        store = self._store.view()
        store.flags.writeable = False
        return Held(store, self._roster.dead, limits, self._roster.living(limits))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file (see `hsr.storage`); an existing file stays until the new one is whole."""
        settings = {
            "method": self._choice.method,
            "reasons": list(self._choice.reasons),
            "buffer": self._buffer,
            "dtype": self._dtype,
            "heads_axis": self._heads_axis,
            "fresh": self._roster.fresh,
        }
        storage.save(Path(path), settings, (self._held, self._roster.old, self._roster.dead), self._segments)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HSRIndex:
        """Read an index written by `save`.

        Raises:
            StorageError: not such a file, another version, truncated or altered.
            FileNotFoundError: no such file.
        """
        settings, (store, old, dead), segments = storage.load(Path(path))
        index = cls.__new__(cls)
        index._buffer, index._dtype = settings["buffer"], settings["dtype"]
        index._heads_axis = settings["heads_axis"]
        index._store, index._segments = store, segments
        index._roster = Roster(store.shape[1], old, settings["fresh"], dead)
        index._largest = float(np.abs(store).max(initial=0.0))
        index._choice = selection.Choice(settings["method"], tuple(settings["reasons"]))
        index._build = choose("build", index.method, d=index.d, n=index.n)
        return index

    def explain(self) -> dict[str, Any]:
        """Sizes, the method and why it was chosen, its work, its segments, bytes per key held, dead or alive."""
        held = sum(storage.nbytes(segment.structure) for head in self._segments for segment in head)
        return {
            "keys": (self.heads, self.n, self.d),
            "alive": self.alive,
            "dead": self._roster.deaths,
            "dtype": self.dtype,
            "method": self.method,
            "reasons": self._choice.reasons,
            "work": named("build", self.method).work,
            "segments": [(segment.start, segment.stop) for segment in self._segments[0]],
            "buffered": self._roster.stored - covered(self._segments[0]),
            "index_bytes_per_key": held / max(1, self.heads * self._roster.stored),
            "key_bytes_per_key": self.d * self._store.itemsize,
        }

    def __repr__(self) -> str:
        return (
            f"HSRIndex(heads={self.heads}, n={self.n}, alive={self.alive}, d={self.d}, dtype={self.dtype}, "
            f"method={self.method})"
        )

    @property
    def _held(self) -> np.ndarray:
        """(g, stored, d): a read-only view of the keys that are stored, dead ones among them."""
        view = self._store[:, : self._roster.stored]
        view.flags.writeable = False
        return view

    def _built(self, keys: np.ndarray) -> tuple[Segment, ...]:
        n = len(keys)
        return tuple(Segment(a, min(a + MOST, n), self._build(keys[a : min(a + MOST, n)])) for a in range(0, n, MOST))

    def _rebuild(self, store: np.ndarray, keep: np.ndarray) -> None:
        """Hold only the keys of store (g, at least s, d) that are marked in keep (s,) bool."""
        store = np.compress(keep, store, axis=1)
        segments = tuple(self._built(head) for head in store)
        self._largest = float(np.abs(store).max(initial=0.0))
        self._store, self._segments, self._roster = store, segments, self._roster.rebuilt(keep)

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
        roster = self._roster
        limits = roster.places(checks.lengths("prefix", prefix, shape, self.n)).reshape(self.heads, -1)
        flat, shrunk, shift = without_overflow(rows.reshape(-1, self.d), bounds, self.largest)
        rows, bounds = flat.reshape(rows.shape), shrunk.reshape(limits.shape)
        every = collect or roster.deaths > 0  # counting tells no dead key from a living one
        parts = [part for head in range(self.heads) for part in self._head(head, rows, bounds, limits, every)]
        hits = stacked(parts)
        if every and (roster.deaths or roster.fresh):
            hits = roster.reported(hits, collect, np.int32 if self.n <= MOST else np.int64)
        if collect and shift is not None:
            with np.errstate(over="ignore"):
                hits = hits._replace(scores=np.ldexp(hits.scores, np.repeat(shift, np.diff(hits.offsets))))
        return Report(hits.offsets, hits.indices, hits.scores, shape, self.n, hits.scanned, hits.visited, self.method)

    def _head(
        self, head: int, rows: np.ndarray, bounds: np.ndarray, limits: np.ndarray, collect: bool
    ) -> Iterator[Hits]:
        """One head's hits, in blocks of queries small enough for the scratch."""
        step = max(1, SCRATCH // max(1, self._roster.stored))
        for first in range(0, max(rows.shape[1], 1), step):
            block = slice(first, first + step)
            yield self._block(head, rows[head, block], bounds[head, block], limits[head, block], collect)

    def _block(self, head: int, rows: np.ndarray, bounds: np.ndarray, limits: np.ndarray, collect: bool) -> Hits:
        runs = list(self._segments[head])
        start, stored = covered(self._segments[head]), self._roster.stored
        if start < stored or not runs:
            runs.append(Segment(start, stored, brute_numba.Brute(self._largest)))
        if len(runs) == 1:  # it holds every key, so the limits are its own
            return runs[0].structure.report(self._store[head, :stored], rows, bounds, limits, collect)
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
        return concatenate(parts, [run.start for run in runs], np.int32 if stored <= MOST else np.int64)
