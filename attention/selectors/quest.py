"""Quest: pages of keys whose channelwise bounds promise the largest scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from attention.decode_selector import DecodeSelector, Steps
from attention.estimates import products
from attention.held_rows import HeldRows
from attention.token_lists import TokenLists
from hsr import checks


@dataclass(frozen=True)
class Quest(DecodeSelector):
    """Pages of 16 keys, each with the least and the largest entry of every channel.

    ``sum_c max(q_c lo_c, q_c hi_c)`` bounds the scores of a page's keys from above.  Every query head attends to the
    last page and to the pages of largest bound, ``budget // page`` in all.  The bounds rank, they do not certify: a
    page that is left out may hold the best key.

    Published code differs: its kernels serve one sequence and as many key-value heads as query heads (ports to groups
    add, average or take the largest score of a group; here every query head has its own list), it keeps at least three
    pages, and its first two layers are dense.

    Args:
        budget: keys of a list, at least one page; the last page counts whole.
        page: keys of a page.

    Raises:
        ArgumentError: a value out of range.

    Source: arXiv 2406.10774; mit-han-lab/Quest.
    """

    budget: int = 2048
    page: int = 16

    def __post_init__(self) -> None:
        checks.whole("page", self.page, 1)
        checks.whole("budget", self.budget, self.page)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `DecodeSelector`."""
        return cls(budget=64), cls(budget=16), cls(budget=40, page=5)

    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """See `DecodeSelector`."""
        return _Pages(self, k)

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """Two bounds a channel of every page."""
        return 2 * -(-n // self.page) * d * itemsize


class _Pages(Steps):
    """The bounds of every page, the last of which is open."""

    def __init__(self, settings: Quest, k: torch.Tensor) -> None:
        self._settings, self._n = settings, k.shape[1]
        self._low, self._high = (HeldRows(bound) for bound in self._bounds(k))

    def _bounds(self, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (G, t, d) from the first of a page on -> the least and the largest entries (G, ceil(t / page), d)."""
        short = -k.shape[1] % self._settings.page
        low, high = (
            torch.nn.functional.pad(k, (0, 0, 0, short), value=beyond).unflatten(1, (-1, self._settings.page))
            for beyond in (torch.inf, -torch.inf)
        )
        return low.amin(2), high.amax(2)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Of the open page and those after it."""
        first = self._n // self._settings.page
        low, high = self._bounds(k[:, first * self._settings.page :])
        self._low.put(first, low)
        self._high.put(first, high)
        self._n = k.shape[1]

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """See `Steps`; the open page stands last in a list."""
        page, last = self._settings.page, self._low.rows.shape[1] - 1
        low, high = self._low.rows[:, :last], self._high.rows[:, :last]
        bounds = (products(q.clamp(min=0)[:, None], high) + products(q.clamp(max=0)[:, None], low))[:, 0]  # (H, last)
        best = bounds.topk(min(self._settings.budget // page - 1, last), sorted=False).indices
        ids = best[:, :, None] * page + torch.arange(page, device=q.device)
        open_page = torch.arange(last * page, self._n, device=q.device).expand(len(q), -1)
        return TokenLists.from_ids(torch.cat([ids.flatten(1), open_page], 1))
