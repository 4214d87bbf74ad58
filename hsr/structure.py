"""What a method of the dispatch table provides: a module with ``build(keys) -> Structure``."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hsr.report import Hits


class Structure(Protocol):
    """An immutable search structure over a fixed run of keys.

    It is a frozen dataclass whose fields are numpy arrays and plain numbers (so that storage can save any of them),
    and it does not hold the keys: the index owns those and passes the same run to every call.
    """

    def report(
        self, keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray, limits: np.ndarray, collect: bool
    ) -> Hits:
        """Report every key with ``<q, k> >= b`` among each query's first ``limits[i]`` keys.

        Args:
            keys: (n, d) float32 or float64, the run given to ``build``, C-contiguous.
            queries: (m, d) float64, C-contiguous, scaled so that no product with a key overflows.
            thresholds: (m,) float64; -inf reports all, +inf none, never NaN.
            limits: (m,) int64 in 0..n.
            collect: with False only ``offsets`` and the work counters are filled.

        Returns:
            Hits: every key whose product, summed in any order in float64, reaches the threshold, and no key whose
            exact product misses it by more than the rounding band of `hsr.exact`.
        """
        ...


class Build(Protocol):
    """Make a structure over keys (n, d), n >= 1, float32 or float64, C-contiguous, finite."""

    def __call__(self, keys: np.ndarray) -> Structure:
        """The structure over these keys."""
        ...
