"""Where the keys and values of a cache lie: in memory of its own, in given buffers, or in pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hsr import checks
from hsr.coded_scan import KEYS as BLOCK
from hsr.errors import ArgumentError


class Tokens:
    """Keys and values of B sequences and g heads, and room for more.

    Attributes:
        keys, values: (B, g, room, d) by strides, or pools (pages, page, g, d); rows contiguous.
        pages: (B, most) int32, the pool's pages of every sequence in order; None where there are no pages.
        page: tokens of a page, 0 where there are none.
        room: tokens that a sequence can hold, a multiple of 64.
        batch, groups, width: B, g, d.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, room: Any) -> None:
        """Copy k, v (B, g, n, d) into memory of its own, a token's key beside its value, with room for ``room``."""
        self.batch, self.groups, n, self.width = k.shape
        self.room = -(-checks.whole("room", n + n // 4 if room is None else room, n) // BLOCK) * BLOCK
        self._hold(k.new_zeros(self.batch, self.groups, self.room, 2, self.width))
        self.keys[:, :, :n], self.values[:, :, :n] = k, v
        self.pages: torch.Tensor | None = None
        self.page = 0

    def _hold(self, own: torch.Tensor) -> None:
        """Memory of its own (B, g, room, 2, d)."""
        self._own: torch.Tensor | None = own
        self.keys, self.values = own[..., 0, :], own[..., 1, :]

    @classmethod
    def adopted(cls, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor | None = None) -> Tokens:
        """Use buffers k, v (B, g, room, d), or pools (pages, page, g, d) with their table, in place.

        Raises:
            ArgumentError: a page size that is no power of two up to 64, rows that are not contiguous, or a table that
                is not (B, most) int32 on the pools' device.
        """
        tokens = cls.__new__(cls)
        tokens._own, tokens.keys, tokens.values, tokens.pages, tokens.page = None, k, v, pages, 0
        for name, part in (("k", k), ("v", v)):
            if not aligned(part):
                raise ArgumentError(f"{name} must have contiguous rows, 16 bytes aligned; got strides {part.stride()}")
        if pages is None:
            tokens.batch, tokens.groups, room, tokens.width = k.shape
        else:
            _, tokens.page, tokens.groups, tokens.width = k.shape
            if tokens.page not in (1, 2, 4, 8, 16, 32, 64):
                raise ArgumentError(f"k must have pages of 1, 2, 4, .. 64 tokens; got {tokens.page}")
            if pages.ndim != 2 or pages.dtype != torch.int32 or pages.device != k.device or not pages.is_contiguous():
                raise ArgumentError(
                    f"pages must be (B, most), contiguous int32 on {k.device}; got {tuple(pages.shape)} of "
                    f"{pages.dtype} on {pages.device}"
                )
            tokens.batch, most = pages.shape
            room = most * tokens.page
        tokens.room = room // BLOCK * BLOCK
        if not tokens.room:
            raise ArgumentError(f"k must have room for {BLOCK} tokens where it is used in place; got {room}")
        return tokens

    @property
    def strides(self) -> tuple[int, ...]:
        """Of sequences, heads, tokens and pages, of keys and then of values, in elements."""
        return (*self._strides(self.keys), *self._strides(self.values))

    def _strides(self, part: torch.Tensor) -> tuple[int, ...]:
        if self.pages is None:
            return (*part.stride()[:3], 0)
        return 0, part.stride(2), part.stride(1), part.stride(0)

    @property
    def most(self) -> int:
        """Pages in a sequence's row of the table."""
        return 0 if self.pages is None else self.pages.shape[1]

    def rows(self, part: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the keys or of the values: ids (B, g, t) int64 -> (B, g, t, d)."""
        if self.pages is None:
            return part.gather(2, ids[..., None].expand(*ids.shape, self.width))
        which = self.pages.long().gather(1, (ids // self.page).flatten(1)).view_as(ids)
        heads = torch.arange(self.groups, device=ids.device)[:, None]
        return part[which, ids % self.page, heads]

    def reserve(self, room: int) -> None:
        """Make room for so many tokens; ArgumentError where the memory is not its own."""
        if self._own is None:
            raise ArgumentError(f"room of a cache that is used in place cannot grow from {self.room}; got {room}")
        more = self._own.new_zeros(self.batch, self.groups, room, 2, self.width)
        more[:, :, : self.room] = self._own
        self.room = room
        self._hold(more)

    def clone(self) -> Tokens:
        """The same in other memory, for measurements that must not find it in a cache."""
        tokens = Tokens.__new__(Tokens)
        vars(tokens).update(vars(self))
        assert self._own is not None, "only what is its own is cloned"
        tokens._hold(self._own.clone())
        return tokens


def aligned(part: torch.Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time."""
    return part.stride(-1) == 1 and not any(step % 8 for step in part.stride()[:-1]) and part.data_ptr() % 16 == 0


def readable(part: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy whose rows can be read so."""
    return part if aligned(part) else part.clone(memory_format=torch.contiguous_format)


def sizes(lengths: Any, tokens: Tokens, given: int | None) -> np.ndarray:
    """(B,) int64: tokens of each sequence, ``given`` where nothing else is said."""
    if lengths is None and given is None:
        raise ArgumentError("lengths must be given where k and v are used in place; got None")
    return checks.lengths("lengths", lengths, (tokens.batch,), tokens.room if given is None else given, least=1)
