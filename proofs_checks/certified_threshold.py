"""Certified threshold: a half-space placed by a few exact scores drops at most the share eps of the softmax weight.

Source. This library (`attention.Certified`); no such threshold is in arXiv 2410.10165.

Hypotheses. S0 is any set of keys scored exactly, ``LSE0 = ln sum_{S0} e^(s_i)``, n' the number of other keys, eps in
(0, 1). Every other key with ``s_i >= T`` is reported, and S0 is kept.

Conclusion. With ``T = LSE0 - ln(n' (1 - eps) / eps)`` the dropped mass is ``tau <= eps``, for any scores whatever,
hence by Theorem 4.3 the error is at most ``2 eps ||V||_inf``. The library uses ``T = LSE0 + ln(eps / n)``, a little
lower, which does not need S0 to be kept.

Proof. Every dropped weight is below e^T, so ``abar <= n' e^T = e^LSE0 eps / (1 - eps)``, and e^LSE0 is at most the
kept weight. The library's: ``abar <= n e^T = eps e^LSE0 <= eps alpha``.

Check. (i) Without the library and exactly: positive rationals for weights, the keys outside S0 just below the
threshold; tau approaches eps, so T cannot be raised. (ii) The library, attacked: all n' other keys just below the
float64 threshold, on it, or above it by little; weights summed with 60 digits. (iii) The library on lattices. The
constants are the largest tau / eps.

What this does not show. What the guarantee costs: for Gaussian scores of deviation 2, eps = 0.1 and n = 32,768 more
than half of the keys lie above T. Rounding of LSE0 itself may exceed eps by a relative 1e-12, which is allowed here.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from attention import Certified, decode
from hsr import HSRIndex
from proofs_checks.check import OURS, Check, Extremes, for_all
from proofs_checks.inputs import Problem, problems
from proofs_checks.rationals import exact, exponentials
from proofs_checks.routes import methods_for


class Kept(NamedTuple):
    """Which keys carry weight, and the dropped mass that the result certifies."""

    keys: np.ndarray  # (m, n) bool
    dropped_mass: np.ndarray  # (m,)


class Attack(NamedTuple):
    """Scores themselves (q = 1, d = 1, scale 1): the first ``sinks`` are S0, the rest aim at the threshold."""

    scores: np.ndarray  # (n,) float64
    sinks: int
    eps: float
    method: str


Select = Callable[[np.ndarray, np.ndarray, Certified, float | None, str], Kept]


def by_decode(q: np.ndarray, k: np.ndarray, policy: Certified, scale: float | None, method: str) -> Kept:
    """The keys that carry weight in `attention.decode`."""
    result = decode(q[None], HSRIndex(k[None], method), np.eye(len(k))[None], policy=policy, scale=scale)
    return Kept(result.output[0] > 0, result.certificate.dropped_mass[0])


@st.composite
def attacks(draw: st.DrawFn) -> Attack:
    """All keys outside S0 at ``LSE0 + ln(eps / n)`` plus or minus little."""
    sinks = draw(st.lists(st.floats(-20, 20), min_size=1, max_size=5))
    others, eps = draw(st.integers(1, 300)), draw(st.sampled_from((0.9, 0.5, 0.1, 0.01, 1e-6)))
    n = len(sinks) + others
    top = max(sinks)
    threshold = top + np.log(np.sum(np.exp(np.array(sinks) - top))) + np.log(eps / n)
    aimed = threshold + draw(st.sampled_from((-1e-11, -1e-13, 0.0, 1e-13, 1e-9, -1e-3, -1.0)))
    return Attack(np.array(sinks + [aimed] * others), len(sinks), eps, draw(st.sampled_from(methods_for(n, 1))))


def conclude(select: Select, examples: int) -> dict[str, float]:
    """The inequality in rationals; the library attacked; the library on lattices."""
    met = Extremes()
    weights = st.lists(st.fractions(Fraction(1, 1000), 1000), min_size=1, max_size=4)
    eps = st.fractions(Fraction(1, 1000), Fraction(9, 10))
    for_all(st.tuples(weights, st.integers(1, 50), eps), lambda case: _in_rationals(*case, met), examples)

    def attacked(case: Attack) -> None:
        policy = Certified(case.eps, sinks=case.sinks, recent=0, spread=0)
        kept = select(np.ones((1, 1)), case.scores[:, None], policy, 1.0, case.method)
        tau = _dropped(kept, 0, list(exact(case.scores)), case.eps)
        met.largest("tau / eps, under attack", tau / Fraction(case.eps))

    for_all(attacks(), attacked, examples)
    policies = st.builds(Certified, st.sampled_from((0.5, 0.1, 1e-3)), *[st.integers(1, 9)] * 3)

    def on_lattices(case: tuple[Problem, Certified]) -> None:
        problem, policy = case
        q, k, _ = problem.floats
        kept = select(q, k, policy, None, problem.method)
        for i in range(len(q)):
            tau = _dropped(kept, i, problem.scores(i), policy.eps)
            met.largest("tau / eps, on lattices", tau / Fraction(policy.eps))

    for_all(st.tuples(problems(), policies), on_lattices, examples)
    return met


def _in_rationals(kept: list[Fraction], others: int, eps: Fraction, met: Extremes) -> None:
    """n' weights just below e^T = W0 eps / (n' (1 - eps))."""
    theta = sum(kept, Fraction(0)) * eps / (others * (1 - eps))
    abar = others * theta * (1 - Fraction(1, 10**9))
    tau = abar / (abar + sum(kept, Fraction(0)))
    assert tau < eps
    met.largest("tau / eps, rationals just below T", tau / eps)


def _dropped(kept: Kept, i: int, scores: list[Fraction], eps: float) -> Fraction:
    weights = exponentials(scores)[0]
    tau = Fraction(sum(w for w, inside in zip(weights, kept.keys[i], strict=True) if not inside), sum(weights))
    limit = Fraction(eps) * (1 + Fraction(1, 10**12))
    assert tau <= limit, f"dropped mass {float(tau):.6g} exceeds eps = {eps}"
    certified = Fraction(float(kept.dropped_mass[i]))
    assert tau <= certified <= limit, f"certified {float(certified):.6g} for {float(tau):.6g}, eps = {eps}"
    return tau


def _count_forgotten(q: np.ndarray, k: np.ndarray, policy: Certified, scale: float | None, method: str) -> Kept:
    return by_decode(q, k, _with_eps(policy, policy.eps * len(k)), scale, method)


def _probe_counted_twice(q: np.ndarray, k: np.ndarray, policy: Certified, scale: float | None, method: str) -> Kept:
    return by_decode(q, k, _with_eps(policy, policy.eps * 2), scale, method)


def _nothing_certified(q: np.ndarray, k: np.ndarray, policy: Certified, scale: float | None, method: str) -> Kept:
    kept = by_decode(q, k, policy, scale, method)
    return kept._replace(dropped_mass=0 * kept.dropped_mass)


def _with_eps(policy: Certified, eps: float) -> Certified:
    return Certified(min(eps, 0.999), policy.sinks, policy.recent, policy.spread)


CHECK = Check(
    statement="Certified threshold: dropped mass at most eps",
    source=OURS,
    evidence="exact rationals; 60 digits for the library",
    conclude=conclude,
    operations={"attention.decode, Certified": by_decode},
    faults={
        "T = LSE0 + ln eps": _count_forgotten,
        "the probed keys counted twice": _probe_counted_twice,
        "a certificate of 0": _nothing_certified,
    },
)
