"""Lemma 6.1: with a high enough threshold a row of ReLU attention has at most ``2 n^(4/5)`` non-zeros.

Source. arXiv 2410.10165, Lemma 6.1. The remark and the corrected thresholds are ours.

Hypotheses. As we understand it, the paper assumes: K i.i.d. N(0, sk^2), Q i.i.d. N(0, sq^2), delta in (0, 1),
``sigma_a = 4 sqrt(1 + ln(m/delta)/d) sq sk`` and ``b >= sigma_a sqrt(0.4 ln n)``.

Conclusion. With probability at least 1 - delta every one of the m rows has at most ``2 n exp(-b^2 / (2 sigma_a^2))``
non-zeros, which is ``2 n^(4/5)`` at equality.

Proof. Given q the scores are independent N(0, s^2), ``s = ||q|| sk / sqrt(d)``, and s <= sigma_a for all rows but for
probability delta (Laurent and Massart). A score exceeds b with probability at most ``exp(-b^2/(2 s^2))``; by Chernoff
twice the mean is exceeded with probability at most ``exp(-n^(4/5)/3)``.

Remark. The threshold is vacuous. sigma_a is at least 4 times the typical s, so for a query of typical norm a score
exceeds b with probability below ``exp(-3.2 ln n)``, and the expected number of non-zeros is below ``n^-2.2``: every
row is empty, and the attention it defines is 0/0. The lemma is true and must not be used to place b.

Corrected thresholds (ours). From the row's own moments ``mu = <q, mean k> / sqrt(d)``, ``s^2 = q^T Cov(k) q / d``:

    moments    b = mu + s sqrt(0.4 ln n)                fires n P(z >= sqrt(0.4 ln n)) of n Gaussian keys, below n^(4/5)
    quantile   b = mu + s z, P(N(0,1) >= z) = n^(-1/5)  fires about n^(4/5): between n^(4/5)/2 and 2 n^(4/5)

and for every input whatsoever (Cantelli) the first fires at most ``n / (1 + 0.4 ln n)`` keys.

Check. Gaussian data, n = 4096, d = 64, m = 8. The lemma: failing trials at delta = 0.1 stay below the quantile of
their binomial law that is exceeded with probability 1e-9. The remark: no row fires; the expected number of fired keys
in the whole run, given its queries, is among the constants and is the rate of false alarms. The corrected thresholds,
on keys with a mean and unequal variances: counts within binomial quantiles, widened by what the estimated moments can
be off; the rate of false alarms is at most 6e-12 a row. Cantelli: lattice inputs, no randomness in the claim. Seeds
are fixed.

What this does not show. Real keys are not Gaussian: n^(4/5) is then not what the quantile threshold fires, only the
Cantelli bound is left. One size and one width were drawn. That n^(4/5) keys suffice for a small softmax error is
another question (`theorem_4_3_error`, `certified_threshold`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import binom, chi2, norm

from attention import ReLUPower, decode
from hsr import HSRIndex
from proofs_checks.check import PAPER, Check, Extremes, for_all
from proofs_checks.inputs import Problem, problems

Fired = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # q (m, d), k (n, d), b (m,) -> non-zeros (m,)
N, M, D = 4096, 8, 64
DELTA = 0.1
ALARM = 1e-12  # probability that an exact law's quantile is exceeded


def fired_by_decode(q: np.ndarray, k: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Keys that `attention.decode` reports for each row's own threshold."""
    index, v = HSRIndex(k[None]), np.zeros((1, len(k), 1))
    rows = [decode(q[None, i : i + 1], index, v, weight=ReLUPower(1, float(b[i]))) for i in range(len(q))]
    return np.array([row.counters.reported[0, 0] for row in rows])


def paper_threshold(n: int, m: int, d: int, delta: float) -> float:
    """b of the lemma at equality, for sq = sk = 1."""
    return 4 * np.sqrt(1 + np.log(m / delta) / d) * np.sqrt(0.4 * np.log(n))


