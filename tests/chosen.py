"""Random lists of tokens, with and without log weights and means."""

from __future__ import annotations

import numpy as np
import torch

from attention.token_lists import Means, TokenLists


def some_lists(
    random: np.random.Generator, lines: int, groups: int, n: int, d: int, weighted: bool = False, means: int = 0
) -> TokenLists:
    """Lines of 0 to n tokens in random order; entries that do not count are sentinels far out of range."""
    counts = random.integers(0, n + 1, lines)
    tokens = np.stack([random.permutation(n) for _ in range(lines)]).astype(np.int32)
    tokens[np.arange(n) >= counts[:, None]] = 1 << 30
    weights = torch.from_numpy(random.normal(0, 2, (lines, n)).astype(np.float32)) if weighted else None
    pseudo = None
    if means:
        keys, values = (torch.from_numpy(random.standard_normal((groups, means, d), np.float32)) for _ in range(2))
        logs = random.normal(1, 2, (lines, means)).astype(np.float32)
        logs[random.random(logs.shape) < 0.3] = -np.inf
        pseudo = Means(keys, values, torch.from_numpy(logs))
    return TokenLists(torch.from_numpy(tokens), torch.from_numpy(counts.astype(np.int32)), weights, pseudo)
