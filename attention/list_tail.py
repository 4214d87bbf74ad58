"""What a selector leaves out, in two ways: a uniform sample of its keys, or the means of its blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch

from attention.block_maps import compressed, key_blocks, own_blocks
from attention.key_lists import KEYS, KeyLists, row_blocks
from attention.selector import ListMaker
from hsr import checks
from hsr.errors import ArgumentError

WORD = 0xFFFFFFFF  # of the numbers that the draws come from


@dataclass(frozen=True)
class ListTail(ListMaker):
    """The lists of another selector, and with them something of all eligible keys that it does not list.

    ``sampled=b``: b of a line's r remaining keys, each with the chance ``b / r``, and weighed by ``r / b``.  Where no
    mean stands for some, sums of weights and of weighted values are unbiased over seeds, for every row and any keys
    (their ratio, the output, is so up to ``1 / b``).  Where at most b remain they are all listed, with weight 1.  The
    draw is systematic, every ``r / b``-th key from one random start on, so that it is spread over the prompt.

    ``means=True``: every block of which no key is listed is stood for by its mean key and mean value, 128-fold.  By
    Jensen's inequality that never has more weight than its keys, and on blocks whose keys differ much it has far less.
    A key is never in the sample and in a mean: with both, the sample is of blocks listed in part.

    It is a policy of `attention.prefill` like the selector, on the CPU and on a GPU, for which nothing waits.  On the
    way to its lists it holds a few maps of H T C numbers (`attention.block_maps`).

    Args:
        selector: any `ListMaker`, such as those of `attention.selectors`.
        sampled: keys drawn for each block of 128 rows, 0 for none.
        means: whether means stand for blocks.
        seed: of the draws, 0 .. 2**63 - 1.  Give layers different seeds, so that their errors are independent.

    Raises:
        ArgumentError: no selector, or one that is a tail; neither a sample nor means, or a value out of range.

    Source: systematic sampling (Madow 1949; Horvitz & Thompson 1952); means as in arXiv 2608.19758.
    """

    selector: ListMaker
    sampled: int = 0
    means: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.selector, ListMaker):
            raise ArgumentError(f"selector must make lists, as those of attention.selectors; got {self.selector!r}")
        if isinstance(self.selector, ListTail):
            raise ArgumentError(f"selector must leave keys out, which {self.selector!r} makes up for")
        checks.whole("sampled", self.sampled, 0)
        if not isinstance(self.means, bool):
            raise ArgumentError(f"means must be True or False; got {self.means!r}")
        if not (self.sampled or self.means):
            raise ArgumentError("sampled must be at least 1 unless means is True; got 0 and False")
        checks.whole("seed", self.seed, 0, 2**63 - 1)

    @property
    def causal(self) -> bool:
        """Whether the selector is; the tail looks at no token."""
        return bool(getattr(self.selector, "causal", False))

    def tighter(self, n: int) -> Self | None:
        """See `ListMaker`: the selector's next, then four times the sample."""
        following = self.selector.tighter(n)
        if following is not None:
            return dataclasses.replace(self, selector=following)
        return dataclasses.replace(self, sampled=4 * self.sampled) if 0 < 4 * self.sampled < n else None

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """See `ListMaker`."""
        (heads, m, _), n = q.shape, k.shape[1]
        found = self.selector.lists(q, k, scale)
        tokens = _Tokens.of(found, n)
        edge = own_blocks(m, n, q.device).repeat(heads)[:, None]  # (lines, 1), whole blocks that are eligible
        here = tokens.by_block()
        taken, pooled = (
            torch.zeros_like(here, dtype=torch.bool) if offsets is None else _members(offsets, ids, here.shape[1])
            for offsets, ids in ((found.block_offsets, found.blocks), (found.mean_offsets, found.means))
        )
        J = torch.arange(key_blocks(n), device=q.device)
        free = (J < edge) & ~taken & ~pooled
        if self.means:
            pooled |= free & (here == 0)
            free &= here > 0
            offsets, ids = compressed(pooled.view(heads, row_blocks(m), -1), J)
            found = dataclasses.replace(found, mean_offsets=offsets, means=ids)
        if not self.sampled:
            return found
        left = torch.where(free, KEYS - here, 0)
        start = starts(self.seed, heads, row_blocks(m), q.device).flatten()
        return tokens.joined(*_drawn(left, tokens, self.sampled, start), found)


def starts(seed: int, heads: int, blocks: int, device: torch.device) -> torch.Tensor:
    """Where the draws of lines begin, as shares of them: (heads, blocks) float64 in [0, 1), of 53 random bits."""
    head, block = torch.arange(heads, device=device)[:, None], torch.arange(blocks, device=device)
    words = []
    for salt in (0, 1):
        first = mixed(mixed(torch.full((), (seed >> 32) + 1 & WORD, device=device)) ^ (seed & WORD) ^ salt)
        words.append(mixed(mixed(first ^ mixed(head + 0x9E3779B9 & WORD)) ^ mixed(block + 0x9E3779B9 & WORD)))
    return ((words[0] << 21) | (words[1] >> 11)).double() / 2.0**53


