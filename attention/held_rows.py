"""Rows that grow at their end, in memory that doubles: the cache of a session, what a selector knows of the keys."""

from __future__ import annotations

import torch


class HeldRows:
    """A copy of rows (G, n, ...) of any dtype, to which more may be added.

    Attributes:
        rows: (G, n, ...), a view; it stays valid, but does not grow, when rows are added.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        with torch.inference_mode(False):  # tensors made within could not be written to outside
            self._held = rows.clone(memory_format=torch.contiguous_format)
            self.rows = self._held[:]

    def put(self, first: int, rows: torch.Tensor) -> None:
        """Write rows (G, t, ...) from the place ``first`` on, which is at most n: n becomes ``first + t``."""
        last = first + rows.shape[1]
        assert first <= self.rows.shape[1]
        if last > self._held.shape[1]:
            room = max(last, 2 * self._held.shape[1])
            with torch.inference_mode(False):
                more = self._held.new_empty(len(rows), room, *rows.shape[2:])
            more[:, :first] = self._held[:, :first]
            self._held = more
        self._held[:, first:last] = rows
        self.rows = self._held[:, :last]

    def keep(self, count: int) -> None:
        """Forget all but the first rows: n becomes ``count``, at most n."""
        assert count <= self.rows.shape[1]
        self.rows = self._held[:, :count]

    def select(self, which: torch.Tensor) -> None:
        """Go on with some of the G, in the order of which (G',) int64, in other memory."""
        with torch.inference_mode(False):
            self._held = self._held.index_select(0, which)
        self.rows = self._held[:, : self.rows.shape[1]]
