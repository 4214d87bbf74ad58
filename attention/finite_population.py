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

import numpy as np

from attention import betting_numba, hypergeometric_numba

SHARES = np.arange(1, 9) / 8  # theta, the share of the capital that is bet each time
LOG_PRIOR = np.log([1 / 14] * 7 + [1 / 2])  # half on the boldest, the best one where nearly all values are near zero
CANDIDATES = 400  # means tried; bounds are rounded up to the next one
PRICES = np.geomspace(1e-6, 10.0, 160)  # Lagrange multipliers tried; each gives a valid bound
SLACK = 1e-7  # above the rounding of a logarithm of capital or of a chance, of a million rows, too


def upper_means(x: np.ndarray, population: int, delta: float) -> np.ndarray:
    """A bound for each of H populations, which its mean exceeds with probability at most ``delta``.

    Args:
        x: (H, s) float64, at most 1 as all of the populations; drawn without replacement, in the order of drawing.
        population: N >= s, of each.
        delta: in (0, 1), for each.

    Returns:
        np.ndarray: (H,); at least the samples' own contributions ``sum(x) / N``, the exact means if s = N.
    """
    means = _candidates(x, population)
    if x.shape[1] == population:
        return means[:, 0]
    level = SLACK - np.log(delta)
    first = betting_numba.first_refuted(x, population, means, SHARES, LOG_PRIOR, level)
    return np.take_along_axis(means, first[:, None], axis=1)[:, 0]


def upper_mean_of_strata(x: np.ndarray, population: int, delta: float) -> float:
    """The same for the mean of H equally large strata, with rows drawn independently in each.

    The strata's capitals multiply: at the true means the product has expectation 1 for each share.  The bound is the
    largest average of means at which ``sum_h log K_h(m_h) <= L = -ln(prior(theta) delta)``, for the theta that gives
    the smallest; the dual bounds it from above at any price lambda,

        sum_h m_h <= lambda L + sum_h max_m (m - lambda log K_h(m)).

    Args:
        x: (H, s) float64, at most 1; each row as for `upper_means`.
        population: N of each stratum.
        delta: in (0, 1), for all strata together.

    Returns:
        float: the bound.
    """
    means = _candidates(x, population)
    if x.shape[1] == population:
        return float(means[:, 0].mean())
    best = betting_numba.best_means(x, population, means, SHARES, PRICES).sum(axis=0)  # (S, P)
    levels = SLACK * len(x) - LOG_PRIOR - np.log(delta)
    return float(min(means[:, -1].mean(), ((PRICES * levels[:, None] + best) / len(x)).min()))


def upper_shares(hits: np.ndarray, sample: int, population: int, delta: float) -> np.ndarray:
    """The same for the shares of populations that have some property, exact: Clopper and Pearson's, hypergeometric.

    Args:
        hits: (H,) int64; rows of each sample that have it.
        sample: s, rows drawn without replacement from each population.
        population: N, of each.
        delta: in (0, 1), for each.

    Returns:
        np.ndarray: (H,); K / N for the largest K at which at most ``hits`` hits have probability above delta, or
            within rounding of it.
    """
    return hypergeometric_numba.largest_totals(hits, population, sample, np.log(delta) - SLACK) / population


def _candidates(x: np.ndarray, population: int) -> np.ndarray:
    """Means (H, CANDIDATES + 1) from the least possible, ``x`` (H, s) among zeros, to the largest, denser below."""
    least = x.sum(axis=1, keepdims=True) / population
    most = (x.sum(axis=1, keepdims=True) + population - x.shape[1]) / population
    return least + (most - least) * np.linspace(0, 1, CANDIDATES + 1) ** 2
