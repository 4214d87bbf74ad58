"""LSE merge: attention over keys in parts is the mean of the parts' outputs, weighted by their sums of weights.

Source. This library (sharded caches); the identity behind split-K and ring attention. The library has no merge of its
own yet: the operation checked is the formula below, fed with the library's partial results.

Hypotheses. Each part gives its output and the logarithm of its sum of weights, ``-inf`` where no key has weight.

Conclusion. ``output = sum_p e^(lse_p) output_p / sum_p e^(lse_p)`` and ``lse = ln sum_p e^(lse_p)`` are the output
and logarithm over all keys, for softmax and for ReLU^alpha; a part without weight changes nothing, and if all are
without, the row is empty. So HSR attention is exact over shards that each report on their own.

Proof. A sum over all keys is the sum over parts of sums over their keys.

Check. (i) Exactly: parts with rational sums and means. (ii) `attention.decode` on each part of lattice problems,
merged in float64, against exponentials of 60 digits or exact rationals over all keys; the logarithms of the parts are
rounded, which allows an error of ``(4 n + 8 |lse| + 40) u max|V|``. The constant is the largest error in units of ``u
max|V|``.

What this does not show. Certificates of merged results, nor top-r over parts: the r best of the whole are not the r
best of each part. How ranks exchange the parts is not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from attention import ReLUPower, Softmax
from proofs_checks.check import OURS, Check, Extremes, for_all
from proofs_checks.inputs import Problem, problems
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
from proofs_checks.routes import Weight, by_decode

Merge = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]]  # outputs (p, dv), lses (p,) -> (dv,), lse


def merged(outputs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, float]:
    """The statement's formula, scaled by the largest part so that nothing overflows."""
    top = lses.max()
    if np.isneginf(top):
        return np.zeros(outputs.shape[1]), -np.inf
    weights = np.exp(lses - top)
    return weights @ outputs / weights.sum(), float(top + np.log(weights.sum()))


def conclude(merge: Merge, examples: int) -> dict[str, float]:
    """The identity in rationals, then the library's partial results."""
    met = Extremes()
    part = st.lists(st.tuples(st.integers(0, 50), st.integers(-9, 9)), min_size=1, max_size=4)
    for_all(st.lists(part, min_size=1, max_size=4), _in_rationals, examples)
    weights = st.sampled_from((Softmax(), ReLUPower(1, 0.5), ReLUPower(2, 4.0)))
    cuts = st.lists(st.integers(0, 200), max_size=5)

    def conclusion(case: tuple[Problem, Weight, list[int]]) -> None:
        problem, weight, places = case
        q, k, v = problem.floats
        edges = sorted({min(max(x, 1), len(k)) for x in places} | {len(k)})
        parts = [slice(a, b) for a, b in zip([0, *edges], edges, strict=False)]
        found = [by_decode(q[:1], k[part], v[part], weight, "brute") for part in parts]
        output, lse = merge(np.stack([x.output[0] for x in found]), np.array([x.lse[0] for x in found]))
        _compare(output, lse, problem, weight, met)

    for_all(st.tuples(problems(), weights, cuts), conclusion, examples)
    return met


def _compare(output: np.ndarray, lse: float, problem: Problem, weight: Weight, met: Extremes) -> None:
    scores, unit = problem.scores(0), rounding_unit(problem.values)
    if isinstance(weight, ReLUPower):
        weights = relu_weights(scores, exact(weight.b).item(), weight.alpha)
        if not any(weights):
            assert np.isneginf(lse) and not output.any(), f"an empty row merges to {output}, lse {lse}"
            return
        total = float(np.log(float(sum(weights))))
    else:
        weights, total = [Fraction(w) for w in exponentials(scores)[0]], float(log_sum_exp(scores))
    error = largest(exact(output) - weighted_mean(weights, problem.values))
    limit = 4 * len(scores) + 8 * Fraction(abs(total)) + 40
    assert error <= limit * unit, f"{output} is not {weighted_mean(weights, problem.values).astype(float)}"
    assert abs(lse - total) <= float(limit * HALF_ULP), f"lse {lse} is not {total}"
    met.largest("output error / (u max|V|)", error / unit)


def _in_rationals(parts: list[list[tuple[int, int]]]) -> None:
    """Weights and values of each part, merged by sums: the same mean as over all keys."""
    sums = [sum(w for w, _ in part) for part in parts]
    keys = [pair for part in parts for pair in part]
    if sum(sums) == 0:
        return
    means = [
        Fraction(sum(w * v for w, v in part), total) if total else Fraction(0)
        for part, total in zip(parts, sums, strict=True)
    ]
    whole = Fraction(sum(w * v for w, v in keys), sum(sums))
    assert sum((m * total for m, total in zip(means, sums, strict=True)), Fraction(0)) / sum(sums) == whole


def _plain_mean(outputs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, float]:
    return outputs.mean(axis=0), merged(outputs, lses)[1]


def _sum_of_logarithms(outputs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, float]:
    output, lse = merged(outputs, lses)
    return output, lse if np.isneginf(lse) else float(lses[np.isfinite(lses)].sum())


def _weights_in_logarithms(outputs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, float]:
    finite = np.where(np.isfinite(lses), np.abs(lses), 0.0) + 1e-9
    return finite @ outputs / finite.sum(), merged(outputs, lses)[1]


CHECK = Check(
    statement="LSE merge: partial attention merges exactly",
    source=OURS,
    evidence="exact rationals; 60 digits for softmax",
    conclude=conclude,
    operations={"the formula, over attention.decode": merged},
    faults={
        "parts weighted equally": _plain_mean,
        "logarithms added": _sum_of_logarithms,
        "logarithms for weights": _weights_in_logarithms,
    },
)
