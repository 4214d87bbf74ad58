"""Lifted half-spaces: every kernel against the reference, and the laws that a sample promises."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2

from hsr import lifted_numba, reference
from hsr.coder import Layout
from hsr.exp_block import rough_power
from hsr.lifted import Draw, Lifted
from hsr.lifted_numba import CHUNK, generators

SEEDS = st.integers(0, 2**32 - 1)
NEAR = 2e-6  # relative, of a probability: exponentials are within 3e-7, differences of float32 scores a little more
ALARM = 1e-4  # false alarms of one statistical test, all its comparisons together


class Scored(NamedTuple):
    """What the drawing kernels take."""

    estimates: np.ndarray  # (g, rows, G, n) int16
    unit: np.ndarray  # (g, rows, G), powers of two
    thresholds: np.ndarray  # (g, rows, G)
    spans: np.ndarray  # (g, rows, 2)
    keys: np.ndarray  # (g, rows) uint32

    @property
    def scores(self) -> np.ndarray:
        return self.unit[..., None] * self.estimates


@st.composite
def scored(draw: st.DrawFn) -> Scored:
    rng = np.random.default_rng(draw(SEEDS))
    g, rows, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    n = 64 * draw(st.one_of(st.integers(1, 5), st.integers(31, 34)))  # one chunk, and a little more than one
    estimates = draw(st.sampled_from([0.0, 0.5, 3.0, 30.0])) * rng.standard_normal((g, rows, heads, n))
    if draw(st.booleans()):
        estimates = np.round(estimates)
    unit = np.full((g, rows, heads), draw(st.sampled_from([2.0**-6, 2.0**-7])))
    estimates = np.rint(estimates / unit[..., None]).astype(np.int16)
    thresholds = unit * estimates.max(axis=3) + draw(st.sampled_from([-8.0, 0.0, 1.0, 5.0])) * rng.random(
        (g, rows, heads)
    )
    spans = np.sort(rng.integers(0, n + 1, (g, rows, 2)), axis=2)
    spans[spans[..., 0] == spans[..., 1]] = 0
    keys = rng.integers(0, 2**32, (g, rows)).astype(np.uint32)
    return Scored(estimates, unit, thresholds, spans, keys)


def chunked(n: int) -> range:
    return range(-(-n // CHUNK))


def report(draw: Draw, head: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and pis of one row."""
    counts = draw.counts[head, row]
    kept = np.concatenate([CHUNK * chunk + np.arange(count) for chunk, count in enumerate(counts)])
    return draw.ids[head, row, kept], draw.pis[head, row, kept]


def drawn(case: Scored, systematic: bool, threads: int = 2) -> Draw:
    g, rows, _, n = case.estimates.shape
    ids, pis = np.empty((g, rows, n), np.int32), np.empty((g, rows, n), np.float32)
    counts, variances = np.empty((g, rows, len(chunked(n))), np.int64), np.empty((g, rows, len(chunked(n)), 2))
    lifted_numba.draw(*case, systematic, threads, ids, pis, counts, variances)
    return Draw(ids, pis, counts, variances.sum(axis=2), case.thresholds)


