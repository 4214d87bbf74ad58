"""Certificates: the error and the dropped mass that a result reports are at least the true ones.

Source. This library (`attention.result.certify`), on top of Theorem 4.3 of arXiv 2410.10165.

Hypotheses. Any finite inputs, any policy of softmax attention, output in the queries' dtype.

Conclusion. With out the exact softmax attention of the given inputs over all visible keys and found the output
returned:

    ||out - found||_2 <= output_error                   truncation, float64 rounding and the rounding to the dtype
    ||out - found||_2 <= relative_error ||out||_2       where that is finite
    tau <= dropped_mass                                 tau: the share of the weight outside the reported keys

Proof idea. ``out - found = tau (mu_T - found)`` by the identity of Theorem 4.3, mu_T is a mean of values and lies in
their ball (centre, radius); tau <= x / (1 + x) if the dropped weight is at most x times the kept weight, which the
policy bounds by the number of dropped keys and the largest score one of them can have. Rounding is added.

Check. Lattice inputs, exact in every dtype, against exponentials of 60 digits; values at random, or of opposite sign
for large and small scores, which is what a certificate must fear. Errors are compared as squares of rationals. The
constants are the largest ratios of truth to certificate: a ratio near 1 says the bound is nearly attained.

What this does not show. That certificates are tight on real data: they assume that the dropped values conspire.
bfloat16 is not tried here, nor values so large that their squares overflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from attention import Certified, Dense, Policy, Result, TopR, decode
from hsr import HSRIndex
from proofs_checks.check import OURS, Check, Extremes, for_all
from proofs_checks.inputs import Problem, problems
from proofs_checks.rationals import exact, exponentials, norm_square, weighted_mean

Decode = Callable[[np.ndarray, np.ndarray, np.ndarray, Policy, str], Result]
POLICIES: tuple[Policy, ...] = (
    Dense(),
    TopR(),
    TopR(1),
    TopR(5),
    Certified(0.01, sinks=1, recent=2, spread=3),
    Certified(0.5, sinks=1, recent=0, spread=0),
    Certified(0.9, sinks=0, recent=1, spread=0),
)


class Judged(NamedTuple):
    """A problem, the policy and the dtype it is solved with, and whether its values conspire."""

    problem: Problem
    policy: Policy
    dtype: type[np.floating]
    opposite: bool


def by_decode(q: np.ndarray, k: np.ndarray, v: np.ndarray, policy: Policy, method: str) -> Result:
    """`attention.decode` of one head."""
    return decode(q[None], HSRIndex(k[None], method), v[None], policy=policy)


def conclude(attend: Decode, examples: int) -> dict[str, float]:
    """Certificates against the truth, for drawn problems, policies and dtypes."""
    met = Extremes()
    dtypes: tuple[type[np.floating], ...] = (np.float64, np.float32, np.float16)
    judged = st.builds(
        Judged, problems((1, 3, 4, 5, 16)), st.sampled_from(POLICIES), st.sampled_from(dtypes), st.booleans()
    )
    for_all(judged, lambda case: _conclusion(attend, case, met), examples)
    return met


def _conclusion(attend: Decode, case: Judged, met: Extremes) -> float:
    q, k, v = case.problem.floats
    if case.opposite:
        products = k @ q[0]
        v = np.where(products >= np.sort(products)[-1 - len(k) // 8], 8.0, -8.0)[:, None]
    result = attend(q.astype(case.dtype), k.astype(case.dtype), v.astype(case.dtype), case.policy, case.problem.method)
    shown = attend(q, k, np.eye(len(k)), case.policy, case.problem.method)  # its output is the weights
    closest = 0.0
    for i in range(len(q)):
        weights = exponentials(case.problem.scores(i))[0]
        out = weighted_mean(weights, v)
        square = norm_square(exact(result.output[0, i]) - out)
        error, relative = (float(x[0, i]) for x in (result.certificate.output_error, result.certificate.relative_error))
        assert square <= Fraction(error) ** 2, f"row {i}: off by {float(square) ** 0.5:.6g}, certified {error:.6g}"
        if np.isfinite(relative):
            assert square <= Fraction(relative) ** 2 * norm_square(out), f"row {i}: relative error above {relative:.6g}"
        tau = Fraction(sum(w for w, p in zip(weights, shown.output[0, i], strict=True) if p <= 0), sum(weights))
        dropped = float(shown.certificate.dropped_mass[0, i])
        assert tau <= dropped, f"row {i}: dropped mass {float(tau):.6g}, certified {dropped:.6g}"
        if error > 0:
            closest = max(closest, float(square) ** 0.5 / error)
        if dropped > 1e-9:
            met.largest("dropped mass / certified", tau / Fraction(dropped))
    met.largest(f"error / certified, {np.dtype(case.dtype)}", closest)
    return closest


def _no_radius(q: np.ndarray, k: np.ndarray, v: np.ndarray, policy: Policy, method: str) -> Result:
    result = by_decode(q, k, v, policy, method)
    far = np.linalg.norm(result.output.astype(np.float64) - v.mean(axis=0), axis=2)
    return _certified(result, result.certificate.dropped_mass, result.certificate.dropped_mass * far + 1e-9)


def _rounding_of_float64(q: np.ndarray, k: np.ndarray, v: np.ndarray, policy: Policy, method: str) -> Result:
    result = by_decode(q, k, v, policy, method)
    wide = by_decode(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), policy, method)
    return _certified(result, result.certificate.dropped_mass, wide.certificate.output_error)


def _half_the_mass(q: np.ndarray, k: np.ndarray, v: np.ndarray, policy: Policy, method: str) -> Result:
    result = by_decode(q, k, v, policy, method)
    return _certified(result, result.certificate.dropped_mass / 2, result.certificate.output_error)


def _certified(result: Result, dropped_mass: np.ndarray, output_error: np.ndarray) -> Result:
    certificate = dataclasses.replace(result.certificate, dropped_mass=dropped_mass, output_error=output_error)
    return dataclasses.replace(result, certificate=certificate)


CHECK = Check(
    statement="Certificates bound the error and the dropped mass",
    source=OURS,
    evidence="60 digits against exact rationals",
    conclude=conclude,
    operations={"attention.decode": by_decode},
    faults={
        "the radius of the values is forgotten": _no_radius,
        "the rounding to the output's dtype is forgotten": _rounding_of_float64,
        "half the dropped mass": _half_the_mass,
    },
)
