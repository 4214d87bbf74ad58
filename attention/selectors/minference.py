"""MInference: single columns and diagonals that the last 64 rows attend to most."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from attention.block_maps import diagonal_blocks, key_lists
from attention.estimates import last_rows
from attention.key_lists import KeyLists
from attention.selector import Selector
from hsr import checks

ROWS = 64  # last rows that choose
FIRST, NEAR = 30, 100  # columns and diagonals that are always chosen


@dataclass(frozen=True)
class MInference(Selector):
    """The vertical-slash pattern of MInference: columns as single keys, diagonals as the key blocks they touch.

    Of the mean attention of the last 64 rows, the largest columns and diagonals are kept, the first 30 columns and the
    100 nearest diagonals among them.  The choice for every row depends on the last ones.

    Published code differs: it searches offline which of three patterns and sizes each head gets (A-shape is
    `StreamingLLM`), and tiles rows by 64 with blocks of 64 keys that begin anywhere; blocks of 128 at multiples of 128
    contain those, so that more keys are attended to.  Counts do not grow with the prompt.

    Args:
        vertical: columns, at least 30; 1000 by default as in the code's fallback.
        slash: diagonals, at least 100; 6096 likewise.

    Raises:
        ArgumentError: fewer than these.

    Source: arXiv 2407.02490; microsoft/MInference.
    """

    causal: ClassVar[bool] = False

    vertical: int = 1000
    slash: int = 6096

    def __post_init__(self) -> None:
        checks.whole("vertical", self.vertical, FIRST)
        checks.whole("slash", self.slash, NEAR)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `Selector`."""
        return cls(vertical=40, slash=103), cls(vertical=200, slash=120)

    def tighter(self, n: int) -> Self | None:
        """See `ListMaker`: four times as many columns and diagonals."""
        larger = dataclasses.replace(self, vertical=4 * self.vertical, slash=4 * self.slash)
        return larger if larger.slash < n else None

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """See `Selector`."""
        m, n = q.shape[1], k.shape[1]
        by_key, by_distance = last_rows(q, k, scale, ROWS)
        by_key[:, :FIRST], by_distance[:, :NEAR] = torch.inf, torch.inf
        columns = by_key.topk(min(self.vertical, n), sorted=False).indices.sort(1).values
        chosen = torch.zeros_like(by_distance, dtype=torch.bool)
        chosen.scatter_(1, by_distance.topk(min(self.slash, n), sorted=False).indices, True)
        return key_lists(diagonal_blocks(chosen, m), m, n, columns=columns)
