"""What the modules compute: plain numpy in float64, one sequence, a loop a row."""

from __future__ import annotations

import numpy as np


def sparsek(z: np.ndarray, k: int) -> np.ndarray:
    """z (m,), 0 <= k <= m -> ``clip(z - tau, 0, 1)`` with sum k, tau by bisection (arXiv 2406.16747).

    The sum falls from m at the least entry minus 1 to 0 at the largest.
    """
    z = z.astype(np.float64)
    low, high = z.min() - 1, z.max()
    while low < (middle := low + (high - low) / 2) < high:
        if np.clip(z - middle, 0, 1).sum() >= k:
            low = middle
        else:
            high = middle
    return np.clip(z - (low if k else high), 0, 1)


def sparsek_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, u: np.ndarray, keep: int, window: int
) -> tuple[np.ndarray, list[list[list[int]]]]:
    """q (h, T, d), k, v (g, T, d), scores u (g, T) -> output (h, T, d), and the old keys that each head's rows keep.

    Row t: far keys ``j <= t - window``, their gates ``p = sparsek(u_far, min(keep, far))``, of which the ``keep`` of
    largest u stay; near keys have gate 1; ``softmax_j(p_j <q, k_j> / sqrt(d))`` times ``p_j v_j``.
    """
    (heads, length, d), group = q.shape, len(q) // len(k)
    output = np.zeros(q.shape)
    kept: list[list[list[int]]] = [[[] for _ in range(length)] for _ in k]
    for head in range(heads):
        g = head // group
        for t in range(length):
            far = max(0, t + 1 - window)
            gates = np.ones(t + 1)
            if far:
                gates[:far] = sparsek(u[g, :far], min(keep, far))
            kept[g][t] = sorted(sorted(range(far), key=lambda j: (-u[g, j], j))[:keep])
            rows = kept[g][t] + list(range(far, t + 1))
            weights = softmax(gates[rows] * (k[g, rows] @ q[head, t]) / np.sqrt(d))
            output[head, t] = (weights * gates[rows]) @ v[g, rows]
    return output, kept


def compositional(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, asked: np.ndarray, matrix: np.ndarray, causal: bool
) -> np.ndarray:
    """q, k (S, T, d), v (R, T, dv), asked (S, T, dr), matrix (dr, dv) -> mixtures (S, T, dv) (arXiv 2110.09419).

    ``O_{s,r} = softmax(q_s k_s^T / sqrt(d)) v_r``, mixed by ``softmax_r <asked_s, matrix O_{s,r}> / sqrt(dr)``.
    """
    output = np.zeros((*q.shape[:2], v.shape[2]))
    for s, t in np.ndindex(*q.shape[:2]):
        seen = t + 1 if causal else k.shape[1]
        found = v[:, :seen].transpose(0, 2, 1) @ softmax(k[s, :seen] @ q[s, t] / np.sqrt(q.shape[2]))  # (R, dv)
        output[s, t] = softmax(found @ matrix.T @ asked[s, t] / np.sqrt(len(matrix))) @ found
    return output


def decoupled(index_q: np.ndarray, index_k: np.ndarray, values: np.ndarray, r: int) -> np.ndarray:
    """Targets (m, di), a history's index_k (n, di) and values (n, dv), n >= 0 -> pooled (m, dv) (arXiv 2410.02604).

    The softmax of ``<index_q, index_k> / sqrt(di)`` over its r largest, times their values; zero for no history.
    """
    output = np.zeros((len(index_q), values.shape[1]))
    for row, query in enumerate(index_q if len(index_k) else ()):
        scores = index_k @ query / np.sqrt(len(query))
        best = np.argsort(-scores, kind="stable")[:r]
        output[row] = softmax(scores[best]) @ values[best]
    return output


def decode_by_index(
    index_q: np.ndarray, index_k: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, r: int
) -> np.ndarray:
    """index_q (h, m, di), index_k (g, n, di), q (h, m, d), k (g, n, d), v (g, n, dv) -> output (h, m, dv).

    The r keys of largest ``<index_q, index_k>``, attended to by ``softmax(<q, k> / sqrt(d))``.
    """
    output = np.zeros((*q.shape[:2], v.shape[2]))
    for head, row in np.ndindex(*q.shape[:2]):
        g = head * len(k) // len(q)
        best = np.argsort(-(index_k[g] @ index_q[head, row]), kind="stable")[:r]
        output[head, row] = softmax(k[g, best] @ q[head, row] / np.sqrt(q.shape[2])) @ v[g, best]
    return output


def softmax(scores: np.ndarray) -> np.ndarray:
    """scores (n,) -> weights (n,) that sum to 1."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
