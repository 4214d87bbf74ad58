"""Certified group sums: what a group's mean and radius say about its weight and its weighted values.

Source. This library. The library has no estimator built on these bounds yet: the operation checked is the formula
below.

Hypotheses. A group of n keys with exact mean c and radius R = max ||k_i - c||; ``x = <q, c> / sqrt(d)``, ``r = ||q||
R / sqrt(d)``; values with mean vbar and ``rho = max ||v_i - vbar||``, in any norm.

Conclusion. With ``W = sum e^(s_i)``,

    n e^x <= W <= n e^x cosh r
    |W - m| <= tanh^2(r/2) m   for the midpoint  m = n e^x (1 + cosh r) / 2
    ||sum e^(s_i) v_i - n e^x vbar|| <= n e^x [(cosh r - 1) ||vbar|| + sinh(r) rho]

All are attained: equal scores attain the first, two equal halves at x - r and x + r the others, with values ``vbar +
rho vbar/||vbar||`` on the upper half and ``vbar - rho vbar/||vbar||`` on the lower.

Proof. Scores have mean x and lie in [x - r, x + r]. Jensen; the chord of exp over the interval, at its middle.
Values: ``sum w_i v_i = W vbar + sum (w_i - e^x)(v_i - vbar)``, and the mean of ``|e^y - 1|`` over y in [-r, r] of
mean zero is at most sinh r, its concave envelope at 0.

Check. (i) Powers of two stand for exponentials, which makes both sides rational: only convexity is used. Scores of
mean exactly x are drawn together with values; a directed search looks for the worst ratios. (ii) Real geometry:
lattice keys, means and radii, exponentials of 70 digits, up to a share of 1e-50. The constants are the largest
ratios.

What this does not show. That groups of real keys have small r: with pages of 16 keys at d = 64 it is so large that
the bounds say nothing. Grouping keys well is another matter.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from proofs_checks.check import OURS, Check, Extremes, for_all
from proofs_checks.rationals import CONTEXT, decimal_of, exact, largest, norm_square

SLACK = Fraction(1, 10**50)  # more than the rounding of 70 digits adds up to


class Bounds(NamedTuple):
    """What is known of a group, all rational in e^x and e^r."""

    least: Fraction  # of the weight
    most: Fraction
    midpoint: Fraction
    deviation: Fraction  # of the weight from the midpoint, as a share of the midpoint
    of_mean: Fraction  # the factor of ||vbar|| in the value bound
    of_radius: Fraction  # the factor of rho


Formula = Callable[[int, Fraction, Fraction], Bounds]


class Group(NamedTuple):
    """Scores minus their mean (whole numbers that sum to 0), values and r."""

    offsets: list[int]
    values: np.ndarray  # (n, dv) int64
    r: int


def bounds(count: int, middle: Fraction, spread: Fraction) -> Bounds:
    """n, e^x, e^r -> the bounds of the statement."""
    cosh, sinh = (spread + 1 / spread) / 2, (spread - 1 / spread) / 2
    base = count * middle
    return Bounds(base, base * cosh, base * (1 + cosh) / 2, (cosh - 1) / (cosh + 1), base * (cosh - 1), base * sinh)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """Whole offsets of sum 0, at most r in magnitude, and small whole values."""
    half = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    offsets = half + [-y for y in half]
    if draw(st.booleans()):
        offsets = [2 * half[0], -half[0], -half[0], *([0] * draw(st.integers(0, 3)))]
    width = draw(st.integers(1, 2))
    values = draw(st.lists(st.integers(-4, 4), min_size=width * len(offsets), max_size=width * len(offsets)))
    r = max(map(abs, offsets)) + draw(st.integers(0, 1))
    return Group(offsets, np.reshape(values, (len(offsets), width)), r)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A query (d,), keys (n, d) and values (n, 2) on lattices; d is 1, 4 or 9."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d, n = draw(st.sampled_from((1, 4, 9))), draw(st.integers(1, 8))
    spread = draw(st.integers(1, 4))
    keys = rng.integers(-8, 9, d) + rng.integers(-spread, spread + 1, (n, d))
    return rng.integers(-4, 5, d), keys, rng.integers(-8, 9, (n, 2))


def conclude(formula: Formula, examples: int) -> dict[str, float]:
    """Rational groups, the extremal groups, real geometry."""
    met = Extremes()
    for_all(groups(), lambda group: _in_rationals(formula, group, met), examples)
    vbar, rho = 3, 2
    halves = Group([5, -5], np.array([[vbar + rho], [vbar - rho]]), 5)
    assert _in_rationals(formula, halves, met) == 1, "two halves attain the value bound"
    for_all(geometries(), lambda case: _in_geometry(formula, *case, met), examples)
    return met


def _in_rationals(formula: Formula, group: Group, met: Extremes) -> float:
    two = Fraction(2)
    found = formula(len(group.offsets), Fraction(1), two**group.r)
    return _compare(found, [two**y for y in group.offsets], group.values, Fraction(0), met)


def _compare(found: Bounds, weights: list[Fraction], values: np.ndarray, slack: Fraction, met: Extremes) -> float:
    """Weights divided by e^x, known up to a share ``slack``; how nearly the value bound is attained."""
    total, n = sum(weights, Fraction(0)), len(weights)
    room = slack * total
    assert found.least - room <= total <= found.most + room, f"{float(total)} is not within its bounds"
    off = abs(total - found.midpoint)
    assert off <= found.deviation * found.midpoint + room, f"{float(total)} is too far from the midpoint"
    vbar = exact(values).sum(axis=0) / n
    rho = max(largest(exact(v) - vbar) for v in values)
    error = largest(np.array(weights, object) @ exact(values) - n * vbar)
    bound = found.of_mean * largest(vbar) + found.of_radius * rho
    assert error <= bound + room * largest(exact(values)), (
        f"the values' sum is off by {float(error)}, bound {float(bound)}"
    )
    met.largest("weight / upper bound", total / found.most)
    met.largest("lower bound / weight", found.least / total)
    ratio = float(error / bound) if bound else 0.0
    met.largest("value error / bound", ratio)
    return ratio


def _in_geometry(formula: Formula, q: np.ndarray, keys: np.ndarray, values: np.ndarray, met: Extremes) -> None:
    centre = exact(keys).sum(axis=0) / len(keys)
    root = round(len(q) ** 0.5)
    offsets = [(exact(k) - centre) @ exact(q) / (4 * root) for k in keys]  # queries are quarters
    square = max(norm_square(exact(k) - centre) for k in keys) * norm_square(exact(q)) / (4 * root) ** 2
    with decimal.localcontext(CONTEXT):
        r = Fraction(decimal_of(square).sqrt())
        assert max(map(abs, offsets)) <= r + SLACK, "a score lies further than r from its mean"
        weights = [Fraction(decimal_of(y).exp()) for y in offsets]
        spread = Fraction(decimal_of(r).exp())
    _compare(formula(len(keys), Fraction(1), spread), weights, values, SLACK, met)


def _no_chord(count: int, middle: Fraction, spread: Fraction) -> Bounds:
    """A centroid's estimate taken for an upper bound."""
    found = bounds(count, middle, spread)
    return found._replace(most=found.least)


def _half_radius(count: int, middle: Fraction, spread: Fraction) -> Bounds:
    found = bounds(count, middle, spread)
    return found._replace(of_radius=found.of_radius / 2)


def _no_curvature(count: int, middle: Fraction, spread: Fraction) -> Bounds:
    found = bounds(count, middle, spread)
    return found._replace(of_mean=Fraction(0))


CHECK = Check(
    statement="Certified group sums: Jensen, chord and value bounds",
    source=OURS,
    evidence="exact rationals for powers of two; 70 digits for exponentials",
    conclude=conclude,
    operations={"the formulas": bounds},
    faults={
        "the centroid's estimate as upper bound": _no_chord,
        "half of sinh(r) rho": _half_radius,
        "the term of the mean value forgotten": _no_curvature,
    },
)
