"""The tree's own promises: boxes hold their keys, nodes are skipped and taken whole, and no input breaks a bound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hsr import Report
from hsr.box_bounds import FAN
from hsr.report import Hits
from hsr.tree_layout import LEAF, LEVELS, OFFSET
from hsr.tree_numba import CHUNK, Tree, build
from tests.assertions import assert_reports

SIZES = (1, 2, LEAF - 1, LEAF, LEAF + 1, FAN * LEAF, FAN * LEAF + 1, 5000)


def gaussian(n: int, d: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


def ask(keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray, limits: np.ndarray | None = None) -> Hits:
    """What the tree reports, checked against the reference, and against the same call that only counts."""
    queries, thresholds = np.asarray(queries, np.float64), np.asarray(thresholds, np.float64)
    limits = np.full(len(queries), len(keys)) if limits is None else limits
    tree = build(keys)
    hits = tree.report(keys, queries, thresholds, limits, True)
    counted = tree.report(keys, queries, thresholds, limits, False)
    assert len(counted.indices) == len(counted.scores) == 0
    for name in ("offsets", "scanned", "visited"):
        assert np.array_equal(getattr(hits, name), getattr(counted, name))
    report = Report(*hits[:3], (len(queries),), len(keys), hits.scanned, hits.visited, "tree")
    assert_reports(report, queries, keys.astype(np.float64), thresholds, limits)
    return hits


def thresholds_at(keys: np.ndarray, queries: np.ndarray, places: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Each query at, just above and just below its score at each place of the sorted scores."""
    with np.errstate(over="ignore", invalid="ignore"):
        scores = np.sort(queries.astype(np.float64) @ keys.astype(np.float64).T, axis=1)
    ties = np.concatenate([scores[:, place] for place in places])
    thresholds = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    return np.tile(queries, (3 * len(places), 1)), thresholds


