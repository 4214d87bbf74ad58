"""Theorem 4.2: decoding with softmax over the ``n^(4/5)`` largest scores, which a half-space holds.

Source. arXiv 2410.10165, Theorem 4.2. As we understand it, the paper states: with R = NN(n^(4/5), q, K), the keys of
the n^(4/5) largest products, and b placed so that the half-space holds them, Algorithm 2 computes the index-set
softmax ``sum_R e^(s_i) v_i / sum_R e^(s_i)`` in O(m n^(4/5) d).

Hypotheses. Any finite inputs; r = ceil(n^(4/5)), or any r >= 1.

Conclusion. (i) The default number of keys is the whole number r with ``r^5 >= n^4 > (r - 1)^5``. (ii) The keys that
carry weight are r keys none of which scores below a key left out. (iii) Each carries ``e^(s_i) / sum_R e^(s_i)``, up
to ``(2 r + 8) u`` relatively to the sum. (iv) The half-space at the r-th largest product holds R, and exactly R
unless keys tie with the r-th.

Proof. (iv) A key has a product of at least the r-th largest iff it is among the r largest or ties with the last of
them.

Check. The values are the n unit vectors, so that the output *is* the vector of weights and shows the index set.
Lattice inputs, many ties; comparisons in whole numbers, exponentials with 60 digits. The constant is the largest
error of a weight in units of u.

What this does not show. The cost: how b is found is not part of the statement; the library places it from a sample
and falls back to all keys where the sample misled it. Among keys that tie with the r-th any choice is allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from attention import TopR, decode
from hsr import HSRIndex
from proofs_checks.check import PAPER, Check, Extremes, for_all
from proofs_checks.inputs import UNIT, Problem, problems
from proofs_checks.rationals import HALF_ULP, exact, exponentials

Weights = Callable[[np.ndarray, np.ndarray, int | None, str], np.ndarray]  # q, k, r, method -> (m, n) softmax weights


def by_decode(q: np.ndarray, k: np.ndarray, r: int | None, method: str) -> np.ndarray:
    """The weights of `attention.decode` with `TopR`."""
    return decode(q[None], HSRIndex(k[None], method), np.eye(len(k))[None], policy=TopR(r)).output[0]


def four_fifths(n: int) -> int:
    """``ceil(n^(4/5))`` in whole numbers."""
    r = round(n**0.8)
    r += r**5 < n**4
    return r - ((r - 1) ** 5 >= n**4)


def assert_index_set_softmax(weights: np.ndarray, scores: list[Fraction], r: int) -> Fraction:
    """Weights (n,) are the softmax over r keys of largest score; the largest error in units of u."""
    kept = np.flatnonzero(weights > 0)
    assert len(kept) == r, f"{len(kept)} keys carry weight, not {r}"
    left_out = [s for j, s in enumerate(scores) if weights[j] <= 0]
    least = min(scores[j] for j in kept)
    assert not left_out or max(left_out) <= least, f"a key of score {float(max(left_out))} is left out"
    exponential = exponentials([scores[j] for j in kept])[0]
    total = sum(exponential)
    errors = [abs(exact(weights)[j] - Fraction(w, total)) for j, w in zip(kept, exponential, strict=True)]
    assert max(errors) <= (2 * r + 8) * HALF_ULP, f"a weight is off by {float(max(errors))}"
    return max(errors) / HALF_ULP


def conclude(attend: Weights, examples: int) -> dict[str, float]:
    """Index sets and weights for the default r and for small ones, and the half-space at the r-th product."""
    met = Extremes()

    def conclusion(problem: Problem) -> None:
        q, k, _ = problem.floats
        n = len(k)
        for asked in (None, 1, 3):
            r = four_fifths(n) if asked is None else min(asked, n)
            weights = attend(q, k, asked, problem.method)
            for i in range(len(q)):
                met.largest("weight error / u", assert_index_set_softmax(weights[i], problem.scores(i), r))
                _half_space(problem, i, r)

    for_all(problems(), conclusion, examples)
    return met


def _half_space(problem: Problem, i: int, r: int) -> None:
    q, k, _ = problem.floats
    products = problem.keys @ problem.queries[i]
    last = np.sort(products)[-r]
    inside = HSRIndex(k, problem.method).query(q[i : i + 1], float(last) / UNIT**2).row(0)[0]
    assert np.array_equal(np.sort(inside), np.flatnonzero(products >= last))
    assert len(inside) == r or np.count_nonzero(products == last) > 1


def _largest_magnitudes(q: np.ndarray, k: np.ndarray, r: int | None, method: str) -> np.ndarray:
    scores = q @ k.T / k.shape[1] ** 0.5
    wanted = four_fifths(len(k)) if r is None else min(r, len(k))
    kept = np.argsort(-np.abs(scores), axis=1)[:, :wanted]
    weights = np.zeros(scores.shape)
    top = np.take_along_axis(scores, kept, axis=1)
    np.put_along_axis(weights, kept, np.exp(top - top.max(axis=1, keepdims=True)), axis=1)
    return weights / weights.sum(axis=1, keepdims=True)


def _one_too_few(q: np.ndarray, k: np.ndarray, r: int | None, method: str) -> np.ndarray:
    return by_decode(q, k, max(1, (four_fifths(len(k)) if r is None else r) - 1), method)


def _not_renormalised(q: np.ndarray, k: np.ndarray, r: int | None, method: str) -> np.ndarray:
    scores = q @ k.T / k.shape[1] ** 0.5
    dense = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.where(by_decode(q, k, r, method) > 0, dense / dense.sum(axis=1, keepdims=True), 0.0)


CHECK = Check(
    statement="Theorem 4.2: index-set softmax over the n^(4/5) best keys",
    source=PAPER,
    evidence="whole numbers and 60 digits",
    conclude=conclude,
    operations={"attention.decode, TopR": by_decode},
    faults={
        "largest magnitudes, not largest scores": _largest_magnitudes,
        "one key too few": _one_too_few,
        "weights not renormalised on the index set": _not_renormalised,
    },
)
