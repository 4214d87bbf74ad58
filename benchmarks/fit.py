"""The exponent e of ``y ~ n**e`` with a confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


class Fit(NamedTuple):
    """An exponent and the ends of its confidence interval."""

    exponent: float
    low: float
    high: float


def fitted(sizes: Sequence[int], samples: Sequence[np.ndarray], rng: np.random.Generator) -> Fit:
    """The least-squares slope of the logarithm of the samples' mean over the logarithm of n.

    The interval holds the middle LEVEL of the slopes of RESAMPLES bootstrap resamples, in each of which every size
    draws anew, with replacement, from its own queries.  So it covers what other queries would have given; not other
    keys, and not that the truth may be no power of n.

    Args:
        sizes: at least two different n.
        samples: one array (m,) of positive costs per size, one cost per query; m may differ.
        rng: source of the resamples.
    """
    x = np.log(sizes)
    x -= x.mean()
    slope = x / (x @ x)  # (sizes,): its product with the logarithms is the slope
    drawn = [part[rng.integers(0, len(part), (RESAMPLES, len(part)))].mean(axis=1) for part in samples]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(slope @ np.log(drawn), (tail, 1 - tail))
    return Fit(float(slope @ np.log([part.mean() for part in samples])), float(low), float(high))
