"""Decoding end to end, one query a call: `attention.decode` over a built index, and numpy over every key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from attention import ReLUPower, Softmax, Values, decode
from benchmarks.attending import DENSE, WEIGHTS, Attention, Work, dense_work, policy, sparse_work, tolerance
from benchmarks.dense_attention import Weight, attended, weighed
from benchmarks.gate import require_rows
from benchmarks.ledger import Costs
from benchmarks.searches import BLOCK, Problem, timed
from hsr import HSRIndex

Found = Iterator[tuple[str, Costs]]  # name of the weight, costs


class Decoding:
    """Decodes of one problem's queries, each weight with n^(4/5) keys."""

    def __init__(self, given: Problem, thresholds: np.ndarray, values: np.ndarray, quick: bool) -> None:
        """Thresholds (m,) that n^(4/5) keys reach, values (n, dv) float32."""
        self._given, self._thresholds, self._values, self._quick = given, thresholds, values, quick
        self._weights = {name: _weights(name, given, thresholds) for name in WEIGHTS}
        self._wanted = {name: self._exact(weights, thresholds) for name, weights in self._weights.items()}

    def sparse(self, method: str, index: HSRIndex) -> Found:
        """Over an index of one head."""
        q, values = self._given.queries[None], Values(self._values[None])
        for name, weights in self._weights.items():
            ask = partial(_decode, q, index, values, weights)
            yield name, self._costs(f"{method}, {name}", Attention(ask, sparse_work), self._wanted[name])

    def dense(self) -> Found:
        """Over every key; for softmax that is more than the top r."""
        given, values = self._given, self._values
        everything = np.full(len(given.queries), -np.inf)
        read = partial(dense_work, keys=np.array([len(values)]))
        for name, weights in self._weights.items():
            ask = partial(_attend, given, values, weights)
            yield name, self._costs(f"{DENSE}, {name}", Attention(ask, read), self._exact(weights, everything))

    def _costs(self, name: str, attention: Attention, wanted: np.ndarray) -> Costs:
        """The gate for every query, wanted (m, dv) float64, then the clock."""
        m = len(wanted)
        pieces = [attention.read(attention.ask(i)) for i in range(m)]
        work = Work(*map(np.concatenate, zip(*pieces, strict=True)))
        require_rows(name, work.outputs, wanted, tolerance(self._values))
        return Costs(timed(attention.ask, m, self._quick), *work[1:])

    def _exact(self, weights: list[Weight], thresholds: np.ndarray) -> np.ndarray:
        """Attention over the keys at or above each query's threshold -> (m, dv) float64."""
        scale = 1 / np.sqrt(self._given.keys.shape[1])
        kept = np.where(self._given.scores >= thresholds[:, None], self._given.scores * scale, -np.inf)
        shares = np.concatenate([weighed(row[None], weight) for row, weight in zip(kept, weights, strict=True)])
        outputs = np.zeros((len(weights), self._values.shape[1]))
        for first in range(0, len(self._values), BLOCK):
            block = slice(first, first + BLOCK)
            outputs += shares[:, block] @ self._values[block].astype(np.float64)
        return outputs / shares.sum(axis=1, keepdims=True)


def _weights(name: str, given: Problem, thresholds: np.ndarray) -> list[Weight]:
    """One weight per query; that of a ReLU fires the keys at or above its query's threshold."""
    scale = 1 / np.sqrt(given.keys.shape[1])
    made: dict[str, Callable[[float], Weight]] = {
        "relu": lambda threshold: ReLUPower(1, float(threshold * scale)),
        "softmax": lambda _: Softmax(),
    }
    return [made[name](threshold) for threshold in thresholds]


def _decode(q: np.ndarray, index: HSRIndex, values: Values, weights: list[Weight], i: int) -> object:
    return decode(q[:, i : i + 1], index, values, weight=weights[i], policy=policy(weights[i]))


def _attend(given: Problem, values: np.ndarray, weights: list[Weight], i: int) -> object:
    return attended(given.queries[i : i + 1], given.keys, values, weights[i])
