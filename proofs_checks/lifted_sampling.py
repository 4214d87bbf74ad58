"""Lifted half-space sampling: sums over the report are unbiased for any estimate of the scores, and few keys suffice.

Source. This library (`hsr.lifted`); threshold sampling is Duffield, Lund and Thorup's (2007).

Hypotheses. G query heads with scores ``s_hj`` and any estimates ``e_hj`` of them, a threshold T_h each. Key j is
reported with probability ``pi_j = max_h min(1, exp(e_hj - T_h))``, independently of the others, and then weighs
``exp(s_hj) / pi_j`` for head h. ``W = sum_j exp(s_hj)``; p is the softmax of ``s_h``.

Conclusion.

    E What = W and E sum_j What_j v_j = sum_j exp(s_hj) v_j, for every head
    E |report| <= sum_h exp(-T_h) sum_j exp(e_hj), and n 2^-24 more where pi is rounded up to multiples of 2^-24
    Var What = sum_j exp(2 s_hj) (1 - pi_j) / pi_j <= exp(T_h) W E_p[exp(s_hj - e_hj)]

With exact estimates and ``exp(T) = eps^2 W`` that is at most ``1 / eps^2`` keys a head, and a relative variance of at
most ``eps^2``, however many keys there are.

Proof. The expectation of ``[j reported] / pi_j`` is 1, its variance ``(1 - pi_j) / pi_j``, which is 0 or at most
``1 / pi_j <= exp(T_h - e_hj)``; probabilities are at most the sum of the heads' exponentials.

Check. Powers of two stand for exponentials, so that everything is rational, and all outcomes of up to six keys are
enumerated: expectations, variances and sizes are exact. The operation says what pi and the weight of a key are; floats
are read as the power of two that they are within 1e-6. The constants are the largest ratios to the bounds.

What this does not show. That the numbers drawn are independent and uniform (`tests/hsr/test_lifted.py` tests
frequencies); that a ratio of two unbiased sums is unbiased, which it is only nearly; of systematic draws more than
that these are their pi: their variance has no such bound. How good estimates are is measured elsewhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from attention.reference import attend_weighted
from hsr import lifted_numba, reference
from proofs_checks.check import OURS, Check, Extremes, for_all

ROWS = 512  # draws by the kernel: a key of the smallest pi, 1/16, is in none of them with chance 4e-15
NEAR = 1e-6


class Case(NamedTuple):
    """Logarithms to the base of two, and values."""

    scores: np.ndarray  # (G, n) int64
    estimates: np.ndarray  # (G, n) int64
    thresholds: np.ndarray  # (G,) int64
    values: np.ndarray  # (n,) int64


class Sample(NamedTuple):
    """What an operation says of each key."""

    pis: list[Fraction]  # (n,)
    weights: list[list[Fraction]]  # (G, n), if reported


Sampler = Callable[[Case], Sample]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few keys, estimates good and bad; the first head's estimates give pi of 1/16 or more."""
    heads, n = draw(st.integers(1, 2)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores, reach = rng.integers(-4, 5, (heads, n)), draw(st.integers(0, 3))
    estimates = scores + rng.integers(-reach, reach + 1, (heads, n))
    return Case(scores, estimates, estimates[0].min() + rng.integers(0, 5, heads), rng.integers(-3, 4, n))


def power(x: float) -> Fraction:
    """The power of two that a float is, up to rounding."""
    exponent = round(math.log2(x))
    assert abs(x / 2.0**exponent - 1) < NEAR, f"{x} is not a power of two"
    return Fraction(2) ** exponent


def by_reference(case: Case) -> Sample:
    """`hsr.reference.chances`, and the weights of `attention.reference.attend_weighted` over one reported key."""
    pis = reference.chances(case.estimates * math.log(2), case.thresholds * math.log(2))
    return Sample([power(pi) for pi in pis], _weights(case, pis))


def by_kernel(case: Case) -> Sample:
    """`hsr.lifted_numba.draw`: the pi of every key, as it is reported with it in one of many draws."""
    heads, n = case.estimates.shape
    estimates, unit = np.zeros((1, ROWS, heads, 64), np.int16), np.full((1, ROWS, heads), math.log(2))
    estimates[..., :n] = case.estimates
    thresholds = np.broadcast_to(case.thresholds * math.log(2), (1, ROWS, heads)).copy()
    spans, keys = np.tile([0, n], (1, ROWS, 1)), lifted_numba.generators(0, np.arange(ROWS)[None])
    ids, pis = np.empty((1, ROWS, 64), np.int32), np.empty((1, ROWS, 64), np.float32)
    counts, variances = np.empty((1, ROWS, 1), np.int64), np.empty((1, ROWS, 1, 2))
    lifted_numba.draw(estimates, unit, thresholds, spans, keys, False, 1, ids, pis, counts, variances)
    found = np.full(n, np.nan)
    for row in range(ROWS):
        report = slice(0, counts[0, row, 0])
        found[ids[0, row, report]] = pis[0, row, report]
    return Sample([power(pi) for pi in found], _weights(case, found))


def _weights(case: Case, pis: np.ndarray) -> list[list[Fraction]]:
    centre, one = np.zeros(1), np.ones((1, 1))
    lse = [
        [attend_weighted(one, one * s * math.log(2), one, pis[[j]], centre, 0.0, 1.0)[1][0] for j, s in enumerate(head)]
        for head in case.scores
    ]
    return [[power(math.exp(x)) for x in head] for head in lse]


def conclude(sampler: Sampler, examples: int) -> dict[str, float]:
    """Every conclusion, by enumeration."""
    met = Extremes()
    for_all(cases(), lambda case: _enumerated(sampler, case, met), examples)
    return met


def _enumerated(sampler: Sampler, case: Case, met: Extremes) -> float:
    pis, weights = sampler(case)
    two, n = Fraction(2), len(pis)
    outcomes = []
    for report in itertools.product((False, True), repeat=n):
        chance = math.prod((pi if inside else 1 - pi) for pi, inside in zip(pis, report, strict=True))
        outcomes.append((Fraction(chance), report))
    size = sum((chance * sum(report) for chance, report in outcomes), Fraction(0))
    most = sum(
        (two ** int(e - t) for t, head in zip(case.thresholds, case.estimates, strict=True) for e in head), Fraction(0)
    )
    assert size <= most, f"{float(size)} keys are expected, bound {float(most)}"
    met.largest("keys / bound", size / most)
    ratios = []
    for scores, estimates, threshold, given in zip(case.scores, case.estimates, case.thresholds, weights, strict=True):
        exact = [two ** int(s) for s in scores]
        total = sum(exact, Fraction(0))
        sums = [
            (chance, sum((w for w, inside in zip(given, report, strict=True) if inside), Fraction(0)))
            for chance, report in outcomes
        ]
        mean = sum((chance * x for chance, x in sums), Fraction(0))
        assert mean == total, f"the expected weight is {float(mean)}, exactly {float(total)}"
        numerator = sum((pi * w * int(v) for pi, w, v in zip(pis, given, case.values, strict=True)), Fraction(0))
        wanted = sum((w * int(v) for w, v in zip(exact, case.values, strict=True)), Fraction(0))
        assert numerator == wanted, f"the expected sum of values is {float(numerator)}, exactly {float(wanted)}"
        variance = sum((chance * (x - total) ** 2 for chance, x in sums), Fraction(0))
        assert variance == sum((w * w * (1 - pi) / pi for w, pi in zip(exact, pis, strict=True)), Fraction(0))
        bound = two ** int(threshold) * sum(
            (w * two ** int(s - e) for w, s, e in zip(exact, scores, estimates, strict=True)), Fraction(0)
        )
        assert variance <= bound, f"variance {float(variance)}, bound {float(bound)}"
        ratios.append(float(variance / bound))
        met.largest("variance / bound", ratios[-1])
    return max(ratios)


def _weights_as_they_are(case: Case) -> Sample:
    return by_reference(case)._replace(weights=[[Fraction(2) ** int(s) for s in head] for head in case.scores])


def _weights_by_estimates(case: Case) -> Sample:
    return by_reference(case._replace(scores=case.estimates))


def _head(case: Case, h: int) -> Case:
    return Case(case.scores[[h]], case.estimates[[h]], case.thresholds[[h]], case.values)


def _smallest_of_the_heads(case: Case) -> Sample:
    alone = [by_reference(_head(case, h)).pis for h in range(len(case.scores))]
    pis = [min(column) for column in zip(*alone, strict=True)]
    return Sample(pis, _weights(case, np.array(pis, np.float64)))


CHECK = Check(
    statement="Lifted sampling: unbiased for any estimates, bounded size and variance",
    source=OURS,
    evidence="exact rationals, all outcomes enumerated",
    conclude=conclude,
    operations={"the references": by_reference, "hsr.lifted_numba.draw": by_kernel},
    faults={
        "weights not divided by pi": _weights_as_they_are,
        "weights of estimates": _weights_by_estimates,
        "the smallest pi of a group's heads": _smallest_of_the_heads,
    },
    examples=200,
)
