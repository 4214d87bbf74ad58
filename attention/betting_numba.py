"""The capital of bets against candidate means; `attention.finite_population` says what it is good for."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

DRAWS, MOST = 16, 1e15  # draws multiplied before a logarithm is taken, and the most that one counts for


@njit(cache=True, inline="always")
def _odds(y, past, i, population, mean):
    """``y_i / eta_i(m)``, what draw i pays for each unit that was bet."""
    return y * (population - i) / max(population * (1 - mean) - past, 1e-300)


@njit(cache=True)
def _refutes(x, population, mean, shares, log_prior, level):
    """Whether the mixture of shares (S,) ever has a log capital of at least level; x (s,) in the order of drawing."""
    paths = log_prior.copy()
    past = 0.0
    for i in range(len(x)):
        y = 1 - x[i]
        odds = _odds(y, past, i, population, mean)
        past += y
        top = -np.inf
        for share in range(len(shares)):
            paths[share] += np.log(1 - shares[share] + shares[share] * odds)
            top = max(top, paths[share])
        total = 0.0
        for share in range(len(shares)):
            total += np.exp(paths[share] - top)
        if top + np.log(total) >= level:
            return True
    return False


@njit(parallel=True, cache=True)
def first_refuted(x, population, means, shares, log_prior, level):
    """The first of the rising means (H, A + 1) of each sample (H, s) that is refuted, the last if none is -> (H,).

    Every mean above a refuted one is refuted too.
    """
    found = np.empty(len(x), np.int64)
    for sample in prange(len(x)):
        low, high = 0, means.shape[1] - 1
        while low < high:
            middle = (low + high) // 2
            if _refutes(x[sample], population, means[sample, middle], shares, log_prior, level):
                high = middle
            else:
                low = middle + 1
        found[sample] = low
    return found


@njit(parallel=True, cache=True)
def best_means(x, population, means, shares, prices):
    """``max_m (m - price log K(m))`` of each stratum: x (H, s), means (H, A + 1) rising -> (H, S, P).

    A mean may lie just below the next candidate: the capital at one counts for the next.
    """
    best = np.full((len(x), len(shares), len(prices)), -np.inf)
    for stratum in prange(len(x)):
        found = best[stratum]
        product, capital = np.empty(len(shares)), np.empty(len(shares))
        for candidate in range(means.shape[1] - 1):
            mean, after = means[stratum, candidate], means[stratum, candidate + 1]
            past = 0.0
            product[:], capital[:] = 1.0, 0.0
            for i in range(x.shape[1]):
                y = 1 - x[stratum, i]
                odds = _odds(y, past, i, population, mean)
                past += y
                for share in range(len(shares)):
                    product[share] *= min(1 - shares[share] + shares[share] * odds, MOST)
                if (i + 1) % DRAWS == 0 or i + 1 == x.shape[1]:
                    for share in range(len(shares)):
                        capital[share] += np.log(product[share])
                        product[share] = 1.0
            for share in range(len(shares)):
                for price in range(len(prices)):
                    value = after - prices[price] * capital[share]
                    found[share, price] = value if value > found[share, price] else found[share, price]
    return best
