"""TokenSelect: single keys that the heads of a sequence vote for; a choice is kept while queries stay alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from attention.decode_selector import DecodeSelector, Steps
from attention.estimates import products, wide
from attention.token_lists import TokenLists
from hsr import checks
from hsr.errors import ArgumentError


@dataclass(frozen=True)
class TokenSelect(DecodeSelector):
    """A soft vote: each head's softmax over the keys in the middle, summed over the heads of a sequence, the top k.

    The first ``sinks`` and the last ``window`` keys are always attended to, the middle lies between them; with no more
    than ``sinks + k + window`` keys attention is dense.  While the queries of all heads together have a cosine of at
    least ``alike`` with those of the last choice, that choice is kept.  The vote reads every key; it is taken in every
    step, so that the device alone decides, and keeping a choice saves no time here.

    Published code differs: it takes key-value head ``x mod g`` for query head x, which is wrong for grouped queries,
    leaves the scale of the scores out, serves one sequence, and in a prompt votes with the mean query of a chunk.

    Args:
        k: keys that are voted in; 2048.
        sinks: n_init, 128.
        window: n_local, at least 1; 512.
        alike: the cosine, in (0, 1], or None to choose in every step; 0.9.
        pool: width of a max-pool over the votes, odd; 1 for none.

    Raises:
        ArgumentError: a value out of range.

    Source: arXiv 2411.02886; pzs19/TokenSelect.
    """

    k: int = 2048
    sinks: int = 128
    window: int = 512
    alike: float | None = 0.9
    pool: int = 1

    def __post_init__(self) -> None:
        checks.whole("k", self.k, 1)
        checks.whole("sinks", self.sinks, 0)
        checks.whole("window", self.window, 1)
        if self.alike is not None:
            checks.real("alike", self.alike, np.nextafter(0, 1), np.nextafter(1, 2))
        if checks.whole("pool", self.pool, 1) % 2 == 0:
            raise ArgumentError(f"pool must be odd; got {self.pool}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `DecodeSelector`."""
        return cls(k=32, sinks=4, window=16), cls(k=8, sinks=0, window=1, alike=None, pool=5)

    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """See `DecodeSelector`."""
        return _Votes(self, scale, batch)

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """The keys in the middle."""
        return max(n - self.sinks - self.window, 0) * d * itemsize


class _Votes(Steps):
    """The last choice of each sequence, and the queries that made it."""

    def __init__(self, settings: TokenSelect, scale: float, batch: int) -> None:
        self._settings, self._scale, self._batch = settings, scale, batch
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # queries (B, h d), tokens (B, k)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Nothing to learn."""

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """See `Steps`; the key-value heads of a sequence have the same list."""
        settings, n = self._settings, k.shape[1]
        if n <= settings.sinks + settings.k + settings.window:
            return TokenLists.from_ids(torch.arange(n, device=q.device).expand(len(k), -1))
        voted = self._votes(q, k).topk(settings.k, sorted=False).indices + settings.sinks  # (B, k)
        asked = q.reshape(self._batch, -1).to(wide(q))
        if self._last is not None and settings.alike is not None:
            known, kept = self._last
            same = (torch.nn.functional.cosine_similarity(asked, known) >= settings.alike)[:, None]
            asked, voted = torch.where(same, known, asked), torch.where(same, kept, voted)
        self._last = asked, voted
        ends = [torch.arange(a, b, device=q.device) for a, b in ((0, settings.sinks), (n - settings.window, n))]
        first, latest = (end.expand(self._batch, -1) for end in ends)
        tokens = torch.cat([first, voted, latest], 1)
        return TokenLists.from_ids(tokens.repeat_interleave(len(k) // self._batch, 0))

    def _votes(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Of each sequence, on the keys in the middle: (B, n - sinks - window)."""
        middle = k[:, self._settings.sinks : k.shape[1] - self._settings.window]
        shares = products(q[:, None] * self._scale, middle)[:, 0].softmax(1)
        votes = shares.unflatten(0, (self._batch, -1)).sum(1)
        pool = self._settings.pool
        return torch.nn.functional.max_pool1d(votes[:, None], pool, 1, pool // 2)[:, 0] if pool > 1 else votes
