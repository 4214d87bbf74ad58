"""Decomposability of reports: the answer over keys in parts is the union of the answers over the parts.

Source. This library (`HSRIndex.append`, sharding); the property is Bentley and Saxe's.

Hypotheses. Keys in any number of runs of any length, one after the other; any method; any buffer.

Conclusion. The report over all keys is the disjoint union of the reports over the runs, positions shifted by each
run's start, whether the runs are appended to one index (some in segments, the last in a buffer) or indexed apart.

Proof. Membership of a key depends on that key alone.

Check. Lattice inputs against whole numbers, ties included; buffers of 1 to 64, so that appended runs end in segments,
merge, or stay in the buffer. The constants are the largest number of runs and of segments met.

What this does not show. What is not decomposable: top-k and softmax are not unions, they merge (`lse_merge`). The
cost of appending is `logarithmic_method`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from hsr import HSRIndex
from proofs_checks.check import OURS, Check, Extremes, for_all
from proofs_checks.inputs import UNIT, Problem, problems

# runs [(t, d)], queries (m, d), thresholds (m,), method, buffer -> positions per query, and how many segments
Reports = Callable[[list[np.ndarray], np.ndarray, np.ndarray, str, int], tuple[list[np.ndarray], int]]


def appended(
    runs: list[np.ndarray], queries: np.ndarray, thresholds: np.ndarray, method: str, buffer: int
) -> tuple[list[np.ndarray], int]:
    """One index that grows."""
    index = HSRIndex(runs[0], method, buffer=buffer)
    for run in runs[1:]:
        index.append(run)
    report = index.query(queries, thresholds)
    return [report.row(i)[0] for i in range(len(queries))], len(index.explain()["segments"])


def apart(
    runs: list[np.ndarray], queries: np.ndarray, thresholds: np.ndarray, method: str, buffer: int
) -> tuple[list[np.ndarray], int]:
    """One index per run; reports shifted and joined."""
    starts = np.cumsum([0, *map(len, runs)])
    reports = [HSRIndex(run, method).query(queries, thresholds) for run in runs]
    return [
        np.concatenate([report.row(i)[0] + start for report, start in zip(reports, starts, strict=False)])
        for i in range(len(queries))
    ], len(runs)


def conclude(reports: Reports, examples: int) -> dict[str, float]:
    """Drawn problems cut into runs."""
    met = Extremes()
    cuts = st.lists(st.integers(0, 200), max_size=12)

    def conclusion(case: tuple[Problem, list[int], int]) -> None:
        problem, places, buffer = case
        q, k, _ = problem.floats
        edges = sorted({min(max(x, 1), len(k)) for x in places} | {len(k)})
        runs = [k[a:b] for a, b in zip([0, *edges], edges, strict=False)]
        products = problem.queries @ problem.keys.T
        bounds = np.sort(products, axis=1)[:, len(k) // 3]
        found, segments = reports(runs, q, bounds / UNIT**2, problem.method, buffer)
        for i in range(len(q)):
            wanted = np.flatnonzero(products[i] >= bounds[i])
            assert np.array_equal(np.sort(found[i]), wanted), f"runs {edges}: {np.sort(found[i])}, not {wanted}"
        met.largest("runs", len(runs))
        met.largest("segments", segments)

    for_all(st.tuples(problems((1, 2, 4, 16), most=200), cuts, st.sampled_from((1, 4, 16, 64))), conclusion, examples)
    return met


def _not_shifted(
    runs: list[np.ndarray], queries: np.ndarray, thresholds: np.ndarray, method: str, buffer: int
) -> tuple[list[np.ndarray], int]:
    found = [
        [HSRIndex(run, method).query(q[None], b).row(0)[0] for run in runs]
        for q, b in zip(queries, thresholds, strict=True)
    ]
    return [np.concatenate(parts) for parts in found], len(runs)


def _last_run_unseen(
    runs: list[np.ndarray], queries: np.ndarray, thresholds: np.ndarray, method: str, buffer: int
) -> tuple[list[np.ndarray], int]:
    return appended(runs[: max(1, len(runs) - 1)], queries, thresholds, method, buffer)


def _border_reported_twice(
    runs: list[np.ndarray], queries: np.ndarray, thresholds: np.ndarray, method: str, buffer: int
) -> tuple[list[np.ndarray], int]:
    wider = [np.concatenate([before[-1:], run]) for before, run in pairwise(runs)]
    starts = np.cumsum([0, *map(len, runs)]) - 1
    starts[0] = 0
    parts = [HSRIndex(run, method).query(queries, thresholds) for run in [runs[0], *wider]]
    return [
        np.concatenate([part.row(i)[0] + start for part, start in zip(parts, starts, strict=False)])
        for i in range(len(queries))
    ], len(runs)


CHECK = Check(
    statement="Reports are decomposable",
    source=OURS,
    evidence="whole numbers",
    conclude=conclude,
    operations={"HSRIndex.append": appended, "one index per run": apart},
    faults={
        "positions not shifted by the run's start": _not_shifted,
        "the last run is not seen": _last_run_unseen,
        "a key on a border is in two runs": _border_reported_twice,
    },
)
