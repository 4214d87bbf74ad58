"""The layers' own promises: chains are the upper hulls, exactly; few keys are looked at; no input loses a key."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsr import Report
from hsr.layers_numba import BITS, Layers, _crossing, _turn, build, refuses
from hsr.report import Hits
from hsr.scaling import without_overflow
from tests.assertions import assert_reports
from tests.strategies import KINDS, _spread, as_dtype, plain

CIRCLE = 2 * np.pi / 1000
WRAPS = (10601504472, -14609196946), (-254453673077, 350607978856)


def gaussian(n: int, dtype: type = np.float64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 2)).astype(dtype)


def around(m: int, seed: int = 1) -> np.ndarray:
    """m queries of random directions, after the axes and diagonals."""
    axes = np.array([[0, 1], [0, -1], [1, 0], [-1, 0], [1, 1], [-1, 2], [3, -1], [-1, -1]], np.float64)
    return np.vstack([axes, gaussian(m, seed=seed)])[:m]


def sideways() -> np.ndarray:
    """Queries to which an upright edge is flat, or nearly."""
    return np.array([[x, y] for x in (1.0, -1.0) for y in (0.0, 1e-300, -1e-300, 1e-17, -1e-17)])


def nested(n: int) -> np.ndarray:
    """Triangles about the origin, n / 3 layers of three."""
    turns = 2 * np.pi / 3 * np.arange(n) + 0.1
    return (1 + np.arange(n) // 3)[:, None] * np.column_stack([np.cos(turns), np.sin(turns)])


def circle(n: int) -> np.ndarray:
    turns = 2 * np.pi * np.random.default_rng(3).random(n)
    return np.column_stack([np.cos(turns), np.sin(turns)])


def shapes(n: int) -> dict[str, np.ndarray]:
    x, rng = gaussian(n), np.random.default_rng(2)
    t = np.linspace(-1, 1, n)
    outlier = x.copy()
    outlier[n // 2] = 1e300
    return {
        "gaussian": x,
        "uniform": rng.random((n, 2)),
        "circle": circle(n),
        "nested": nested(n),
        "equal": np.repeat(x[:1], n, axis=0),
        "zero": np.zeros((n, 2)),
        "lattice": rng.integers(-4, 5, (n, 2)).astype(np.float64),
        "repeated": x[rng.integers(0, n // 4 + 1, n)],
        "column": np.column_stack([np.full(n, 0.7), x[:, 1]]),
        "row": np.column_stack([x[:, 0], np.full(n, 0.7)]),
        "line": np.outer(x[:, 0], [1.0, 3.0]),
        "rounded_line": np.outer(x[:, 0], [0.1, 0.3]) + 0.7,
        "flat_arc": np.column_stack([t, 1 - 1e-16 * t * t]),
        "flat_arc_up": np.column_stack([1 - 1e-15 * t * t, t]),
        "tilted_arc": np.column_stack([np.cos(0.94 + 1e-3 * t), np.sin(0.94 + 1e-3 * t)]),
        "arc_of_ulps": np.column_stack(
            [1 + np.spacing(1) * np.arange(n), 1 - np.spacing(1) * (np.arange(n) ** 2 // n)]
        ),
        "cluster_ends": np.vstack([x[: n // 2] * 1e-15 + 1, x[n // 2 :] * 1e-15 - [1, 0.5]]),
        "outlier": outlier,
        "huge": x * 1e300,
        "tiny": x * 1e-300,
        "subnormal": x * 1e-318,
        "scattered": np.ldexp(x, rng.integers(-400, 400, x.shape)),
        "steps": np.ldexp(x, rng.integers(-60, 1, x.shape)),
    }


def ask(
    keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray, limits: np.ndarray | None = None, few: bool = False
) -> Hits:
    """What the layers report, checked against the reference, and against the same calls that count or come alone."""
    queries, thresholds = np.asarray(queries, np.float64), np.asarray(thresholds, np.float64)
    queries, thresholds, _ = without_overflow(queries, thresholds, float(np.abs(keys).max()))
    limits = np.full(len(queries), len(keys)) if limits is None else limits
    layers = build(keys)
    hits = layers.report(keys, queries, thresholds, limits, True)
    counted = layers.report(keys, queries, thresholds, limits, False)
    assert len(counted.indices) == len(counted.scores) == 0
    for name in ("offsets", "scanned", "visited"):
        assert np.array_equal(getattr(hits, name), getattr(counted, name))
    report = Report(*hits[:3], (len(queries),), len(keys), hits.scanned, hits.visited, "layers")
    assert_reports(report, queries, keys.astype(np.float64), thresholds, limits)
    for i in range(len(queries) if few else 0):
        alone = layers.report(keys, queries[i : i + 1], thresholds[i : i + 1], limits[i : i + 1], True)
        assert np.array_equal(alone.indices, hits.indices[hits.offsets[i] : hits.offsets[i + 1]])
    return hits


def thresholds_at(keys: np.ndarray, queries: np.ndarray, places: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Each query at, just above and just below its score at each place of the sorted scores."""
    with np.errstate(over="ignore", invalid="ignore"):
        scores = np.nan_to_num(np.sort(queries @ keys.astype(np.float64).T, axis=1))
    ties = np.concatenate([scores[:, place] for place in places])
    with np.errstate(over="ignore"):
        thresholds = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    return np.tile(queries, (3 * len(places), 1)), thresholds


