"""Lifted half-space reporting: a random sample of the keys, drawn in proportion to their estimated weight.

One dimension up, key j is ``(k_j, lift_j, -ln u_j)`` with u_j uniform in (0, 1) and the query ``(q, 1, 1)``: the lifted
half-space ``scale <q, k_j> + lift_j - ln u_j >= T`` reports key j with probability
``pi_j = min(1, exp(scale <q, k_j> + lift_j - T))``, here rounded up to a multiple of 2^-24.  Weights
``exp(scale <q, k_j>) / pi_j`` then make sums over the report unbiased, whatever stands for the score in pi_j: here an
estimate from `hsr.coder`.  The G query heads of a key-value head share u and the list: ``pi_j`` is the largest of
theirs.

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
from hsr.coded_scan import BYTES, KEYS, QUERIES
from hsr.coder import Coder, fit
from hsr.growth import with_room
from hsr.lifted_numba import CHUNK

DRIFT = 0.1  # nats^2 by which the squared error of new scores may exceed the fit's; variances grow by its exponential
NOISE = 1.25  # times that, which the error of a window may be by chance
WINDOW = 8  # blocks whose mean error is compared
GROWTH = 1.25  # times the keys of the last fit before another fit
SLACK = 0.005  # share of a budget by which it may be missed
ROUNDS, PATIENCE = 60, 8  # of the search for the threshold that spends it; rounds before its steps are lengthened
LARGEST = 1e20  # of a scaled score, in nats: its estimates stay far from the ends of float32
LOWEST = -1e29  # below every estimate
FAR = 2.0**40  # coordinates of keys appended later, on the fit's scale: their squares are finite in float32
BALANCE = 2.0**20  # bound on the unit of the lift


class Draw(NamedTuple):
    """The reported keys: per row and chunk, counts[...] entries of ids and pis from CHUNK * chunk on."""

    ids: np.ndarray  # (g, rows, n) int32
    pis: np.ndarray  # (g, rows, n) float32, in (0, 1]
    counts: np.ndarray  # (g, rows, chunks) int64
    variance: np.ndarray  # (g, rows, 2) of their number: what it would be for independent draws, and what it is
    thresholds: np.ndarray  # (g, rows, G), T in nats


class Lifted:
    """Codes of g heads' keys, a block of 64 at a time, and samples drawn from them.

    What is coded is ``(k_j / 2^e, lift_j / u)`` for queries ``(scale 2^e q, u)``, whose products are scaled and lifted
    scores in nats: e makes the fit's keys about 1, however large they are, and u gives both parts about one size.

    Args:
        keys: (g, n, d) float32 or float64.
        lift: (g, n), added to a key's scaled score in nats: the logarithm of how much a unit of weight on it matters.
        scale: of the scores, positive; no ``scale sum_i |q_i k_i|`` may exceed LARGEST.
        bytes_per_key: size of a code, a positive multiple of 4; no more is used than 8 bits an axis take.
        queries: (g, m, d) float64, like those to come.
    """

    def __init__(
        self, keys: np.ndarray, lift: np.ndarray, scale: float, bytes_per_key: int, queries: np.ndarray
    ) -> None:
        g, _, d = keys.shape
        self._scale, self._words, self._queries = scale, min(bytes_per_key // 4, -(-(d + 1) // 4)), queries
        self._exponents, self._units = np.zeros(g, np.int64), np.ones(g)
        self._coder: Coder | None = None
        self._codes = np.empty((g, 0, self._words, KEYS, 4), np.uint8)
        self._blocks = self._fitted = 0
        self._usual = np.zeros(g)  # squared error of a score, in nats^2, that the coder is expected to have
        self._recent = np.empty((g, 0))  # the last blocks' squared errors
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
        codes = self._encoded(keys, lift, self._blocks, blocks)
        drifted = self._recent.mean(axis=1) > NOISE * self._usual + DRIFT
        if drifted.any() and blocks >= GROWTH * self._fitted:
            self._fit(keys, lift)
            codes = self._encoded(keys, lift, 0, blocks)
            self._usual = np.maximum(self._usual, self._recent.max(axis=1))  # what no fit suits must not cause another
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
        estimates, ids, pis = self._scratch.of(g, rows, heads, self.n)
        counts, variances = np.zeros((g, rows, chunks), np.int64), np.zeros((g, rows, chunks, 2))
        if not chunks:
            return Draw(ids, pis, counts, variances.sum(axis=2), known)
        lse, base, unit = self._estimate(queries, spans, estimates)
        if eps is not None:
            thresholds = np.logaddexp(lse, known - base) + 2 * np.log(eps)
        else:
            thresholds = _spend(estimates, unit, spans, lse, float(budget or 0))
        lifted_numba.draw(
            estimates, unit, thresholds, spans, generators, systematic, get_num_threads(), ids, pis, counts, variances
        )
        return Draw(ids, pis, counts, variances.sum(axis=2), thresholds + base)

    def _estimate(
        self, queries: np.ndarray, spans: np.ndarray, estimates: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fill estimates (g, rows, G, n) of lifted scores less base; their log-sum-exp, base and unit (g, rows, G)."""
        g, rows, heads, n = estimates.shape
        asked = np.zeros((g, rows, -(-heads // QUERIES) * QUERIES, queries.shape[3] + 1))  # whole tiles
        asked[:, :, :heads] = self._asked(queries)
        coded = self.coder.prepare(asked.reshape(g, -1, asked.shape[3]))
        slope, base = (part.reshape(asked.shape[:3])[..., :heads] for part in (coded.sigma, coded.base))
        tops, totals = np.empty((2, g, rows, -(-n // CHUNK), heads))
        words, shift = np.array(self.coder.layout.words), self.coder.layout.shift
        lifted_numba.estimate(
            self._codes, words, coded.tiles, slope, shift, spans, get_num_threads(), estimates, tops, totals
        )
        with np.errstate(divide="ignore"):
            return np.logaddexp.reduce(tops + np.log(totals), axis=2), base, slope * 2.0**shift

    def _fit(self, keys: np.ndarray, lift: np.ndarray) -> None:
        coded = slice(0, keys.shape[1] // KEYS * KEYS)
        room = np.finfo(keys.dtype).maxexp - 8  # powers of two that the keys can be multiplied by
        largest = np.maximum(keys[:, coded].max(axis=(1, 2)), -keys[:, coded].min(axis=(1, 2)))
        self._exponents = np.clip(np.frexp(largest)[1].astype(np.int64) - 1, -room, room)
        self._units = np.clip(np.ldexp(self._scale, self._exponents), 1 / BALANCE, BALANCE)
        queries = self._asked(self._queries[:, None])[:, 0]
        self._coder = fit(self._lifted(keys, lift, coded), BYTES * self._words, queries)
        self._usual, self._fitted = self._coder.error, coded.stop // KEYS

    def _encoded(self, keys: np.ndarray, lift: np.ndarray, first: int, last: int) -> np.ndarray:
        """The codes of blocks first .. last - 1; their errors are taken down."""
        if self._coder is None:
            self._fit(keys, lift)
        codes, error = self.coder.encode(self._lifted(keys, lift, slice(first * KEYS, last * KEYS)))
        errors = error.reshape(len(keys), -1, KEYS).mean(axis=2)
        self._recent = np.concatenate([self._recent, errors], axis=1)[:, -WINDOW:]
        return codes

    def _lifted(self, keys: np.ndarray, lift: np.ndarray, span: slice) -> np.ndarray:
        """What is coded of the keys in the span: (g, t, d + 1) in their dtype, at most FAR in magnitude."""
        g, _, d = keys.shape
        part = keys[:, span]
        coded = np.empty((g, part.shape[1], d + 1), keys.dtype)
        shrink = np.ldexp(np.ones((), keys.dtype), -self._exponents[:, None, None])
        with np.errstate(over="ignore"):
            np.multiply(part, shrink, out=coded[..., :d])
        coded[..., d] = lift[:, span] / self._units[:, None]
        return np.clip(coded, -FAR, FAR, out=coded)

    def _asked(self, queries: np.ndarray) -> np.ndarray:
        """Queries (g, rows, G, d) -> (g, rows, G, d + 1), whose products with what is coded are lifted scores."""
        shape = (-1, 1, 1, 1)
        asked = np.empty((*queries.shape[:-1], queries.shape[-1] + 1))
        unbounded = np.ldexp(queries, self._exponents.reshape(shape)) * self._scale  # only where all keys are zero
        asked[..., :-1] = np.clip(unbounded, -LARGEST, LARGEST)
        asked[..., -1:] = self._units.reshape(shape)
        return asked

    def _keep(self, codes: np.ndarray) -> None:
        """Append codes (g, blocks, words, 64, 4)."""
        total = self._blocks + codes.shape[1]
        self._codes = with_room(self._codes, self._blocks, total)
        self._codes[:, self._blocks : total] = codes
        self._blocks = total


def _spend(estimates: np.ndarray, unit: np.ndarray, spans: np.ndarray, lse: np.ndarray, budget: float) -> np.ndarray:
    """Thresholds (g, rows, G) that report ``budget`` keys on average.

    estimates (g, rows, G, n), their unit and log-sum-exp (g, rows, G).  A row with no more keys than that reports all.
    Steps that would be exact if no further key became certain come from above and never overshoot; where many do become
    certain, steps are lengthened until they overshoot, and the rest is bisection.
    """
    g, rows, heads, n = estimates.shape
    keys = (spans[..., 1] - spans[..., 0])[..., None]
    high = np.where(keys <= budget, LOWEST, lse - np.log(budget))
    low, thresholds = np.full_like(high, -np.inf), high
    certain, sampled = np.empty((2, g, rows, -(-n // CHUNK), heads))
    for trial in range(ROUNDS):
        lifted_numba.expected(estimates, unit, thresholds, spans, get_num_threads(), certain, sampled)
        sure, chance = certain.sum(axis=2), sampled.sum(axis=2)
        over = (sure + chance > budget * (1 + SLACK)) & (keys > budget)
        short = sure + chance < (1 - SLACK) * np.minimum(budget, keys)
        if not (over | short).any():
            break
        low, high = np.where(over, thresholds, low), np.where(short, thresholds, high)
        with np.errstate(divide="ignore"):
            step = np.log(np.maximum(budget - sure, 1.0) / chance) * 2.0 ** max(0, trial - PATIENCE)
        below = np.where(np.isneginf(low), thresholds - step, (low + high) / 2)
        thresholds = np.maximum(np.where(over | short, below, thresholds), LOWEST)
    return thresholds


class _Scratch:
    """Buffers that live from draw to draw, so that a steady state allocates nothing large."""

    def __init__(self) -> None:
        self._estimates, self._ids, self._pis = np.empty(0, np.int16), np.empty(0, np.int32), np.empty(0, np.float32)

    def of(self, g: int, rows: int, heads: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Estimates (g, rows, G, n), ids (g, rows, n), pis (g, rows, n), contents arbitrary."""
        size = g * rows * n
        if size * heads > len(self._estimates):
            self._estimates = np.empty(5 * size * heads // 4, np.int16)
        if size > len(self._ids):
            self._ids, self._pis = np.empty(5 * size // 4, np.int32), np.empty(5 * size // 4, np.float32)
        return (
            self._estimates[: size * heads].reshape(g, rows, heads, n),
            self._ids[:size].reshape(g, rows, n),
            self._pis[:size].reshape(g, rows, n),
        )
