"""What every operation of the index means: plain numpy in float64, no options.

A half-space is closed: key j is reported for query i iff ``<q_i, k_j> >= b_i``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsr.coded_scan import WIDTHS
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


def unpacked(codes: np.ndarray, words: tuple[int, ...]) -> np.ndarray:
    """Codes (g, blocks, words, 64, 4) uint8, how many words are of each width -> (g, 64 blocks, axes) uint8."""
    widths = np.repeat(WIDTHS, words)
    planes = [
        (codes[:, :, word] >> np.uint8(width * plane)) & np.uint8(2**width - 1)
        for word, width in enumerate(widths)
        for plane in range(8 // width)
    ]
    return np.concatenate(planes, axis=3).reshape(len(codes), codes.shape[1] * codes.shape[3], -1)


def estimate(codes: np.ndarray, words: tuple[int, ...], tiles: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Codes as above, tiles (g, rows * tiles a row, 4, planes, 4) int8, slope (g, rows, G) -> (g, rows, G, n) float64.

    What `hsr.coder` estimates a score to be, less its base: the slope times the sum of products with the codes.
    """
    g, rows, heads = slope.shape
    queries = tiles.reshape(g, rows, -1, tiles.shape[3] * tiles.shape[4])[:, :, :heads]
    sums = np.einsum("grha,gna->grhn", queries.astype(np.float64), unpacked(codes, words).astype(np.float64))
    return slope[..., None] * sums


def chances(estimates: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Estimates (G, n), thresholds (G,) -> pi (n,), the largest over heads of ``min(1, exp(estimate - threshold))``.

    Chances are rounded up to multiples of 2**-24, so that 24 random bits draw keys exactly that often.
    """
    return np.ceil(np.exp(np.minimum(estimates - thresholds[:, None], 0.0)).max(axis=0) * 2**24) / 2**24


def numbers(key: int, counters: np.ndarray) -> np.ndarray:
    """The numbers in [0, 1) of a uint32 generator key and counters (n,): 24 bits of MurmurHash3's finaliser."""
    x = (counters.astype(np.uint64) * np.uint64(0x9E3779B1)).astype(np.uint32) ^ np.uint32(key)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return ((x ^ (x >> np.uint32(16))) >> np.uint32(8)).astype(np.float64) / 2**24


def draw(pis: np.ndarray, key: int, systematic: bool) -> np.ndarray:
    """pi (n,) -> the keys drawn, ascending: with a number each, or with one for every 64."""
    if not systematic:
        return np.flatnonzero(numbers(key, np.arange(len(pis))) < pis)
    blocks = [pis[first : first + 64] for first in range(0, len(pis), 64)]
    passed = [
        np.floor(np.cumsum(block) + offset)
        for block, offset in zip(blocks, numbers(key, np.arange(len(blocks))), strict=True)
    ]
    return np.flatnonzero(np.concatenate([np.diff(sums, prepend=0.0) for sums in passed]))


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
