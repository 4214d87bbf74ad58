"""Half-space searches as the statements about their cost see them: keys, queries, thresholds -> Report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from hsr import HSRIndex, Report
from proofs_checks.inputs import UNIT, Problem

Search = Callable[[np.ndarray, np.ndarray, np.ndarray], Report]
Law = Callable[[np.random.Generator, int, int], np.ndarray]


def searched_by(method: str) -> Search:
    """Build an index of the method over keys (n, d), query it once."""

    def search(keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray) -> Report:
        return HSRIndex(keys, method).query(queries, thresholds)

    return search


def losing_one(search: Search) -> Search:
    """A fault: the last key of the report is lost."""

    def faulty(keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray) -> Report:
        report = search(keys, queries, thresholds)
        offsets = np.minimum(report.offsets, max(report.offsets[-1] - 1, 0))
        return dataclasses.replace(
            report, offsets=offsets, indices=report.indices[: offsets[-1]], scores=report.scores[: offsets[-1]]
        )

    return faulty


def assert_complete(search: Search, problem: Problem, rank: int) -> None:
    """At the score of the rank-th best key of each query, ties included, exactly the half-space is reported."""
    products = problem.queries @ problem.keys.T  # UNIT^2 times the products, whole numbers
    bounds = -np.sort(-products, axis=1)[:, min(rank, len(problem.keys) - 1)]
    q, k, _ = problem.floats
    report = search(k, q, bounds / UNIT**2)
    for i in range(len(q)):
        wanted = np.flatnonzero(products[i] >= bounds[i])
        found = np.sort(report.row(i)[0])
        assert np.array_equal(found, wanted), f"query {i} at {bounds[i]}/{UNIT**2}: {found} reported, {wanted} inside"


def work(report: Report) -> np.ndarray:
    """Keys and bounds looked at, per query."""
    return report.scanned + report.visited


def at_rank(keys: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Thresholds (m,) that the k best keys reach; none for k = 0."""
    scores = queries @ keys.T
    if k == 0:
        return scores.max(axis=1) + np.abs(scores).max(axis=1)
    return np.partition(scores, -k, axis=1)[:, -k]


def uniform(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Keys from a cube."""
    return rng.uniform(-1.0, 1.0, (n, d))


def gaussian(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Standard normal keys."""
    return rng.standard_normal((n, d))


def sphere(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Keys on the unit sphere; a circle for d = 2."""
    x = gaussian(rng, n, d)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def collinear(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Keys on a line."""
    return np.outer(rng.standard_normal(n), rng.standard_normal(d))


def slab(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Keys near the hyperplane on which the coordinates sum to 0, which no box of a tree follows."""
    x = gaussian(rng, n, d)
    return x - x.mean(axis=1, keepdims=True) + 1e-3 * gaussian(rng, n, d)
