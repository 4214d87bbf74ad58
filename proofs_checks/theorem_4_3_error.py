"""Theorem 4.3: the error of the index-set softmax is at most ``2 tau ||V||_inf``, tau the dropped share of the weight.

Source. arXiv 2410.10165, Theorem 4.3. As we understand it, the paper states: for any index set R, with ``alpha`` the
sum of all weights and ``abar`` that of the weights outside R, ``||out - out_R||_inf <= (2 abar / alpha) ||V||_inf``.
The identity behind it and the sharper bound are ours.

Hypotheses. Positive weights w_1 .. w_n, values v_1 .. v_n, R not empty. That the weights are exponentials is not
used, so any positive rationals stand for them.

Conclusion. With ``tau = abar / alpha`` and mu_R, mu_T the weighted means over R and over its complement T:

    out - out_R = tau (mu_T - mu_R)        exactly, out_R being mu_R
    ||out - out_R||_inf <= 2 tau ||V||_inf
    ||out - out_R||_2   <= tau diam(V)

and the constant 2 cannot be lowered: values 1 on R and -1 on T attain it.

Proof. ``out = (1 - tau) mu_R + tau mu_T``. Means lie in the hull of the values: two points of it differ by at most
diam(V) in norm and 2 ||V||_inf in each coordinate.

Check. Weights and values are whole numbers and the operation's float64 result is compared with the exact rational: it
must be ``out - tau (mu_T - mu_R)``, rounded once. A directed search looks for the worst ratio to each bound; the
constants are those ratios, and that of the extremal example, which is 1 exactly.

What this does not show. How large tau is: for diffuse heads n^(4/5) keys leave out most of the weight (0.56 of it for
Gaussian scores of deviation 1 and n = 32,768). Real values rarely conspire, so that the bound is usually far from the
error; a bound is all it is.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from attention import ReLUPower
from hsr.backend import choose, methods
from proofs_checks.check import PAPER, Check, Extremes, for_all
from proofs_checks.rationals import HALF_ULP, exact, largest, norm_square, weighted_mean

Mean = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # weights (n,), values (n, dv), kept (n,) -> (dv,)


class Split(NamedTuple):
    """Whole weights and values, and the index set R."""

    weights: np.ndarray  # (n,) int64, positive
    values: np.ndarray  # (n, dv) int64
    kept: np.ndarray  # (n,) bool, some true, some false


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Two to eight keys, weights of any size relative to each other."""
    n, dv = draw(st.integers(2, 8)), draw(st.integers(1, 2))
    weights = draw(st.lists(st.integers(1, 1 << 20), min_size=n, max_size=n))
    values = draw(st.lists(st.integers(-8, 8), min_size=n * dv, max_size=n * dv))
    kept = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda x: any(x) and not all(x)))
    return Split(np.array(weights), np.reshape(values, (n, dv)), np.array(kept))


def mean_by(method: str, weights: np.ndarray, values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The library's ``attend`` over the index set: ReLU weights ``max(s - 0, 0)`` are the scores themselves."""
    indices = np.flatnonzero(kept).astype(np.int32)
    offsets = np.array([0, len(indices)])
    scores = weights[indices].astype(np.float64)
    return choose("attend", method)(
        offsets, indices, scores, values[None].astype(np.float64), np.zeros(1), ReLUPower(1, 0.0), 1.0
    )[0][0]


def conclude(mean: Mean, examples: int) -> dict[str, float]:
    """Identity and bounds on drawn splits, then the extremal example."""
    met = Extremes()
    for_all(splits(), lambda split: float(_conclusion(mean, split, met)), examples)
    extremal = Split(np.array([3, 1, 2]), np.array([[1], [1], [-1]]), np.array([True, True, False]))
    ratio = _conclusion(mean, extremal, met)
    assert ratio == 1, "values of opposite sign attain the bound"
    met["ratio of the extremal example"] = float(ratio)
    return met


def _conclusion(mean: Mean, split: Split, met: Extremes) -> Fraction:
    weights, values, kept = split
    out = weighted_mean(weights, values)
    mu_r, mu_t = weighted_mean(weights[kept], values[kept]), weighted_mean(weights[~kept], values[~kept])
    tau = Fraction(int(weights[~kept].sum()), int(weights.sum()))
    difference = tau * (mu_t - mu_r)
    found = exact(mean(weights, values, kept))
    size = largest(exact(values))
    assert largest(found - (out - difference)) <= HALF_ULP * size, (
        f"{found.astype(float)} is not out - tau (mu_T - mu_R)"
    )
    assert (out - mu_r == difference).all()
    bound = 2 * tau * size
    assert largest(difference) <= bound
    diameter = max(norm_square(exact(a - b)) for a in values for b in values)
    assert norm_square(difference) <= tau**2 * diameter
    if size == 0:
        return Fraction(0)
    ratio = largest(difference) / bound
    met.largest("error / (2 tau max|V|)", ratio)
    if diameter:
        met.largest("error / (tau diam V)", (norm_square(difference) / (tau**2 * diameter)) ** 0.5)
    return ratio


def _not_renormalised(weights: np.ndarray, values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return (weights * kept) @ values / weights.sum()


def _complement(weights: np.ndarray, values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return mean_by("reference", weights, values, ~kept)


CHECK = Check(
    statement="Theorem 4.3: error of the index-set softmax",
    source=PAPER,
    evidence="exact rationals",
    conclude=conclude,
    operations={f"attend, {method}": partial(mean_by, method) for method in methods("attend")},
    faults={
        "not renormalised on R": _not_renormalised,
        "the mean over the keys left out": _complement,
    },
)