def nodes(tree: Tree, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each node that holds keys: its column of the groups (2d + 3,), and its keys' rows."""
    found = []
    for level, (start, stop) in enumerate(itertools.pairwise(tree.starts)):
        span = LEAF * FAN**level
        for node in range(-(-n // span)):
            assert start + node // FAN < stop
            found.append((tree.groups[start + node // FAN, :, node % FAN], tree.rows[node * span : (node + 1) * span]))
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", SIZES)
def test_every_node_bounds_its_keys(n: int, dtype: type) -> None:
    keys = gaussian(n, 3, dtype) * np.array([1, 10, 0.01], dtype) + 2
    tree = build(keys)
    assert np.array_equal(np.sort(tree.rows), np.arange(n))
    unit = np.ldexp(keys.astype(np.float64), -tree.exponent)
    far = ((unit.astype(np.float32) - tree.centre) ** 2).sum(axis=1)
    for bounds, rows in nodes(tree, n):
        assert (np.abs(unit[rows] - bounds[:3]) <= bounds[3:6]).all()
        assert bounds[6] >= far[rows].max()
        assert bounds[7] >= max(np.linalg.norm(unit[rows], axis=1).max(), np.linalg.norm(bounds[:3]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", SIZES)
def test_leaves_hold_the_keys_and_codes_within_half_a_step(n: int, dtype: type) -> None:
    keys = gaussian(n, 5, dtype) * np.array([1, 10, 0.01, 0, 1e-12], dtype) + np.array([0, 3, 0, 7, 0], dtype)
    tree = build(keys)
    assert np.array_equal(tree.keys, keys[tree.rows])
    unit = np.ldexp(keys.astype(np.float64), -tree.exponent)
    for leaf, (bounds, rows) in enumerate(nodes(tree, n)[: len(tree.codes)]):
        steps = tree.scales / np.float64(bounds[12])
        code = tree.codes[leaf].transpose(1, 0, 2).reshape(LEAF, -1)[:, :5].astype(np.float64) - OFFSET
        assert np.abs(code).max() <= LEVELS
        away = np.abs(unit[rows] - (bounds[:5] + code[: len(rows)] * steps))
        assert (away <= 0.501 * steps + 2.0**-24 * np.abs(unit[rows])).all()


def hostile(tree: Tree, rng: np.random.Generator, place: int) -> np.ndarray:
    """A query (d,) for which the codes understate the key at a place most: every rounding points the same way."""
    leaf, d = place // LEAF, tree.keys.shape[1]
    bounds = tree.groups[leaf // FAN, :, leaf % FAN].astype(np.float64)
    steps = tree.scales / bounds[2 * d + 2]
    code = tree.codes[leaf, :, place % LEAF].reshape(-1)[:d].astype(np.float64) - OFFSET
    residual = np.ldexp(tree.keys[place].astype(np.float64), -tree.exponent) - (bounds[:d] + code * steps)
    size = np.floor(rng.random(d) ** rng.integers(0, 4) * LEVELS)
    size[rng.integers(d)] = LEVELS  # this axis sets the unit of the query's codes
    sign = np.where(residual < 0, -1.0, 1.0)
    rounded = np.where(size < LEVELS, np.copysign(rng.choice([0.499, 0.49, 0.3]), code * sign), 0.0)
    return sign * np.maximum(size + rounded, 0.0) / tree.scales


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 33])
def test_no_rounding_of_keys_and_queries_hides_a_key(d: int, dtype: type) -> None:
    rng = np.random.default_rng(d)
    wide = np.ldexp(1.0, rng.integers(-12, 12, d))
    for keys in (gaussian(400, d, dtype), gaussian(400, d, dtype) * wide + 30 * rng.standard_normal(d), gaussian(2, d)):
        keys = np.ascontiguousarray(keys, dtype)
        tree = build(keys)
        places = rng.integers(0, len(keys), 200)
        queries = np.array([hostile(tree, rng, place) for place in places])
        exact = [
            math.fsum(q * np.float64(k) for q, k in zip(queries[i], tree.keys[place], strict=True))
            for i, place in enumerate(places)
        ]
        hits = tree.report(keys, queries, np.array(exact), np.full(len(places), len(keys)), True)
        for i, place in enumerate(places):
            assert tree.rows[place] in hits.indices[hits.offsets[i] : hits.offsets[i + 1]]


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sizes_and_widths(n: int, dtype: type, m: int) -> None:
    for d in (1, 2, 3, 4, 7, 8, 33):
        keys, queries = gaussian(n, d, dtype), gaussian(m, d, np.float64, 1)
        ask(keys, *thresholds_at(keys, queries, (0, n // 2, n - 1)))
        for threshold in (-np.inf, -1e300, 0.0, 1e300, np.inf):
            ask(keys, queries, np.full(m, threshold))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whole_nodes_are_reported_untested(dtype: type) -> None:
    keys, queries = gaussian(50_000, 3, dtype), gaussian(4, 3, np.float64, 1)
    hits = ask(keys, queries, np.full(4, -1.0))
    assert (np.diff(hits.offsets) > 25_000).all()
    assert (hits.scanned < np.diff(hits.offsets) / 2).all()
    everything = ask(keys, queries, np.full(4, -np.inf))
    assert (np.diff(everything.offsets) == 50_000).all()
    assert (everything.scanned == 0).all()
    assert (everything.visited <= FAN).all()


@pytest.mark.parametrize(("d", "most"), [(2, 0.01), (4, 0.05), (8, 0.35)])
def test_nodes_outside_are_skipped(d: int, most: float) -> None:
    keys, queries = gaussian(60_000, d), gaussian(8, d, np.float64, 1)
    thresholds = np.sort(queries @ keys.T.astype(np.float64), axis=1)[:, -30]
    hits = ask(keys, queries, thresholds)
    assert (np.diff(hits.offsets) == 30).all()
    assert (hits.visited < (most + 0.02) * len(keys)).all()
    assert (hits.scanned < 60).all()  # the codes let few pass that are not reported
    none = ask(keys, queries, np.full(8, np.inf))
    assert (none.scanned == 0).all()
    assert (none.visited <= FAN).all()


def test_keys_far_from_the_origin_prune_as_well() -> None:
    keys, queries = gaussian(60_000, 4) + 50, gaussian(8, 4, np.float64, 1)
    hits = ask(keys, queries, np.sort(queries @ keys.T.astype(np.float64), axis=1)[:, -30])
    assert hits.visited.mean() < 0.05 * len(keys)
    assert (hits.scanned < 60).all()


def test_one_outlier_spoils_its_own_leaf_alone() -> None:
    keys, queries = gaussian(60_000, 4), gaussian(8, 4, np.float64, 1)
    thresholds = np.sort(queries @ keys.T.astype(np.float64), axis=1)[:, -30]
    keys[777] = 1e30
    hits = ask(keys, queries, thresholds)
    assert hits.visited.mean() < 0.1 * len(keys)  # by boxes alone: squared distances underflow


def degenerate() -> dict[str, np.ndarray]:
    x = gaussian(1100, 3, np.float64)
    line = np.outer(x[:, 0], x[0])
    outlier, huge_outlier = x.copy(), x.copy()
    outlier[700], huge_outlier[700] = 1e30, 1e300
    scattered = np.ldexp(x, np.random.default_rng(0).integers(-120, 120, x.shape))
    return {
        "duplicates": np.repeat(x[:1], 1100, axis=0).astype(np.float32),
        "few_values": np.round(x).astype(np.float32),
        "collinear": line.astype(np.float32),
        "collinear64": line,
        "zero": np.zeros((200, 3), np.float32),
        "outlier": outlier.astype(np.float32),
        "outlier64": huge_outlier,
        "huge": (x * 1e37).astype(np.float32),
        "huge64": x * 1e300,
        "subnormal": (x * 1e-40).astype(np.float32),
        "subnormal64": x * 1e-310,
        "scattered": scattered.astype(np.float32),
        "scattered64": np.ldexp(scattered, 3 * (np.frexp(scattered)[1] // 2)),
        "sphere": (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", degenerate())
def test_degenerate_keys(kind: str, dtype: type) -> None:
    keys = degenerate()[kind]
    queries = np.vstack([gaussian(2, 3, dtype, 1), np.eye(3)[:2], keys[:1] / np.abs(keys).max(initial=1)])
    ask(keys, *thresholds_at(keys, queries.astype(np.float64), (0, len(keys) // 2, len(keys) - 3, len(keys) - 1)))


def test_scores_that_underflow_are_zero_in_float64() -> None:
    keys = gaussian(300, 3, np.float64) * 1e-300
    queries = gaussian(2, 3, np.float64, 1) * 1e-300
    hits = ask(keys, queries, np.zeros(2))
    assert np.array_equal(np.diff(hits.offsets), [300, 300])  # every product rounds to 0 >= 0


def test_zero_query() -> None:
    hits = ask(gaussian(1000, 3), np.zeros((4, 3)), np.array([0.0, 5e-324, 1e-300, -1.0]))
    assert np.diff(hits.offsets)[0] == np.diff(hits.offsets)[3] == 1000
    assert np.diff(hits.offsets)[2] == 0


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_only_keys_below_the_limit_are_reported(dtype: type, m: int) -> None:
    keys, queries = gaussian(3000, 3, dtype), gaussian(m, 3, np.float64, 1)
    for threshold in (-np.inf, -1.0, 0.5):
        for limit in (0, 1, LEAF, 1500, 2999, 3000):
            ask(keys, queries, np.full(m, threshold), np.full(m, limit))


def test_one_long_query_is_shared_by_the_threads() -> None:
    keys, queries = gaussian(100_000, 4), gaussian(40, 4, np.float64, 1)
    thresholds = np.sort(queries @ keys.T.astype(np.float64), axis=1)[:, 60_000]
    together = ask(keys, queries, thresholds)
    assert (np.diff(together.offsets) > 2 * CHUNK * LEAF / 4).all()
    for i in (0, 39):
        alone = ask(keys, queries[i : i + 1], thresholds[i : i + 1])
        part = slice(together.offsets[i], together.offsets[i + 1])
        assert np.array_equal(alone.indices, together.indices[part])
        assert np.array_equal(alone.scores, together.scores[part])
        assert alone.scanned[0] == together.scanned[i]


def test_no_queries() -> None:
    hits = ask(gaussian(100, 3), np.empty((0, 3)), np.empty(0))
    assert np.array_equal(hits.offsets, [0])
    assert len(hits.indices) == len(hits.scanned) == 0


def test_nothing_is_modified() -> None:
    keys, queries, thresholds = gaussian(1000, 3), gaussian(2, 3, np.float64, 1), np.zeros(2)
    before = [array.copy() for array in (keys, queries, thresholds)]
    ask(keys, queries, thresholds)
    assert all(np.array_equal(a, b) for a, b in zip(before, (keys, queries, thresholds), strict=True))
