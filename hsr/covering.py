"""Codes whose error is bounded: grids that cover the keys, at offsets that may be random.

As in `hsr.coder`, keys are centred, whitened and rotated, and each axis is rounded to a grid; here the grid of an axis
covers (nearly) all keys, so that what rounding does to a score is known:

* *Deterministic.*  With r the error of a key in the rotated space, ``|<q, k> - estimate| <= |q query_map| |r|``; the
  length |r| of each key is kept, as a float32.
* *Dithered.*  The grid of axis i is shifted by a uniform random part of its step, drawn once, and the shift is taken
  off again (subtractive dither; Schuchman 1964).  For a key given beforehand, r_i is then uniform in +- step_i / 2,
  independent between axes, so that its effect on the score of a query *chosen without knowledge of the shifts* is
  sub-Gaussian with variance proxy ``v = sum_i (q query_map)_i^2 step_i^2 / 12``; with probability 1 - delta no key of n
  is off by more than ``sqrt(2 v ln(2 n / delta))``.  What a grid does not cover (clipped entries) is bounded as above.

Queries are rounded to two int8 (``128 high + low``), whose own error is bounded by Cauchy-Schwarz.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hsr.coded_scan import BYTES, KEYS, QUERIES
from hsr.coder import SAMPLE, SLICE, SMALLEST, Layout, cheapest_layout, packed, principal_axes
from hsr.rotation import rotated
from hsr.scaling import exponent

OUTLIER = 5.0  # robust standard deviations that a grid covers to either side of the median, at most
HIGH = 128  # weight of a query's first int8 over its second
FINE = 127 * HIGH  # largest coordinate of a rounded query
SQUARED_STEP = {8: 255.0**-2 / 12, 4: 15.0**-2 / 12, 2: 3.0**-2 / 12, 1: 1 / 12}  # mean error, per squared stretch
UNCODED = 0.25
SLACK = 1e-9  # relative; over what float64 loses in rotating a key or a query


class BoundedQueries(NamedTuple):
    """Queries as two int8 each: ``<q, k> = base + slope sum_i (128 a_i + b_i) code_i`` up to what follows."""

    tiles: np.ndarray  # (g, tiles, 4, planes, 4) int8: a and b of two queries a tile
    slope: np.ndarray  # (g, m) float64
    base: np.ndarray  # (g, m) float64
    length: np.ndarray  # (g, m): times a key's |r|, what is not dithered can change a score
    proxy: np.ndarray  # (g, m): variance proxy v of what is
    rounding: np.ndarray  # (g, m): bound on the rounding of the query and of float32


@dataclass(frozen=True)
class Cover:
    """Grids of g heads that share a layout."""

    layout: Layout
    exponents: np.ndarray  # (g,) int64: what follows is for keys times 2**-exponent, of magnitude about 1 or less
    mean: np.ndarray  # (g, d) float64
    key_map: np.ndarray  # (g, d, d) float64
    query_map: np.ndarray  # (g, d, d) float64
    steps: np.ndarray  # (g, axes) float64
    centres: np.ndarray  # (g, axes) float64: coordinate 0 lies at this code, in steps
    ends: np.ndarray  # (2, g, axes) float64: the stretch of an axis that its grid covers
    dithered: bool

    def encode(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys (g, n, d) -> codes (g, ceil(n / 64), words, 64, 4) uint8 and |r| of each key (g, n) float32, rounded up.

        Of dithered codes r is only what no grid covers.  The last block is padded with zeros.
        """
        g, n, d = keys.shape
        bits = self.layout.bits
        used = min(len(bits), d)
        most, steps, centres = 2.0 ** bits[:used] - 1, self.steps[:, None, :used], self.centres[:, None, :used]
        low, high = self.ends[:, :, None, :used]
        blocks = -(-n // KEYS)
        codes = np.zeros((g, blocks, sum(self.layout.words), KEYS, BYTES), np.uint8)
        lengths = np.empty((g, n), np.float32)
        for first in range(0, n, SLICE):
            y = rotated(_unit(keys[:, first : first + SLICE], self.exponents), self.mean, self.key_map)
            size, seen = y.shape[1], y[..., :used]
            cells = np.divide(seen, steps, out=np.zeros_like(seen), where=steps > 0) + centres + 0.5
            code = np.clip(np.floor(cells), 0.0, most)
            r = y.copy()
            r[..., :used] -= steps * (code - centres)
            if self.dithered:  # what the shifts make random is not in r
                r[..., :used][(low <= seen) & (seen <= high)] = 0.0
            with np.errstate(over="ignore"):  # a key appended far out has an infinite length
                length = np.sqrt((r**2).sum(axis=2)) + SLACK * np.sqrt((y**2).sum(axis=2))
                lengths[:, first : first + size] = np.minimum(length * (1 + 2.0**-22), np.inf)
            padded = np.zeros((g, -(-size // KEYS) * KEYS, len(bits)), np.uint8)
            padded[:, :size, :used] = code
            span = slice(first // KEYS, first // KEYS + padded.shape[1] // KEYS)
            codes[:, span] = packed(padded.reshape(g, -1, KEYS, len(bits)), self.layout)
        return codes, lengths

    def prepare(self, queries: np.ndarray) -> BoundedQueries:
        """Queries (g, m, d) float64, m even -> their rounded form."""
        g, m, d = queries.shape
        bits = self.layout.bits
        used = min(len(bits), d)
        queries = np.ldexp(queries, self.exponents[:, None, None])
        turned = np.matmul(queries, self.query_map)
        z = np.zeros((g, m, len(bits)))
        z[..., :used] = turned[..., :used] * self.steps[:, None, :used]
        slope = np.abs(z).max(axis=2) / FINE
        slope[slope < SMALLEST] = 1.0
        whole = np.rint(z / slope[..., None])
        high = np.rint(whole / HIGH)
        low = whole - HIGH * high
        tiles = np.stack([high, low], axis=2).astype(np.int8).reshape(g, -1, QUERIES, len(bits) // BYTES, BYTES)
        largest = np.maximum(np.abs(self.centres), np.abs(2.0**bits - 1 - self.centres))  # |code - centre|
        left = np.sqrt(((z - slope[..., None] * whole) ** 2).sum(axis=2)) * np.sqrt((largest**2).sum(axis=1))[:, None]
        swing = slope * (np.abs(whole) @ (2.0**bits - 1))  # no sum is larger, before its slope is rounded to float32
        base = np.einsum("gmd,gd->gm", queries, self.mean) - slope * np.einsum("gma,ga->gm", whole, self.centres)
        size = np.sqrt((queries**2).sum(axis=2)) * np.sqrt((self.mean**2).sum(axis=1))[:, None] + swing
        return BoundedQueries(
            tiles,
            slope,
            base,
            np.sqrt((turned**2).sum(axis=2)) * (1 + SLACK),
            (z**2).sum(axis=2) / 12 if self.dithered else np.zeros((g, m)),
            left * (1 + SLACK) + swing * 2.0**-22 + size * SLACK,
        )


def cover(
    keys: np.ndarray, bytes_per_key: int, queries: np.ndarray | None, dither: np.random.Generator | None
) -> Cover:
    """Grids over keys (g, n, d) with the smallest bound for a byte budget; ``dither`` draws their offsets.

    Queries (g, m, d) set the metric, as in `hsr.coder.fit`; without dither all cells are centred alike.
    """
    g, n, d = keys.shape
    exponents = exponent(keys.reshape(g, -1), axis=1)
    mean, key_map, query_map, _ = principal_axes(_unit(keys[:, :: -(-n // SAMPLE)], exponents), queries)
    low, high = _stretch(keys, exponents, mean, key_map)
    order = np.argsort(-((high - low) ** 2).sum(axis=0), kind="stable")
    key_map, query_map, low, high = key_map[..., order], query_map[..., order], low[:, order], high[:, order]
    layout = cheapest_layout(((high - low) ** 2).sum(axis=0), bytes_per_key, SQUARED_STEP, UNCODED)
    bits = layout.bits
    used = min(len(bits), d)
    steps, centres, ends = np.zeros((g, len(bits))), np.zeros((g, len(bits))), np.zeros((2, g, len(bits)))
    ends[0, :, :used], ends[1, :, :used] = low[:, :used], high[:, :used]
    steps[:, :used] = (high - low)[:, :used] * (1 + SLACK) / (2.0 ** bits[:used] - 1)
    shift = np.full((g, used), 0.5) if dither is None else dither.random((g, used))
    start = np.divide(low[:, :used], steps[:, :used], out=np.zeros((g, used)), where=steps[:, :used] > 0)
    centres[:, :used] = shift - 0.5 - start
    return Cover(layout, exponents, mean, key_map, query_map, steps, centres, ends, dither is not None)


def _stretch(
    keys: np.ndarray, exponents: np.ndarray, mean: np.ndarray, key_map: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The stretch (g, d) of each axis that the keys take, OUTLIER robust deviations from the median at most."""
    g, n, d = keys.shape
    low, high = np.full((g, d), np.inf), np.full((g, d), -np.inf)
    for first in range(0, n, SLICE):
        y = rotated(_unit(keys[:, first : first + SLICE], exponents), mean, key_map)
        low, high = np.minimum(low, y.min(axis=1)), np.maximum(high, y.max(axis=1))
    y = rotated(_unit(keys[:, :: -(-n // SAMPLE)], exponents), mean, key_map)
    middle = np.median(y, axis=1)
    spread = OUTLIER * 1.4826 * np.median(np.abs(y - middle[:, None]), axis=1)
    spread = np.where(spread > 0, spread, np.inf)  # more than half of the keys agree: nothing tells what is far out
    return np.maximum(low, middle - spread), np.minimum(high, middle + spread)


def _unit(keys: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Keys (g, t, d) times 2**-exponents (g,), float64."""
    return np.ldexp(keys.astype(np.float64), -exponents[:, None, None])
