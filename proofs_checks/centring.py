"""Centring: softmax attention does not change when one vector is subtracted from every key; ReLU does, unless b moves.

Source. This library (the sketch centres keys; any sketch of softmax keys may).

Hypotheses. Any finite inputs, any vector c.

Conclusion. With keys ``k_j - c``:

    half-spaces   <q, k> >= b  iff  <q, k - c> >= b - <q, c>
    softmax       the same output, the logarithm of the sum smaller by <q, c> / sqrt(d)
    ReLU^alpha    the same output and sum with b - <q, c> / sqrt(d) in place of b, and in general another one with b

Proof. Every score of a row moves by the same ``<q, c> / sqrt(d)``: a common factor of the exponentials, which the
normaliser cancels; a shift of ``s - b``, which a shift of b cancels.

Check. Lattice inputs, so that centring itself is exact; the centred operation is compared with the definitions on the
keys as given, exactly for ReLU, with 60 digits for softmax. The non-invariance of ReLU is shown by an example. The
constants are the largest errors.

What this does not show. Rounding: keys minus a float mean are rounded, which moves scores by up to ``||q|| ||k|| u``
each; the library's certificates speak of the keys it was given. Rows of different queries need different b.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isqrt

import numpy as np
from hypothesis import strategies as st

from attention import ReLUPower, Softmax
from hsr import HSRIndex
from proofs_checks.check import OURS, Check, Extremes, for_all
from proofs_checks.definition_1_2_relu import assert_relu_row
from proofs_checks.inputs import UNIT, Problem, problems
from proofs_checks.rationals import (
    HALF_ULP,
    exact,
    exponentials,
    largest,
    log_sum_exp,
    relu_weights,
    rounding_unit,
    weighted_mean,
)
from proofs_checks.routes import Attended, Weight, by_decode

# q (d,), k (n, d), v (n, dv), c (d,), weight, method -> one row; k and v as given, c to be subtracted
Centred = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Weight, str], Attended]


def centred(q: np.ndarray, k: np.ndarray, v: np.ndarray, c: np.ndarray, weight: Weight, method: str) -> Attended:
    """`attention.decode` over k - c, b shifted to match, the logarithm shifted back for softmax."""
    shift = float(q @ c) / np.sqrt(len(q))
    if isinstance(weight, ReLUPower):
        return by_decode(q[None], k - c, v, ReLUPower(weight.alpha, weight.b - shift), method)
    found = by_decode(q[None], k - c, v, weight, method)
    return found._replace(lse=found.lse + shift)


def conclude(attend: Centred, examples: int) -> dict[str, float]:
    """Both weights on centred keys, half-spaces, and an example where ReLU is not invariant."""
    met = Extremes()
    shifts = st.lists(st.integers(-40, 40), min_size=16, max_size=16)

    def conclusion(case: tuple[Problem, list[int], int]) -> None:
        problem, entries, b = case
        c = np.array(entries[: problem.keys.shape[1]])
        _softmax(attend, problem, c, met)
        _relu(attend, problem, c, Fraction(b, 4), met)
        _half_spaces(problem, c)

    for_all(st.tuples(problems(), shifts, st.integers(-4, 8)), conclusion, examples)
    q, k, v = np.ones(1), np.array([[1.0], [2.0]]), np.array([[0.0], [1.0]])
    as_given, moved = (by_decode(q[None], x, v, ReLUPower(1, 0.0), "brute").output.item() for x in (k, k + 1))
    assert (round(3 * as_given), round(5 * moved)) == (2, 3), "ReLU attention with the same b is not invariant"
    return met


def _softmax(attend: Centred, problem: Problem, c: np.ndarray, met: Extremes) -> None:
    q, k, v = problem.floats
    scores = problem.scores(0)
    found = attend(q[0], k, v, c / UNIT, Softmax(), problem.method)
    wanted = weighted_mean(exponentials(scores)[0], problem.values)
    error = largest(exact(found.output[0]) - wanted) / rounding_unit(v)
    assert error <= 2 * len(k) + 8, f"{found.output[0]} is not {wanted.astype(float)}"
    off = abs(exact(found.lse)[0] - log_sum_exp(scores))
    assert off <= (len(k) + 8 + 4 * 2000) * HALF_ULP, f"lse {found.lse[0]} is not {float(log_sum_exp(scores))}"
    met.largest("softmax: output error / (u max|V|)", error)


def _relu(attend: Centred, problem: Problem, c: np.ndarray, b: Fraction, met: Extremes) -> None:
    q, k, v = problem.floats
    for alpha in (1, 2):
        found = attend(q[0], k, v, c / UNIT, ReLUPower(alpha, float(b)), problem.method)
        weights = relu_weights(problem.scores(0), b, alpha)
        error = assert_relu_row(found.output[0], float(found.lse[0]), weights, problem.values)
        met.largest("ReLU: output error / (u max|V|)", error)


def _half_spaces(problem: Problem, c: np.ndarray) -> None:
    products = problem.keys @ problem.queries[0]
    b = int(np.sort(products)[len(products) // 2])
    shifted = b - int(problem.queries[0] @ c)
    index = HSRIndex((problem.keys - c) / UNIT, problem.method)
    found = index.query(problem.queries[:1] / UNIT, shifted / UNIT**2).row(0)[0]
    assert np.array_equal(np.sort(found), np.flatnonzero(products >= b)), "the shifted half-space holds other keys"


def _same_b(q: np.ndarray, k: np.ndarray, v: np.ndarray, c: np.ndarray, weight: Weight, method: str) -> Attended:
    found = by_decode(q[None], k - c, v, weight, method)
    shift = float(q @ c) / np.sqrt(len(q)) if isinstance(weight, Softmax) else 0.0
    return found._replace(lse=found.lse + shift)


def _unscaled_shift(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, c: np.ndarray, weight: Weight, method: str
) -> Attended:
    return centred(q, k - c + c / isqrt(len(q)), v, c / isqrt(len(q)), weight, method)


def _queries_centred(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, c: np.ndarray, weight: Weight, method: str
) -> Attended:
    return centred(q - c, k, v, c, weight, method)


CHECK = Check(
    statement="Centring: softmax is invariant, ReLU shifts b",
    source=OURS,
    evidence="exact rationals for ReLU; 60 digits for softmax",
    conclude=conclude,
    operations={"attention.decode over k - c": centred},
    faults={
        "ReLU with b as it was": _same_b,
        "b shifted by less than was subtracted": _unscaled_shift,
        "c subtracted from the query too": _queries_centred,
    },
)
