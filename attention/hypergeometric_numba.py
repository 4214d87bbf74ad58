"""How many of a population may have a property that few of a sample have; `attention.finite_population` says why."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange


@njit(cache=True)
def log_cdf(hits, population, total, sample):
    """Log of the chance of at most ``hits`` hits; all of the whole sample's misses fit into the population's.

    With h hits, K in all and s of N drawn: the chance of just h is
    ``prod_{j < h} (K - j)(s - j) / ((N - j)(j + 1)) prod_{j < s - h} (N - K - j) / (N - h - j)``, and that of one
    fewer than i is ``i (N - K - s + i) / ((K - i + 1)(s - i + 1))`` times that of i.
    """
    log = 0.0
    for j in range(hits):
        log += math.log((total - j) * (sample - j) / ((population - j) * (j + 1)))
    for j in range(sample - hits):
        log += math.log((population - total - j) / (population - hits - j))
    term, sum = 1.0, 1.0
    for i in range(hits, 0, -1):
        term *= i * (population - total - sample + i) / ((total - i + 1) * (sample - i + 1))
        sum += term
        if term <= 0.0:
            break
    return log + math.log(sum)


@njit(parallel=True, cache=True)
def largest_totals(hits, population, sample, level):
    """The largest K for which the log of the chance of at most ``hits`` (H,) is above level; hits if none -> (H,)."""
    found = np.empty(len(hits), np.int64)
    for one in prange(len(hits)):
        low, high = hits[one], population - sample + hits[one] + 1  # the first that is refuted lies in low .. high
        while low < high:
            middle = (low + high) // 2
            if log_cdf(hits[one], population, middle, sample) <= level:
                high = middle
            else:
                low = middle + 1
        found[one] = max(low - 1, hits[one])
    return found
