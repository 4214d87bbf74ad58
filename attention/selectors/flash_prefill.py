"""FlashPrefill: key blocks whose mean key comes near the best one of the row block."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from attention.block_maps import distances, key_lists
from attention.estimates import LARGEST, means, products
from attention.key_lists import KEYS, ROWS, KeyLists
from attention.selector import Selector
from hsr import checks
from hsr.errors import ArgumentError


@dataclass(frozen=True)
class FlashPrefill(Selector):
    """Energies of mean keys: ``sum_i exp(scale <q_i, mean key of J> - M)`` over rows of a block, M their largest score.

    A key block is kept where its energy is at least alpha times the largest one of its row block, the blocks of the
    diagonal included; so are the first blocks, the latest, and all of the last row blocks.  Dropped blocks may enter by
    their mean key and mean value with weight 128, as in the second version; all that are eligible are fully visible,
    which that asks for.  No sum is bounded: dropped mass can be many times alpha.

    Published code differs: the second version has one list for a group of heads, this one for every head, as the
    first; the first's least number of blocks is not here.  Both versions' signatures have other defaults than the
    settings they recommend, which are ours.

    Args:
        alpha: in (0, 1]; 0.1, in the first version 0.08 to 0.18 by model.
        sinks: first key blocks that every row sees.
        window: key blocks that a row sees up to its own, at least 1.
        last: row blocks at the end that see everything; 8 in the second version, 2 in the first.
        means: whether means stand for dropped blocks; the second version's True.

    Raises:
        ArgumentError: a value out of range.

    Source: arXiv 2603.06199 and 2608.19758; qhfan/FlashPrefill, qhfan/FlashPrefillv2.
    """

    causal: ClassVar[bool] = True

    alpha: float = 0.1
    sinks: int = 2
    window: int = 4
    last: int = 8
    means: bool = True

    def __post_init__(self) -> None:
        checks.real("alpha", self.alpha, np.nextafter(0, 1), np.nextafter(1, 2))
        checks.whole("sinks", self.sinks, 0)
        checks.whole("window", self.window, 1)
        checks.whole("last", self.last, 0)
        if not isinstance(self.means, bool):
            raise ArgumentError(f"means must be True or False; got {self.means!r}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `Selector`."""
        return cls(sinks=1, window=1, last=1), cls(alpha=0.5, sinks=0, window=2, last=0, means=False)

    def tighter(self, n: int) -> Self | None:
        """See `ListMaker`: a quarter of alpha."""
        return dataclasses.replace(self, alpha=self.alpha / 4) if self.alpha > 1e-3 else None

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """See `Selector`."""
        m, n = q.shape[1], k.shape[1]
        far = distances(m, n, q.device)  # (T, C)
        T, C = far.shape
        energy = energies(q, means(k), scale, n)
        near = (far < self.window) | (torch.arange(C, device=q.device) < self.sinks)
        whole = near | (torch.arange(T, device=q.device) >= T - self.last)[:, None]
        keep = whole | (energy >= self.alpha * energy.amax(2, keepdim=True))
        return key_lists(keep, m, n, means=~keep if self.means else None)


def energies(q: torch.Tensor, mean: torch.Tensor, scale: float, n: int) -> torch.Tensor:
    """q (H, m, d), mean keys (G, C, d) of n keys -> energy of each up to a row block's own, else 0: (H, T, C)."""
    heads, m, _ = q.shape
    far = distances(m, n, q.device)
    T, C = far.shape
    step = max(1, LARGEST // (heads * ROWS * C))  # row blocks at a time
    parts = []
    for first in range(0, T, step):
        last = min(first + step, T)
        width = (n - m + ROWS * (last - 1)) // KEYS + 1  # key blocks up to their own
        rows = q[:, ROWS * first : ROWS * last]
        scores = torch.nn.functional.pad(products(rows, mean[:, :width]) * scale, (0, 0, 0, -rows.shape[1] % ROWS))
        absent = ROWS * first + torch.arange(scores.shape[1], device=q.device) >= m
        hidden = (far[first:last, :width] < 0)[:, None] | absent.view(-1, ROWS, 1)
        scores = scores.view(heads, -1, ROWS, width).masked_fill_(hidden, -torch.inf)
        energy = (scores - scores.amax((2, 3), keepdim=True)).exp_().sum(2)
        parts.append(torch.nn.functional.pad(energy, (0, C - width)))
    return torch.cat(parts, 1)
