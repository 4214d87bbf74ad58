"""What the ends have in common: ways to attend, the work they report, and the judge's tolerance.

ReLU attention gets the threshold that fires n^(4/5) keys, softmax the policy `TopR`, which keeps as many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attention import Result, Softmax, TopR
from benchmarks.dense_attention import Weight

RULE = "n^0.8"  # of `benchmarks.ledger`
DENSE = "dense"  # the method that reads every key: numpy in float32
WEIGHTS = ("relu", "softmax")
TOLERANCE = 1e-5  # of an output's entry, over the values' largest: sums of up to 2**20 terms in float32


class Work(NamedTuple):
    """Arrays, one entry per row of attention."""

    outputs: np.ndarray  # (rows, dv)
    visited: np.ndarray
    scanned: np.ndarray
    reported: np.ndarray


class Attention(NamedTuple):
    """One way to attend; what it returns for its i-th piece of work is read off the clock."""

    ask: Callable[[int], Any]
    read: Callable[[Any], Work]


def policy(weight: Weight) -> TopR | None:
    """ReLU attention takes none."""
    return TopR() if isinstance(weight, Softmax) else None


def sparse_work(result: Result) -> Work:
    """Of one head."""
    counters = result.counters
    return Work(result.output[0], counters.visited[0], counters.scanned[0], counters.reported[0])


def dense_work(outputs: np.ndarray, keys: np.ndarray) -> Work:
    """Of rows that see so many keys each."""
    return Work(outputs, np.zeros_like(keys), keys, keys)


def tolerance(values: np.ndarray) -> float:
    """How far an output's entry may be off, for values (n, dv)."""
    return TOLERANCE * float(np.abs(values).max())
