"""Bounded codes: no score is off by more than its bound, however a query is chosen; dither is what it claims to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from hsr import bounded_numba
from hsr.bounded import UNDERFLOW, Bounded
from hsr.bounded_numba import PAIRS
from hsr.coded_scan import KEYS
from hsr.covering import Cover, cover
from tests.strategies import _spread

KINDS = ("gaussian", "lattice", "repeated", "clustered", "offset", "outlier", "huge", "tiny", "flat", "zero")


def estimates(grid: Cover, keys: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores that the kernel estimates for keys (n, d) and queries (m, d), m even; bounds for r alone; the proxies."""
    n, m = len(keys), len(queries)
    codes, lengths = grid.encode(keys[None])
    coded = grid.prepare(queries[None])
    scores = np.empty((1, m // PAIRS, PAIRS, codes.shape[1] * KEYS), np.float32)
    spans = np.tile(np.array([0, codes.shape[1] * KEYS]), (1, m // PAIRS, 1))
    slope = coded.slope.reshape(1, -1, PAIRS)
    bounded_numba.score(codes, np.array(grid.layout.words), coded.tiles, slope, spans, 1, scores)
    found = scores[0].reshape(m, -1)[:, :n] + coded.base[0, :, None]
    return found, coded.length[0, :, None] * lengths[0] + coded.rounding[0, :, None], coded.proxy[0]


def hostile(grid: Cover, keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Queries (n, d), each turned so that the whole error of one key counts in full."""
    bits = grid.layout.bits
    used = min(len(bits), keys.shape[1])
    y = (np.ldexp(keys.astype(np.float64), -grid.exponents[0]) - grid.mean[0]) @ grid.key_map[0]
    steps, centres = grid.steps[0, :used], grid.centres[0, :used]
    cells = np.divide(y[:, :used], steps, out=np.zeros((len(y), used)), where=steps > 0) + centres + 0.5
    r = y.copy()
    r[:, :used] -= steps * (np.clip(np.floor(cells), 0, 2.0 ** bits[:used] - 1) - centres)
    size = np.maximum(np.linalg.norm(r, axis=1, keepdims=True), 1e-300)
    return (r / size) @ grid.key_map[0].T * rng.choice([-1.0, 1.0], (len(keys), 1))


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(("float32", "float64")),
    n=st.integers(1, 150),
    d=st.integers(1, 24),
    bytes_per_key=st.sampled_from((4, 8, 16, 32)),
)
def test_no_score_is_off_by_more_than_its_bound(
    seed: int, kind: str, dtype: str, n: int, d: int, bytes_per_key: int
) -> None:
    rng = np.random.default_rng(seed)
    keys = np.clip(_spread(rng, (n, d), kind, "float32"), -1e37, 1e37).astype(dtype)
    queries = rng.standard_normal((n + n % 2, d)) * 10.0 ** rng.integers(-6, 6)
    grid = cover(keys[None], bytes_per_key, queries[None], None)
    for asked in (queries, np.resize(hostile(grid, keys, rng), queries.shape)):
        largest = np.abs(asked @ keys.astype(np.float64).T).max()
        asked = asked * min(1.0, 1e20 / max(largest, 1e-300))  # float32 holds the estimates
        found, bound, _ = estimates(grid, keys, asked)
        exact = asked @ keys.astype(np.float64).T
        rounding = 4 * d * 2.0**-53 * (np.abs(asked) @ np.abs(keys.astype(np.float64)).T)  # of the oracle
        assert (np.abs(found - exact) <= bound + rounding + UNDERFLOW).all()


def test_a_hundred_thousand_hostile_queries_come_close_and_never_over() -> None:
    trials, closest = 0, 0.0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        keys = _spread(rng, (64, 16), KINDS[seed % 6], "float32").astype(np.float32)
        grid = cover(keys[None], 8 + 8 * (seed % 2), rng.standard_normal((1, 40, 16)), None)
        asked = hostile(grid, keys, rng)
        found, bound, _ = estimates(grid, keys, asked)
        error = np.abs(found - asked @ keys.astype(np.float64).T)
        assert (error <= bound).all()
        trials, closest = trials + error.size, max(closest, float((error / bound).max()))
    assert trials >= 100_000
    assert closest > 0.95  # the search is one that would find a bound too small by a twentieth


@pytest.mark.parametrize("bytes_per_key", [8, 16])
def test_dither_makes_errors_of_the_stated_variance_and_few_beyond_the_bound(bytes_per_key: int) -> None:
    """False alarms: 1e-6 each.  The same keys and queries under 1,000 shifts; delta = 0.2 for 64 keys."""
    rng = np.random.default_rng(7)
    keys, queries = rng.standard_normal((64, 12)).astype(np.float32), rng.standard_normal((2, 12))
    keys[3] *= 100  # beyond the grids
    exact = queries @ keys.astype(np.float64).T
    shifts, delta = 1000, 0.2
    beyond, scaled = np.zeros(2), np.empty((shifts, 2, 64))
    for seed in range(shifts):
        grid = cover(keys[None], bytes_per_key, None, np.random.default_rng(seed))
        found, bound, proxy = estimates(grid, keys, queries)
        reach = bound + np.sqrt(2 * proxy * np.log(2 * 64 / delta))[:, None]
        beyond += (np.abs(found - exact) > reach).any(axis=1)
        scaled[seed] = (found - exact) / np.sqrt(proxy)[:, None]
    assert (binom.sf(beyond - 1, shifts, delta) > 1e-6).all()
    inside = np.delete(scaled, 3, axis=2)[:, 0, :8]  # eight keys: enough, and nearly independent over shifts
    error = np.sqrt(1 / shifts)
    assert (np.abs(inside.mean(axis=0)) < norm.isf(1e-6 / 32) * error * inside.std(axis=0)).all()
    spread = (inside**2).std(axis=0) * error
    assert (np.abs((inside**2).mean(axis=0) - 1) < norm.isf(1e-6 / 32) * spread).all()


def test_growing_codes_bound_what_is_appended_and_grids_are_laid_anew() -> None:
    rng = np.random.default_rng(3)
    keys = np.concatenate([rng.standard_normal((256, 8)), 50 * rng.standard_normal((512, 8)) + 30])[None]
    queries = rng.standard_normal((1, 1, 2, 8))
    codes = Bounded(keys[:, :256], 8, queries[:, 0])
    exact = np.einsum("gd,gnd->gn", queries[:, 0, 0], keys)[0]
    for n in (300, 400, 768):
        codes.follow(keys[:, :n])
        spans, known = np.array([[[0, codes.n]]]), np.full((1, 1, 2), -np.inf)
        listing = codes.select(queries, spans, known, 0.3, 0.01)
        listed = np.concatenate([listing.ids[0, 0, c * 2048 :][:count] for c, count in enumerate(listing.counts[0, 0])])
        left = np.setdiff1d(np.arange(codes.n), listed)
        weights = np.exp(0.3 * (exact[: codes.n] - exact[: codes.n].max()))
        assert weights[left].sum() <= 0.01 * weights.sum()
        assert len(listed) < codes.n or n < 768  # diffuse at first, then far beyond the grids until there are new ones


def test_a_key_too_far_out_to_bound_is_always_listed() -> None:
    keys = np.random.default_rng(4).standard_normal((1, 128, 4))
    codes = Bounded(keys, 4, keys)
    keys = np.concatenate([keys, np.full((1, 64, 4), -1e200)], axis=1)
    codes.follow(keys)
    listing = codes.select(np.ones((1, 1, 1, 4)), np.array([[[0, 192]]]), np.zeros((1, 1, 1)), 1e-3, 0.5)
    assert set(range(128, 192)) <= set(listing.ids[0, 0, : listing.counts[0, 0, 0]])
