"""StreamingLLM: the first keys and the latest ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from attention.block_maps import key_blocks, key_lists
from attention.key_lists import KEYS, ROWS, KeyLists, row_blocks
from attention.selector import Selector
from hsr import checks


@dataclass(frozen=True)
class StreamingLLM(Selector):
    """Attention sinks, single keys, and a window, the same for every head; MInference's A-shape is (100, 800).

    The window is whole key blocks: every row sees its ``window`` latest keys, and at most 254 more, since the 128 rows
    of a block share the first row's window and it begins with the key block it falls into.  The published system evicts
    from a cache, so that positions count within it; here keys keep theirs.

    Args:
        sinks: first keys that every row sees; 4 in the paper.
        window: latest keys that a row sees, its own included; 1020 (of a cache of 1024) in the paper's experiments.

    Raises:
        ArgumentError: sinks below 0 or a window below 1.

    Source: arXiv 2309.17453.
    """

    causal: ClassVar[bool] = True

    sinks: int = 4
    window: int = 1020

    def __post_init__(self) -> None:
        checks.whole("sinks", self.sinks, 0)
        checks.whole("window", self.window, 1)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `Selector`."""
        return cls(window=200), cls(sinks=0, window=1), cls(sinks=150, window=128)

    def tighter(self, n: int) -> Self | None:
        """See `ListMaker`: four times the window."""
        return dataclasses.replace(self, window=4 * self.window) if 4 * self.window < n else None

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """See `Selector`."""
        (heads, m, _), n = q.shape, k.shape[1]
        oldest = n - m + ROWS * torch.arange(row_blocks(m), device=q.device) - self.window + 1
        blocks = torch.arange(key_blocks(n), device=q.device)
        keep = blocks >= torch.div(oldest, KEYS, rounding_mode="floor")[:, None]  # (T, C)
        first = torch.arange(min(self.sinks, n), device=q.device)[None]
        return key_lists(keep.expand(heads, -1, -1), m, n, columns=first)
