"""TopOracle: the keys of largest score, read off all scores; what no selection of as many keys gets more mass from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from attention.decode_selector import DecodeSelector, Steps
from attention.estimates import products, wide
from attention.token_lists import TokenLists
from hsr import checks

KEYS = 1 << 14  # of a head, widened at a time


@dataclass(frozen=True)
class TopOracle(DecodeSelector):
    """The r keys of largest ``<q, k>`` for every query head: the most softmax mass that r keys can have.

    It reads every key, so that it saves the values alone: a yardstick for the others, not a method.  Scores are
    computed in float32 at least; which of equal scores come in is left open.

    Args:
        r: keys of a list, at least 1; all, where there are fewer.

    Raises:
        ArgumentError: a value out of range.
    """

    r: int = 2048

    def __post_init__(self) -> None:
        checks.whole("r", self.r, 1)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `DecodeSelector`."""
        return cls(r=64), cls(r=1)

    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """See `DecodeSelector`."""
        return _Scores(self.r)

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """Every key."""
        return n * d * itemsize


@dataclass(frozen=True)
class _Scores(Steps):
    """Nothing is remembered."""

    r: int

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Nothing to learn."""

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """See `Steps`."""
        asked = q[:, None].to(wide(q))
        scores = torch.cat([products(asked, part.to(wide(k))) for part in k.split(KEYS, 1)], 2)[:, 0]  # (H, n)
        return TokenLists.from_ids(scores.topk(min(self.r, k.shape[1]), sorted=False).indices)
