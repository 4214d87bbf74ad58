"""Theorem 4.1: decoding with ReLU attention over reported keys alone is exact, in time ``O(m n^(4/5) d)``.

Source. arXiv 2410.10165, Theorem 4.1. As we understand it, the paper states: under Lemma 6.1 and for m = Theta(1)
queries, Algorithm 2 (report the half-space at ``b sqrt(d)``, attend to the report) computes the ReLU attention with
no error in O(m n^(4/5) d), with probability at least 1 - delta.

Hypotheses. Exactness: any finite inputs. Cost: a threshold that at most ``2 n^(4/5)`` keys reach; the corrected
quantile threshold of `lemma_6_1_sparsity` on Gaussian keys here.

Conclusion. (i) The output differs from exact ReLU^alpha attention by rounding only: the certificate says that nothing
was dropped, and its error bound, computed from what was read, holds against exact rational arithmetic. (ii) The keys
attended are the keys of positive weight, at most ``2 n^(4/5)`` of them.

Proof. A key that is not reported has ``<q, k> < b sqrt(d)``, hence weight exactly 0. The cost is that of the query
(Corollary 3.1, part 2) plus O(d) per reported key.

Check. (i) Normal deviates and whole numbers in float32 and float64, thresholds on scores and beyond all of them, so
that a weight may be exactly 0 and the row empty. The weights of the given floats are rational for d in {1, 4, 16};
for 3 and 5 the root has 70 digits. (ii) n = 4096, d = 16. The constants are the largest error over its certified
bound, reported keys over n^(4/5), and keys read at full precision over reported keys.

What this does not show. The time: part 2 of Corollary 3.1 has no structure for d = 16, the query visits every key's
code, and only the keys read at full precision and attended to are few. Nor that n^(4/5) is what real keys fire.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from scipy.stats import norm

from attention import ReLUPower, Result, decode
from hsr import HSRIndex
from proofs_checks.check import PAPER, Check, Extremes, for_all
from proofs_checks.lemma_6_1_sparsity import row_moments
from proofs_checks.rationals import exact, norm_square, relu_weights, square_root, weighted_mean
from proofs_checks.routes import methods_for

Decode = Callable[[np.ndarray, np.ndarray, np.ndarray, ReLUPower, str], Result]


class Floats(NamedTuple):
    """One head of attention in float32 or float64."""

    q: np.ndarray  # (m, d)
    k: np.ndarray  # (n, d)
    v: np.ndarray  # (n, dv)
    weight: ReLUPower
    method: str


@st.composite
def floats(draw: st.DrawFn) -> Floats:
    """b is a float64 score of the first query, or moved by a little, or far above all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d, m = (
        draw(st.one_of(st.just(1), st.integers(1, 80))),
        draw(st.sampled_from((1, 3, 4, 5, 16))),
        draw(st.integers(1, 2)),
    )
    dtype = draw(st.sampled_from((np.float32, np.float64)))
    size = draw(st.sampled_from((0.01, 1.0, 30.0)))
    q, k = (size * rng.standard_normal((rows, d)) for rows in (m, n))
    if draw(st.booleans()):
        q, k = np.round(q), np.round(k)
    q, k, v = q.astype(dtype), k.astype(dtype), rng.standard_normal((n, 2)).astype(dtype)
    scores = k.astype(np.float64) @ q[0].astype(np.float64) / d**0.5
    b = float(draw(st.sampled_from((scores[0], np.median(scores), scores.max()))))
    b += draw(st.sampled_from((0.0, 0.0, -1e-9 * size, 0.1 * size, -1.0, 1e6)))
    return Floats(q, k, v, ReLUPower(draw(st.integers(1, 3)), b), draw(st.sampled_from(methods_for(n, d))))


def by_decode(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: ReLUPower, method: str) -> Result:
    """`attention.decode` of one head."""
    return decode(q[None], HSRIndex(k[None], method), v[None], weight=weight)


def conclude(attend: Decode, examples: int) -> dict[str, float]:
    """Exactness against rationals, then the number of keys read."""
    met = Extremes()
    for_all(floats(), lambda case: _exactness(attend, case, met), examples)
    rng = np.random.default_rng(0)
    n, d = 4096, 16
    for _ in range(max(1, examples // 20)):
        q, k, v = rng.standard_normal((1, d)), rng.standard_normal((n, d)), rng.standard_normal((n, 2))
        mean, deviation = row_moments(q, k)
        b = float((mean + deviation * norm.isf(n**-0.2))[0])
        counters = attend(q, k, v, ReLUPower(1, b), "auto").counters
        reported, inside = int(counters.reported[0, 0]), int((k @ q[0] / 4 >= b).sum())
        assert reported == inside, f"{reported} keys attended, {inside} have weight"
        assert reported <= 2 * n**0.8
        met.largest("attended keys / n^(4/5)", reported / n**0.8)
        met.largest("keys read / attended", counters.scanned[0, 0] / reported)
    return met


def _exactness(attend: Decode, case: Floats, met: Extremes) -> None:
    result = attend(*case)
    scores = exact(case.k) @ exact(case.q).T / square_root(case.k.shape[1])  # (n, m)
    certificate = result.certificate
    assert certificate.kind == "exact"
    assert (certificate.dropped_mass == 0).all()
    for i in range(len(case.q)):
        weights = relu_weights(scores[:, i], Fraction(case.weight.b), case.weight.alpha)
        wanted = weighted_mean(weights, case.v) if any(weights) else exact(np.zeros(case.v.shape[1]))
        square = norm_square(exact(result.output[0, i]) - wanted)
        bound = Fraction(float(certificate.output_error[0, i]))
        assert square <= bound**2, f"row {i}: off by {float(square) ** 0.5:.3e}, certified {float(bound):.3e}"
        if result.counters.reported[0, i] == 0:
            assert not any(weights), f"row {i}: nothing reported, {sum(w > 0 for w in weights)} keys have weight"
        if bound > 0:
            met.largest("error / certified error", float(square) ** 0.5 / float(bound))


def _last_key_lost(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: ReLUPower, method: str) -> Result:
    return by_decode(q, k[: max(1, len(k) - 1)], v[: max(1, len(k) - 1)], weight, method)


def _larger_b(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: ReLUPower, method: str) -> Result:
    return by_decode(q, k, v, dataclasses.replace(weight, b=weight.b + 1e-6), method)


def _no_rounding(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: ReLUPower, method: str) -> Result:
    result = by_decode(q, k, v, weight, method)
    certificate = dataclasses.replace(result.certificate, output_error=0 * result.certificate.output_error)
    return dataclasses.replace(result, certificate=certificate)


CHECK = Check(
    statement="Theorem 4.1: ReLU decoding is exact",
    source=PAPER,
    evidence="exact rationals of the given floats; counts measured",
    conclude=conclude,
    operations={"attention.decode": by_decode},
    faults={
        "the last key is never reported": _last_key_lost,
        "b too large by 1e-6": _larger_b,
        "a certificate that forgets rounding": _no_rounding,
    },
)
