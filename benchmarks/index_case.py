"""Case ``index``: time and work of a query, for each method of the index, against numpy and faiss in the same run.

Keys and queries are standard Gaussian float32 from a fixed seed, the queries scaled to norm sqrt(d): a Gaussian cloud
has no structure to exploit beyond its dimension, so this is the plain case, not a flattering one.

One threshold serves all queries and all contenders, because faiss takes only one a call: the score of the exact rank at
which the queries report ``reported`` keys on average.  With equal norms each query's own count is close to that.

``m = 1`` answers one query a call, going round all queries; ``m = 64`` answers them in one call.  ``ms`` (median round)
and ``spread`` (between its quartiles) are per query.  ``scanned_fraction`` is the part of the keys read at full
precision to decide about them, ``visited_fraction`` the bounds evaluated per key: a tree's nodes, a sketch's codes.  A
method that would need more than BUDGET for one setting, and is HOPELESS against both baselines, is left out there, with
a note: at these sizes, the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from benchmarks.dense import Faiss, Form, Numpy
from benchmarks.gate import Answer, require, rounding
from benchmarks.measure import PAUSE, ROUND, Call, seconds, take_turns
from hsr import HSRIndex
from hsr.backend import methods
from hsr.errors import BackendUnavailable

SIZES = ((1 << 20, 2), (1 << 20, 4), (1 << 20, 8), (1 << 17, 64), (1 << 17, 128))
QUICK_SIZES = ((1 << 11, 2), (1 << 11, 64))
QUERIES, QUICK_QUERIES = 64, 8  # of a batch
FEW, QUICK_FEW = 512, 16  # keys reported by the first threshold
SHARE = 100  # one key in so many is reported by the second
REPEATS, QUICK_REPEATS = 9, 5
BUDGET, HOPELESS = 10.0, 10.0  # seconds; times slower than the slower baseline
SEED = 20240

Note = Callable[[str], None]
Row = dict[str, object]


def rows(quick: bool, note: Note) -> Iterator[Row]:
    """One row per size, threshold, batch and contender."""
    for n, d in QUICK_SIZES if quick else SIZES:
        rng = np.random.default_rng((SEED, n, d))
        keys = rng.standard_normal((n, d), np.float32)
        queries = rng.standard_normal((QUICK_QUERIES if quick else QUERIES, d), np.float32)
        queries *= np.sqrt(d) / np.linalg.norm(queries, axis=1, keepdims=True)
        contest = Contest(keys, queries, note)
        for reported in (QUICK_FEW if quick else FEW, n // SHARE):
            for m in (1, len(queries)):
                yield from contest.rows(reported, m, quick)


class Contest:
    """Everything that competes over one set of keys and queries."""

    def __init__(self, keys: np.ndarray, queries: np.ndarray, note: Note) -> None:
        """Keys (n, d) float32, queries (m, d) float32."""
        self._keys, self._queries, self._note = keys, queries, note
        self._oracle = queries.astype(np.float64) @ keys.T.astype(np.float64)  # (m, n)
        self._numpy, self._faiss = Numpy(keys, len(queries)), Faiss(keys)
        self._indexes: dict[str, HSRIndex] = {}
        self._build_seconds: dict[str, float] = {}
        for method in methods("build"):
            try:
                HSRIndex(keys[: min(256, len(keys))], method).query(queries[:1], 0.0)  # compiles, outside the clock
                start = time.perf_counter()
                self._indexes[method] = HSRIndex(keys, method)
                self._build_seconds[method] = time.perf_counter() - start
            except BackendUnavailable as refusal:
                note(f"n = {len(keys)}, d = {keys.shape[1]}: {refusal}")

    def rows(self, reported: int, m: int, quick: bool) -> Iterator[Row]:
        """Rows of one setting: the gate, then the clock.

        Args:
            reported: keys per query, on average.
            m: queries a call.
            quick: for a check that it works; the times mean nothing.
        """
        n, d = self._keys.shape
        rank = reported * len(self._queries)
        threshold = np.float32(np.partition(self._oracle.ravel(), -rank)[-rank])
        pieces = np.split(self._queries, len(self._queries) // m)
        repeats = QUICK_REPEATS if quick else REPEATS
        form, dense = self._best_form(pieces, threshold)
        contenders: dict[str, Form] = {"numpy": dense, "faiss": self._faiss.search}
        work = repeats * len(self._queries)
        patience = max(
            BUDGET, HOPELESS * work * max(self._cost(baseline, threshold) for baseline in contenders.values())
        )
        for method, index in self._indexes.items():
            ask = partial(_ask, index)
            cost = work * self._cost(ask, threshold)
            if cost <= patience:
                contenders[method] = ask
            else:
                self._note(
                    f"n = {n}, d = {d}, reported = {reported}, m = {m}: {method} left out, it needs {cost:.0f} s"
                )
        for name, contender in contenders.items():
            self._pass_gate(name, contender, pieces, threshold)
        timings = take_turns(
            {name: _calls(contender, pieces, threshold) for name, contender in contenders.items()},
            len(pieces),
            repeats,
            shortest=0.0 if quick else ROUND,
            pause=0.0 if quick else PAUSE,
        )
        best = min(timings["numpy"].median, timings["faiss"].median)
        for name, timing in timings.items():
            yield {
                "n": n,
                "d": d,
                "reported": reported,
                "m": m,
                "method": name,
                "ms": timing.median * 1e3 / m,
                "spread": timing.spread * 1e3 / m,
                "speedup_vs_best_baseline": best / timing.median,
                **self._work(name, threshold),
                "build_s": self._build_seconds.get(name),
                "form": {"numpy": form, "faiss": "IndexFlatIP.range_search"}.get(name),
            }

    def _best_form(self, pieces: Sequence[np.ndarray], threshold: np.float32) -> tuple[str, Form]:
        """The fastest of numpy's forms in this setting."""
        forms = self._numpy.forms(len(pieces[0]))
        calls = {name: _calls(form, pieces, threshold) for name, form in forms.items()}
        timings = take_turns(calls, min(len(pieces), 8), 5, shortest=0.0, pause=0.0)
        best = min(timings, key=lambda name: timings[name].median)
        return best, forms[best]

    def _cost(self, contender: Form, threshold: np.float32) -> float:
        """Seconds that one query takes, roughly."""
        return seconds(_calls(contender, [self._queries[:1]], threshold))

    def _pass_gate(self, name: str, contender: Form, pieces: Sequence[np.ndarray], threshold: np.float32) -> None:
        band = rounding(self._queries, self._keys, np.float64 if name in self._indexes else np.float32)
        for piece, oracle in zip(pieces, np.split(self._oracle, len(pieces)), strict=True):
            require(name, contender(piece, threshold), oracle, float(threshold), band)

    def _work(self, name: str, threshold: np.float32) -> Row:
        if name not in self._indexes:
            return {"scanned_fraction": 1.0, "visited_fraction": 0.0}
        report = self._indexes[name].query(self._queries, float(threshold))
        pairs = len(self._queries) * len(self._keys)
        return {
            "scanned_fraction": float(report.scanned.sum()) / pairs,
            "visited_fraction": float(report.visited.sum()) / pairs,
        }


def _calls(contender: Form, pieces: Sequence[np.ndarray], threshold: np.float32) -> Call:
    return lambda i: contender(pieces[i], threshold)


def _ask(index: HSRIndex, queries: np.ndarray, threshold: np.float32) -> Answer:
    report = index.query(queries, float(threshold))
    return Answer(report.offsets, report.indices, report.scores)
