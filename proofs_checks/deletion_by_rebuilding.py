"""Deletion by rebuilding: keys built per operation, when appends and deletions come in any order.

Source. This library (`HSRIndex.append`, `HSRIndex.delete`); global rebuilding is Overmars' (1983), appending is
`logarithmic_method`. As we understand it, arXiv 2410.10165 states amortised updates, insertions and removals, of
O_d(log^2 n) for Corollary 3.1, part 1; with a build of O(n log n) these are such updates.

Hypotheses. Appends and deletions of any lengths in any order; a buffer of b >= 1 keys. A keys are added in all, the
first ones included, D are deleted, and never are more than N stored, dead ones included; log is log2 max(N / b, 1).

Conclusion. (i) After every call fewer than half of the stored keys are dead, or none is stored. (ii) At most
``2 (1 + log) A + 4 D`` keys were built into structures: O(build(n) / n) per deletion, log n times that per insertion.
(iii) Ids neither change nor return: the living ids are those given and not deleted, and the half-space at -inf holds
them.

Proof. Let a key in a segment of s >= b keys hold L(N / s) coins, L the logarithm to base 3/2, and any other key 1 + L(N
/ b). A key that is added pays for these, for its first build, and one more: 2 + L(N / b) <= 2 + 1.71 log. A segment is
swallowed by one that gathers more than half as many keys beyond it (ranks are powers of two), so s grows by 3/2 or the
key was in the buffer: a coin is left for its build. Where a merge of T keys drops its dead and leaves l, living keys
need at most l L(T / l) <= 2.47 (T - l) coins more, which the dead pay; if l < b, one more each, which the b or more
keys of the buffer pay. A rebuild that follows a deletion drops at least as many keys as it builds: with x = l / (S -
l) <= 1, each dead key pays x (2 + L(1 + 1 / x)) <= 3.71.

Check. Drawn sequences; then a window that slides, a set that is halved and refilled, and one dead key before each
merge, key by key. Builds are counted where the index calls them. The constants are keys built over ``(1 + log) A + D``
and over A + D.

What this does not show. That a query is fast while keys are dead: it meets each dead key of its half-space and strikes
it, so its cost is that of the stored keys, up to twice as many as live, all of them perhaps in this one half-space.
Wall-clock time: one deletion may rebuild everything, only the sum is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

import numpy as np
from hypothesis import strategies as st

from hsr import HSRIndex, checks
from hsr.roster import Roster
from hsr.structure import Structure
from proofs_checks.check import OURS, Check, Extremes, for_all

Steps = Sequence[tuple[int, float]]  # keys to append, and then which share of the living to delete


def conclude(index_class: type[HSRIndex], examples: int) -> dict[str, float]:
    """Drawn sequences, then the three that try to be dear."""
    met = Extremes()
    step = st.tuples(st.integers(0, 40), st.sampled_from((0.0, 0.02, 0.2, 0.5, 0.6, 1.0)))
    drawn = st.tuples(st.lists(step, min_size=1, max_size=40), st.integers(1, 32), st.booleans())
    for_all(drawn, lambda case: _conclusion(index_class, *case, "drawn", met), examples)
    _conclusion(index_class, [(1, 1 / 300)] * 2048, 16, True, "a window slides", met)
    _conclusion(
        index_class, [(256, 0.0), *[(0, 1e-9)] * 128, *[(1, 0.0)] * 128] * 8, 16, False, "halved, refilled", met
    )
    _conclusion(index_class, [(1, 0.0), *[(1, 0.0)] * 30, (0, 1e-9)] * 64, 16, False, "one dead a merge", met)
    return met


def _conclusion(index_class: type[HSRIndex], steps: Steps, buffer: int, oldest: bool, name: str, met: Extremes) -> None:
    rng = np.random.default_rng(0)
    index = index_class(np.ones((1, 1)), "brute", buffer=buffer)
    counted = _Counted(index, 1)
    living, most = np.zeros(1, np.int64), 1
    for count, share in steps:
        index.append(np.ones((count, 1)))
        living = np.append(living, np.arange(index.n - count, index.n))
        most = max(most, _stored(index))
        gone = (living if oldest else rng.permutation(living))[: int(np.ceil(share * len(living)))]
        index.delete(gone)
        living = np.setdiff1d(living, gone)
        dead, stored = index.explain()["dead"], _stored(index)
        assert 2 * dead < stored or stored == 0, f"{dead} of {stored} stored keys are dead"
        assert np.array_equal(index.ids, living), f"living are {index.ids}, not {living}"
    assert np.array_equal(np.sort(index.query(np.ones((1, 1)), -np.inf).indices), living)
    added, deleted = index.n, index.n - index.alive
    rise = 1 + log2(max(most / buffer, 1))
    limit = 2 * rise * added + 4 * deleted
    assert counted.keys <= limit, f"{counted.keys} keys built for {added} added and {deleted} deleted, buffer {buffer}"
    met.largest(f"keys built / ((1 + log) A + D), {name}", counted.keys / (rise * added + deleted))
    met.largest(f"keys built / (A + D), {name}", counted.keys / (added + deleted))


class _Counted:
    """Counts the keys that an index builds into structures."""

    def __init__(self, index: HSRIndex, keys: int) -> None:
        self.keys = keys
        self._inner = index._build
        index._build = self

    def __call__(self, keys: np.ndarray) -> Structure:
        """Build, and count."""
        self.keys += len(keys)
        return self._inner(keys)


def _stored(index: HSRIndex) -> int:
    return int(index.alive + index.explain()["dead"])


class _RebuildsAlways(HSRIndex):
    def delete(self, ids: Any) -> None:
        keep = self._roster.keep
        keep[self._roster.found(checks.distinct("ids", ids, self.n))] = False
        self._rebuild(self._store, keep)


class _NeverRebuilds(HSRIndex):
    def delete(self, ids: Any) -> None:
        self._roster.bury(self._roster.found(checks.distinct("ids", ids, self.n)))


class _Renumbers(HSRIndex):
    def _rebuild(self, store: np.ndarray, keep: np.ndarray) -> None:
        super()._rebuild(store, keep)
        self._roster = Roster.of(self._roster.stored)


class _ReportsTheDead(HSRIndex):
    def delete(self, ids: Any) -> None:
        super().delete(ids)
        self._roster._dead[:] = False


CHECK = Check(
    statement="Deletion by rebuilding: builds per operation",
    source=OURS,
    evidence="whole numbers",
    conclude=conclude,
    operations={"HSRIndex": HSRIndex},
    faults={
        "every deletion rebuilds": _RebuildsAlways,
        "nothing is ever rebuilt": _NeverRebuilds,
        "a rebuild gives new ids": _Renumbers,
        "the dead are reported": _ReportsTheDead,
    },
)
