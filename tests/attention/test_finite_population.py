"""Bounds on means of finite populations: exact where all is drawn, and wrong no more often than they say."""

from __future__ import annotations

from fractions import Fraction
from math import comb, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, hypergeom

from attention import finite_population
from attention.finite_population import upper_mean_of_strata, upper_means, upper_shares
from attention.hypergeometric_numba import log_cdf

SIZE, DRAWN, DELTA, AUDITS = 60, 20, 0.1, 2000
ALARM = 1e-6  # chance that a valid bound fails a test of coverage, fixed seeds apart
rng = np.random.default_rng(0)
POPULATIONS = {
    "zeros": np.zeros(SIZE),
    "one row": np.eye(SIZE)[0],
    "few rows": 1.0 * (np.arange(SIZE) < 5),
    "half the rows": 1.0 * (np.arange(SIZE) % 2),
    "all but few": 1.0 * (np.arange(SIZE) >= 4),
    "heavy": np.where(np.arange(SIZE) < 4, 0.9, 0.001),
    "spread": rng.beta(0.3, 2, SIZE),
    "narrow": 0.3 + 0.01 * rng.random(SIZE),
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_bound_on_a_mean_fails_no_more_often_than_delta(name: str) -> None:
    population, draws = POPULATIONS[name], np.random.default_rng(1)
    samples = np.array([draws.choice(population, DRAWN, replace=False) for _ in range(AUDITS)])
    bounds = upper_means(samples, SIZE, DELTA)
    assert (bounds < population.mean()).sum() <= binom.isf(ALARM, AUDITS, DELTA)
    assert np.mean(bounds) < population.mean() + 0.3, "a bound that is always 1 is none"


@pytest.mark.parametrize("mixed", [("few rows", "zeros"), ("half the rows", "all but few"), ("heavy", "one row")])
def test_the_bound_over_strata_fails_no_more_often_than_delta(mixed: tuple[str, ...]) -> None:
    strata, draws = np.array([POPULATIONS[name] for name in mixed]), np.random.default_rng(2)
    bounds = [
        upper_mean_of_strata(np.array([draws.choice(x, DRAWN, replace=False) for x in strata]), SIZE, DELTA)
        for _ in range(AUDITS)
    ]
    assert (np.array(bounds) < strata.mean()).sum() <= binom.isf(ALARM, AUDITS, DELTA)
    assert np.mean(bounds) < strata.mean() + 0.3


@given(total=st.integers(0, 60), sample=st.integers(1, 60), delta=st.floats(1e-6, 0.5))
def test_the_bound_on_a_share_fails_with_probability_at_most_delta_exactly(
    total: int, sample: int, delta: float
) -> None:
    hits = np.arange(max(0, sample + total - 60), min(sample, total) + 1)
    chances = hypergeom.pmf(hits, 60, total, sample)
    failed = upper_shares(hits, sample, 60, delta) < total / 60
    assert chances[failed].sum() <= delta * (1 + 1e-9)


def chance_of_at_most(hits: int, sample: int, population: int, total: int) -> Fraction:
    """Of that many hits, exactly."""
    ways = sum(comb(total, i) * comb(population - total, sample - i) for i in range(hits + 1))
    return Fraction(ways, comb(population, sample))


@given(sample=st.integers(1, 60), delta=st.floats(1e-6, 0.5) | st.sampled_from((0.1, 0.25, 0.5)), data=st.data())
def test_the_bound_on_a_share_is_the_largest_total_that_is_not_refuted(
    sample: int, delta: float, data: st.DataObject
) -> None:
    """A total whose chance is delta, but for rounding, is kept."""
    hits = data.draw(st.integers(0, sample))
    totals = np.arange(hits, 60 - sample + hits + 1)
    chances = np.array([float(chance_of_at_most(hits, sample, 60, int(total))) for total in totals])
    least, most = (totals[chances > delta * (1 - slack)].max() / 60 for slack in (0, 2e-9))
    assert least <= upper_shares(np.array([hits]), sample, 60, delta)[0] <= most


@given(population=st.integers(2, 5000), data=st.data())
def test_chances_are_those_of_exact_arithmetic(population: int, data: st.DataObject) -> None:
    sample = data.draw(st.integers(1, min(population - 1, 300)))
    hits = data.draw(st.integers(0, sample))
    total = data.draw(st.integers(hits, population - sample + hits))
    chance = chance_of_at_most(hits, sample, population, total)
    exact = log(chance.numerator) - log(chance.denominator)
    assert log_cdf(hits, population, total, sample) == pytest.approx(exact, abs=1e-10 * (1 + abs(exact)))


@given(seed=st.integers(0, 2**32 - 1), sample=st.integers(1, 30), extra=st.integers(0, 30), delta=st.floats(1e-9, 0.9))
def test_bounds_lie_between_what_was_seen_and_what_is_possible(
    seed: int, sample: int, extra: int, delta: float
) -> None:
    draws = np.random.default_rng(seed)
    x = draws.choice([0.0, 1.0, draws.random()], (3, sample))
    population = sample + extra
    least, most = x.sum(axis=1) / population, (x.sum(axis=1) + extra) / population
    bounds = upper_means(x, population, delta)
    overall = upper_mean_of_strata(x, population, delta)
    assert (least <= bounds).all()
    assert (bounds <= most * (1 + 1e-12)).all()
    assert least.mean() <= overall * (1 + 1e-12)
    assert overall <= most.mean() * (1 + 1e-12)
    assert extra or np.allclose(bounds, x.mean(axis=1), rtol=1e-12)
    assert (bounds <= upper_means(x, population, delta / 10)).all()
    assert overall <= upper_mean_of_strata(x, population, delta / 10)


def log_capital(x: np.ndarray, population: int, means: np.ndarray, share: float) -> np.ndarray:
    """x (s,), means (A,) -> log of the capital (A, s) after each draw, as the module's head defines it."""
    y = 1 - x
    left = (population * (1 - means)[:, None] - (np.cumsum(y) - y)) / (population - np.arange(len(y)))
    with np.errstate(divide="ignore"):
        return np.log(1 - share + share * y / np.maximum(left, 1e-300)).cumsum(axis=1)


def test_a_mean_is_refuted_where_the_mixed_capital_ever_reaches_the_level() -> None:
    draws = np.random.default_rng(4)
    for _ in range(50):
        x = draws.choice([0.0, 0.01, 0.2, 1.0], 15, p=[0.6, 0.2, 0.1, 0.1])
        means = finite_population._candidates(x[None], 50)[0]
        paths = np.array([log_capital(x, 50, means, share) for share in finite_population.SHARES])
        capital = np.logaddexp.reduce(paths + finite_population.LOG_PRIOR[:, None, None], axis=0).max(axis=1)
        bound = means[np.argmax(capital >= -np.log(DELTA))]
        assert upper_means(x[None], 50, DELTA)[0] == pytest.approx(bound, abs=1e-12)


def test_the_dual_finds_the_largest_mean_of_two_strata() -> None:
    """Against all pairs of candidates: never below the true maximum, and above it by no more than the grid."""
    draws = np.random.default_rng(3)
    for _ in range(5):
        x = draws.choice([0.0, 0.01, 0.2, 1.0], (2, 15), p=[0.6, 0.2, 0.1, 0.1])
        means = finite_population._candidates(x, 50)
        largest = []
        for share, log_prior in zip(finite_population.SHARES, finite_population.LOG_PRIOR, strict=True):
            one, other = (log_capital(row, 50, m[:-1], share)[:, -1] for row, m in zip(x, means, strict=True))
            possible = one[:, None] + other[None] < -log_prior - np.log(DELTA)
            largest.append((means[0, :-1, None] + means[1, None, :-1])[possible].max() / 2)
        found = upper_mean_of_strata(x, 50, DELTA)
        assert min(largest) <= found <= min(largest) + 0.01


def test_all_heads_rows_count_for_the_overall_bound() -> None:
    x = np.zeros((16, 64))
    assert upper_mean_of_strata(x, 4096, 0.05) < upper_means(x[:1], 4096, 0.05)[0] / 10
