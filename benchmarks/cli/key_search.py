"""What finding keys costs: each index method beside the best dense baseline, on one head's keys and queries."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.dense import Faiss, Form, Numpy
from benchmarks.gate import Answer, require, rounding
from benchmarks.ledger import RULES
from benchmarks.measure import Call, seconds, take_turns
from hsr import HSRIndex, methods
from hsr.errors import BackendUnavailable

SHARES = {"0.1%": 0.001, "1%": 0.01, "10%": 0.1}  # of the keys, to report
PAPER = "n^0.8"
REPEATS, ROUND = 9, 0.02  # rounds of the clock, and the seconds that each takes at least
TIMED = 8  # queries that take part in them
SAFE = 40  # binary magnitude up to which, and down to which, products and their rounding are float32's own
DENSE = ("numpy", "faiss")
DEFINITION = "reference"  # plain float64 numpy: nobody would choose it for its speed


class Cost(NamedTuple):
    """Of one contender at one number of reported keys."""

    rule: str
    k: int
    contender: str
    milliseconds: float  # per query, one query a call; the median round
    spread: float  # of the rounds, between their quartiles
    scanned: float  # share of the keys read at full precision
    visited: float  # bounds evaluated per key


class Methods(NamedTuple):
    """The index methods that can serve, built, and why others cannot."""

    indexes: dict[str, HSRIndex]
    seconds: dict[str, float]
    refusals: dict[str, str]


def built(keys: np.ndarray, advance: Callable[[str], None]) -> Methods:
    """Every method over keys (n, d); a small build compiles first, outside the clock."""
    indexes: dict[str, HSRIndex] = {}
    taken: dict[str, float] = {}
    refusals: dict[str, str] = {}
    for method in methods("build"):
        advance(method)
        if method == DEFINITION:
            continue
        try:
            HSRIndex(keys[:256], method).query(keys[:1], 0.0)
            start = time.perf_counter()
            indexes[method] = HSRIndex(keys, method)
            taken[method] = time.perf_counter() - start
        except BackendUnavailable as refusal:
            refusals[method] = str(refusal)
    return Methods(indexes, taken, refusals)


def scaled(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows (m, d) times a power of two, and which: 0 where products with rows alike stay well within float32.

    Every score is scaled alike, so that who reports what, and what it costs, stays.
    """
    largest = float(np.abs(rows).max())
    if largest == 0 or abs(math.log2(largest)) <= SAFE:
        return rows, 0
    power = -int(np.frexp(largest)[1])
    return np.ldexp(rows, power), power


def sizes(n: int) -> dict[str, int]:
    """How many of n keys are reported, by rule, fewest first."""
    found = {rule: max(1, int(share * n)) for rule, share in SHARES.items()} | {PAPER: RULES[PAPER].keys(n)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def costs(keys: np.ndarray, queries: np.ndarray, indexes: Mapping[str, HSRIndex], rule: str) -> list[Cost]:
    """Gate, then clock: every contender reports the same exact ranks of queries (m, d) over keys (n, d).

    Raises:
        WrongAnswer: a contender missed a key, or reported a stranger.
    """
    k = sizes(len(keys))[rule]
    oracle = queries.astype(np.float64) @ keys.T.astype(np.float64)  # (m, n)
    thresholds = np.partition(oracle, -k, axis=1)[:, -k]
    narrow, pieces = keys.astype(np.float32), queries.astype(np.float32)
    rows, faiss = Numpy(narrow, 1), Faiss(narrow)
    band = rounding(queries, keys, np.float32)
    answers: dict[str, Callable[[int], Answer]] = {
        name: _dense(form, pieces, thresholds) for name, form in (("faiss", faiss.search), *rows.forms(1).items())
    }
    answers |= {name: _indexed(index, queries, thresholds) for name, index in indexes.items()}
    for name, answer in answers.items():
        for i in range(min(TIMED, len(queries))):
            require(name, answer(i), oracle[i : i + 1], thresholds[i : i + 1], band)
    forms = min(rows.forms(1), key=lambda name: seconds(answers[name]))
    calls: dict[str, Call] = {"numpy": answers[forms], "faiss": answers["faiss"]}
    calls |= {name: answers[name] for name in indexes}
    timings = take_turns(calls, min(TIMED, len(queries)), REPEATS, shortest=ROUND)
    found = []
    for name, timing in timings.items():
        scanned, visited = 1.0, 0.0
        if name in indexes:
            report = indexes[name].query(queries, thresholds)
            scanned, visited = (float(part.mean()) / len(keys) for part in (report.scanned, report.visited))
        found.append(Cost(rule, k, name, timing.median * 1e3, timing.spread * 1e3, scanned, visited))
    return found


def _dense(form: Form, queries: np.ndarray, thresholds: np.ndarray) -> Callable[[int], Answer]:
    return lambda i: form(queries[i : i + 1], np.float32(thresholds[i]))


def _indexed(index: HSRIndex, queries: np.ndarray, thresholds: np.ndarray) -> Callable[[int], Answer]:
    def answer(i: int) -> Answer:
        report = index.query(queries[i : i + 1], float(thresholds[i]))
        return Answer(report.offsets, report.indices, report.scores)

    return answer
