"""Upper confidence bounds on means of finite populations, from rows drawn without replacement.

Nothing is assumed of the population but its range, and every bound holds for every sample size.  It is a test by
betting: who doubts that the mean is as large as m bets, draw by draw, on small values, at odds that are fair if the
mean is m.  At the true mean the capital is a non-negative martingale that starts at 1, so it ever reaches
``1 / delta`` with probability at most delta (Ville); a candidate m at which it does is refuted.

    y_i = 1 - x_i,  eta_i(m) = (N (1 - m) - y_1 - .. - y_{i-1}) / (N - i + 1)    mean of what is left, if the mean is m
    K_t(m) = sum_theta prior(theta) prod_{i <= t} (1 - theta + theta y_i / eta_i(m))

K grows with m, so the candidates that are left form an interval, and log K is convex in m.

Sources: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (JRSS B 2024), section 5 for
draws without replacement; the mixture of fixed shares, and the bound over strata by the dual of a convex programme,
are ours.  The empirical Bernstein bound of Maurer and Pontil (COLT 2009) is wider and made for draws with replacement;
`proofs_checks/audit_bound.py` measures both.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache

import numpy as np
from scipy.stats import hypergeom

from attention import betting_numba

SHARES = np.arange(1, 9) / 8  # theta, the share of the capital that is bet each time
LOG_PRIOR = np.log([1 / 14] * 7 + [1 / 2])  # half on the boldest, the best one where nearly all values are near zero
CANDIDATES = 400  # means tried; bounds are rounded up to the next one
PRICES = np.geomspace(1e-6, 10.0, 160)  # Lagrange multipliers tried; each gives a valid bound
SLACK = 1e-9  # above any rounding of a logarithm of capital


def upper_mean(x: np.ndarray, population: int, delta: float) -> float:
    """A bound that the population's mean exceeds with probability at most ``delta``.

    Args:
        x: (s,) float64, at most 1 as all of the population; drawn without replacement, in the order of drawing.
        population: N >= s.
        delta: in (0, 1).

    Returns:
        float: at least the sample's own contribution ``sum(x) / N``, the exact mean if s = N.
    """
    means = _candidates(x, population)
    if len(x) == population:
        return float(means[0])

    def refuted(i: int) -> bool:  # as is every larger one, because the capital grows with the mean
        return bool(betting_numba.refutes(x, population, means[i], SHARES, LOG_PRIOR, SLACK - np.log(delta)))

    return float(means[bisect_left(range(CANDIDATES), True, key=refuted)])


def upper_mean_of_strata(x: np.ndarray, population: int, delta: float) -> float:
    """The same for the mean of H equally large strata, with rows drawn independently in each.

    The strata's capitals multiply: at the true means the product has expectation 1 for each share.  The bound is the
    largest average of means at which ``sum_h log K_h(m_h) <= L = -ln(prior(theta) delta)``, for the theta that gives
    the smallest; the dual bounds it from above at any price lambda,

        sum_h m_h <= lambda L + sum_h max_m (m - lambda log K_h(m)).

    Args:
        x: (H, s) float64, at most 1; each row as for `upper_mean`.
        population: N of each stratum.
        delta: in (0, 1), for all strata together.

    Returns:
        float: the bound.
    """
    means = np.array([_candidates(stratum, population) for stratum in x])
    if x.shape[1] == population:
        return float(means[:, 0].mean())
    best = betting_numba.best_means(x, population, means, SHARES, PRICES).sum(axis=0)  # (S, P)
    levels = SLACK * len(x) - LOG_PRIOR - np.log(delta)
    return float(min(means[:, -1].mean(), ((PRICES * levels[:, None] + best) / len(x)).min()))


@lru_cache(maxsize=4096)  # heads are often alike
def upper_share(hits: int, sample: int, population: int, delta: float) -> float:
    """The same for the share of a population that has some property, exact: Clopper and Pearson's, hypergeometric.

    Args:
        hits: rows of the sample that have it.
        sample: s, rows drawn without replacement.
        population: N.
        delta: in (0, 1).

    Returns:
        float: K / N for the largest K at which at most ``hits`` hits have probability above delta.
    """
    totals = range(hits, population - sample + hits + 1)
    above = bisect_left(totals, True, key=lambda total: hypergeom.cdf(hits, population, total, sample) <= delta)
    return totals[max(above - 1, 0)] / population


def _candidates(x: np.ndarray, population: int) -> np.ndarray:
    """Means (CANDIDATES + 1,) from the least possible, ``x`` among zeros, to the largest, denser near the least."""
    least, most = x.sum() / population, (x.sum() + population - len(x)) / population
    return least + (most - least) * np.linspace(0, 1, CANDIDATES + 1) ** 2