def row_moments(q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (m,) of each row's scores, from the keys' mean and covariance alone."""
    centred = k - k.mean(axis=0)
    covariance = centred.T @ centred / len(k)
    variance = np.einsum("md,de,me->m", q, covariance, q) / k.shape[1]
    return q @ k.mean(axis=0) / np.sqrt(k.shape[1]), np.sqrt(np.maximum(variance, 0))


def conclude(fired: Fired, examples: int) -> dict[str, float]:
    """The lemma, its vacuity, the corrected thresholds, and the bound for every input."""
    rng = np.random.default_rng(0)
    met = Extremes()
    trials = min(20, max(2, examples // 10))
    failed, expected = 0, 0.0
    for _ in range(trials):
        q, k = rng.standard_normal((M, D)), rng.standard_normal((N, D))
        b = paper_threshold(N, M, D, DELTA)
        counts = fired(q, k, np.full(M, b))
        failed += bool((counts > 2 * N**0.8).any())
        expected += float(N * norm.sf(b / (np.linalg.norm(q, axis=1) / np.sqrt(D))).sum())
        met.largest("non-zeros at the paper's b", counts.max())
        assert (counts == 0).all(), f"{counts} keys fire at the paper's threshold, {expected:.1e} were expected so far"
        _corrected(fired, rng, met)
    assert failed <= binom.isf(1e-9, trials, DELTA), f"{failed} of {trials} trials break the lemma"
    assert expected < 1e-4, f"the remark would be a false alarm with probability {expected:.1e}"
    met["expected number of them in the run"] = expected
    for_all(problems((1, 3, 16)), lambda problem: _cantelli(fired, problem, met), examples)
    return met


def _corrected(fired: Fired, rng: np.random.Generator, met: Extremes) -> None:
    scale = np.exp(rng.standard_normal(D))
    q, k = rng.standard_normal((M, D)), rng.standard_normal((N, D)) * scale + 3 * rng.standard_normal(D)
    mean, deviation = row_moments(q, k)
    for name, z in (("moments", np.sqrt(0.4 * np.log(N))), ("quantile", norm.isf(N**-0.2))):
        counts = fired(q, k, mean + z * deviation)
        low, high = fired_range(N, z)
        assert ((low <= counts) & (counts <= high)).all(), f"{name} threshold: {counts} fired, not {low:g} to {high:g}"
        met.smallest(f"fired / n^(4/5), {name} (least)", counts.min() / N**0.8)
        met.largest(f"fired / n^(4/5), {name} (most)", counts.max() / N**0.8)
        assert high <= 2 * N**0.8, f"the {name} threshold may fire more than 2 n^(4/5)"
        assert name == "moments" or low >= N**0.8 / 2, "the quantile threshold may fire fewer than n^(4/5) / 2"


def fired_range(n: int, z: float) -> tuple[float, float]:
    """Bounds on how many of n Gaussian scores exceed their own mean + z deviations, each missed with chance 3 ALARM.

    The mean of n scores is off by less than ``shift`` deviations and their deviation by a factor in ``least .. most``,
    but for ALARM each; between thresholds fixed in advance the count is binomial.
    """
    shift = norm.isf(ALARM) / np.sqrt(n)
    least, most = np.sqrt(chi2.ppf(ALARM, n - 1) / n), np.sqrt(chi2.isf(ALARM, n - 1) / n)
    low = binom.ppf(ALARM, n, norm.sf(z * most + shift))
    high = binom.isf(ALARM, n, norm.sf(z * least - shift))
    return float(low), float(high)


def _cantelli(fired: Fired, problem: Problem, met: Extremes) -> None:
    q, k, _ = problem.floats
    mean, deviation = row_moments(q, k)
    n = len(k)
    z = np.sqrt(0.4 * np.log(n))
    spread = deviation > 1e-6 * (1 + np.abs(mean))  # where all scores are equal, all may fire
    counts = fired(q, k, mean + z * deviation)[spread]
    if counts.size and n > 1:
        limit = n / (1 + z * z)
        assert (counts <= limit * (1 + 1e-9)).all(), f"{counts} of {n} keys fire, more than Cantelli's {limit:.1f}"
        met.largest("fired / Cantelli's bound", counts.max() / limit)


def _unscaled(q: np.ndarray, k: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (q @ k.T >= b[:, None]).sum(axis=1)


def _two_sided(q: np.ndarray, k: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.abs(q @ k.T) / np.sqrt(k.shape[1]) >= b[:, None]).sum(axis=1)


CHECK = Check(
    statement="Lemma 6.1: sparsity; its threshold is vacuous; corrected thresholds",
    source=PAPER,
    evidence="Monte Carlo, false alarms below 1e-4 in all; Cantelli on lattices",
    conclude=conclude,
    operations={"attention.decode": fired_by_decode},
    faults={
        "b compared with unscaled products": _unscaled,
        "magnitudes compared with b": _two_sided,
    },
)
