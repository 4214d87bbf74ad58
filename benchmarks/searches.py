"""One set of keys and queries, searched one query a call by every contender: gate, clock, work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.dense import Numpy
from benchmarks.gate import Answer, require, rounding
from benchmarks.key_laws import gaussian
from benchmarks.ledger import Costs
from benchmarks.measure import PAUSE, each, seconds
from hsr import HSRIndex
from hsr.backend import methods
from hsr.errors import BackendUnavailable

ROUNDS = 3  # every query is asked so often, unless BUDGET is used up before
BUDGET = 0.5  # seconds for the queries of one contender at one threshold
BLOCK = 1 << 16  # keys cast to float64 at a time
WARM = 300  # keys of the index on which a method compiles
LEFT_OUT = "reference"  # the definition, with the brute's work at many times its cost


class Problem(NamedTuple):
    """Keys, queries, and their exact scores."""

    keys: np.ndarray  # (n, d) float32
    queries: np.ndarray  # (m, d) float32
    scores: np.ndarray  # (m, n) float64

    def at_rank(self, k: int) -> np.ndarray:
        """Thresholds (m,) that exactly k keys of each query reach, ties aside."""
        return np.partition(self.scores, -k, axis=1)[:, -k].copy()


class Outcome(NamedTuple):
    """One query's answer and the work it took."""

    answer: Answer
    visited: int
    scanned: int


class Contender(NamedTuple):
    """Something that answers one query a call; what it returns is read off the clock."""

    ask: Callable[[np.ndarray, float], Any]  # query (1, d), threshold
    read: Callable[[Any], Outcome]
    dtype: type[np.floating]  # of its sums


def problem(keys: np.ndarray, queries: np.ndarray) -> Problem:
    """Score every key in float64, by blocks."""
    wide = queries.astype(np.float64)
    scores = np.empty((len(queries), len(keys)))
    for first in range(0, len(keys), BLOCK):
        scores[:, first : first + BLOCK] = wide @ keys[first : first + BLOCK].T.astype(np.float64)
    return Problem(keys, queries, scores)


def serving(d: int) -> list[str]:
    """The methods that take keys of width d, compiled."""
    keys = gaussian(np.random.default_rng(0), WARM, d)[None]
    return [method for method in methods("build") if method != LEFT_OUT and _serves(method, keys)]


def _serves(method: str, keys: np.ndarray) -> bool:
    try:
        HSRIndex(keys, method).topk(keys[:, :1], 1)
    except BackendUnavailable:
        return False
    return True


def searcher(index: HSRIndex) -> Contender:
    """An index of one head."""

    def read(report: Any) -> Outcome:
        answer = Answer(report.offsets, report.indices, report.scores)
        return Outcome(answer, int(report.visited[0]), int(report.scanned[0]))

    return Contender(lambda query, threshold: index.query(query[None], threshold), read, np.float64)


def dense_searcher(given: Problem, thresholds: np.ndarray) -> Contender:
    """numpy in the form that is fastest for these keys, at the first of the thresholds (m,)."""
    forms = Numpy(given.keys, 1).forms(1)
    query, bound = given.queries[:1], np.float32(thresholds[0])
    form = min(forms.values(), key=lambda form: seconds(lambda i: form(query, bound)))
    n = len(given.keys)
    return Contender(
        lambda query, threshold: form(query, np.float32(threshold)), lambda answer: Outcome(answer, 0, n), np.float32
    )


def searched(name: str, contender: Contender, given: Problem, thresholds: np.ndarray, quick: bool) -> Costs:
    """The gate for every query, then the clock."""
    m = len(given.queries)

    def ask(i: int) -> Any:
        return contender.ask(given.queries[i : i + 1], float(thresholds[i]))

    outcomes = [contender.read(ask(i)) for i in range(m)]
    counts = [len(outcome.answer.indices) for outcome in outcomes]
    answer = Answer(
        np.cumsum([0, *counts]),
        np.concatenate([outcome.answer.indices for outcome in outcomes]),
        np.concatenate([outcome.answer.scores for outcome in outcomes]),
    )
    require(name, answer, given.scores, thresholds, rounding(given.queries, given.keys, contender.dtype))
    return Costs(
        timed(ask, m, quick),
        np.array([outcome.visited for outcome in outcomes]),
        np.array([outcome.scanned for outcome in outcomes]),
        np.array(counts),
    )


def timed(ask: Callable[[int], Any], m: int, quick: bool) -> np.ndarray:
    """Seconds (m,) of each query."""
    return each(ask, m, rounds=1 if quick else ROUNDS, budget=BUDGET, pause=0.0 if quick else PAUSE)
