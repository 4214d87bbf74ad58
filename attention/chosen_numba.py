"""Attention to chosen tokens on the CPU, parallel over query heads, summed in float64."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from attention.token_lists import Means, TokenLists
from hsr.exp_block import FAST


@njit(fastmath=FAST, cache=True)
def _product(row, query):
    total = 0.0
    for i in range(len(query)):
        total += query[i] * np.float64(row[i])
    return total


@njit(fastmath=FAST, cache=True)
def _add(weight, row, sums):
    for i in range(len(sums)):
        sums[i] += weight * np.float64(row[i])


@njit(parallel=True, cache=True)
def _chosen(q, k, v, steps, groups, tokens, counts, logs, mean_k, mean_v, mean_logs, scale, output, lse):
    """Queries (H, d) float64; keys and values from one place on, flat, and their steps to a head and a token.

    Logs (L, W) or (L, 0) for zeros, mean_k (G, C, d), mean_v (G, C, dv), mean_logs (L, C) -> output, lse, filled.
    """
    (heads, d), dv, lines = q.shape, output.shape[1], len(tokens)
    k_h, k_n, v_h, v_n = steps
    weighted = logs.shape[1] > 0
    for x in prange(heads):
        g, line = x * groups // heads, x * lines // heads
        count, means = counts[line], mean_logs.shape[1]
        scores = np.empty(count + means)
        for j in range(count):
            at = g * k_h + tokens[line, j] * k_n
            scores[j] = scale * _product(k[at : at + d], q[x])
            if weighted:
                scores[j] += logs[line, j]
        for c in range(means):
            scores[count + c] = scale * _product(mean_k[g, c], q[x]) + mean_logs[line, c]
        top = -np.inf
        for j in range(len(scores)):
            top = max(top, scores[j])
        if top > -np.inf:
            total, sums = 0.0, np.zeros(dv)
            for j in range(count):
                weight = np.exp(scores[j] - top)
                total += weight
                at = g * v_h + tokens[line, j] * v_n
                _add(weight, v[at : at + dv], sums)
            for c in range(means):
                weight = np.exp(scores[count + c] - top)
                total += weight
                _add(weight, mean_v[g, c], sums)
            output[x] = sums / total
            lse[x] = top + np.log(total)


def chosen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: TokenLists, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """See `attention.chosen_reference.chosen`; k and v float32 or float64, rows contiguous; means rounded to that."""
    output, lse = np.zeros((len(q), v.shape[2])), np.full(len(q), -np.inf)
    none = torch.empty(len(lists.tokens), 0)
    means = lists.means or Means(k[:, :0], v[:, :0], none)
    small = [lists.tokens, lists.counts, none if lists.log_weights is None else lists.log_weights]
    small += [means.keys.to(k.dtype), means.values.to(v.dtype), means.log_weights]
    rest = [part.contiguous().numpy() for part in small]
    queries = q.double().contiguous().numpy()
    _chosen(queries, _flat(k), _flat(v), k.stride()[:2] + v.stride()[:2], len(k), *rest, scale, output, lse)
    return output, lse


def _flat(rows: torch.Tensor) -> np.ndarray:
    """The memory of rows (G, n, d), from the first on: the kernel is compiled once for all the strides there are."""
    G, n, d = rows.shape
    size = (G - 1) * rows.stride(0) + (n - 1) * rows.stride(1) + d
    assert rows.stride(2) == 1 or d == 1
    return rows.as_strided((size,), (1,)).numpy()
