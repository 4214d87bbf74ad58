"""Massive activation: softmax over the ``n^gamma`` best keys errs by ``2 ||V||_inf / n^(gamma + (b1 - b2) ||q|| - 1)``.

Source. arXiv 2410.10165. As we understand it, the paper defines, for gamma in [0, 1] and ``b1 >= b2 >= 0``: K is
(gamma, b1, b2)-massively activated for q if (1) the mean of ``<q, k_i> / ||q||`` over R = NN(n^gamma, q, K) is at
least ``b1 ln n`` and (2) ``<q, k_i> / ||q|| <= b2 ln n`` for every other i; and it states for softmax of ``<q, k_i>``
that

    ||out - out_R||_inf <= 2 ||V||_inf / n^(gamma + (b1 - b2) ||q|| - 1)

Hypotheses. As above; every drawn problem satisfies them with equality in (1) and (2), b2 = 0 if all others are
negative.

Conclusion. The bound above, and with scores divided by sqrt(d) the same with ``||q|| / sqrt(d)`` in place of
``||q||``.

Proof. By Jensen ``alpha >= n^gamma n^(b1 ||q||)``; ``abar <= n n^(b2 ||q||)``; insert both in Theorem 4.3.

Check. (i) Without the library and exactly: powers of two stand for exponentials (the proof uses only convexity), both
sides are raised to the power n^gamma, which makes them rational. (ii) `attention.decode` with TopR and scale 1 or
1/sqrt(d), against exponentials of 60 digits: the bound is ``2 ||V||_inf (n/r) e^(top score outside R - mean score
inside)``. The constant is the largest ratio of error to bound; it comes close to 1 when two groups of keys have
opposite values.

What this does not show. That real keys are massively activated. The bound says something only if ``gamma + (b1 - b2)
||q|| > 1``; the constant named "useful bounds" is the share of drawn problems for which it does.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from attention import TopR, decode
from hsr import HSRIndex
from proofs_checks.check import PAPER, Check, Extremes, for_all
from proofs_checks.rationals import DIGITS, HALF_ULP, exact, exponentials, largest, weighted_mean
from proofs_checks.routes import methods_for

# q (d,), k (n, d), v (n, dv), r, scale, method -> (dv,)
Decode = Callable[[np.ndarray, np.ndarray, np.ndarray, int, float, str], np.ndarray]


class Activated(NamedTuple):
    """A query, r keys along it and others that score less, in whole numbers of quarters; R is the first r."""

    q: np.ndarray  # (d,) int64
    k: np.ndarray  # (n, d) int64
    v: np.ndarray  # (n, dv) int64
    r: int
    method: str


@st.composite
def activated(draw: st.DrawFn) -> Activated:
    """Products inside R above those outside, which may all be equal; values random, or opposite in- and outside."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d = draw(st.integers(2, 100)), draw(st.sampled_from((1, 4)))
    r = draw(st.one_of(st.integers(1, n - 1), st.integers(1, min(3, n - 1))))
    q, k = rng.integers(-4, 5, d), rng.integers(-2, 3, (n, d))
    k = k[np.argsort(-(k @ q), kind="stable")]
    k[:r] += draw(st.integers(0, 12)) * np.sign(q)
    if draw(st.booleans()):
        k[r:] = k[r]
    v = rng.integers(-8, 9, (n, 1))
    if draw(st.booleans()):
        v = np.where(np.arange(n) < r, 8, -8)[:, None]
    products = k @ q
    assume(products[:r].min() > products[r:].max() and products[:r].sum() >= 0)
    return Activated(q, k, v, r, draw(st.sampled_from(methods_for(n, d))))


def by_decode(q: np.ndarray, k: np.ndarray, v: np.ndarray, r: int, scale: float, method: str) -> np.ndarray:
    """`attention.decode` with `TopR`."""
    return decode(q[None, None], HSRIndex(k[None], method), v[None], policy=TopR(r), scale=scale).output[0, 0]


def conclude(attend: Decode, examples: int) -> dict[str, float]:
    """The inequality in powers of two, then the library in exponentials."""
    met = Extremes()
    useful = [0, 0]

    def conclusion(case: Activated) -> float:
        closest = 0.0
        _powers_of_two(case)
        products = case.k @ case.q
        for root in {1, round(len(case.q) ** 0.5)}:
            scores = [Fraction(int(x), 16 * root) for x in products]
            bound, informative = _bound(scores, case.r, largest(exact(case.v)))
            out = weighted_mean(exponentials(scores)[0], case.v)
            found = attend(case.q / 4, case.k / 4, case.v.astype(np.float64), case.r, 1 / root, case.method)
            error = largest(exact(found) - out)
            rounding = (2 * len(scores) + 8) * HALF_ULP * 8
            assert error <= bound + rounding, f"error {float(error)} exceeds the bound {float(bound)}"
            if bound:
                met.largest("error / bound", error / bound)
                closest = max(closest, float(error / bound))
            useful[0], useful[1] = useful[0] + informative, useful[1] + 1
        return closest

    for_all(activated(), conclusion, examples)
    met["useful bounds"] = useful[0] / useful[1]
    return met


def _bound(scores: list[Fraction], r: int, size: Fraction) -> tuple[Fraction, bool]:
    """``2 size (n/r) e^(s_outside - mean s_inside)`` to 59 digits, rounded up, and whether it is below 2 size."""
    outside = max(max(scores[r:]), Fraction(0))  # b2 >= 0
    mean = sum(scores[:r], Fraction(0)) / r
    assert mean >= outside, "b1 >= b2"
    small = Fraction(exponentials([outside, mean])[0][0] + 1, 10**DIGITS)
    factor = Fraction(len(scores), r) * small
    return 2 * size * factor, factor < 1


def _powers_of_two(case: Activated) -> None:
    """The same inequality for weights 2^s, s whole: both sides to the power r."""
    s = [int(x) for x in case.k @ case.q]
    least = min(s)
    weights = [Fraction(2) ** (x - least) for x in s]
    difference = largest(weighted_mean(weights, case.v) - weighted_mean(weights[: case.r], case.v[: case.r]))
    size = largest(exact(case.v))
    outside = max(max(s[case.r :]), 0)
    left = difference**case.r
    right = (2 * size * Fraction(len(s), case.r) * Fraction(2) ** outside) ** case.r / Fraction(2) ** sum(s[: case.r])
    assert left <= right, "the inequality fails in powers of two"


def _first_and_last(q: np.ndarray, k: np.ndarray, v: np.ndarray, r: int, scale: float, method: str) -> np.ndarray:
    return by_decode(-q, k, v, r, scale, method)


def _one_key_less(q: np.ndarray, k: np.ndarray, v: np.ndarray, r: int, scale: float, method: str) -> np.ndarray:
    best = np.argsort(-(k @ q), kind="stable")[1:]
    return by_decode(q, k[best], v[best], r, scale, method)


CHECK = Check(
    statement="Massive activation: error over the n^gamma best keys",
    source=PAPER,
    evidence="exact rationals for powers of two; 60 digits for exponentials",
    conclude=conclude,
    operations={"attention.decode, TopR": by_decode},
    faults={
        "the worst keys, not the best": _first_and_last,
        "the best key is lost": _one_key_less,
    },
)
