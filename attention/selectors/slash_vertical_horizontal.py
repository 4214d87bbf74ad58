"""Slash, vertical, horizontal: key blocks by an additive model of the scores.  Our design."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from attention.block_maps import distances, key_lists
from attention.estimates import LARGEST, by_block_distance, covering, pooled, products, ranks
from attention.key_lists import KEYS, KeyLists, row_blocks
from attention.selector import Selector
from attention.time_budget import blocks_for
from hsr import checks

ROWS = 128  # sampled rows
SWEEPS = 4  # of the fit


@dataclass(frozen=True)
class SlashVerticalHorizontal(Selector):
    """Scores as terms of the distance, the key and the row, ``S(i - j) + V(j) + H(i)``, and a rest.

    The terms are fitted to 128 rows spread evenly over the prompt, by alternating means (the last row among them, so
    that every distance and key is met).  A row block weighs a key block by the model's sum of ``exp(s)`` over both, and
    keeps the largest until the rest is at most the share that may be dropped, by the model.  That is no union of lines:
    a line counts only where the sum is high.  What depends on row and key together, a needle, is not seen.

    The published abstract has a decomposition into these three, linear in size and found online, and a threshold on
    it; no more is known, and no code.  Everything else here is ours: the fit to rows, which needs no knowledge of
    rotary embeddings, the blocks, and the threshold for each row block.  Its maps are quadratic in blocks.

    With ``seconds`` the threshold is one for a head, at the modelled shares that as many blocks have as there is time
    for, by rates that are measured once for a kind and size of call, in the first of them.  Approximate: other work on
    the machine counts, and what is always seen is seen however little time there is.

    Args:
        dropped: share of a row block's modelled attention that may be left out, in [0, 1); ours, 0.1.
        seconds: or else the time that a prompt should take; None for ``dropped`` alone.
        sinks: first key blocks that every row sees; ours, 1.
        window: key blocks that a row sees up to its own, at least 1; ours, 2.
        last: row blocks at the end that see everything; ours, 2.

    Raises:
        ArgumentError: a value out of range.

    Source: our design, after the abstract of "SparseSkeleton: Prefill sparse attention by decomposition" (OpenReview
    Y5kgP4x20k; not on arXiv).
    """

    causal: ClassVar[bool] = False

    dropped: float = 0.1
    sinks: int = 1
    window: int = 2
    last: int = 2
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None:
            checks.real("seconds", self.seconds, np.nextafter(0, 1), np.inf)
        checks.real("dropped", self.dropped, 0.0, np.nextafter(1, 0))
        checks.whole("sinks", self.sinks, 0)
        checks.whole("window", self.window, 1)
        checks.whole("last", self.last, 0)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `Selector`."""
        return cls(), cls(dropped=0.5, sinks=0, window=1, last=0)

    def tighter(self, n: int) -> Self | None:
        """See `ListMaker`: half of what may be dropped, None with a limit of time."""
        spare = self.seconds is None and self.dropped > 1e-3
        return dataclasses.replace(self, dropped=self.dropped / 2) if spare else None

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """See `Selector`."""
        m, n = q.shape[1], k.shape[1]
        far = distances(m, n, q.device)  # (T, C)
        T, C = far.shape
        shares = modelled(*fitted(q, k, scale), far, (n - m) % KEYS)
        near = (far < self.window) | (torch.arange(C, device=q.device) < self.sinks)
        forced = near | (torch.arange(T, device=q.device) >= T - self.last)[:, None]
        if self.seconds is None:
            keep = covering(shares.flatten(0, 1), 1 - self.dropped, forced.repeat(len(q), 1))
        else:
            room = blocks_for(self.seconds, dataclasses.replace(self, seconds=None), q, k)
            older = (far > 0).flatten()
            keep = ranks(shares.flatten(1).masked_fill(~older, -1.0), forced.flatten() & older) < room
            keep |= forced.flatten()
        return key_lists(keep.view(len(q), row_blocks(m), C), m, n)


def fitted(q: torch.Tensor, k: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q (H, m, d), k (G, n, d) -> S by distance and V by key, both (H, n), up to constants."""
    group, m, n = len(q) // len(k), q.shape[1], k.shape[1]
    R = min(ROWS, m)
    rows = torch.arange(1, R + 1, device=q.device) * m // R - 1
    step = max(1, LARGEST // (group * R * n))
    parts = [
        _fit(products(q[group * g : group * (g + step), rows], k[g : g + step]) * scale, n - m + rows)
        for g in range(0, len(k), step)
    ]
    slash, vertical = (torch.cat(part) for part in zip(*parts, strict=True))
    return slash, vertical


def _fit(scores: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (H, R, n) of rows at positions (R,) -> S and V: each in turn the mean of what the others leave.

    Key j of a row at p lies at distance ``p - j``, and distance D at key ``p - D``: one index turns either into the
    other, and what a row sees is alike in both.
    """
    n = scores.shape[2]
    turn = positions[:, None] - torch.arange(n, device=scores.device)
    seen = turn >= 0
    turn = turn.clamp(min=0)
    by_row, by_column = seen.sum(1)[:, None], seen.sum(0)
    slash = torch.zeros_like(scores[:, 0])
    vertical, horizontal = slash, torch.zeros_like(scores[:, :, :1])
    for _ in range(SWEEPS):
        rest = scores - slash[:, turn]
        vertical = ((rest - horizontal) * seen).sum(1) / by_column
        rest = rest - vertical[:, None]
        horizontal = (rest * seen).sum(2, keepdim=True) / by_row
        rest = scores - vertical[:, None] - horizontal
        slash = (rest.gather(2, turn.expand(rest.shape)) * seen).sum(1) / by_column
    return slash, vertical


def modelled(slash: torch.Tensor, vertical: torch.Tensor, far: torch.Tensor, phase: int) -> torch.Tensor:
    """S, V (H, n) -> share of each key block in the attention of each row block, of those up to its own: (H, T, C)."""
    least = torch.finfo(slash.dtype).tiny
    lines = [(x - x.amax(1, keepdim=True)).exp() for x in (slash, vertical)]
    by_offset = by_block_distance(lines[0], phase).clamp(min=least).log()
    by_key = pooled(lines[1]).clamp(min=least).log()
    both = by_offset[:, (far + 1).clamp(min=0)] + by_key[:, None]
    return both.masked_fill(far < 0, -torch.inf).softmax(2)