def chains(layers: Layers, side: int) -> list[list[tuple[int, int]]]:
    """The points of each layer in units of the grid."""
    grid = [(int(x), int(y)) for x, y in np.ldexp(layers.points[side], BITS)]
    return [grid[a:b] for a, b in itertools.pairwise(layers.starts[side].tolist()) if a < b]


def peeled(points: set[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Upper hulls by monotone chains in unbounded integers, until no point is left."""
    left, found = sorted(points), []
    while left:
        hull: list[tuple[int, int]] = []
        for p in left:
            while len(hull) > 1:
                (ax, ay), (bx, by) = hull[-2:]
                if (bx - ax) * (p[1] - ay) - (p[0] - ax) * (by - ay) < 0:
                    break
                hull.pop()
            hull.append(p)
        found.append(hull)
        gone = set(hull)
        left = [p for p in left if p not in gone]
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 300])
@pytest.mark.parametrize("kind", shapes(8))
def test_chains_are_the_upper_hulls_of_what_is_left(kind: str, n: int) -> None:
    keys = shapes(n)[kind]
    layers = build(keys)
    unit = np.ldexp(keys, BITS - layers.exponent)
    grid = {(round(x), round(y)) for x, y in unit.tolist()}
    for side, sign in ((0, 1), (1, -1)):
        assert chains(layers, side) == peeled({(sign * x, sign * y) for x, y in grid})


@pytest.mark.parametrize("kind", shapes(8))
def test_deeper_keys_lie_below_every_chain(kind: str) -> None:
    layers = build(shapes(60)[kind])
    for side in (0, 1):
        found = chains(layers, side)
        for depth, chain in enumerate(found):
            for x, y in itertools.chain(*found[depth + 1 :]):
                assert chain[0] <= (x, y) <= chain[-1]
                a, b = next((a, b) for a, b in itertools.pairwise(chain) if a <= (x, y) <= b)
                assert a[0] == b[0] or y <= a[1] + Fraction(b[1] - a[1], b[0] - a[0]) * (x - a[0])


@pytest.mark.parametrize("kind", shapes(8))
def test_places_hold_every_key_once_and_near(kind: str) -> None:
    keys = shapes(200)[kind]
    layers = build(keys)
    for side, sign in ((0, 1), (1, -1)):
        rows, firsts = layers.rows[side], layers.firsts[side]
        assert np.array_equal(np.sort(rows), np.arange(200))
        assert (np.diff(firsts) > 0).all()
        assert (firsts[0], firsts[-1]) == (0, 200)
        held = np.repeat(layers.points[side], np.diff(firsts), axis=0)
        assert (np.abs(sign * held - np.ldexp(keys, -layers.exponent)[rows]) <= 2.0 ** -(BITS + 1)).all()


@pytest.mark.parametrize("kind", shapes(8))
def test_hints_bracket_the_best_place_of_the_next_layer(kind: str) -> None:
    layers = build(shapes(300)[kind])
    for side in (0, 1):
        found, begin = chains(layers, side), 0
        for chain, below in itertools.pairwise(found):
            end = begin + len(chain)
            for qx, qy in ((0, 1), (1, 1), (-3, 2), (1, 0), (-1, 0), (5, 10**6), (10**6, 3), (-(10**7), 1)):
                scores = [qx * x + qy * y for x, y in chain]
                best = scores.index(max(scores))
                lower = [qx * x + qy * y for x, y in below]
                low = layers.hints[side, begin + best] - end
                high = layers.hints[side, begin + best + 1] - end if begin + best + 1 < end else len(below) - 1
                assert max(lower) == max(lower[low : high + 1])
            begin = end


def test_turns_are_exact() -> None:
    rng, top = np.random.default_rng(0), 2**53
    for _ in range(2000):
        ax, ay, factor = (int(v) for v in rng.integers(-(2**26), 2**26, 3))
        bx, by = (ax * factor + int(rng.integers(-1, 2)), ay * factor + int(rng.integers(-1, 2)))
        for a, b in (((ax, ay), (bx, by)), ((bx, by), (bx + 1, by - 1)), ((top, -bx), (bx, -top)), ((0, bx), (0, by))):
            product = a[0] * b[1] - b[0] * a[1]
            assert _turn(*a, *b) == (product > 0) - (product < 0)
    # the last: both products fit 64 bits only modulo 2**64, and their difference overflows there, too
    for a, b in (((top, top), (top, top)), ((top, top - 1), (top - 1, top - 2)), ((-top, top), (top, -top)), WRAPS):
        product = a[0] * b[1] - b[0] * a[1]
        assert _turn(*a, *b) == (product > 0) - (product < 0)


def test_crossings_are_right_or_undecided() -> None:
    rng, undecided = np.random.default_rng(0), 0
    for _ in range(3000):
        top = int(2 ** rng.integers(2, 53))
        ax, bx, middle, cx, dx = (int(v) for v in np.sort(rng.integers(-top, top, 5)))
        ay, by, cy, dy = (int(v) for v in rng.integers(-top, top, 4))
        above = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay), (bx - ax) * (dy - ay) - (dx - ax) * (by - ay)
        other = (dx - cx) * (ay - cy) - (ax - cx) * (dy - cy), (dx - cx) * (by - cy) - (bx - cx) * (dy - cy)
        if max(*above, *other) >= 0 or ax == bx or cx == dx:
            continue
        e, f = Fraction(by - ay, bx - ax), Fraction(dy - cy, dx - cx)
        x = (ay - e * ax - cy + f * cx) / (f - e)
        side = _crossing(np.array([[ax, ay], [bx, by], [cx, cy], [dx, dy]]), 0, 1, 2, 3, middle)
        assert side == 0 or side == (x > middle) - (x < middle)
        undecided += side == 0
    assert undecided < 100


@st.composite
def calls(draw: st.DrawFn, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Keys (n, 2), queries (m, 2), thresholds and limits (m,), as in `tests.strategies.cases`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m = draw(st.one_of(st.integers(1, 12), st.integers(13, 420))), draw(st.integers(1, 8))
    keys = as_dtype(_spread(rng, (n, 2), draw(st.sampled_from(KINDS)), dtype), dtype)
    queries = plain(as_dtype(_spread(rng, (m, 2), draw(st.sampled_from(KINDS)), dtype), dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        scores = np.nan_to_num(queries @ plain(keys).T)
    ties = scores[np.arange(m), rng.integers(0, n, m)]
    with np.errstate(over="ignore"):
        choices = [ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), ties * 0.75, 0 * ties]
    choices += [np.full(m, -np.inf), np.full(m, np.inf), np.sort(scores, axis=1)[:, -min(n, 5)]]
    thresholds = np.array(choices)[rng.integers(0, len(choices), m), np.arange(m)]
    limits = np.where(rng.random(m) < 0.5, n, rng.integers(0, n + 1, m))
    return keys, queries, thresholds, limits


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(data=st.data())
def test_reports_like_the_reference(data: st.DataObject, dtype: str) -> None:
    ask(*data.draw(calls(dtype)))


@pytest.mark.parametrize("n", [1, 2, 5, 300])
@pytest.mark.parametrize("kind", shapes(8))
def test_shapes(kind: str, n: int) -> None:
    keys = shapes(n)[kind]
    along = keys[:2, ::-1] * [1, -1] / max(np.abs(keys[:2]).max(), 1e-300)  # at right angles to a key
    between = np.diff(np.ldexp(keys, -build(keys).exponent)[:40:5], axis=0)[:, ::-1] * [1, -1]  # to a pair
    queries = np.vstack([around(20), along, between, -between])
    for places in ((n - 1, n // 2), (0, max(0, n - 4))):
        ask(keys, *thresholds_at(keys, queries, places), few=n == 5)
    for threshold in (-np.inf, -1e300, 0.0, 5e-324, 1e300, np.inf):
        ask(keys, queries, np.full(len(queries), threshold))


@pytest.mark.parametrize("kind", ["gaussian", "lattice", "line", "flat_arc", "arc_of_ulps", "circle", "column"])
def test_float32_shapes(kind: str) -> None:
    keys = shapes(400)[kind].astype(np.float32)
    assert build(keys).lossless
    ask(keys, *thresholds_at(keys, around(30), (399, 396, 200, 0)))


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), columns=st.integers(1, 4))
def test_upright_edges(seed: int, n: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    keys = np.column_stack([rng.integers(0, columns, n), rng.integers(-5, 6, n)]) * rng.choice([1.0, 1e-12], (1, 2))
    ask(keys, *thresholds_at(keys, sideways(), (n - 1, n // 2, 0)))


def test_edges_that_are_flat_to_the_query() -> None:
    for width in (1e-3, 1e-6, 1e-8):
        t = width * np.linspace(-1, 1, 500)
        keys = np.column_stack([np.sin(t), np.cos(t)])
        turns = np.random.default_rng(0).integers(0, 1000, 12) * CIRCLE
        spun = keys @ np.array([[np.cos(turns), np.sin(turns)], [-np.sin(turns), np.cos(turns)]]).transpose(2, 0, 1)
        for turn, arc in zip(turns, spun, strict=True):
            normal = np.array([[-np.sin(turn), np.cos(turn)], [np.sin(turn), np.cos(turn)]])
            queries = np.vstack([normal, np.diff(arc[::100], axis=0)[:, ::-1] * [-1, 1]])
            ask(np.ascontiguousarray(arc), *thresholds_at(arc, queries, (499, 498, 490)))


def spreads(n: int) -> dict[str, np.ndarray]:
    return {
        "uniform": np.random.default_rng(2).random((n, 2)),
        "gaussian": gaussian(n, np.float32),
        "circle": circle(n),
        "nested": nested(n),
    }


@pytest.mark.parametrize("kind", spreads(8))
def test_work_is_log_n_plus_k(kind: str) -> None:
    for n in (2**8, 2**12, 2**16):
        keys, queries = spreads(n)[kind], around(40)
        layers, scores = build(keys), np.sort(queries @ keys.T.astype(np.float64), axis=1)
        for k in (1, 8, 64):
            hits = layers.report(keys, queries, scores[:, -k], np.full(40, n), False)
            bound = 5 * (math.log2(n) + np.diff(hits.offsets))
            assert (hits.scanned + hits.visited <= bound).all()
            assert (np.diff(hits.offsets) >= k).all()
            assert (hits.scanned <= np.diff(hits.offsets) + 3).all()


def test_a_silent_first_layer_ends_the_search() -> None:
    keys, queries = gaussian(5000), around(30)
    hits = ask(keys, queries, np.full(30, np.inf))
    assert (hits.scanned == 0).all()
    assert (hits.visited <= 6).all()


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_only_keys_below_the_limit_are_reported(dtype: type, m: int) -> None:
    keys, queries = gaussian(3000, dtype), around(m)
    for threshold in (-np.inf, -1.0, 0.5):
        for limit in (0, 1, 1500, 2999, 3000):
            ask(keys, queries, np.full(m, threshold), np.full(m, limit))


def test_scores_that_underflow_are_zero_in_float64() -> None:
    keys, queries = gaussian(300) * 1e-300, gaussian(12) * 1e-300
    hits = ask(keys, queries, np.zeros(12))
    assert (np.diff(hits.offsets) == 300).all()


def test_zero_query() -> None:
    hits = ask(gaussian(1000), np.zeros((4, 2)), np.array([0.0, 5e-324, 1e-300, -1.0]))
    assert np.diff(hits.offsets)[0] == np.diff(hits.offsets)[3] == 1000
    assert np.diff(hits.offsets)[2] == 0


def test_no_queries_and_nothing_modified() -> None:
    keys = gaussian(100)
    before = keys.copy()
    assert np.array_equal(ask(keys, np.empty((0, 2)), np.empty(0)).offsets, [0])
    assert np.array_equal(keys, before)


def test_refuses_other_widths() -> None:
    assert refuses(d=2, n=5) is None
    assert refuses(d=3) == "needs keys of width 2, got width 3"
