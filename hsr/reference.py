"""What every operation of the index means: plain numpy in float64, no options.

A half-space is closed: key j is reported for query i iff ``<q_i, k_j> >= b_i``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsr.report import Hits
from hsr.scaling import exponent


def products(queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """queries (m, d), keys (n, d) -> s (m, n) float64, e (m, n) int64 with ``<q_i, k_j> = s_ij * 2**e_ij``.

    Each row is first divided by a power of two, so that no finite input overflows.
    """
    q_exponent, k_exponent = exponent(queries, axis=1)[:, None], exponent(keys, axis=1)[:, None]
    unit_queries = np.ldexp(queries.astype(np.float64), -q_exponent)
    unit_keys = np.ldexp(keys.astype(np.float64), -k_exponent)
    return np.einsum("md,Nd->mN", unit_queries, unit_keys), q_exponent + k_exponent.T


def report(queries: np.ndarray, keys: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """queries (m, d), keys (n, d), thresholds (m,) -> offsets (m+1,) int64, indices (nnz,) int32, scores (nnz,).

    Row i holds every j with ``<q_i, k_j> >= b_i``, ascending.  A score beyond float64 reads as infinity, and is still
    compared correctly.
    """
    s, e = products(queries, keys)
    with np.errstate(over="ignore"):  # a threshold beyond float64 is beyond every score
        inside = s >= np.ldexp(thresholds[:, None], -e)
    offsets = np.concatenate(([0], np.cumsum(inside.sum(axis=1)))).astype(np.int64)
    rows, indices = np.nonzero(inside)
    with np.errstate(over="ignore"):
        scores = np.ldexp(s[rows, indices], e[rows, indices])
    return offsets, indices.astype(np.int32), scores


def topk(queries: np.ndarray, keys: np.ndarray, r: int) -> np.ndarray:
    """queries (m, d), keys (n, d) -> indices (m, r) of the r largest ``<q, k>``, descending; ties: lower index."""
    s, e = products(queries, keys)
    with np.errstate(over="ignore"):
        return np.argsort(-np.ldexp(s, e), axis=1, kind="stable")[:, :r]


@dataclass(frozen=True)
class Reference:
    """The method ``reference``: no structure at all."""

    def report(
        self, keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray, limits: np.ndarray, collect: bool
    ) -> Hits:
        """See `hsr.structure.Structure`."""
        pieces = [
            report(q[None], keys[:limit], b[None]) for q, b, limit in zip(queries, thresholds, limits, strict=True)
        ]
        offsets = np.concatenate(([0], np.cumsum([piece[0][1] for piece in pieces]))).astype(np.int64)
        kept = pieces if collect else []
        return Hits(
            offsets,
            np.concatenate([piece[1] for piece in kept] or [np.empty(0, np.int32)]),
            np.concatenate([piece[2] for piece in kept] or [np.empty(0)]),
            limits.copy(),
            np.zeros(len(queries), np.int64),
        )


def build(keys: np.ndarray) -> Reference:
    """See `hsr.structure.Build`."""
    return Reference()
