"""Lists of keys that one decode step attends to: what decode selectors make and attention takes, tensors anywhere.

Letters as in `attention.decode_selector`: H query heads, G key-value heads, n tokens; W is the width of the lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from hsr.errors import ArgumentError


@dataclass(frozen=True)
class Means:
    """Pseudo keys that stand for many: centroids, means of blocks.  On a GPU they are rounded to the cache's dtype.

    Attributes:
        keys: (G, C, d), any float dtype.
        values: (G, C, dv), likewise.
        log_weights: (L, C) float32, natural logarithms, added to the scaled score of the mean key; -inf leaves it out.
    """

    keys: torch.Tensor
    values: torch.Tensor
    log_weights: torch.Tensor


@dataclass(frozen=True)
class TokenLists:
    """Keys that one decode step attends to: L = H lists, one a query head, or L = G lists, one for a group's heads.

    The first ``counts[l]`` entries of line l count, the others may hold anything.  No token may be listed twice, nor
    both listed and stand behind a mean of weight above zero: `check` sees to what it can, attention does not look.

    Attributes:
        tokens: (L, W) int32, ids 0..n-1, in any order.
        counts: (L,) int32, 0..W.
        log_weights: (L, W) float32, natural logarithms, added to scaled scores; None for zeros.
        means: pseudo keys beside the tokens; None for none.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    log_weights: torch.Tensor | None = None
    means: Means | None = None

    @classmethod
    def from_mask(
        cls,
        mask: torch.Tensor,
        width: int | None = None,
        log_weights: torch.Tensor | None = None,
        means: Means | None = None,
    ) -> Self:
        """mask (L, n) bool, log_weights (L, n) -> lists in ascending order, of a line's first ``width`` tokens."""
        L, n = mask.shape
        wide = n if width is None else width
        place = (mask.cumsum(1) - 1).masked_fill(~mask, wide).clamp(max=wide)  # (L, n), the last place is thrown away
        ids = torch.arange(n, dtype=torch.int32, device=mask.device).expand(L, n)
        tokens = ids.new_zeros(L, wide + 1).scatter_(1, place, ids)[:, :wide]
        counts = mask.sum(1).clamp(max=wide).int()
        if log_weights is None:
            return cls(tokens, counts, None, means)
        weights = log_weights.new_zeros(L, wide + 1, dtype=torch.float32).scatter_(1, place, log_weights.float())
        return cls(tokens, counts, weights[:, :wide], means)

    @classmethod
    def from_ids(
        cls,
        ids: torch.Tensor,
        valid: torch.Tensor | None = None,
        log_weights: torch.Tensor | None = None,
        means: Means | None = None,
    ) -> Self:
        """ids (L, W), any whole dtype, valid (L, W) bool or None for all, log_weights (L, W) -> lists in that order."""
        if valid is None:
            counts = torch.full((len(ids),), ids.shape[1], dtype=torch.int32, device=ids.device)
            return cls(ids.int(), counts, log_weights, means)
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        weights = None if log_weights is None else log_weights.gather(1, order)
        return cls(ids.gather(1, order).int(), valid.sum(1).int(), weights, means)

    def valid(self) -> torch.Tensor:
        """Which entries count: (L, W) bool."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.counts[:, None]

    def mask(self, n: int) -> torch.Tensor:
        """Which of n tokens each line lists: (L, n) bool."""
        places = self.tokens.long().masked_fill(~self.valid(), n)
        found = torch.zeros(len(places), n + 1, dtype=torch.bool, device=places.device)
        return found.scatter_(1, places, True)[:, :n]

    def attended(self) -> torch.Tensor:
        """Keys that each line attends to, a mean of weight above zero counting as one: (L,) int64."""
        found = self.counts.long()
        return found if self.means is None else found + (self.means.log_weights > -torch.inf).sum(1)


def check(lists: TokenLists, heads: int, groups: int, n: int) -> None:
    """Whether the lists fit ``heads`` query heads over n tokens of ``groups`` heads; it reads all of them.

    Raises:
        ArgumentError: a shape or dtype that does not fit, a token out of range or listed twice.
    """
    check_shapes(lists, heads, groups)
    W = lists.tokens.shape[1]
    if int(lists.counts.min()) < 0 or int(lists.counts.max()) > W:
        raise ArgumentError(f"counts must lie in 0..{W}; got {int(lists.counts.min())}..{int(lists.counts.max())}")
    named = lists.tokens[lists.valid()]
    if named.numel() and (int(named.min()) < 0 or int(named.max()) >= n):
        raise ArgumentError(f"tokens must lie in 0..{n - 1}; got {int(named.min())}..{int(named.max())}")
    if int(lists.mask(n).sum()) != int(lists.counts.sum()):
        raise ArgumentError("tokens must name a key once in a line; got one more than once")


def check_shapes(lists: TokenLists, heads: int, groups: int, widths: tuple[int, int] | None = None) -> None:
    """What `check` can tell without reading the lists, and of means of these widths (d, dv); ArgumentError likewise."""
    if lists.tokens.ndim != 2:
        raise ArgumentError(f"tokens must be (lines, width); got {tuple(lists.tokens.shape)}")
    L = len(lists.tokens)
    if L not in (heads, groups) or lists.counts.shape != (L,):
        raise ArgumentError(f"lists must be {heads} or {groups} lines; got {L} of {tuple(lists.counts.shape)} counts")
    if lists.tokens.dtype != torch.int32 or lists.counts.dtype != torch.int32:
        raise ArgumentError(f"lists must be int32; got {lists.tokens.dtype} and {lists.counts.dtype}")
    if lists.means is not None:
        d, dv = widths or (lists.means.keys.shape[-1], lists.means.values.shape[-1])
        C = lists.means.keys.shape[1]
        for name, part, width in (("means.keys", lists.means.keys, d), ("means.values", lists.means.values, dv)):
            if tuple(part.shape) != (groups, C, width):
                raise ArgumentError(f"{name} must be {(groups, C, width)}; got {tuple(part.shape)}")
    for name, found, wanted in _weights(lists):
        if found.dtype != torch.float32 or tuple(found.shape) != wanted:
            raise ArgumentError(f"{name} must be {wanted} float32; got {tuple(found.shape)} {found.dtype}")


def _weights(lists: TokenLists) -> list[tuple[str, torch.Tensor, tuple[int, ...]]]:
    """Every log weight there is: its name, itself and the shape it must have."""
    found = []
    if lists.log_weights is not None:
        found.append(("log_weights", lists.log_weights, tuple(lists.tokens.shape)))
    if lists.means is not None:
        shape = (len(lists.tokens), lists.means.keys.shape[1])
        found.append(("means.log_weights", lists.means.log_weights, shape))
    return found
