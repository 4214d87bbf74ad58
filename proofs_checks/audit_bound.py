"""Audit bound: the mean of all rows exceeds the bound from a sample of them with probability at most delta.

Source. This library (`attention.finite_population`), after Waudby-Smith and Ramdas, Estimating means of bounded random
variables by betting (JRSS B 2024, arXiv 2010.09686): theirs is the capital process for draws without replacement, the
mixture, the strata and the dual are ours.

Hypotheses. H strata of N values, all at most 1; s are drawn in each without replacement, independently of the values
and of each other, in random order. Nothing else is assumed.

Conclusion. The bound U from the sample satisfies ``P(U < mean) <= delta`` for the mean over all strata, for every
population, s and delta; and U is the mean if s = N.

Proof. With y = 1 - x and eta_i the mean of what is left before draw i, y_i / eta_i is non-negative and has conditional
expectation 1, hence so has ``1 - theta + theta y_i / eta_i`` for theta in [0, 1]. Products of these are a non-negative
martingale, mixtures over theta too, and by Ville one ever reaches 1 / delta with probability at most delta. eta_i falls
as the supposed mean grows: the capital grows, and the means not refuted form an interval below U. Strata are
independent: the product of their capitals has expectation 1 (Markov, for each theta with its share of delta); the dual
bounds the largest average of means whose product is below the level, for it is weak duality at every price.

Check. Populations of few rows, of eighths, with 0 and 1 and negative values among them: every ordered sample is
enumerated, and the samples whose bound lies below the mean are counted, so that the probability of failure is an exact
rational. The constants are its largest ratio to delta, and, for 1,024 rows of known errors, by how much the bound
exceeds the mean with 64 rows drawn and delta = 0.05, on average over 40 draws with a fixed seed, beside the empirical
Bernstein bound of Maurer and Pontil (COLT 2009), which is asserted to be wider.

What this does not show. Coverage for large populations, where samples cannot be enumerated: `tests/attention` draws
there, and finds it within its binomial law. That a mean over rows or heads is what matters: a fault in a few rows moves
it little. That the bound is the tightest there is; for shares of rows the hypergeometric one is tighter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from scipy.stats import norm

from attention.finite_population import upper_mean_of_strata, upper_means
from proofs_checks.check import OURS, Check, Extremes, for_all

Upper = Callable[[np.ndarray, int, float], float]  # x (H, s), N, delta -> bound on the mean over strata
ROWS, DRAWN, DRAWS = 1024, 64, 40
ROUNDING = 1 + Fraction(1, 2**50)  # of the sums and quotients behind a bound
POPULATIONS = {
    "no error": np.zeros(ROWS),
    "1 % of rows wrong": 1.0 * (np.arange(ROWS) < 10),
    "errors near 0.01": np.random.default_rng(0).beta(1, 99, ROWS),
    "errors near 0.3": np.random.default_rng(0).beta(3, 7, ROWS),
}


class Drawn(NamedTuple):
    """Strata of a small population, how many rows are drawn in each, and the risk."""

    strata: tuple[tuple[Fraction, ...], ...]
    sample: int
    delta: Fraction


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    """One stratum of up to seven rows or two of up to four, with two distinct values in each."""
    count = draw(st.integers(1, 2))
    rows = draw(st.integers(1, 7 if count == 1 else 4))
    eighths = st.integers(-4, 8).map(lambda x: Fraction(x, 8))
    values = st.sampled_from((Fraction(0), Fraction(1))) | eighths
    strata = []
    for _ in range(count):
        pair = draw(st.tuples(values, values))
        strata.append(tuple(draw(st.lists(st.sampled_from(pair), min_size=rows, max_size=rows))))
    delta = draw(st.sampled_from((Fraction(9, 10), Fraction(1, 2), Fraction(1, 4), Fraction(1, 10), Fraction(1, 50))))
    return Drawn(tuple(strata), draw(st.integers(1, rows)), delta)


def by_head(x: np.ndarray, population: int, delta: float) -> float:
    """`upper_means` of the strata, together with 1 - delta."""
    return float(upper_means(x, population, delta / len(x)).mean())


def conclude(upper: Upper, examples: int) -> dict[str, float]:
    """The probability of failure, exactly; then how far the bound is from the mean."""
    met = Extremes()
    for_all(drawn(), lambda case: _conclusion(upper, case, met), examples)
    rng = np.random.default_rng(1)
    for name, values in POPULATIONS.items():
        samples = [rng.choice(values, DRAWN, replace=False) for _ in range(DRAWS)]
        excess = np.mean([upper(x[None], ROWS, 0.05) for x in samples]) - values.mean()
        wider = np.mean([empirical_bernstein(x, 0.05) for x in samples]) - values.mean()
        assert excess < wider, f"{name}: {excess:.4g} above the mean, empirical Bernstein {wider:.4g}"
        met[f"bound - mean, {name}"] = float(excess)
        met[f"empirical Bernstein - mean, {name}"] = float(wider)
    return met


def _conclusion(upper: Upper, case: Drawn, met: Extremes) -> float:
    rows = len(case.strata[0])
    mean = sum((sum(stratum, Fraction(0)) for stratum in case.strata), Fraction(0)) / (rows * len(case.strata))
    orders = [Counter(permutations(stratum, case.sample)) for stratum in case.strata]
    failed, every = 0, 0
    for sample in product(*orders):
        times = int(np.prod([order[x] for order, x in zip(orders, sample, strict=True)]))
        bound = Fraction(upper(np.array(sample, dtype=np.float64), rows, float(case.delta)))
        below = mean - bound > abs(mean) * (ROUNDING - 1)
        failed, every = failed + times * below, every + times
        assert case.sample < rows or abs(bound - mean) <= ROUNDING - 1, "all rows are drawn, the mean is known"
    chance = Fraction(failed, every)
    assert chance <= case.delta, f"fails with probability {chance}, not {case.delta}"
    met.largest("P(failure) / delta", chance / case.delta)
    return float(chance / case.delta)


def empirical_bernstein(x: np.ndarray, delta: float) -> float:
    """Theorem 4 of Maurer and Pontil, for values in [0, 1]."""
    level = np.log(2 / delta)
    return float(x.mean() + np.sqrt(2 * x.var(ddof=1) * level / len(x)) + 7 * level / (3 * (len(x) - 1)))


def _sample_mean(x: np.ndarray, population: int, delta: float) -> float:
    return float(x.mean())


def _normal(x: np.ndarray, population: int, delta: float) -> float:
    left = 1 - x.shape[1] / population
    return float(x.mean() + norm.isf(delta) * np.sqrt(left * x.var() / x.size))


def _sorted(x: np.ndarray, population: int, delta: float) -> float:
    return by_head(np.sort(x, axis=1), population, delta)


def _risk_not_split(x: np.ndarray, population: int, delta: float) -> float:
    return float(upper_means(x, population, min(3 * delta, 0.99)).mean())


CHECK = Check(
    statement="Audit bound: a finite population's mean, from draws without replacement",
    source=OURS,
    evidence="exact: every sample enumerated",
    conclude=conclude,
    operations={"upper_means of the heads": by_head, "upper_mean_of_strata": upper_mean_of_strata},
    faults={
        "the sample's mean": _sample_mean,
        "a normal approximation": _normal,
        "the order of drawing is lost": _sorted,
        "three bounds at the risk of one": _risk_not_split,
    },
    examples=150,
)