@given(case=scored(), systematic=st.booleans())
def test_a_draw_is_that_of_the_reference(case: Scored, systematic: bool) -> None:
    found = drawn(case, systematic)
    for head, row in np.ndindex(case.keys.shape):
        ids, pis = report(found, head, row)
        start, stop = case.spans[head, row]
        chances = reference.chances(case.scores[head, row], case.thresholds[head, row])
        chances[:start], chances[stop:] = 0, 0
        assert np.allclose(pis, chances[ids], rtol=30 * NEAR, atol=1e-37)
        key = int(case.keys[head, row])
        near = [reference.draw(np.minimum(chances * (1 + off), 1), key, systematic) for off in (0, -NEAR, NEAR)]
        assert any(np.array_equal(ids, wanted) for wanted in near)
        independent, blocks = (chances * (1 - chances)).sum(), np.add.reduceat(chances, np.arange(0, len(chances), 64))
        part = blocks % 1
        own = (part * (1 - part)).sum() if systematic else independent
        assert found.variance[head, row] == pytest.approx([independent, own], abs=1e-3)
        if systematic:
            counts = np.bincount(ids // 64, minlength=len(blocks))
            assert (np.abs(counts - blocks) < 1 + 1e-4).all()


@given(case=scored())
def test_expected_counts_are_those_of_the_reference(case: Scored) -> None:
    g, rows, heads, n = case.estimates.shape
    off = case.scores - case.thresholds[..., None].astype(np.float32)
    for head, row in np.ndindex(g, rows):
        start, stop = case.spans[head, row]
        off[head, row, :, :start], off[head, row, :, stop:] = -np.inf, -np.inf
    certain, sampled = np.empty((2, g, rows, len(chunked(n)), heads))
    lifted_numba.expected(case.estimates, case.unit, case.thresholds, case.spans, 2, certain, sampled)
    assert np.array_equal(certain.sum(axis=2), (off >= 0).sum(axis=3))
    wanted = np.where(off >= 0, 0, np.exp(np.minimum(off, 0).astype(np.float64))).sum(axis=3)
    assert np.allclose(sampled.sum(axis=2), wanted, rtol=1e-5, atol=1e-4)


@given(seed=SEEDS, heads=st.integers(1, 9), words=st.tuples(*[st.integers(0, 2)] * 4).filter(any))
def test_estimates_are_those_of_the_reference(seed: int, heads: int, words: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    g, rows, blocks = 2, 2, rng.choice([1, 2, 33])
    n, axes = 64 * blocks, len(Layout(words).bits)
    codes = rng.integers(0, 256, (g, blocks + 1, sum(words), 64, 4)).astype(np.uint8)  # with room at the end
    tiles = rng.integers(-127, 128, (g, rows * -(-heads // 4), 4, axes // 4, 4)).astype(np.int8)
    slope = rng.choice([0.0, 1e-4, 0.01], (g, rows, heads)) * rng.random((g, rows, heads))
    spans = np.tile([[0, n], np.sort(rng.choice(n + 1, 2, replace=False))], (g, 1, 1))
    start, stop = spans[0, 1]
    estimates, shift = np.empty((g, rows, heads, n), np.int16), Layout(words).shift
    tops, totals = np.empty((2, g, rows, len(chunked(n)), heads))
    lifted_numba.estimate(codes, np.array(words), tiles, slope, shift, spans, 2, estimates, tops, totals)
    wanted = reference.estimate(codes[:, :-1], words, tiles, slope)
    for row, span in enumerate((slice(0, n), slice(start, stop))):
        unit = slope[:, row, :, None] * 2.0**shift
        assert (np.abs(unit * estimates[:, row, :, span] - wanted[:, row, :, span]) <= unit / 2 * (1 + 1e-9)).all()
    wanted[:, 1, :, :start], wanted[:, 1, :, stop:] = -np.inf, -np.inf
    with np.errstate(divide="ignore"):
        lse = np.logaddexp.reduce(tops + np.log(totals), axis=2)
    assert np.allclose(lse, np.logaddexp.reduce(wanted, axis=3), rtol=1e-6, atol=0.041)


def test_a_rough_power_is_near_and_right_on_average() -> None:
    y = np.concatenate([-np.arange(4096) / 4096, np.linspace(-100, 0, 4096)]).astype(np.float32)
    ratio = np.array([rough_power(x) for x in y]) / 2.0 ** y.astype(np.float64)
    assert 0.96 < ratio.min() < 0.97
    assert 1.015 < ratio.max() < 1.025
    assert ratio[:4096].mean() == pytest.approx(1, abs=1e-3)


@given(seed=SEEDS)
def test_numbers_are_those_of_the_reference_and_differ(seed: int) -> None:
    keys = generators(seed, np.arange(40).reshape(4, 10))
    assert len(np.unique(keys)) == 40
    counters = np.arange(50) + seed % 1000
    found = [lifted_numba.number(keys[0, 0], counter) for counter in counters]
    assert np.array_equal(np.array(found) / lifted_numba.SURE, reference.numbers(int(keys[0, 0]), counters))


class Heads(NamedTuple):
    keys: np.ndarray  # (g, n, d)
    lift: np.ndarray  # (g, n)
    queries: np.ndarray  # (g, 1, G, d)

    def exact(self, scale: float) -> np.ndarray:
        """Lifted scores (g, G, n)."""
        return scale * self.queries[:, 0] @ self.keys.swapaxes(1, 2) + self.lift[:, None]


def heads(n: int, heads: int = 2, sharp: float = 1.0, g: int = 2, d: int = 16) -> Heads:
    rng = np.random.default_rng(n + heads)
    keys = rng.standard_normal((g, n, d)) * np.geomspace(2, 0.2, d)
    return Heads(keys, 0.3 * rng.standard_normal((g, n)), sharp * rng.standard_normal((g, 1, heads, d)))


def sample(lifted: Lifted, queries: np.ndarray, rows: int, **options: object) -> Draw:
    """So many draws for the same queries (g, 1, G, d), each with its own generator."""
    g, _, many, d = queries.shape
    spans = np.tile(np.array([0, lifted.n]), (g, rows, 1))
    known = np.full((g, rows, many), -np.inf)
    keys = generators(7, np.tile(np.arange(rows), (g, 1)))
    asked = np.ascontiguousarray(np.broadcast_to(queries, (g, rows, many, d)))
    settings = {"eps": None, "budget": None, "systematic": True} | options
    return lifted.draw(asked, spans, known, generators=keys, **settings)


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("systematic", [True, False])
def test_keys_are_included_as_often_as_they_should_be(systematic: bool, size: int) -> None:
    """Binomial tests of every key, Bonferroni; for independent draws their squares add up to a chi-squared."""
    rows, given_heads = 4000, heads(256, 3)
    lifted = Lifted(given_heads.keys, given_heads.lift, 0.5, size, given_heads.queries[:, 0])
    found = sample(lifted, given_heads.queries, rows, budget=20, systematic=systematic)
    for head in range(2):
        times, chances = np.zeros(256, np.int64), np.zeros(256)
        for row in range(rows):
            ids, pis = report(found, head, row)
            times[ids] += 1
            chances[ids] = pis
        seen = times > 0
        assert (times[chances == 1] == rows).all()
        tails = [binomtest(int(k), rows, p).pvalue for k, p in zip(times[seen], chances[seen], strict=True)]
        assert min(tails) > ALARM / seen.sum() / 2
        if not systematic:
            often = seen & (chances < 1) & (chances * rows > 20)
            squares = (times - rows * chances)[often] ** 2 / (rows * chances * (1 - chances))[often]
            assert squares.sum() < chi2.isf(ALARM / 2, often.sum())


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_a_head_expects_no_more_keys_than_its_accuracy_allows(eps: float, size: int) -> None:
    for sharp in (0.0, 1.0, 10.0):
        given_heads = heads(2240, 1, sharp)
        lifted = Lifted(given_heads.keys, given_heads.lift, 0.5, size, given_heads.queries[:, 0])
        counts = sample(lifted, given_heads.queries, 200, eps=eps).counts.sum(axis=2)
        noise = 4 * counts.std(axis=1) / np.sqrt(200) + 1e-9
        assert (counts.mean(axis=1) <= 1 / eps**2 + noise).all()
        group = heads(2240, 4, sharp)
        both = Lifted(group.keys, group.lift, 0.5, size, group.queries[:, 0])
        assert (sample(both, group.queries, 50, eps=eps).counts.sum(axis=2).mean(axis=1) <= 4 / eps**2 * 1.05).all()


@pytest.mark.parametrize("budget", [1.0, 17.0, 300.0, 2000.0])
@pytest.mark.parametrize("sharp", [0.0, 1.0, 30.0])
def test_a_budget_is_met_within_a_hundredth(budget: float, sharp: float) -> None:
    given_heads = heads(2240, 1, sharp)
    lifted = Lifted(given_heads.keys, given_heads.lift, 0.5, 16, given_heads.queries[:, 0])
    counts = sample(lifted, given_heads.queries, 400, budget=budget).counts.sum(axis=2)
    noise = 4 * counts.std(axis=1) / 20
    assert (np.abs(counts.mean(axis=1) - budget) <= 0.01 * budget + noise).all()


@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("sharp", [0.0, 10.0, 30.0, 300.0])
@pytest.mark.parametrize("budget", [2.0, 17.0, 40.0])
def test_a_budget_is_met_where_keys_are_few_and_far_apart(n: int, sharp: float, budget: float) -> None:
    given_heads = heads(n, 1, sharp)
    lifted = Lifted(given_heads.keys, given_heads.lift, 0.5, 16, given_heads.queries[:, 0])
    counts = sample(lifted, given_heads.queries, 300, budget=budget).counts.sum(axis=2)
    noise = 4 * counts.std(axis=1) / np.sqrt(300)
    assert (np.abs(counts.mean(axis=1) - budget) <= 0.01 * budget + noise).all()


def test_a_budget_of_all_keys_reports_them_for_sure() -> None:
    given_heads = heads(320, 3, 30.0)
    lifted = Lifted(given_heads.keys, given_heads.lift, 0.5, 4, given_heads.queries[:, 0])
    found = sample(lifted, given_heads.queries, 2, budget=320)
    ids, pis = report(found, 1, 1)
    assert np.array_equal(ids, np.arange(320))
    assert (pis == 1).all()
    assert (found.variance == 0).all()


def test_the_list_of_a_group_has_the_largest_chance_of_its_heads() -> None:
    given_heads = heads(640, 3, 2.0)
    alone = []
    for h in range(3):
        lifted = Lifted(given_heads.keys, given_heads.lift, 0.5, 16, given_heads.queries[:, 0])
        chances = np.zeros((2, 640))
        found = sample(lifted, given_heads.queries[:, :, h : h + 1], 300, eps=0.2, systematic=False)
        for head, row in np.ndindex(2, 300):
            ids, pis = report(found, head, row)
            chances[head, ids] = pis
        alone.append(chances)
    together = Lifted(given_heads.keys, given_heads.lift, 0.5, 16, given_heads.queries[:, 0])
    found = sample(together, given_heads.queries, 40, eps=0.2, systematic=False)
    for head, row in np.ndindex(2, 40):
        ids, pis = report(found, head, row)
        known = np.max(alone, axis=0)[head, ids]
        assert (pis[known > 0] >= known[known > 0] * (1 - 1e-5)).all()
        often = known > 0.1  # seen in every head that gives it this chance, but for odds of 1e-13
        assert np.allclose(pis[often], known[often], rtol=1e-5)


def test_estimates_are_scores_where_bytes_are_plenty() -> None:
    given_heads = heads(640, 3, 1.0)
    lifted = Lifted(given_heads.keys, given_heads.lift, 0.5, 400, given_heads.queries[:, 0])
    assert lifted.coder.layout.bytes_per_key == 20  # 17 axes of 8 bits
    assert (lifted.score_error() < 0.02).all()
    found = sample(lifted, given_heads.queries, 200, eps=0.1, systematic=False)
    exact = given_heads.exact(0.5)
    thresholds = np.logaddexp.reduce(exact, axis=2) + 2 * np.log(0.1)
    for head, row in np.ndindex(2, 200):
        ids, pis = report(found, head, row)
        assert np.allclose(np.log(pis), np.log(reference.chances(exact[head], thresholds[head]))[ids], atol=0.15)


def grown(lifted: Lifted, keys: np.ndarray, lift: np.ndarray, first: int, step: int) -> list[object]:
    """Follow keys (g, n, d) from ``first`` on; the coders met."""
    coders = [lifted.coder]
    for n in range(first, keys.shape[1] + 1, step):
        lifted.follow(keys[:, :n], lift)
        if lifted.coder is not coders[-1]:
            coders.append(lifted.coder)
    return coders


@pytest.mark.parametrize("step", [1, 64, 200])
def test_appended_keys_of_the_same_law_have_the_codes_of_all_at_once(step: int) -> None:
    given_heads = heads(1500)
    lifted = Lifted(given_heads.keys[:, :700], given_heads.lift, 0.5, 8, given_heads.queries[:, 0])
    assert lifted.n == 640
    assert len(grown(lifted, given_heads.keys, given_heads.lift, 700, step)) == 1
    wanted, _ = lifted.coder.encode(lifted._lifted(given_heads.keys, given_heads.lift, slice(0, lifted.n)))
    assert lifted.n > 1500 - 64 - step
    assert np.array_equal(lifted._codes[:, : lifted.n // 64], wanted)
    assert lifted._codes.shape[1] * 64 <= 2 * max(lifted.n, 640), "room for at most as many again"


@pytest.mark.parametrize("step", [16, 64, 256])
def test_keys_of_another_law_cause_one_fit_that_brings_the_error_back(step: int) -> None:
    old, new = heads(1024), heads(3008)
    keys = np.concatenate([old.keys, new.keys[..., ::-1] + 3], axis=1)
    lift = np.concatenate([old.lift, new.lift], axis=1)
    lifted = Lifted(old.keys, old.lift, 0.5, 12, 3 * old.queries[:, 0])
    stale = lifted.coder
    assert len(grown(lifted, keys, lift, 1024, step)) == 2
    span = slice(lifted.n - 512, lifted.n)
    fresh = lifted.coder.encode(lifted._lifted(keys, lift, span))[1].mean(axis=1)
    assert (fresh <= 1.25 * lifted.score_error() ** 2 + 0.1).all()
    lost = stale.encode(np.concatenate([keys, lift[..., None]], axis=2)[:, span])[1].mean(axis=1)
    assert (fresh < 0.5 * lost).all()


def test_fewer_keys_than_a_block_draw_none() -> None:
    given_heads = heads(50)
    lifted = Lifted(given_heads.keys, given_heads.lift, 0.5, 8, given_heads.queries[:, 0])
    assert lifted.n == 0
    found = lifted.draw(
        given_heads.queries,
        np.zeros((2, 1, 2), np.int64),
        np.zeros((2, 1, 2)),
        eps=0.1,
        budget=None,
        generators=generators(0, np.zeros((2, 1), np.int64)),
        systematic=True,
    )
    assert found.counts.sum() == 0
