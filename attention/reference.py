"""What attention means here: plain numpy in float64."""

from __future__ import annotations

import math

import numpy as np

from attention.weights import ReLUPower, Softmax


def weigh(scores: np.ndarray, weight: Softmax | ReLUPower) -> tuple[np.ndarray, np.ndarray]:
    """scores (..., n), -inf where hidden -> weights (..., n) up to a factor exp(shift), and shift (...)."""
    if isinstance(weight, Softmax):
        shift = scores.max(axis=-1, initial=-np.inf)
        return np.exp(scores - np.where(np.isfinite(shift), shift, 0.0)[..., None]), shift
    above = np.maximum(scores - weight.b, 0.0)
    power = relief(np.frexp(above.max(axis=-1, initial=0.0))[1], weight.alpha)
    return np.ldexp(above, -power[..., None]) ** weight.alpha, weight.alpha * power * math.log(2)


def relief(exponent: np.ndarray, alpha: int) -> np.ndarray:
    """The power of two to divide out before raising to alpha: 0, but where powers could overflow or all vanish."""
    return np.where(np.abs(exponent) * alpha > 300, exponent, 0)


def dense(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    weight: Softmax | ReLUPower,
    scale: float,
    causal: bool = False,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """q (h, m, d), k (g, n, d), v (g, n, dv) -> output (h, m, dv) and log of the weights' sum (h, m), float64.

    ``output = D^-1 A V`` with ``A_ij = w(scale <q_i, k_j>)`` and ``D = diag(A 1)`` (Definitions 1.1 and 1.2).
    ``causal`` hides keys j > i + n - m (bottom-right aligned); ``keep`` (h, m, n) bool restricts to an index set,
    re-normalised on it.  A row without weight gives zeros, and -inf for the logarithm.
    """
    repeat = q.shape[0] // k.shape[0]
    k, v = (np.repeat(x.astype(np.float64), repeat, axis=0) for x in (k, v))
    scores = scale * np.einsum("hmd,hNd->hmN", q.astype(np.float64), k)
    m, n = scores.shape[1:]
    seen = np.tri(m, n, n - m, dtype=bool) if causal else np.ones((m, n), bool)
    scores[~np.broadcast_to(seen if keep is None else seen & keep, scores.shape)] = -np.inf
    weights, shift = weigh(scores, weight)
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + shift
    output = np.einsum("hmN,hNd->hmd", weights, v) / np.where(total > 0, total, 1.0)[..., None]
    return output, lse


def attend(
    offsets: np.ndarray,
    indices: np.ndarray,
    scores: np.ndarray,
    values: np.ndarray,
    error: np.ndarray,
    weight: Softmax | ReLUPower,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR of raw products, values (g, n, dv), error (rows,) -> output (rows, dv), log-sum (rows,), slope (rows,).

    The rows are split evenly over the g heads.  ``slope`` bounds the relative change of the weights' sum per unit of
    score, for scores that may be off by ``error``: ``sum_j alpha (max(s_j - b, 0) + error)**(alpha - 1) / sum_j w_j``;
    1 for Softmax. An empty row gives zeros, -inf and 0.
    """
    rows = len(offsets) - 1
    output, lse, slope = np.zeros((rows, values.shape[2])), np.full(rows, -np.inf), np.zeros(rows)
    for row in range(rows):
        part = slice(offsets[row], offsets[row + 1])
        head = row * len(values) // rows
        s = scale * scores[part]
        weights, shift = weigh(s, weight)
        total = weights.sum()
        if total > 0:
            output[row] = weights @ values[head, indices[part]].astype(np.float64) / total
            lse[row] = np.log(total) + shift
            slope[row] = 1.0
            if isinstance(weight, ReLUPower):
                power = -round(float(shift) / weight.alpha / math.log(2))
                above = np.ldexp(np.maximum(s - weight.b, 0) + error[row], power)
                slope[row] = np.ldexp((weight.alpha * above ** (weight.alpha - 1)).sum() / total, power)
    return output, lse, slope


def attend_weighted(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pis: np.ndarray,
    centre: np.ndarray,
    excess: float,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q (G, d), and of the drawn keys k (t, d), v (t, dv), pi (t,) -> output (G, dv), lse (G,), moments (G, 3).

    Key j weighs ``exp(s_j) / pi_j``.  The moments are as `attention.sampled_numba.merge` has them, centre (dv,).
    """
    scores = scale * q.astype(np.float64) @ k.astype(np.float64).T
    shift = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - shift) / pis
    total = weights.sum(axis=1)
    shares = weights / total[:, None]
    far = v.astype(np.float64) - centre
    off = shares @ far
    risks = (1 - pis) * shares**2
    draws = (1 - pis).sum()
    typical = ((1 - pis) * shares).sum(axis=1) / draws if draws > 0 else np.zeros(len(q))
    squares = ((far / (np.abs(far).max() or 1.0)) ** 2).sum(axis=1)
    variance = np.maximum(risks.sum(axis=1) - typical**2 * excess, 0)
    apart = far - off[:, None]  # (G, t, dv)
    risk = risks.sum(axis=1, keepdims=True)
    mean = np.divide(np.einsum("gt,gtd->gd", risks, apart), risk, out=np.zeros_like(off), where=risk > 0)
    spread = (risks[:, :, None] * apart**2).sum(axis=(1, 2)) - typical**2 * excess * (mean**2).sum(axis=1)
    fourth = ((risks * squares) ** 2).sum(axis=1)
    carrying = np.divide((risks @ squares) ** 2, fourth, out=np.full(len(q), draws), where=fourth > 0)
    return centre + off, np.log(total) + shift[:, 0], np.stack([variance, np.maximum(spread, 0), carrying], axis=1)
