"""DoubleSparsity: the keys of largest score by a few channels alone, which are kept apart in four bits each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from attention.decode_selector import DecodeSelector, Steps
from attention.estimates import products, wide
from attention.held_rows import HeldRows
from attention.token_lists import TokenLists
from hsr import checks
from hsr.errors import ArgumentError

LEVELS = 15  # steps between the least and the largest code


@dataclass(frozen=True)
class DoubleSparsity(DecodeSelector):
    """A label cache of a few channels of every key; each query head takes the keys of largest score by them.

    The channels are chosen once, when the cache begins: for each key-value head the largest of mean ``|q_c|`` times
    mean ``|k_c|``, over the queries that are known of its group and over the keys; where no queries are known, of mean
    ``|k_c|`` alone.  Labels are codes of 4 bits between the least and the largest of a key's labels, or the labels.

    Published code differs: it calibrates offline, on other text, a query head at a time and with each query beside its
    own position's key alone; it rounds the queries' labels too; and its Triton path needs a head's whole context in
    one program.

    Args:
        budget: keys of a list; 1/16 of the context in the paper, 256 or 2048 in the code.
        channels: of a label, all where d is smaller; 16 of 128.
        codes: whether labels are rounded to 4 bits.

    Raises:
        ArgumentError: a value out of range.

    Source: arXiv 2408.07092; andy-yang-1/DoubleSparse.
    """

    budget: int = 2048
    channels: int = 16
    codes: bool = True

    def __post_init__(self) -> None:
        checks.whole("budget", self.budget, 1)
        checks.whole("channels", self.channels, 1)
        if not isinstance(self.codes, bool):
            raise ArgumentError(f"codes must be True or False; got {self.codes!r}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `DecodeSelector`."""
        return cls(budget=64, channels=8), cls(budget=64, channels=4, codes=False), cls(budget=1, channels=3)

    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """See `DecodeSelector`."""
        strength = k.abs().mean(1, dtype=wide(k))  # (G, d)
        if queries is not None:
            asked = queries.abs().mean(1, dtype=wide(k))
            strength = strength * asked.view(len(k), -1, k.shape[2]).mean(1)
        chosen = strength.topk(min(self.channels, k.shape[2]), sorted=False).indices  # (G, r)
        return (_Codes if self.codes else _Labels)(self.budget, chosen, k)

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """A label of every key; with codes two a byte, and two float32 for their range."""
        channels = min(self.channels, d)
        return n * (8 + -(-channels // 2)) if self.codes else n * channels * itemsize


class _Labels(Steps):
    """Channels (G, r) of every key."""

    def __init__(self, budget: int, channels: torch.Tensor, k: torch.Tensor) -> None:
        self._budget, self._channels, self._n = budget, channels, k.shape[1]
        self._held = [HeldRows(part) for part in self._kept(self._of(k))]

    def _of(self, x: torch.Tensor) -> torch.Tensor:
        """(G, t, d) -> labels (G, t, r)."""
        return x.gather(2, self._channels[:, None].expand(-1, x.shape[1], -1))

    def _kept(self, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is kept of labels (G, t, r)."""
        return (labels,)

    def _scores(self, asked: torch.Tensor) -> torch.Tensor:
        """Labels of queries (G, H / G, r) -> scores (H, n)."""
        return products(asked.flatten(0, 1)[:, None], self._held[0].rows)[:, 0]

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Labels of the new keys, by the channels of the first ones."""
        for held, part in zip(self._held, self._kept(self._of(k[:, self._n :])), strict=True):
            held.put(self._n, part)
        self._n = k.shape[1]

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """See `Steps`."""
        scores = self._scores(self._of(q.reshape(len(k), -1, q.shape[1])))
        return TokenLists.from_ids(scores.topk(min(self._budget, self._n), sorted=False).indices)


class _Codes(_Labels):
    """Labels as ``low + step code``, two codes a byte."""

    def _kept(self, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Codes (G, t, ceil(r / 2)) uint8, low and step (G, t, 2)."""
        exact = labels.to(wide(labels))
        low, high = exact.aminmax(dim=2, keepdim=True)
        step = (high - low) / LEVELS
        codes = ((exact - low) / torch.where(step > 0, step, 1.0)).round().to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, codes.shape[2] % 2))
        return codes[:, :, ::2] | codes[:, :, 1::2] << 4, torch.cat([low, step], 2)

    def _scores(self, asked: torch.Tensor) -> torch.Tensor:
        codes, (low, step) = self._held[0].rows, self._held[1].rows.unbind(2)
        exact = asked.to(low.dtype)
        even, odd = exact[:, :, ::2], torch.nn.functional.pad(exact, (0, exact.shape[2] % 2))[:, :, 1::2]
        coded = even @ (codes & LEVELS).to(low.dtype).mT + odd @ (codes >> 4).to(low.dtype).mT  # (G, H / G, n)
        return (exact.sum(2, keepdim=True) * low[:, None] + step[:, None] * coded).flatten(0, 1)
