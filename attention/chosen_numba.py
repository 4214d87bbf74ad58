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
def _chosen(q, k, v, tokens, counts, logs, mean_k, mean_v, mean_logs, scale, output, lse):
    """Scaled queries (H, d) float64; logs (L, W) or (L, 0) for zeros, mean_logs (L, C) -> output, lse, filled."""
    heads, groups, lines = len(q), len(k), len(tokens)
    weighted = logs.shape[1] > 0
    for x in prange(heads):
        g, line = x * groups // heads, x * lines // heads
        count, means = counts[line], mean_logs.shape[1]
        scores = np.empty(count + means)
        for j in range(count):
            scores[j] = scale * _product(k[g, tokens[line, j]], q[x])
            if weighted:
                scores[j] += logs[line, j]
        for c in range(means):
            scores[count + c] = scale * _product(mean_k[g, c], q[x]) + mean_logs[line, c]
        top = -np.inf
        for j in range(len(scores)):
            top = max(top, scores[j])
        if top > -np.inf:
            total, sums = 0.0, np.zeros(v.shape[2])
            for j in range(count):
                weight = np.exp(scores[j] - top)
                total += weight
                _add(weight, v[g, tokens[line, j]], sums)
            for c in range(means):
                weight = np.exp(scores[count + c] - top)
                total += weight
                _add(weight, mean_v[g, c], sums)
            output[x] = sums / total
            lse[x] = top + np.log(total)


def chosen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: TokenLists, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """See `attention.chosen_reference.chosen`; k and v float32 or float64, means are rounded to that."""
    output, lse = np.zeros((len(q), v.shape[2])), np.full(len(q), -np.inf)
    none = torch.empty(len(lists.tokens), 0)
    means = lists.means or Means(k[:, :0], v[:, :0], none)
    small = [lists.tokens, lists.counts, none if lists.log_weights is None else lists.log_weights]
    small += [means.keys.to(k.dtype), means.values.to(v.dtype), means.log_weights]
    parts = [part.contiguous().numpy() for part in small]  # of one layout, so that it is compiled once
    _chosen(q.double().numpy(), k.numpy(), v.numpy(), *parts, scale, output, lse)
    return output, lse
