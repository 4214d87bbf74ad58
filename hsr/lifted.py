"""Lifted half-space reporting: a random sample of the keys, drawn in proportion to their estimated weight.

One dimension up, key j is ``(k_j, lift_j, -ln u_j)`` with u_j uniform in (0, 1) and the query ``(q, 1, 1)``: the lifted
half-space ``scale <q, k_j> + lift_j - ln u_j >= T`` reports key j with probability
``pi_j = min(1, exp(scale <q, k_j> + lift_j - T))``.  Weights ``exp(scale <q, k_j>) / pi_j`` then make sums over the
report unbiased, whatever stands for the score in pi_j: here an estimate from `hsr.coder`.  The G query heads of a
key-value head share u and the list: ``pi_j`` is the largest of theirs.

Two ways to draw.  *Independent*: u_j is a hash of (seed, head, step, j).  *Systematic*: one hash per block of 64 keys,
and a key is drawn where the running sum of pi passes it; every key keeps its pi_j, counts in a block vary by less than
one, and because near keys have like values, errors are some 10 % smaller.

Source: threshold (Poisson) sampling, Duffield, Lund & Thorup 2007; systematic sampling, Madow 1949.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import get_num_threads

from hsr import lifted_numba
from hsr.coded_scan import KEYS
from hsr.coder import Coder, fit
from hsr.lifted_numba import CHUNK

DRIFT = 0.1  # nats^2 by which the squared error of new scores may exceed the fit's; variances grow by its exponential
WINDOW = 8  # blocks whose mean error is compared
GROWTH = 1.25  # times the keys of the last fit before another fit
ENOUGH = 0.995  # share of a budget at which the threshold is settled
ROUNDS = 40


class Draw(NamedTuple):
    """The reported keys: per row and chunk, counts[...] entries of ids and pis from CHUNK * chunk on."""

    ids: np.ndarray  # (g, rows, n) int32
    pis: np.ndarray  # (g, rows, n) float32, in (0, 1]
    counts: np.ndarray  # (g, rows, chunks) int64
    excess: np.ndarray  # (g, rows) by how much the variance of their number is below that of independent draws


class Lifted:
    """Codes of g heads' keys, a block of 64 at a time, and samples drawn from them.

    Args:
        keys: (g, n, d) float32 or float64.
        lift: (g, n), added to a key's scaled score in nats: the logarithm of how much a unit of weight on it matters.
        scale: of the scores, positive.
        bytes_per_key: size of a code, a positive multiple of 4.
        queries: (g, m, d) like those to come; None where none are known.
    """

    def __init__(
        self, keys: np.ndarray, lift: np.ndarray, scale: float, bytes_per_key: int, queries: np.ndarray | None = None
    ) -> None:
        self._scale, self._bytes = scale, bytes_per_key
        self._queries = None if queries is None else _with_one(queries)
        self._coder: Coder | None = None
        self._codes = np.empty((len(keys), 0, bytes_per_key // 4, KEYS, 4), np.uint8)
        self._blocks = self._fitted = 0
        self._usual = np.zeros(len(keys))  # squared error of a score, in nats^2, that the coder is expected to have
        self._scratch = _Scratch()
        self.follow(keys, lift)

    @property
    def n(self) -> int:
        """Number of coded keys, a multiple of 64."""
        return self._blocks * KEYS

    @property
    def coder(self) -> Coder:
        """The coder in use."""
        assert self._coder is not None
        return self._coder

    def score_error(self) -> np.ndarray:
        """Root mean squared error (g,) of an estimated score in nats, over keys, for queries like the fit's."""
        return np.sqrt(self._usual)

    def follow(self, keys: np.ndarray, lift: np.ndarray) -> None:
        """Code what has been appended to keys (g, n, d) and lift (g, n), whole blocks only; fit anew after drift."""
        blocks = keys.shape[1] // KEYS
        if blocks == self._blocks:
            return
        if self._coder is None:
            self._fit(keys, lift)
        new = slice(self._blocks * KEYS, blocks * KEYS)
        codes, error = self.coder.encode(self._lifted(keys, lift, new))
        recent = self._scale**2 * error[:, -WINDOW * KEYS :].mean(axis=1)
        if (recent > self._usual + DRIFT).any() and blocks >= GROWTH * self._fitted:
            self._fit(keys, lift)
            codes, error = self.coder.encode(self._lifted(keys, lift, slice(0, blocks * KEYS)))
            recent = self._scale**2 * error[:, -WINDOW * KEYS :].mean(axis=1)
            self._usual = np.maximum(self._usual, recent)  # a stretch that no fit suits must not cause another
            self._blocks = 0
        self._keep(codes)

    def draw(
        self,
        queries: np.ndarray,
        spans: np.ndarray,
        known: np.ndarray,
        *,
        eps: float | None,
        budget: float | None,
        generators: np.ndarray,
        systematic: bool,
    ) -> Draw:
        """Draw a sample for every row.  The arrays returned are overwritten by the next draw.

        Args:
            queries: (g, rows, G, d) float64.
            spans: (g, rows, 2) int64, first and last + 1 of the keys up for sampling, within the coded ones.
            known: (g, rows, G) float64, the log-sum-exp of the lifted scores of keys that are attended to anyway.
            eps: ``exp(T)`` is eps^2 times the (estimated) sum of all lifted weights; at most about 1 / eps^2 keys a
                head are expected.
            budget: or else T is such that a head reports so many keys on average.
            generators: (g, rows) uint32, from `hsr.lifted_numba.generators`.
            systematic: how to draw.
        """
        g, rows, heads, _ = queries.shape
        chunks = -(-self.n // CHUNK)
        padded = np.zeros((g, rows, -(-heads // 4) * 4, queries.shape[3] + 1))
        padded[:, :, :heads] = _with_one(queries)
        coded = self.coder.prepare(padded.reshape(g, -1, padded.shape[3]))
        slope, base = (self._scale * part.reshape(g, rows, -1)[..., :heads] for part in (coded.sigma, coded.base))
        estimates, ids, pis = self._scratch.of(g, rows, heads, self.n)
        tops, totals = np.empty((2, g, rows, chunks, heads))
        words = np.array(self.coder.layout.words)
        codes = self._codes
        lifted_numba.estimate(codes, words, coded.tiles, slope, spans, get_num_threads(), estimates, tops, totals)
        with np.errstate(divide="ignore"):
            lse = np.logaddexp.reduce(tops + np.log(totals), axis=2) if chunks else np.full((g, rows, heads), -np.inf)
        if eps is not None:
            thresholds = np.logaddexp(lse + base, known) - base + 2 * np.log(eps)
        else:
            thresholds = self._spend(estimates, spans, lse, float(budget or 0), chunks)
        counts, excess = np.empty((g, rows, chunks), np.int64), np.empty((g, rows, chunks))
        lifted_numba.draw(
            estimates, thresholds, spans, generators, systematic, get_num_threads(), ids, pis, counts, excess
        )
        return Draw(ids, pis, counts, excess.sum(axis=2))

    def _spend(
        self, estimates: np.ndarray, spans: np.ndarray, lse: np.ndarray, budget: float, chunks: int
    ) -> np.ndarray:
        """Thresholds (g, rows, G) that report ``budget`` keys on average, from above: each round's step undershoots."""
        with np.errstate(divide="ignore"):
            thresholds = lse - np.log(budget)
        certain, sampled = np.empty((2, *lse.shape[:2], chunks, lse.shape[2]))
        for _ in range(ROUNDS):
            lifted_numba.expected(estimates, thresholds, spans, get_num_threads(), certain, sampled)
            sure, chance = certain.sum(axis=2), sampled.sum(axis=2)
            if (sure + chance >= ENOUGH * budget).all():
                break
            with np.errstate(divide="ignore", invalid="ignore"):
                step = np.where(sure + chance < ENOUGH * budget, np.log(np.maximum(budget - sure, 0) / chance), 0.0)
            thresholds = np.maximum(thresholds - np.where(np.isnan(step), np.inf, step), LOWEST)
        return thresholds

    def _fit(self, keys: np.ndarray, lift: np.ndarray) -> None:
        blocks = keys.shape[1] // KEYS
        self._coder = fit(self._lifted(keys, lift, slice(0, blocks * KEYS)), self._bytes, self._queries)
        self._usual, self._fitted = self._scale**2 * self._coder.error, blocks

    def _lifted(self, keys: np.ndarray, lift: np.ndarray, span: slice) -> np.ndarray:
        """Keys of the span with ``lift / scale`` as one more coordinate: (g, t, d + 1)."""
        return np.concatenate([keys[:, span], lift[:, span, None] / self._scale], axis=2)

    def _keep(self, codes: np.ndarray) -> None:
        """Append codes (g, blocks, words, 64, 4)."""
        total = self._blocks + codes.shape[1]
        if total > self._codes.shape[1]:
            grown = np.empty((len(codes), max(total, 2 * self._blocks), *codes.shape[2:]), np.uint8)
            grown[:, : self._blocks] = self._codes[:, : self._blocks]
            self._codes = grown
        self._codes[:, self._blocks : total] = codes
        self._blocks = total


LOWEST = -1e29  # below every estimate


class _Scratch:
    """Buffers that live from draw to draw, so that a steady state allocates nothing large."""

    def __init__(self) -> None:
        self._estimates, self._ids, self._pis = np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.float32)

    def of(self, g: int, rows: int, heads: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Estimates (g, rows, G, n), ids (g, rows, n), pis (g, rows, n), contents arbitrary."""
        size = g * rows * n
        if size * heads > len(self._estimates):
            self._estimates = np.empty(5 * size * heads // 4, np.float32)
        if size > len(self._ids):
            self._ids, self._pis = np.empty(5 * size // 4, np.int32), np.empty(5 * size // 4, np.float32)
        return (
            self._estimates[: size * heads].reshape(g, rows, heads, n),
            self._ids[:size].reshape(g, rows, n),
            self._pis[:size].reshape(g, rows, n),
        )


def _with_one(queries: np.ndarray) -> np.ndarray:
    """Queries (..., d) -> (..., d + 1): a one for the lift."""
    return np.concatenate([queries, np.ones((*queries.shape[:-1], 1), queries.dtype)], axis=-1)
