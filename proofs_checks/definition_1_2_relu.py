"""Definition 1.2: ReLU^alpha attention, ``D^-1 A V`` with ``A = max(Q K^T / sqrt(d) - b, 0)^alpha``, ``D = diag(A 1)``.

Source. arXiv 2410.10165, Definition 1.2, as we understand it. The convention for empty rows is ours: where no key has
weight, ``D_ii = 0`` and the formula is undefined; the output is then 0 and the logarithm of the sum -inf.

Hypotheses. Finite queries, keys and values; alpha a whole number of at least 1; b finite.

Conclusion. (i) The output is the weighted mean with the row's own sum of weights as divisor (not n, not sqrt(n)), an
empty row gives 0 and -inf. (ii) The half-space that is asked for lies at ``b sqrt(d)`` on raw products: exactly the
keys with ``<q, k> >= b sqrt(d)`` are reported.

Proof. The weights are rational functions of the inputs where sqrt(d) is rational, so there is nothing to estimate.
(ii) ``w_j > 0`` iff ``<q, k_j> / sqrt(d) > b`` iff ``<q, k_j> > b sqrt(d)``; the half-space is closed, so keys of
weight 0 on its border are in it.

Check. (i) Lattice inputs with d in {1, 4, 16}: every float64 operation but the last division is exact, so the output
must be the exact rational rounded once (one unit of ``u max|V|`` is allowed for routes that compute powers by pow).
(ii) Any d: membership is decided by comparing squares of whole numbers, with b on scores (ties) and between them.

What this does not show. That the rounding is as small for other inputs: weights near the threshold cancel, and an
absolute error of the score becomes a relative error of the weight; the certificate accounts for it. Powers that
overflow or underflow are not tried. (ii) uses the lattice, on which a product that is not on the border misses it by
more than the rounding band; within the band the library may report more.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from attention import ReLUPower
from attention.reference import attend
from hsr import HSRIndex
from proofs_checks.check import PAPER, Check, Extremes, for_all
from proofs_checks.inputs import Problem, problems
from proofs_checks.rationals import at_least_root, exact, largest, relu_weights, rounding_unit, weighted_mean
from proofs_checks.routes import ROUTES, Attended, Route, Weight, by_reference


class Thresholded(NamedTuple):
    """A problem with a weight whose b is on, between, or beyond its scores."""

    problem: Problem
    b: Fraction  # a binary fraction, exact as a float
    alpha: int

    @property
    def weight(self) -> ReLUPower:
        """The weight, with b as a float."""
        return ReLUPower(self.alpha, float(self.b))


@st.composite
def thresholded(draw: st.DrawFn, widths: tuple[int, ...]) -> Thresholded:
    """b is a drawn score rounded to 1/64 (which changes nothing for d in 1, 4, 16), moved a little, or beyond all."""
    problem = draw(problems(widths))
    n, d = problem.keys.shape
    score = float(problem.products(0)[draw(st.integers(0, n - 1))]) / d**0.5
    moved = draw(st.sampled_from((Fraction(0), Fraction(0), Fraction(1, 256), Fraction(-1, 256), Fraction(500))))
    b = Fraction(round(64 * score), 64) + moved
    return Thresholded(problem, b, draw(st.integers(1, 3)))


def assert_relu_row(output: np.ndarray, lse: float, weights: list[Fraction], values: np.ndarray) -> Fraction:
    """Output (dv,) is the weighted mean of values (n, dv), or 0 with lse = -inf; its error in units of u max|V|."""
    if not any(weights):
        assert (output == 0).all(), f"an empty row gives {output}, not 0"
        assert lse == -np.inf, f"an empty row has lse {lse}, not -inf"
        return Fraction(0)
    unit = rounding_unit(values)
    error = largest(exact(output) - weighted_mean(weights, values)) / unit
    assert error <= 1, f"{output} is not {weighted_mean(weights, values).astype(float)}"
    total = float(sum(weights))
    assert abs(np.exp(lse) - total) <= 1e-12 * total, f"lse {lse} is not ln {total}"
    return error


def conclude(route: Route, examples: int) -> dict[str, float]:
    """Compare a route with the definition; the largest error, and how often the row was empty."""
    met = Extremes()
    rows = empty = 0

    def outputs(case: Thresholded) -> None:
        nonlocal rows, empty
        q, k, v = case.problem.floats
        found = route(q, k, v, case.weight, case.problem.method)
        for i in range(len(q)):
            weights = relu_weights(case.problem.scores(i), case.b, case.alpha)
            error = assert_relu_row(found.output[i], found.lse[i], weights, case.problem.values)
            met.largest("output error / (u max|V|)", error)
            rows, empty = rows + 1, empty + (not any(weights))

    def offsets(case: Thresholded) -> None:
        q, k, v = case.problem.floats
        found = route(q, k, v, case.weight, case.problem.method)
        for i in range(len(q)):
            members = sum(at_least_root(x, case.b, k.shape[1]) for x in case.problem.products(i))
            if found.reported[i] >= 0:
                assert found.reported[i] == members, f"row {i}: {found.reported[i]} keys reported, {members} are inside"

    for_all(thresholded((1, 4, 16)), outputs, examples)
    for_all(thresholded((2, 3, 5, 7, 16)), offsets, examples)
    met["share of empty rows"] = empty / rows
    return met


def at_offset(offset: float, q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: ReLUPower, method: str) -> Attended:
    """ReLU attention over the half-space ``<q, k> >= offset``, whatever b is."""
    report = HSRIndex(k, method).query(q, offset)
    output, lse, _ = attend(
        report.offsets, report.indices, report.scores, v[None], np.zeros(len(q)), weight, k.shape[1] ** -0.5
    )
    return Attended(output, lse, report.counts, report.scanned)


def _unscaled_offset(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: Weight, method: str) -> Attended:
    assert isinstance(weight, ReLUPower)
    return at_offset(weight.b, q, k, v, weight, method)


def _divided_by_n(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: Weight, method: str) -> Attended:
    found = by_reference(q, k, v, weight, method)
    return found._replace(output=found.output * np.exp(found.lse)[:, None] / len(k))


def _empty_row_averages(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: Weight, method: str) -> Attended:
    found = by_reference(q, k, v, weight, method)
    return found._replace(output=np.where(np.isneginf(found.lse)[:, None], v.mean(axis=0) + 1, found.output))


CHECK = Check(
    statement="Definition 1.2: ReLU^alpha attention, its half-space and its empty rows",
    source=PAPER,
    evidence="exact rationals",
    conclude=conclude,
    operations=ROUTES,
    faults={
        "half-space at b, not b sqrt(d)": _unscaled_offset,
        "weights divided by n, not by their sum": _divided_by_n,
        "an empty row gives a mean": _empty_row_averages,
    },
)
