"""What attention to chosen tokens means: plain numpy in float64."""

from __future__ import annotations

import numpy as np
import torch

from attention.token_lists import TokenLists


def chosen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: TokenLists, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """q (H, d), k (G, n, d), v (G, n, dv), lists of H or G lines -> output (H, dv), log-sum-exp (H,), float64.

    ``output = sum_j w_j v_j / sum_j w_j`` with ``w_j = exp(scale <q, k_j> + log_weight_j)``, j over the listed tokens
    and the means.  An empty list gives zeros and -inf.  No score may overflow.
    """
    H, G, L = len(q), len(k), len(lists.tokens)
    output, lse = np.zeros((H, v.shape[2])), np.full(H, -np.inf)
    for x in range(H):
        g, line = x * G // H, x * L // H
        ids = lists.tokens[line, : int(lists.counts[line])].long()
        keys, values = [k[g, ids]], [v[g, ids]]
        logs = [torch.zeros(len(ids)) if lists.log_weights is None else lists.log_weights[line, : len(ids)]]
        if lists.means is not None:
            keys.append(lists.means.keys[g])
            values.append(lists.means.values[g])
            logs.append(lists.means.log_weights[line])
        rows, sums, weights = (np.concatenate([x.double().numpy() for x in part]) for part in (keys, values, logs))
        scores = scale * rows @ q[x].double().numpy() + weights
        top = scores.max(initial=-np.inf)
        if top > -np.inf:
            shares = np.exp(scores - top)
            output[x], lse[x] = shares @ sums / shares.sum(), top + np.log(shares.sum())
    return output, lse
