"""Certified attention from bounded codes: list what could matter, attend to it, bound the share of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import get_num_threads

from attention import sampled_numba
from attention.result import UNIT, Counters, Result, certify, joined
from attention.sampled import TASKS, coded_spans
from attention.values import Values
from attention.weights import Softmax
from hsr.errors import ArgumentError
from hsr.lifted import LARGEST
from hsr.lifted_numba import CHUNK

if TYPE_CHECKING:
    from attention.policies import Certified, Visible

SCORES = 1 << 26  # most bounded scores held at once


def attend(policy: Certified, visible: Visible, values: Values) -> Result:
    """Attend to every key that the codes cannot rule out: Result (h, m), output float64."""
    h, m, d = visible.queries.shape
    g = visible.index.heads
    if visible.index.alive < visible.index.n:
        gone = visible.index.n - visible.index.alive
        raise ArgumentError(
            f"bytes_per_key needs an index from which nothing was deleted; got one that lost {gone} keys"
        )
    error = visible.score_error()
    if error.max(initial=0.0) > LARGEST * UNIT:
        raise ArgumentError(f"q and k must have scaled scores below {LARGEST:.0e} for codes; got larger ones")
    rows = visible.queries.reshape(g, h // g, m, d).transpose(0, 2, 1, 3)  # (g, m, G, d)
    limits = visible.limits.reshape(g, h // g, m)
    assert (limits == limits[:, :1]).all(), "the heads of a group see the same keys"
    step = max(1, SCORES // (h * visible.index.n))
    results = []
    for first in range(0, max(m, 1), step):
        block = slice(first, first + step)
        output, lse, log_dropped, counters = _attend(policy, visible, values, rows[:, block], limits[:, 0, block])
        certificate = certify(
            output,
            lse,
            np.zeros(lse.shape),
            log_dropped,
            error[:, block] + sampled_numba.ROUNDING / 2,
            counters.reported,
            values,
            visible.index.dtype,
            Softmax(),
            "probability" if policy.delta else "deterministic",
            1 - policy.delta,
        )
        results.append(Result(output, lse, np.isneginf(lse), certificate, counters, visible.index.n))
    return joined(results)


def _attend(
    policy: Certified, visible: Visible, values: Values, queries: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Counters]:
    """queries (g, rows, G, d), limits (g, rows) -> output (h, rows, dv), lse, log_dropped (h, rows), work."""
    index, scale = visible.index, visible.scale
    g, rows, heads, _ = queries.shape
    limits = np.ascontiguousarray(limits)
    keys = visible.held.keys
    assert policy.bytes_per_key is not None
    codes = values.bounded(keys[:, : index.n], queries, policy.bytes_per_key, policy.delta, policy.seed)
    spans = coded_spans(limits, policy.sinks, policy.recent, codes.n)
    parts = 1 + min(-(-TASKS // max(g * rows, 1)), -(-codes.n // CHUNK))
    width = values.array.shape[2]
    sums = np.empty((g, rows, parts, heads, sampled_numba.SUMS))
    vectors, known = np.empty((g, rows, parts, heads, 2, width)), np.empty((g, rows, heads))
    near, units = np.ascontiguousarray(queries), values.unit
    centre = (values.centre * units[:, None]).astype(units.dtype)
    cache = keys, values.store, centre, units
    sampled_numba.attend_certain(*cache, np.zeros(keys.shape[:2]), near, scale, spans, limits, sums, vectors, known)
    listing = codes.select(queries, spans, known, scale, policy.eps)
    listed = listing.ids, listing.pis, listing.counts
    sampled_numba.attend_drawn(*cache, near, scale, *listed, get_num_threads(), sums, vectors)
    output, lse = np.empty((g, rows, heads, width)), np.empty((g, rows, heads))
    certain = np.zeros((g, rows, 2))  # nothing is left to chance
    sampled_numba.merge(sums, vectors, centre, units, certain, output, lse, np.empty((g, rows, heads, 5)))
    coded = spans[..., 1] - spans[..., 0]
    kept = listing.counts.sum(axis=2) + limits - coded
    scanned, visited = (np.repeat(count, heads, axis=0) for count in (kept, coded))
    parts_by_head = [
        np.moveaxis(part, 2, 1).reshape(g * heads, rows, -1) for part in (output, lse, listing.log_dropped)
    ]
    return parts_by_head[0], parts_by_head[1][..., 0], parts_by_head[2][..., 0], Counters(scanned, visited, scanned)
