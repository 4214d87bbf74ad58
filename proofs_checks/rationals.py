"""Attention in exact rationals, and softmax weights to 60 digits: what the checks compare floats with.

Matrices are numpy arrays of dtype object that hold ``fractions.Fraction`` or ``int``, so ``@`` and ``sum`` are exact.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np

DIGITS = 60
HALF_ULP = Fraction(1, 2**53)  # float64 rounds by at most this, relatively
CONTEXT = decimal.Context(prec=DIGITS + 10)


def exact(array: Any) -> np.ndarray:
    """Floats, integers or Fractions of any shape -> the same values as Fractions."""
    plain = array if isinstance(array, np.ndarray) else np.array(array, object)
    out = np.empty(plain.shape, object)
    for place, x in np.ndenumerate(plain):
        out[place] = Fraction(x.item() if isinstance(x, np.generic) else x)  # of a numpy integer it would overflow
    return out


def weighted_mean(weights: Sequence[Any] | np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weights (n,) of positive sum, values (n, dv) integers, floats or Fractions -> (dv,) Fractions."""
    held = exact(weights)
    return (held @ exact(values)) / held.sum()


def exponentials(scores: Iterable[Fraction]) -> tuple[list[int], Fraction]:
    """Scores (n,) -> whole numbers ``10**DIGITS exp(s_j - max s)``, each off by less than 1; and max s."""
    listed = list(scores)
    top = max(listed)
    unit = decimal.Decimal(10) ** DIGITS
    with decimal.localcontext(CONTEXT):
        by_score = {s: int(unit * decimal_of(s - top).exp()) for s in set(listed)}
    return [by_score[s] for s in listed], top


def log_sum_exp(scores: Iterable[Fraction]) -> Fraction:
    """``ln sum_j exp(s_j)`` to 50 digits or more."""
    weights, top = exponentials(scores)
    with decimal.localcontext(CONTEXT):
        return top + Fraction((decimal.Decimal(sum(weights)) / decimal.Decimal(10) ** DIGITS).ln())


def decimal_of(x: Fraction) -> decimal.Decimal:
    """A Fraction, rounded to the digits of the current context."""
    return decimal.Decimal(x.numerator) / decimal.Decimal(x.denominator)


def square_root(d: int) -> Fraction:
    """The root of a whole number: exact for squares, 70 digits for others."""
    if isqrt(d) ** 2 == d:
        return Fraction(isqrt(d))
    with decimal.localcontext(CONTEXT):
        return Fraction(decimal.Decimal(d).sqrt())


def relu_weights(scores: Iterable[Fraction], b: Fraction, alpha: int) -> list[Fraction]:
    """``max(s_j - b, 0) ** alpha``."""
    return [max(s - b, Fraction(0)) ** alpha for s in scores]


def at_least_root(x: Fraction, c: Fraction, d: int) -> bool:
    """Whether ``x >= c sqrt(d)``, decided by squares."""
    if x >= 0 >= c:
        return True
    if x < 0 < c:
        return False
    return x * x >= c * c * d if x >= 0 else x * x <= c * c * d


def at_most_two_roots(x: Fraction, a: Fraction, b: Fraction) -> bool:
    """Whether ``x <= sqrt(a) + sqrt(b)``, for a, b >= 0, decided by squares."""
    rest = x * x - a - b
    return x <= 0 or rest <= 0 or rest * rest <= 4 * a * b


def norm_square(vector: np.ndarray) -> Fraction:
    """``||x||_2^2`` of (d,) Fractions."""
    return Fraction(sum(x * x for x in vector))


def rounding_unit(values: np.ndarray) -> Fraction:
    """``u max(max|V|, 1)``, what errors of outputs are measured in."""
    return HALF_ULP * max(largest(exact(values)), Fraction(1))


def largest(array: np.ndarray) -> Fraction:
    """The largest magnitude of any entry."""
    return Fraction(max(abs(x) for x in array.ravel()))
