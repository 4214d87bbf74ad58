"""Rules that choose keys for the 128-row blocks of a prompt: two that know all probabilities, two that estimate.

A choice is a set (T, n) bool: the keys that block I of rows attends to.  Its density is their number over that of the
keys up to each block's last row, the whole diagonal block counted.  A rule gets a head and a density, chooses over all
blocks of the head, and returns None where the keys that it takes anyway are more already.

``block_oracle``: the sink block, the diagonal block, and the 128 x 128 blocks of largest probability in the head.
``token_oracle``: the diagonal block, and for each block of rows the keys of largest probability summed over its rows;
one threshold for the head.
``pooled_blocks``: as ``block_oracle`` by an estimate: every row's softmax over mean keys of the blocks up to its own,
averaged over the block's rows; one threshold.
``vertical_slash``: sink and diagonal blocks; columns and diagonals by their probability in the last 128 rows, as
MInference (arXiv 2407.02490) and FlexPrefill (arXiv 2502.20766) do.  Diagonals come first, the largest at the head,
with both block offsets that a diagonal touches, as many offsets as half of the remaining keys pay for; then columns,
single keys for all later rows, until the density is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from attention.key_lists import KEYS


class Head:
    """One query head over a prompt: q, k, v (n, d) float32 on any device, n a multiple of 128."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Nothing is computed yet."""
        self.q, self.k, self.v = q, k, v
        self.n, self.blocks = len(q), len(q) // KEYS
        self.visible = KEYS * self.blocks * (self.blocks + 1) // 2

    def weights(self, block: int) -> torch.Tensor:
        """Exact attention probabilities of a block's rows: (128, keys up to its end)."""
        end = KEYS * (block + 1)
        scores = self.q[end - KEYS : end] @ self.k[:end].T * self.q.shape[1] ** -0.5
        scores[:, end - KEYS :] += self._hidden
        return scores.softmax(1)

    @cached_property
    def mass(self) -> torch.Tensor:
        """(T, n) probability of a key summed over a block's rows."""
        found = self.q.new_zeros(self.blocks, self.n)
        for block in range(self.blocks):
            found[block, : KEYS * (block + 1)] = self.weights(block).sum(0)
        return found

    @cached_property
    def pooled(self) -> torch.Tensor:
        """(T, T) mean over a block's rows of their softmax over mean keys."""
        means = self.k.reshape(self.blocks, KEYS, -1).mean(1)
        scores = (self.q @ means.T * self.q.shape[1] ** -0.5).reshape(self.blocks, KEYS, self.blocks)
        later = torch.ones(self.blocks, self.blocks, dtype=torch.bool, device=self.q.device).triu(1)
        return scores.masked_fill_(later[:, None], -torch.inf).softmax(2).mean(1)

    @cached_property
    def earlier(self) -> torch.Tensor:
        """(T, T) bool, the blocks of keys before a block of rows."""
        return torch.ones(self.blocks, self.blocks, dtype=torch.bool, device=self.q.device).tril(-1)

    @cached_property
    def diagonal(self) -> torch.Tensor:
        """(T, T) bool."""
        return torch.eye(self.blocks, dtype=torch.bool, device=self.q.device)

    @cached_property
    def ends(self) -> torch.Tensor:
        """(T, T) bool, the sink block and the diagonal one."""
        found = self.diagonal.clone()
        found[:, 0] = True
        return found

    @cached_property
    def _hidden(self) -> torch.Tensor:
        return torch.full((KEYS, KEYS), -torch.inf, device=self.q.device).triu(1)


Rule = Callable[[Head, float], torch.Tensor | None]


def density(head: Head, chosen: torch.Tensor) -> float:
    """Of a set (T, n)."""
    return float(chosen.sum()) / head.visible


def block_oracle(head: Head, density: float) -> torch.Tensor | None:
    """See the module."""
    return _top_blocks(head, head.mass.reshape(head.blocks, head.blocks, KEYS).sum(2), density)


def pooled_blocks(head: Head, density: float) -> torch.Tensor | None:
    """See the module."""
    return _top_blocks(head, head.pooled, density)


def token_oracle(head: Head, density: float) -> torch.Tensor | None:
    """See the module."""
    spare = _spare(head, head.diagonal, density)
    if spare < 0:
        return None
    return _top(head.mass, _keys(head.earlier), spare) | _keys(head.diagonal)


def vertical_slash(head: Head, density: float) -> torch.Tensor | None:
    """See the module."""
    spare = _spare(head, head.ends, density)
    if spare < 0:
        return None
    last = head.weights(head.blocks - 1)
    chosen = head.ends | (_slashes(head, last, spare // 2)[_offsets(head)] & head.earlier)
    price = (head.earlier & ~chosen).sum(0).repeat_interleave(KEYS)  # (n,) lines that a column would add a key to
    order = last.sum(0).argsort(descending=True)
    paid = price[order].cumsum(0) <= _spare(head, chosen, density)
    columns = torch.zeros_like(paid).scatter_(0, order, paid)
    return _keys(chosen) | (columns & _keys(head.earlier))


def _slashes(head: Head, last: torch.Tensor, keys: int) -> torch.Tensor:
    """The block offsets (T,) of the largest diagonals that so many keys pay for; last (128, n) probabilities."""
    distance = torch.arange(head.n, device=last.device)
    key = head.n - KEYS + torch.arange(KEYS, device=last.device)[:, None] - distance
    mass = last.gather(1, key.clamp(min=0)).masked_fill_(key < 0, 0.0).sum(0)
    rank = mass.argsort(descending=True).argsort().reshape(head.blocks, KEYS).amin(1)
    rank[1:] = torch.minimum(rank[1:], rank[:-1].clone())  # a diagonal within an offset also touches the next one
    price = KEYS * (head.blocks - 1 - torch.arange(head.blocks, device=last.device))  # without the sink block
    price[0] = 0  # the diagonal block is there already
    order = rank.argsort(stable=True)
    return torch.zeros_like(price, dtype=torch.bool).scatter_(0, order, price[order].cumsum(0) <= keys)


def _offsets(head: Head) -> torch.Tensor:
    """(T, T) how many blocks a block of keys lies before a block of rows, 0 where it lies behind."""
    place = torch.arange(head.blocks, device=head.q.device)
    return (place[:, None] - place).clamp(min=0)


def _top_blocks(head: Head, scores: torch.Tensor, density: float) -> torch.Tensor | None:
    spare = _spare(head, head.ends, density)
    if spare < 0:
        return None
    return _keys(_top(scores, head.earlier & ~head.ends, spare // KEYS) | head.ends)


def _spare(head: Head, blocks: torch.Tensor, density: float) -> int:
    """Keys that a density leaves beside these blocks (T, T)."""
    return int(density * head.visible) - KEYS * int(blocks.sum())


def _keys(blocks: torch.Tensor) -> torch.Tensor:
    """(T, T) -> (T, n)."""
    return blocks.repeat_interleave(KEYS, 1)


def _top(scores: torch.Tensor, eligible: torch.Tensor, many: int) -> torch.Tensor:
    """So many eligible ones of largest score, without those that tie with the next; scores of zero never."""
    values = scores[eligible]
    if many >= len(values):
        return eligible
    return eligible & (scores > values.kthvalue(len(values) - many).values)


RULES: dict[str, Rule] = {
    "block-oracle": block_oracle,
    "token-oracle": token_oracle,
    "pooled-blocks": pooled_blocks,
    "vertical-slash": vertical_slash,
}
