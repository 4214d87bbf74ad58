"""XAttention: key blocks by the sums of antidiagonals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from attention.block_maps import distances, key_blocks, key_lists
from attention.estimates import LARGEST, covering, products
from attention.key_lists import KEYS, ROWS, KeyLists, row_blocks
from attention.selector import Selector, nearer_one
from hsr import checks
from hsr.errors import ArgumentError


@dataclass(frozen=True)
class XAttention(Selector):
    """Mean scores on the antidiagonals of S x S cells, their softmax over a row of cells, and its sums over blocks.

    Each row block keeps block 0, the diagonal and then the largest key blocks until they hold the threshold's share of
    its sums.  A cell's mean dampens a single strong key by S.  Cells begin at row 0 and at key 0; rows of cells see
    those up to the one in which their first row lies; at the ends cells are filled with zeros.

    Published code differs: batches of one, keys expanded to all heads; it has calibrated thresholds per head, of which
    this has none, and groups of rows of another prompt length may see later cells (issues 14 and 15 of its tracker).

    Args:
        threshold: share of the estimated attention, in (0, 1]; 0.9.
        stride: S, a divisor of 128; 8, or 16 for half the work, which is n^2 d / S.

    Raises:
        ArgumentError: a value out of range.

    Source: arXiv 2503.16428; mit-han-lab/x-attention.
    """

    causal: ClassVar[bool] = True

    threshold: float = 0.9
    stride: int = 8

    def __post_init__(self) -> None:
        checks.real("threshold", self.threshold, np.nextafter(0, 1), np.nextafter(1, 2))
        if KEYS % checks.whole("stride", self.stride, 1, KEYS):
            raise ArgumentError(f"stride must divide {KEYS}; got {self.stride}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `Selector`."""
        return cls(), cls(threshold=0.6, stride=16)

    def tighter(self, n: int) -> Self | None:
        """See `ListMaker`: the threshold halfway to 1."""
        threshold = nearer_one(self.threshold)
        return None if threshold is None else dataclasses.replace(self, threshold=threshold)

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """See `Selector`."""
        m, n = q.shape[1], k.shape[1]
        far = distances(m, n, q.device)  # (T, C)
        forced = (far <= 0) | (torch.arange(far.shape[1], device=q.device) == 0)
        sums = block_sums(q, k, scale, self.stride)
        keep = covering(sums.flatten(0, 1), self.threshold, forced.repeat(len(q), 1)).view(sums.shape)
        return key_lists(keep, m, n)


def block_sums(q: torch.Tensor, k: torch.Tensor, scale: float, stride: int) -> torch.Tensor:
    """q (H, m, d), k (G, n, d) -> softmax of mean antidiagonal scores, summed over blocks: (H, T, C)."""
    (heads, m, _), n = q.shape, k.shape[1]
    T, C, cells = row_blocks(m), key_blocks(n), ROWS // stride
    rows = torch.nn.functional.pad(q / stride, (0, 0, 0, ROWS * T - m)).unflatten(1, (-1, stride)).flip(2).flatten(2)
    keys = torch.nn.functional.pad(k, (0, 0, 0, KEYS * C - n)).unflatten(1, (-1, stride)).flatten(2)
    step = max(1, LARGEST // (heads * cells * keys.shape[1]))  # row blocks at a time
    parts = []
    for first in range(0, T, step):
        last = min(first + step, T)
        width = min((n - m + ROWS * last - 1) // KEYS + 1, C)  # key blocks that their rows see
        begin = stride * torch.arange(cells * first, cells * last, device=q.device)  # the first row of each cell
        column = torch.arange(cells * width, device=q.device)
        scores = products(rows[:, cells * first : cells * last], keys[:, : cells * width]) * scale
        shares = scores.masked_fill_(column > (n - m + begin)[:, None] // stride, -torch.inf).softmax(2)
        shares *= (begin < m)[:, None]
        sums = shares.unflatten(2, (width, cells)).sum(3).unflatten(1, (-1, cells)).sum(2)
        parts.append(torch.nn.functional.pad(sums, (0, C - width)))
    return torch.cat(parts, 1)
