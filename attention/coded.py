"""Attention to the keys that codes choose: sinks and recent keys for certain, of the rest one list per key-value head.

What chooses the list, and what is then known of the error, is the policy's (`Coded`); reading the keys is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numba import get_num_threads

from attention import sampled_numba
from attention.result import UNIT, Certificate, Counters, Result, joined
from attention.values import Values
from attention.visible import Visible
from hsr.coded_scan import KEYS
from hsr.errors import ArgumentError
from hsr.lifted import LARGEST
from hsr.lifted_numba import CHUNK

TASKS = 64  # into which attending to listed keys is cut, however many threads there are: sums are always the same
SCORES = 1 << 26  # most coded scores held at once


class Asked(NamedTuple):
    """Rows of queries and what their list is chosen by; the G query heads of a key-value head share a list."""

    queries: np.ndarray  # (g, rows, G, d) float64, C-contiguous
    limits: np.ndarray  # (g, rows) int64, keys that a row sees
    spans: np.ndarray  # (g, rows, 2) int64, first and last + 1 of the keys to choose from; the others are certain
    known: np.ndarray  # (g, rows, G), log-sum-exp of the certain keys' scaled scores and lift
    scale: float


class Chosen(Protocol):
    """Keys listed for every row: counts[..., c] entries of ids and pis from CHUNK * c on."""

    ids: np.ndarray  # (g, rows, n) int32
    pis: np.ndarray  # (g, rows, n) float32, the chance with which each was listed
    counts: np.ndarray  # (g, rows, chunks) int64
    variance: np.ndarray  # (g, rows, 2) of their number: if listed independently, and as it is


class Attended(NamedTuple):
    """Sums over certain and listed keys."""

    output: np.ndarray  # (h, rows, dv)
    lse: np.ndarray  # (h, rows)
    moments: np.ndarray  # (h, rows, 3), as `sampled_numba.merge` has them
    reported: np.ndarray  # (h, rows)
    chosen: Any  # the policy's own kind of `Chosen`


class Coded(Protocol):
    """A policy whose keys are chosen by codes."""

    sinks: int
    recent: int

    def codes(self, keys: np.ndarray, values: Values, queries: np.ndarray, scale: float) -> Any:
        """The codes, up to date, of keys (g, n, d): they have ``n``, how many keys are coded."""
        ...

    def lift(self, values: Values) -> np.ndarray:
        """What counts beside a certain key's score in `Asked.known`: (g, at least n)."""
        ...

    def choose(self, codes: Any, asked: Asked) -> Chosen:
        """List keys within the spans."""
        ...

    def certificate(self, attended: Attended, error: np.ndarray, values: Values, dtype: str) -> Certificate:
        """What is known of the error; error (h, rows) bounds the rounding of scores."""
        ...


def attend(policy: Coded, visible: Visible, values: Values) -> Result:
    """Attend to what the policy chooses: Result (h, m), output float64.

    Raises:
        ArgumentError: keys were deleted, or scores are too large for float32.
    """
    h, m, d = visible.queries.shape
    index = visible.index
    if index.alive < index.n:
        gone = index.n - index.alive
        raise ArgumentError(f"codes need an index from which nothing was deleted; got one that lost {gone} keys")
    error = visible.score_error
    if error.max(initial=0.0) > LARGEST * UNIT:
        raise ArgumentError(f"q and k must have scaled scores below {LARGEST:.0e} for codes; got larger ones")
    rows = visible.queries.reshape(index.heads, h // index.heads, m, d).transpose(0, 2, 1, 3)  # (g, m, G, d)
    limits = visible.limits.reshape(index.heads, h // index.heads, m)
    assert (limits == limits[:, :1]).all(), "the heads of a group see the same keys"
    step = max(1, SCORES // (h * index.n))
    results = []
    for first in range(0, max(m, 1), step):
        block = slice(first, first + step)
        attended, counters = _attend(policy, visible, values, rows[:, block], limits[:, 0, block])
        certificate = policy.certificate(attended, error[:, block], values, index.dtype)
        empty = np.isneginf(attended.lse)
        results.append(Result(attended.output, attended.lse, empty, certificate, counters, index.n))
    return joined(results)


def _attend(
    policy: Coded, visible: Visible, values: Values, queries: np.ndarray, limits: np.ndarray
) -> tuple[Attended, Counters]:
    """queries (g, rows, G, d), limits (g, rows) -> what is attended to, and the work."""
    scale, keys = visible.scale, visible.held.keys
    g, rows, heads, _ = queries.shape
    queries, limits = np.ascontiguousarray(queries), np.ascontiguousarray(limits)
    codes = policy.codes(keys[:, : visible.index.n], values, queries, scale)
    spans = _spans(limits, policy.sinks, policy.recent, codes.n)
    parts = 1 + min(-(-TASKS // max(g * rows, 1)), -(-codes.n // CHUNK))
    width = values.array.shape[2]
    sums = np.empty((g, rows, parts, heads, sampled_numba.SUMS))
    vectors, known = np.empty((g, rows, parts, heads, 2, width)), np.empty((g, rows, heads))
    units = values.unit
    centre = (values.centre * units[:, None]).astype(units.dtype)
    cache = keys, values.store, centre, units
    sampled_numba.attend_certain(*cache, policy.lift(values), queries, scale, spans, limits, sums, vectors, known)
    chosen = policy.choose(codes, Asked(queries, limits, spans, known, scale))
    listed = chosen.ids, chosen.pis, chosen.counts
    sampled_numba.attend_drawn(*cache, queries, scale, *listed, get_num_threads(), sums, vectors)
    output, lse = np.empty((g, rows, heads, width)), np.empty((g, rows, heads))
    moments = np.empty((g, rows, heads, 3))
    sampled_numba.merge(sums, vectors, centre, units, chosen.variance, output, lse, moments)
    coded = spans[..., 1] - spans[..., 0]
    read = chosen.counts.sum(axis=2) + limits - coded
    scanned, visited = (np.repeat(count, heads, axis=0) for count in (read, coded))
    attended = Attended(by_head(output), by_head(lse), by_head(moments), scanned, chosen)
    return attended, Counters(scanned, visited, scanned)


def by_head(part: np.ndarray) -> np.ndarray:
    """(g, rows, G, ...) -> (h, rows, ...)."""
    g, rows, heads = part.shape[:3]
    return part.swapaxes(1, 2).reshape(g * heads, rows, *part.shape[3:])


def _spans(limits: np.ndarray, sinks: int, recent: int, coded: int) -> np.ndarray:
    """limits (g, rows) -> first and last + 1 (g, rows, 2) of the keys left to codes: whole blocks, none if no more."""
    stop = np.minimum((limits - recent) // KEYS * KEYS, coded)
    return np.where((stop > sinks)[..., None], np.stack([np.full_like(stop, sinks), stop], axis=2), 0)
