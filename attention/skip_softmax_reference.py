"""What attention means that skips key blocks of small weight: plain numpy in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attention.key_lists import ROWS, row_blocks

BLOCK = 64  # keys of a block


class Skipped(NamedTuple):
    """Attention over the key blocks that were not skipped."""

    output: np.ndarray  # (H, m, dv) float64
    lse: np.ndarray  # (H, m) float64, of the keys attended to
    log_dropped: np.ndarray  # (H, m) float64, bound on the log-sum-exp of those skipped, but for rounding
    kept: np.ndarray  # (H, m) int64, keys attended to
    blocks: np.ndarray  # (H, T) int64, key blocks skipped


def skip_softmax(q: np.ndarray, k: np.ndarray, v: np.ndarray, level: float, scale: float) -> Skipped:
    """q (H, m, d), k (g, n, d), v (g, n, dv), level the logarithm of a threshold of at most 1, -inf for none.

    Each block of 128 rows visits blocks of 64 keys from key 0 on.  Of scores ``s`` of the keys that a row sees, M is
    the largest one so far, and b that of the block, -inf of a row that sees none of it: where ``b < M + level`` for
    every row, the block is skipped, and nothing of it is known but b.  Else it is attended to, and M becomes max(M, b).
    """
    heads, m, n = len(q), q.shape[1], k.shape[1]
    output, (lse, log_dropped), kept = np.empty((heads, m, v.shape[2])), np.empty((2, heads, m)), np.zeros((heads, m))
    found = Skipped(output, lse, log_dropped, kept.astype(np.int64), np.zeros((heads, row_blocks(m)), np.int64))
    for head, block in np.ndindex(heads, row_blocks(m)):
        rows = np.arange(ROWS * block, min(m, ROWS * (block + 1)))
        source, position = head * len(k) // heads, n - m + rows[:, None]
        scores = scale * (q[head, rows].astype(np.float64) @ k[source].astype(np.float64).T)
        scores = np.where(np.arange(n) > position, -np.inf, scores)
        top, bound, attended = np.full(len(rows), -np.inf), np.zeros(len(rows)), np.zeros(n, bool)
        for first in range(0, position[-1, 0] + 1, BLOCK):
            part = slice(first, first + BLOCK)
            seen, best = (scores[:, part] > -np.inf).sum(axis=1), scores[:, part].max(axis=1)
            if (best < top + level).all():  # of rows that see none of it, best is -inf
                bound += seen * np.exp(best - top)
                found.blocks[head, block] += 1
                continue
            higher = np.maximum(top, best)
            bound, top, attended[part] = bound * np.exp(top - higher), higher, True
        weights = np.where(attended, np.exp(scores - top[:, None]), 0.0)
        total = weights.sum(axis=1)
        found.output[head, rows] = weights @ v[source].astype(np.float64) / total[:, None]
        found.lse[head, rows] = np.log(total) + top
        with np.errstate(divide="ignore"):
            found.log_dropped[head, rows] = np.log(bound) + top
        found.kept[head, rows] = (attended & (scores > -np.inf)).sum(axis=1)
    return found
