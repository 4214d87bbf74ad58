"""Measurements of growing inputs as flat rows, all with the same keys, and the exponents fitted to them.

A row of kind "query" or "decode" is about one query a call, one of kind "prefill" about a whole prompt.  ``ms`` is the
mean and ``spread`` the distance between the quartiles over the queries (prompts); ``visited`` (bounds evaluated),
``scanned`` (keys read at full precision) and ``reported`` are means.

A row of kind "fit" holds the exponent of n of one ``quantity`` of the rows of kind ``of``: "work", which is visited +
scanned, or "ms"; ``low`` and ``high`` end its 95 % interval (see `benchmarks.fit`).  Beside it stand the exponents of
the paper's terms: ``theory`` is ``1 - 1/floor(d/2)`` (Corollary 3.1, part 1), ``theory_output`` that of the keys to
report, ``theory_log`` the slope that log n (part 2) has between these sizes on doubly logarithmic paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.fit import fitted

Row = dict[str, object]


class Rule(NamedTuple):
    """How many of n keys to report: about ``n**exponent``."""

    exponent: float
    keys: Callable[[int], int]


RULES = {
    "64": Rule(0.0, lambda n: 64),
    "n^0.8": Rule(0.8, lambda n: int(np.ceil(n**0.8 - 1e-9))),  # as `attention.TopR` rounds
}
EMPTY: Row = dict.fromkeys(
    "kind of data d n rule k method weight ms spread visited scanned reported "
    "quantity exponent low high theory theory_output theory_log".split()
)
MILLI = 1e3


class Series(NamedTuple):
    """What grows with n alone."""

    kind: str
    data: str
    d: int
    rule: str  # of RULES
    method: str
    weight: str | None = None


class Costs(NamedTuple):
    """Arrays (m,), one entry per query or prompt."""

    seconds: np.ndarray
    visited: np.ndarray
    scanned: np.ndarray
    reported: np.ndarray


class Ledger:
    """Makes rows and remembers what the fits need."""

    def __init__(self) -> None:
        self._costs: dict[Series, dict[int, Costs]] = {}

    def row(self, series: Series, n: int, costs: Costs) -> Row:
        """The row of one size of one series."""
        self._costs.setdefault(series, {})[n] = costs
        quartiles = np.percentile(costs.seconds, [25, 75])
        return (
            EMPTY
            | series._asdict()
            | {
                "n": n,
                "k": RULES[series.rule].keys(n),
                "ms": float(costs.seconds.mean()) * MILLI,
                "spread": float(quartiles[1] - quartiles[0]) * MILLI,
                "visited": float(costs.visited.mean()),
                "scanned": float(costs.scanned.mean()),
                "reported": float(costs.reported.mean()),
            }
        )

    def fits(self, rng: np.random.Generator) -> Iterator[Row]:
        """Two rows, work and time, per series with more than one size."""
        for series, by_size in self._costs.items():
            sizes = sorted(by_size)
            if len(sizes) < 2:
                continue
            costs = [by_size[n] for n in sizes]
            quantities = {
                "work": [found.visited + found.scanned for found in costs],
                "ms": [found.seconds * MILLI for found in costs],
            }
            named = series._asdict() | {"kind": "fit", "of": series.kind} | theories(series, sizes)
            for quantity, samples in quantities.items():
                yield EMPTY | named | {"quantity": quantity, **fitted(sizes, samples, rng)._asdict()}


def theories(series: Series, sizes: Sequence[int]) -> dict[str, float]:
    """The exponents of n that the paper's terms have over these sizes; a prompt of n rows adds 1."""
    rows = 1.0 if series.kind == "prefill" else 0.0
    growth = np.polyfit(np.log(sizes), np.log(np.log(sizes)), 1)[0]
    return {
        "theory": rows + 1 - 1 / max(1, series.d // 2),
        "theory_output": rows + RULES[series.rule].exponent,
        "theory_log": rows + float(growth),
    }
