"""FlexPrefill: columns and diagonals of key blocks, or pooled attention, as each head's last rows tell."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from attention.block_maps import distances, key_lists
from attention.estimates import (
    covering,
    jensen_shannon,
    last_rows,
    means,
    pooled,
    products,
    ranks,
    vertical_slash,
    wide,
)
from attention.key_lists import KEYS, KeyLists
from attention.selector import Selector, nearer_one
from hsr import checks
from hsr.errors import ArgumentError


@dataclass(frozen=True)
class FlexPrefill(Selector):
    """The last 128 rows choose key blocks for all rows, as many as cover a share gamma of their attention.

    A head keeps the key blocks with most of that attention and the block distances with most of it, each set reaching
    gamma.  A diagonal counts for the two block distances that it crosses, by its part in each.  A head is query-aware
    where attention by pooled keys is close to the true one (square root of the Jensen-Shannon divergence below tau): it
    keeps ``min_budget`` of both sets, and the entries of its pooled attention map that make gamma of it.  Block 0 and
    the diagonal are always kept.  That map is made for every head, because to know which need it would take a look.

    Published code differs from the paper, and ``published=True`` does as it does: gamma tells how many single columns
    and diagonals would cover it, and the best ``count // 128 + 1`` blocks are taken, whatever they cover; a diagonal
    counts for the first of its block distances alone, on a grid that begins at the latest block.  Either way blocks are
    chosen, where the paper has single columns and diagonals, the dense rule for short prompts follows from the budget,
    and a block of zero attention never spoils the divergence.

    Args:
        gamma: share of attention, in (0, 1]; 0.9, or 0.95 for Llama 3.1.
        tau: of the divergence; 0.1, and 0 for no query-aware head.
        min_budget: least keys of each set, rounded up to blocks; 1024 in the paper, 512 in the code's README.
        published: whether to do as the published code does.

    Raises:
        ArgumentError: a value out of range.

    Source: arXiv 2502.20766; bytedance/FlexPrefill.
    """

    causal: ClassVar[bool] = False

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    published: bool = False

    def __post_init__(self) -> None:
        checks.real("gamma", self.gamma, np.nextafter(0, 1), np.nextafter(1, 2))
        checks.real("tau", self.tau, 0.0, 2.0)
        checks.whole("min_budget", self.min_budget, 1)
        if not isinstance(self.published, bool):
            raise ArgumentError(f"published must be True or False; got {self.published!r}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `Selector`."""
        least = 128
        return (
            cls(min_budget=least),
            cls(gamma=0.6, tau=0.0, min_budget=least),
            cls(gamma=0.7, tau=1.0, min_budget=least),
            cls(tau=0.3, min_budget=least, published=True),
        )

    def tighter(self, n: int) -> Self | None:
        """See `ListMaker`: gamma halfway to 1, and twice the least budget."""
        gamma = nearer_one(self.gamma)
        if gamma is None or self.min_budget >= n:
            return None
        return dataclasses.replace(self, gamma=gamma, min_budget=2 * self.min_budget)

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """See `Selector`."""
        m, n = q.shape[1], k.shape[1]
        by_key, by_distance = last_rows(q, k, scale, KEYS)
        aware = self._aware(q, k, scale, pooled(by_key))
        sets = self._counted if self.published else self._covered
        columns, offsets = sets(by_key, by_distance, aware, (n - m) % KEYS)
        far = distances(m, n, q.device)  # (T, C)
        keep = columns[:, None] | offsets[:, (far + 1).clamp(min=0)]
        return key_lists(keep | (aware[:, :, None] & self._pooled(q, k, scale, far)), m, n)

    def _covered(
        self, by_key: torch.Tensor, by_distance: torch.Tensor, aware: torch.Tensor, phase: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key blocks (H, C) and block distances (H, >= C + 1), from -1 on, whose attention reaches gamma."""
        return vertical_slash(by_key, by_distance, torch.where(aware, 0.0, self.gamma), phase, self._least)

    def _counted(
        self, by_key: torch.Tensor, by_distance: torch.Tensor, aware: torch.Tensor, phase: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Likewise as published: a number of blocks by how many columns or diagonals reach gamma."""
        found = []
        for mass, blocks in ((by_key, pooled(by_key)), (by_distance, pooled(by_distance.flip(1)).flip(1))):
            covered = mass.sort(1, descending=True).values.double().cumsum(1) <= self.gamma
            count = ((covered.sum(1, keepdim=True) + 1) // KEYS + 1).clamp(min=self._least)
            first = torch.arange(blocks.shape[1], device=blocks.device) == 0
            found.append(ranks(blocks, first) < count.where(~aware, self._least))
        return found[0], torch.nn.functional.pad(found[1], (1, 0))

    @property
    def _least(self) -> int:
        return -(-self.min_budget // KEYS)

    def _aware(self, q: torch.Tensor, k: torch.Tensor, scale: float, true: torch.Tensor) -> torch.Tensor:
        """Whether pooled attention is like the true one (H, C) of the last rows: (H, 1)."""
        query = q[:, -KEYS:].mean(1, keepdim=True, dtype=wide(q)).to(q.dtype)
        estimate = (products(query, means(k)) * scale).softmax(2)[:, 0]
        return jensen_shannon(estimate, true) < self.tau

    def _pooled(self, q: torch.Tensor, k: torch.Tensor, scale: float, far: torch.Tensor) -> torch.Tensor:
        """The largest entries of pooled attention (H, T, C) that make gamma of it."""
        shares = (products(means(q), means(k)) * scale).masked_fill_(far < 0, -torch.inf).softmax(2)
        none = torch.zeros((), dtype=torch.bool, device=q.device)
        return covering(shares.flatten(1), self.gamma, none).view(shares.shape)
