"""Definition 1.1: softmax attention is ``D^-1 A V`` with ``A = exp(Q K^T / sqrt(d))`` and ``D = diag(A 1)``.

Source. arXiv 2410.10165, Definition 1.1, as we understand it.

Hypotheses. Finite queries (m, d), keys (n, d) and values (n, dv), n >= 1.

Conclusion. Every route of the library that keeps all keys returns ``sum_j w_j v_j / sum_j w_j`` and ``ln sum_j w_j``
with ``w_j = exp(<q, k_j> / sqrt(d))``, up to the rounding of float64: where the scores are exact, the output is off
by at most ``(2 n + 8) u max|V|`` and the logarithm by ``(n + 8 + 2 |lse|) u``, with ``u = 2**-53``.

Proof of the bound. An exponential is off by 2 u, a sum of n positive terms by (n - 1) u, each relatively; numerator
and denominator have one of each, the products and the division add 2 u.

Check. Keys and queries on a lattice with d in {1, 4, 16}, so that scores are exact in float64; the definition is
evaluated with exponentials of 60 digits and exact rational sums. The constants are the largest errors met, in units
of ``u max|V|`` and of u.

What this does not show. Nothing is said of scores that round: for other widths and data the error of a score moves a
weight by that much, relatively; the certificate accounts for it (`certificates`). The lattice has scores of magnitude
up to 128, so overflow of the exponential is not tried here.
"""

from __future__ import annotations

import numpy as np

from attention import Softmax
from proofs_checks.check import PAPER, Check, Extremes, for_all
from proofs_checks.inputs import Problem, problems
from proofs_checks.rationals import (
    HALF_ULP,
    exact,
    exponentials,
    largest,
    log_sum_exp,
    rounding_unit,
    weighted_mean,
)
from proofs_checks.routes import ROUTES, Attended, Route, Weight, by_reference


def conclude(attend: Route, examples: int) -> dict[str, float]:
    """Compare a route with the definition on drawn problems; the largest errors."""
    met = Extremes()

    def conclusion(problem: Problem) -> None:
        q, k, v = problem.floats
        found = attend(q, k, v, Softmax(), problem.method)
        n = len(k)
        for i in range(len(q)):
            scores = problem.scores(i)
            wanted, lse = weighted_mean(exponentials(scores)[0], problem.values), log_sum_exp(scores)
            unit = rounding_unit(v)
            error = largest(exact(found.output[i]) - wanted)
            assert error <= (2 * n + 8) * unit, f"row {i}: {found.output[i]} is not {wanted.astype(float)}"
            off = abs(exact(found.lse)[i] - lse)
            assert off <= (n + 8 + 2 * abs(lse)) * HALF_ULP, f"row {i}: {found.lse[i]} is not {float(lse)}"
            met.largest("output error / (u max|V|)", error / unit)
            met.largest("lse error / u", off / HALF_ULP)

    for_all(problems(), conclusion, examples)
    return met


def _unscaled(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: Weight, method: str) -> Attended:
    return by_reference(q * k.shape[1] ** 0.5, k, v, weight, method)


def _not_normalised(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: Weight, method: str) -> Attended:
    found = by_reference(q, k, v, weight, method)
    return found._replace(output=found.output * np.exp(found.lse)[:, None] / len(k))


def _values_shifted(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: Weight, method: str) -> Attended:
    return by_reference(q, k, np.roll(v, 1, axis=0), weight, method)


CHECK = Check(
    statement="Definition 1.1: softmax attention",
    source=PAPER,
    evidence="60 digits; floats within a proven bound",
    conclude=conclude,
    operations=ROUTES,
    faults={
        "scores not divided by sqrt(d)": _unscaled,
        "weights divided by n, not by their sum": _not_normalised,
        "values of the neighbouring keys": _values_shifted,
    },
)
