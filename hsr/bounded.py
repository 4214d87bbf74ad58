"""Listing every key that could matter, by bounds on coded scores: the rest has a bounded share of weight.

Codes (`hsr.covering`) put each score of a row within a known distance of an estimate.  Sort the keys by upper bound;
the longest tail whose upper bounds add up to no more than ``eps`` times a lower bound on all weight is left out, so its
share is at most eps.  This sharpens ``T = LSE0 + ln(eps / n)`` (`attention.policies.Certified`), which lets every key
left out weigh as much as the threshold.  Sorting is by bins of 1/16 nat, a key counting as the top of its bin.

With dithered codes this holds for a query with probability 1 - delta over the shifts of the grids, drawn when the codes
are made, for keys and queries that do not depend on them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import get_num_threads

from hsr import bounded_numba
from hsr.bounded_numba import BINS, PAIRS, STEPS
from hsr.coded_scan import KEYS
from hsr.covering import Cover, cover
from hsr.growth import with_room
from hsr.lifted_numba import CHUNK

UNDERFLOW = 2.0**-90  # nats, more than float32 loses where a slope is subnormal
GROWTH = 2  # times the keys of the grids before they are laid anew


class Listing(NamedTuple):
    """The keys listed, as in `hsr.lifted.Draw`, and a bound on what is not."""

    ids: np.ndarray  # (g, rows, n) int32
    pis: np.ndarray  # (g, rows, n) float32, all 1
    counts: np.ndarray  # (g, rows, chunks) int64
    variance: np.ndarray  # (g, rows, 2), all 0: nothing is left to chance
    log_dropped: np.ndarray  # (g, rows, G): ln of an upper bound on the sum of the weights left out


class Bounded:
    """Codes of g heads' keys with bounds, a block of 64 at a time.

    Args:
        keys: (g, n, d) float32 or float64.
        bytes_per_key: size of a code, a positive multiple of 4; another 4 bytes hold its error.
        queries: (g, m, d) like those to come, which set the metric.
        delta: 0 for bounds that always hold; else the chance, for each query, that they do not.
        seed: of the shifts.
    """

    def __init__(
        self, keys: np.ndarray, bytes_per_key: int, queries: np.ndarray, delta: float = 0.0, seed: int = 0
    ) -> None:
        self._bytes, self._queries, self._delta, self._seed = bytes_per_key, queries, delta, seed
        self._cover: Cover | None = None
        self._codes = np.empty((len(keys), 0, bytes_per_key // 4, KEYS, 4), np.uint8)
        self._lengths = np.empty((len(keys), 0), np.float32)
        self._blocks = self._laid = 0
        self.follow(keys)

    @property
    def n(self) -> int:
        """Number of coded keys, a multiple of 64."""
        return self._blocks * KEYS

    def follow(self, keys: np.ndarray) -> None:
        """Code what has been appended to keys (g, n, d), whole blocks only; grids are laid anew at GROWTH times."""
        blocks = keys.shape[1] // KEYS
        if blocks == self._blocks:
            return
        if self._cover is None or blocks >= GROWTH * self._laid:
            shifts = np.random.default_rng((self._seed, blocks)) if self._delta else None
            self._cover = cover(keys[:, : blocks * KEYS], self._bytes, self._queries, shifts)
            self._laid, self._blocks = blocks, 0
        codes, lengths = self._cover.encode(keys[:, self._blocks * KEYS : blocks * KEYS])
        self._codes = with_room(self._codes, self._blocks, blocks)
        self._codes[:, self._blocks : blocks] = codes
        self._lengths = with_room(self._lengths, self.n, blocks * KEYS)
        self._lengths[:, self.n : blocks * KEYS] = lengths
        self._blocks = blocks

    def select(self, queries: np.ndarray, spans: np.ndarray, known: np.ndarray, scale: float, eps: float) -> Listing:
        """List the keys of each row that could hold more than eps of a head's weight together.

        Args:
            queries: (g, rows, G, d) float64.
            spans: (g, rows, 2) int64, first and last + 1 of the keys to choose from, within the coded ones.
            known: (g, rows, G), at most the log-sum-exp of the scaled scores of keys that are attended to anyway.
            scale: of the scores.
            eps: in [0, 1).
        """
        g, rows, heads, d = queries.shape
        chunks = -(-self.n // CHUNK)
        ids, counts = np.empty((g, rows, self.n), np.int32), np.zeros((g, rows, chunks), np.int64)
        pis, certain = np.ones((g, rows, self.n), np.float32), np.zeros((g, rows, 2))
        if self._cover is None:
            return Listing(ids, pis, counts, certain, np.full((g, rows, heads), -np.inf))
        padded = np.zeros((g, rows, -(-heads // PAIRS) * PAIRS, d))
        padded[:, :, :heads] = queries
        coded = self._cover.prepare(padded.reshape(g, -1, d))
        slope, base, length, proxy, rounding = (part.reshape(g, rows, -1)[..., :heads] * scale for part in coded[1:])
        fixed = rounding + UNDERFLOW
        if self._delta:
            fixed = fixed + np.sqrt(2 * scale * proxy * np.log(2 * max(self.n, 1) / self._delta))
        scores = np.empty((g, rows, heads, self.n), np.float32)
        words, threads = np.array(self._cover.layout.words), get_num_threads()
        bounded_numba.score(self._codes, words, coded.tiles, slope, spans, threads, scores)
        totals, bins = known - base, np.empty((g, rows, heads, BINS), np.int64)
        bounded_numba.survey(scores, length, fixed, self._lengths, spans, totals, bins)
        cuts, log_dropped = _tails(bins, totals, eps)
        bounded_numba.choose(scores, length, fixed, self._lengths, spans, totals, cuts, threads, ids, counts)
        return Listing(ids, pis, counts, certain, log_dropped + base)


def _tails(bins: np.ndarray, totals: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The first bin (g, rows, G) of the longest tail that holds at most eps of the total, and ln of the tail's bound.

    Bin 0 holds whatever could be as much as the total alone; unless it is empty, no tail reaches it.
    """
    weights = bins * np.exp(-np.arange(BINS) / STEPS)  # relative to the total
    tails = np.cumsum(weights[..., ::-1], axis=-1)[..., ::-1] * (1 + 1e-12)
    tails = np.concatenate([tails, np.zeros((*tails.shape[:-1], 1))], axis=-1)
    cuts = np.argmax(tails <= eps, axis=-1)
    with np.errstate(divide="ignore"):
        return cuts, np.log(np.take_along_axis(tails, cuts[..., None], axis=-1)[..., 0]) + totals