def mixed(x: torch.Tensor) -> torch.Tensor:
    """`hsr.lifted_numba.mixed` of 32-bit words in int64, whose products wrap and keep their low bits."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & WORD
    return x ^ (x >> 16)


@dataclass(frozen=True)
class _Tokens:
    """Single keys of lines, sorted in each; entries beyond the last offset lie behind all others."""

    offsets: torch.Tensor  # (lines + 1,) int64
    places: torch.Tensor  # (t,) int64, line n' + key, ascending, with n' = 128 C
    order: torch.Tensor  # (t,) int64, which entry of the lists each is
    line: torch.Tensor  # (t,) int64, of each entry of the lists, as they lie; ``lines`` beyond the last offset
    width: int  # C

    @classmethod
    def of(cls, lists: KeyLists, n: int) -> Self:
        line = _lines(lists.token_offsets, len(lists.tokens))
        key = torch.where(line < lists.lines, lists.tokens.long(), torch.arange(len(line), device=line.device))
        places, order = (line * (KEYS * key_blocks(n)) + key).sort()
        return cls(lists.token_offsets, places, order, line, key_blocks(n))

    @property
    def lines(self) -> int:
        return len(self.offsets) - 1

    def by_block(self) -> torch.Tensor:
        """How many lie in each block of each line: (lines, C) int64."""
        marks = KEYS * torch.arange(self.lines * self.width + 1, device=self.places.device)
        return torch.searchsorted(self.places, marks).diff().view(self.lines, self.width)

    def skipping(self, block: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """The rank-th key of a block (lines, b), from 0 on, that is not among these: (lines, b) int64 keys.

        Of sorted tokens ``x_0 < x_1 < ..`` in it, the ones before that key are those with ``x_i - i <= rank``, and the
        differences never fall: how many is found by bisection in them all.
        """
        first = (torch.arange(self.lines, device=block.device)[:, None] * self.width + block) * KEYS
        begin, end = torch.searchsorted(self.places, first), torch.searchsorted(self.places, first + KEYS)
        differences = self.places - torch.arange(len(self.places), device=block.device)
        before = torch.searchsorted(differences, first - begin + rank, right=True).clamp(begin, end) - begin
        return block * KEYS + rank + before

    def joined(self, drawn: torch.Tensor, counts: torch.Tensor, logs: torch.Tensor, lists: KeyLists) -> KeyLists:
        """The lists with the first counts (lines,) of drawn (lines, b) behind their tokens, of log weights (lines,)."""
        b, size = drawn.shape[1], len(lists.tokens) + drawn.numel()
        more = torch.nn.functional.pad(counts.cumsum(0), (1, 0))  # (lines + 1,)
        offsets = self.offsets + more
        old = torch.arange(len(lists.tokens), device=drawn.device) + more[self.line.clamp(max=self.lines - 1)]
        i = torch.arange(b, device=drawn.device)
        new = (offsets[1:] - counts)[:, None] + i
        nowhere = torch.full((), size, device=drawn.device)
        into = torch.cat(
            [old.where(self.line < self.lines, nowhere), new.where(i < counts[:, None], nowhere).flatten()]
        )
        given = torch.zeros_like(lists.tokens, dtype=torch.float32) if lists.log_weights is None else lists.log_weights
        weights = torch.cat([given[: len(lists.tokens)], logs.float()[:, None].expand(-1, b).flatten()])
        keys = torch.cat([lists.tokens, drawn.flatten().to(torch.int32)])
        tokens, log_weights = (x.new_zeros(size + 1).scatter_(0, into, x) for x in (keys, weights))
        return dataclasses.replace(lists, token_offsets=offsets, tokens=tokens, log_weights=log_weights)


def _drawn(
    left: torch.Tensor, tokens: _Tokens, b: int, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Remaining keys of each block (lines, C), start (lines,) -> keys (lines, b), how many count, their log weights.

    With s uniform in 0 .. r - 1, key j of the r remaining is drawn where one of the numbers ``s + i r``, i < b, lies in
    ``j b .. j b + b - 1``.  These numbers run through 0 .. b r - 1 as s and i do, and never two of them of one s lie in
    one such range while r >= b: b of the r starts draw the key, so that its chance is ``b / r``.
    """
    upto = left.cumsum(1)
    rest = upto[:, -1:]  # r, (lines, 1)
    first = (start[:, None] * rest).long().clamp(max=(rest - 1).clamp(min=0))
    i = torch.arange(b, device=left.device)
    rank = torch.where(rest > b, (first + i * rest) // b, i).clamp(max=(rest - 1).clamp(min=0))
    block = torch.searchsorted(upto, rank, right=True).clamp(max=left.shape[1] - 1)
    keys = tokens.skipping(block, rank - (upto - left).gather(1, block))
    counts = rest[:, 0].clamp(max=b)
    return keys, counts, (rest[:, 0].clamp(min=1).double() / counts.clamp(min=1)).log()


def _lines(offsets: torch.Tensor, entries: int) -> torch.Tensor:
    """The line of every entry, as many as there are lines where it lies beyond the last offset: (entries,) int64."""
    return torch.searchsorted(offsets, torch.arange(entries, device=offsets.device), right=True) - 1


def _members(offsets: torch.Tensor, ids: torch.Tensor, width: int) -> torch.Tensor:
    """Whether a block is on a line: (lines, C) bool."""
    line, size = _lines(offsets, len(ids)), (len(offsets) - 1) * width
    place = torch.where(line < len(offsets) - 1, line * width + ids, size)
    return torch.zeros(size + 1, dtype=torch.bool, device=ids.device).scatter_(0, place, True)[:size].view(-1, width)
