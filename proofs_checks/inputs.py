"""Hypothesis strategies shared by the statements: attention problems on a lattice, whose products are exact."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from proofs_checks.rationals import square_root
from proofs_checks.routes import methods_for

UNIT = 4  # queries and keys are whole multiples of 1 / UNIT
SQUARES = (1, 4, 16)  # widths whose square root is a power of two: every scaled score is exact in float64
KINDS = ("spread", "coarse", "repeated", "offset", "sharp", "zero")


class Problem(NamedTuple):
    """One head of attention, in whole numbers."""

    queries: np.ndarray  # (m, d) int64, UNIT times the queries
    keys: np.ndarray  # (n, d) int64, UNIT times the keys
    values: np.ndarray  # (n, dv) int64
    method: str  # of the index

    @property
    def floats(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys and values as float64, exactly."""
        return self.queries / UNIT, self.keys / UNIT, self.values.astype(np.float64)

    def products(self, i: int) -> list[Fraction]:
        """``<q_i, k_j>`` for every j, exactly."""
        return [Fraction(int(x), UNIT * UNIT) for x in self.keys @ self.queries[i]]

    def scores(self, i: int) -> list[Fraction]:
        """``<q_i, k_j> / sqrt(d)`` for every j, exactly if d is a square."""
        root = square_root(self.keys.shape[1])
        return [x / root for x in self.products(i)]


@st.composite
def problems(
    draw: st.DrawFn, widths: tuple[int, ...] = SQUARES, most: int = 90, kinds: tuple[str, ...] = KINDS
) -> Problem:
    """Few or many keys (several leaves of a tree, blocks of a sketch); ties, duplicates, zeros, a common offset."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.one_of(st.integers(1, 8), st.integers(1, most)))
    d, m, dv = draw(st.sampled_from(widths)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(kinds))
    reach = 1 if kind == "coarse" else 8
    queries, keys = rng.integers(-reach, reach + 1, (m, d)), rng.integers(-reach, reach + 1, (n, d))
    values = rng.integers(-8, 9, (n, dv))
    if kind == "repeated":
        keys = keys[rng.integers(0, 1 + n // 4, n)]
    elif kind == "offset":
        keys = keys + rng.integers(-40, 41, d)
    elif kind == "sharp":
        queries = 8 * queries
    elif kind == "zero":
        keys[rng.random(n) < 0.5] = 0
        queries[0] = 0
    return Problem(queries, keys, values, draw(st.sampled_from(methods_for(n, d))))


class Prompt(NamedTuple):
    """A problem with at most as many queries as keys, and whether row i sees only the keys up to i + n - m."""

    problem: Problem
    causal: bool

    def visible(self, i: int) -> int:
        """How many keys row i sees."""
        m, n = len(self.problem.queries), len(self.problem.keys)
        return n - m + i + 1 if self.causal else n


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Square prompts and continuations of a cached prefix."""
    problem = draw(problems(most=40))
    n, d = problem.keys.shape
    m = draw(st.one_of(st.just(n), st.integers(1, n)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Prompt(problem._replace(queries=rng.integers(-8, 9, (m, d))), draw(st.booleans()))
