"""PowerAttention: key blocks at distances 1, 2, 4, ..."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from attention.block_maps import distances, key_lists
from attention.key_lists import KEYS, KeyLists
from attention.selector import Selector
from hsr import checks


@dataclass(frozen=True)
class PowerAttention(Selector):
    """Key blocks whose distance from a row's own is a power of two, with sinks and a window, the same for every head.

    The receptive field doubles with every layer.  The paper trains with its pattern; a model that was not does poorly.
    Distances are counted in blocks of 128 from the key block that a block's first row lies in.

    Args:
        sinks: first key blocks that every row sees; ours, 1.
        window: key blocks that a row sees up to its own, at least 1; ours, 2.

    Raises:
        ArgumentError: sinks below 0 or a window below 1.

    Source: arXiv 2503.03588; we know of no code that its authors released.
    """

    causal: ClassVar[bool] = True

    sinks: int = 1
    window: int = 2

    def __post_init__(self) -> None:
        checks.whole("sinks", self.sinks, 0)
        checks.whole("window", self.window, 1)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `Selector`."""
        return cls(), cls(sinks=0, window=1), cls(sinks=2, window=4)

    def tighter(self, n: int) -> Self | None:
        """See `ListMaker`: four times the window."""
        return dataclasses.replace(self, window=4 * self.window) if 4 * KEYS * self.window < n else None

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """See `Selector`."""
        (heads, m, _), n = q.shape, k.shape[1]
        far = distances(m, n, q.device)  # (T, C)
        power = (far > 0) & (far & (far - 1) == 0)
        keep = power | (far < self.window) | (torch.arange(far.shape[1], device=q.device) < self.sinks)
        return key_lists(keep.expand(heads, -1, -1), m, n)
