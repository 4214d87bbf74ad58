"""Upper bounds on ``<q, k>`` that could prune real keys, each in plain float64 numpy.

A bound maps queries (m, d) to (m, n) upper bounds on the scores of its n keys; a key survives a threshold that its
bound reaches.  Orders put keys next to each other: "tokens" as the model wrote them (the pages of Quest), "kd" by
halving near the median of the widest axis.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

GROUP = 16  # keys per ball or box
BLOCK = 64  # keys that share one residual and one norm of their codes, as in `hsr.sketch_numba`
INT8, INT4 = 127, 7  # largest code
OUTLIER = 8.0  # robust standard deviations an axis of codes covers, as in `hsr.sketch_numba`

Bound = Callable[[np.ndarray], np.ndarray]
MakeBound = Callable[[np.ndarray], Bound]
Order = Callable[[np.ndarray], np.ndarray]  # keys (n, d) -> permutation (n,)


def tokens(keys: np.ndarray) -> np.ndarray:
    """The order in which the keys came."""
    return np.arange(len(keys))


def kd(keys: np.ndarray) -> np.ndarray:
    """Halves of halves, split at a multiple of GROUP near the median of the axis that spreads most."""

    def halved(rows: np.ndarray) -> np.ndarray:
        if len(rows) <= GROUP:
            return rows
        middle = GROUP * (-(-len(rows) // GROUP) // 2)
        axis = np.ptp(keys[rows], axis=0).argmax()
        rows = rows[np.argpartition(keys[rows, axis], middle)]
        return np.concatenate([halved(rows[:middle]), halved(rows[middle:])])

    return halved(np.arange(len(keys)))


def balls(keys: np.ndarray, order: Order) -> Bound:
    """``<q, c> + |q| r`` for the group's mean c and the largest distance r from it."""
    rows = order(keys)
    starts = np.arange(0, len(keys), GROUP)
    sizes = np.diff(np.append(starts, len(keys)))
    centres = np.add.reduceat(keys[rows], starts) / sizes[:, None]
    radii = np.maximum.reduceat(np.linalg.norm(keys[rows] - np.repeat(centres, sizes, axis=0), axis=1), starts)
    group = _group_of(rows)
    return lambda q: (q @ centres.T + np.linalg.norm(q, axis=1)[:, None] * radii)[:, group]


def boxes(keys: np.ndarray, order: Order) -> Bound:
    """``sum_i max(q_i lo_i, q_i hi_i)`` over the group's box."""
    rows = order(keys)
    starts = np.arange(0, len(keys), GROUP)
    low, high = np.minimum.reduceat(keys[rows], starts), np.maximum.reduceat(keys[rows], starts)
    group = _group_of(rows)
    return lambda q: (np.minimum(q, 0) @ low.T + np.maximum(q, 0) @ high.T)[:, group]


def _group_of(rows: np.ndarray) -> np.ndarray:
    """The group of each key, for a permutation that puts groups next to each other."""
    group = np.empty(len(rows), np.int64)
    group[rows] = np.arange(len(rows)) // GROUP
    return group


def suffix(keys: np.ndarray, leading: int) -> Bound:
    """The exact product on the leading principal axes, and Cauchy-Schwarz on the others; one bound per key."""
    mean, axes = _principal(keys)
    turned = (keys - mean) @ axes
    head, tail = turned[:, :leading], np.linalg.norm(turned[:, leading:], axis=1)

    def bound(q: np.ndarray) -> np.ndarray:
        z = q @ axes
        rest = np.linalg.norm(z[:, leading:], axis=1)
        return (q @ mean)[:, None] + z[:, :leading] @ head.T + rest[:, None] * tail

    return bound


class Codes:
    """The method ``sketch`` in numpy, with codes up to a given level; its queries are int8 for any level."""

    def __init__(self, keys: np.ndarray, levels: int) -> None:
        self._mean, self._axes = _principal(keys)
        turned = (keys - self._mean) @ self._axes
        widest, deviation = np.abs(turned).max(axis=0), 1.4826 * np.median(np.abs(turned), axis=0)
        self._steps = np.where(deviation > 0, np.minimum(widest, OUTLIER * deviation), widest) / levels
        ratio = np.divide(turned, self._steps, where=self._steps > 0, out=np.zeros_like(turned))
        self._codes = np.clip(np.rint(ratio), -levels, levels)
        self._residual = _of_block(np.linalg.norm(turned - self._codes * self._steps, axis=1))
        self._norm = _of_block(np.linalg.norm(self._codes, axis=1))

    def scores(self, q: np.ndarray) -> np.ndarray:
        """What the codes alone say: (m, d) -> (m, n)."""
        sigma, a, _ = self._query(q)
        return (q @ self._mean)[:, None] + sigma[:, None] * (a @ self._codes.T)

    def __call__(self, q: np.ndarray) -> np.ndarray:
        """The scores plus what rounding the query and the keys can take away."""
        _, _, lost = self._query(q)
        return self.scores(q) + lost[:, None] * self._norm + np.linalg.norm(q, axis=1)[:, None] * self._residual

    def _query(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Step (m,), int8 query (m, d) on the codes' axes, norm (m,) of what rounding took from it."""
        z = (q @ self._axes) * self._steps
        sigma = np.abs(z).max(axis=1) / INT8
        a = np.rint(np.divide(z, sigma[:, None], where=sigma[:, None] > 0, out=np.zeros_like(z)))
        return sigma, a, np.linalg.norm(z - sigma[:, None] * a, axis=1)


def _of_block(values: np.ndarray) -> np.ndarray:
    """values (n,) -> at each place the largest of its block."""
    starts = np.arange(0, len(values), BLOCK)
    return np.repeat(np.maximum.reduceat(values, starts), np.diff(np.append(starts, len(values))))


def _principal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and principal axes (d, d), leading first."""
    return keys.mean(axis=0), np.linalg.eigh(np.atleast_2d(np.cov(keys, rowvar=False)))[1][:, ::-1]
