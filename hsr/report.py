"""What a query returns: compressed sparse rows of reported keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from hsr.errors import ArgumentError


class Hits(NamedTuple):
    """What one static structure reports for ``m`` queries; indices count from the structure's first key."""

    offsets: np.ndarray  # (m + 1,) int64
    indices: np.ndarray  # (nnz,) int32, or empty where only counts were asked for
    scores: np.ndarray  # (nnz,) float64, or empty
    scanned: np.ndarray  # (m,) int64, keys read at full precision to decide about them
    visited: np.ndarray  # (m,) int64, bounds evaluated: a tree's nodes and key codes, a sketch's key codes


@dataclass(frozen=True)
class Report:
    """The keys in each query's closed half-space ``<q, k> >= b``, in CSR form.

    Arrays are numpy's, or torch tensors on the GPU that holds the index's keys; `cpu` copies a report to the host.  Row
    ``i`` is query ``i`` of the flattened leading axes: ``i`` for queries ``(m, d)``, ``head * m + i`` for queries
    ``(h, m, d)``.  The order of keys inside a row is unspecified; the same call gives the same order.

    Attributes:
        offsets: (rows + 1,) int64; row i is ``indices[offsets[i]:offsets[i + 1]]``.
        indices: (nnz,) int32, or int64 where n does not fit; key positions in ``0..n-1``.
        scores: (nnz,) float64; ``<q, k>`` accumulated in float64, unscaled.
        shape: leading shape of the queries, ``(m,)`` or ``(h, m)``.
        n: number of keys a row could hold.
        scanned: (rows,) int64; keys read at full precision to decide about them.
        visited: (rows,) int64; bounds evaluated: a tree's nodes and key codes, a sketch's key codes.
        method: name of the index structure that answered.
    """

    offsets: Any
    indices: Any
    scores: Any
    shape: tuple[int, ...]
    n: int
    scanned: Any
    visited: Any
    method: str

    @property
    def counts(self) -> Any:
        """Reported keys per query, int64, in the queries' leading shape."""
        return (self.offsets[1:] - self.offsets[:-1]).reshape(self.shape)

    def row(self, *position: int) -> tuple[Any, Any]:
        """Indices and scores of one query, as views: ``row(i)`` or ``row(head, i)``."""
        i = int(np.ravel_multi_index(position, self.shape))
        part = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.indices[part], self.scores[part]

    def cpu(self) -> Report:
        """The report with numpy arrays: itself, or a copy of one on a GPU."""
        if isinstance(self.offsets, np.ndarray):
            return self
        arrays = {name: value.cpu().numpy() for name, value in vars(self).items() if hasattr(value, "cpu")}
        return dataclasses.replace(self, **arrays)

    def to_scipy(self) -> csr_array:
        """A ``scipy.sparse.csr_array`` of shape (rows, n) holding the scores; zero scores stay explicit.

        Raises:
            ArgumentError: the report lies on a GPU.
        """
        if not isinstance(self.offsets, np.ndarray):
            raise ArgumentError(f"report must be on the host, as report.cpu() is; got one on {self.offsets.device}")
        rows = len(self.offsets) - 1
        return csr_array((self.scores, self.indices, self.offsets), shape=(rows, self.n), copy=True)
