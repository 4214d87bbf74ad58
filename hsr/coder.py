"""Transform coding: a few bytes per key from which any query's scores can be estimated.

Keys (n, d) are centred, whitened by the queries' second moment ``M = E[q q^T]`` and rotated to the principal axes of
the result, so that the mean squared error of a score is the sum of the axes' mean squared errors.  Each axis is then
rounded to 8, 4, 2 or 1 bits, or dropped.  With ``key_map = M^(1/2) U`` and ``query_map = M^(-1/2) U``,

    y = (k - mean) key_map,   y_i ~ step_i (code_i - (2^b_i - 1) / 2),   <q, k> = <q, mean> + <q query_map, y>.

Estimates carry no bound (`hsr.sketch_numba` has codes that do).  What uses them is right for any estimate: a lifted
half-space (`hsr.lifted`) samples keys by estimates and weighs them by exact scores.

Layout of codes: (g, blocks, words, 64, 4) uint8, a word being 4 bytes of each of a block's 64 keys.  A word of b-bit
codes holds 8 / b *planes* of 4 axes: bits ``b p .. b p + b - 1`` of its byte t are axis ``4 p + t`` of the word.  Words
of 8 bits come first, then those of 4, 2 and 1; axes are in order of falling variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hsr.coded_scan import BYTES, KEYS, QUERIES, WIDTHS
from hsr.rotation import rotated

DISTORTION = {8: 6e-5, 4: 0.01154, 2: 0.1188, 1: 0.3634}  # of a Gaussian's best uniform quantiser, per variance
STEP = {8: 0.0308, 4: 0.3352, 2: 0.9957, 1: 1.596}  # its step, per standard deviation (Max 1960)
STRETCH = (0.7, 0.85, 1.0, 1.2, 1.45, 1.8)  # tried on that step: real axes are not Gaussian
SAMPLE = 1 << 13  # keys that statistics are taken from
SLICE = 1 << 13  # keys coded at a time, whole blocks
EVERY = {width: 1 for width in WIDTHS}  # words come in any number
SMALLEST = 1e-290  # a query with smaller coordinates is orthogonal to every axis


@dataclass(frozen=True)
class Layout:
    """How many words hold codes of 8, 4, 2 and 1 bits."""

    words: tuple[int, int, int, int]

    @property
    def bytes_per_key(self) -> int:
        """Bytes that the code of one key takes."""
        return BYTES * sum(self.words)

    @cached_property
    def shift(self) -> int:
        """Last bits that a sum of codes times int8 loses to become int16: less than what rounding a query loses."""
        most, shift = 127 * int((2**self.bits - 1).sum()), 0
        while (most + (1 << shift >> 1)) >> shift > np.iinfo(np.int16).max:
            shift += 1
        return shift

    @property
    def bits(self) -> np.ndarray:
        """Bits of each coded axis: (axes,) int64, axes a multiple of 4, those beyond the keys' width being padding."""
        axes = [BYTES * 8 // width * count for count, width in zip(self.words, WIDTHS, strict=True)]
        return np.repeat(WIDTHS, axes)


@dataclass(frozen=True)
class CodedQueries:
    """Queries as `hsr.coded_scan` takes them: ``<q, k> ~ base + sigma sum_i a_i code_i``."""

    tiles: np.ndarray  # (g, tiles, 4, planes, 4) int8, the a of four queries a tile; the last one padded with zeros
    sigma: np.ndarray  # (g, m) float64
    base: np.ndarray  # (g, m) float64


@dataclass(frozen=True)
class Coder:
    """Maps and steps of g heads that share a layout."""

    layout: Layout
    mean: np.ndarray  # (g, d) float64
    key_map: np.ndarray  # (g, d, d) float64
    query_map: np.ndarray  # (g, d, d) float64
    steps: np.ndarray  # (g, axes) float64
    error: np.ndarray  # (g,) float64, mean squared error of a score over the fit's keys, for queries with its M

    def encode(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys (g, n, d) -> codes (g, ceil(n / 64), words, 64, 4) uint8, each key's squared score error (g, n).

        The error is its mean over queries of second moment M.  The last block is padded with zeros.
        """
        g, n, d = keys.shape
        bits = self.layout.bits
        used = min(len(bits), d)
        coded = np.zeros((g, -(-n // KEYS), sum(self.layout.words), KEYS, BYTES), np.uint8)
        error = np.empty((g, n))
        mean, key_map, steps = (part.astype(keys.dtype) for part in (self.mean, self.key_map, self.steps[:, :used]))
        for first in range(0, n, SLICE):
            part = keys[:, first : first + SLICE]
            y = rotated(part, mean, key_map)
            codes = np.zeros((g, -(-part.shape[1] // KEYS) * KEYS, len(bits)), np.uint8)
            for head in range(g):
                rounded = _rounded(y[head, :, :used], steps[head], bits[:used])
                codes[head, : part.shape[1], :used] = rounded
                y[head, :, :used] -= steps[head] * (rounded - (2.0 ** bits[:used] - 1) / 2)
            error[:, first : first + SLICE] = np.einsum("gni,gni->gn", y, y)
            blocks = slice(first // KEYS, first // KEYS + codes.shape[1] // KEYS)
            coded[:, blocks] = packed(codes.reshape(g, -1, KEYS, len(bits)), self.layout)
        return coded, error

    @cached_property
    def middle(self) -> np.ndarray:
        """(axes,) float64, what is taken from a code before its step multiplies it."""
        return (2.0**self.layout.bits - 1) / 2

    @cached_property
    def readout(self) -> np.ndarray:
        """(g, d, axes + 1) float64: a query's product with an axis of unit codes; last, with the mean."""
        g, d = self.mean.shape
        axes = len(self.layout.bits)
        used = min(axes, d)
        readout = np.zeros((g, d, axes + 1))
        readout[..., :used] = self.query_map[..., :used] * self.steps[:, None, :used]
        readout[..., axes] = self.mean
        return readout

    def prepare(self, queries: np.ndarray) -> CodedQueries:
        """Queries (g, m, d) float64 -> their int8 form."""
        g, m, d = queries.shape
        padded = np.zeros((g, -(-m // QUERIES) * QUERIES, d))
        padded[:, :m] = queries
        products = np.matmul(padded, self.readout)
        z = products[..., :-1]
        sigma = np.abs(z).max(axis=2) / 127
        sigma[sigma < SMALLEST] = 1.0
        a = np.rint(z / sigma[..., None])
        base = products[..., -1] - sigma * (a @ self.middle)
        tiles = a.astype(np.int8).reshape(g, -1, QUERIES, z.shape[2] // BYTES, BYTES)
        return CodedQueries(tiles, sigma[:, :m], base[:, :m])


def fit(
    keys: np.ndarray,
    bytes_per_key: int,
    queries: np.ndarray | None = None,
    widths: tuple[int, ...] = WIDTHS,
    grain: Mapping[int, int] = EVERY,
) -> Coder:
    """The coder of a given size, chosen for the smallest squared error of a score.

    Args:
        keys: (g, n, d), n >= 1; statistics are taken from at most SAMPLE of them, evenly spaced.
        bytes_per_key: a positive multiple of 4.  Bits go to axes by variance, alike in all heads.
        queries: (g, m, d) like those to come, from which M is taken; few of them pull it little from the identity.
            None: all directions count alike.
        widths: bits that a code may have; a kernel that knows only some of them says so here.
        grain: of which number the words of a width must be a multiple.
    """
    mean, key_map, query_map, variances = principal_axes(keys, queries)
    g, _, d = keys.shape
    layout = best_layout(variances.sum(axis=0), bytes_per_key, widths, grain)
    used = min(len(layout.bits), d)
    steps, error = np.zeros((g, len(layout.bits))), variances[:, used:].sum(axis=1)
    sample = _sample(keys)
    for head in range(g):
        y = (sample[head] - mean[head]) @ key_map[head, :, :used]
        steps[head, :used], lost = _best_steps(y, layout.bits[:used])
        error[head] += lost
    return Coder(layout, mean, key_map, query_map, steps, error)


def principal_axes(
    keys: np.ndarray, queries: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean (g, d), key_map, query_map (g, d, d) and the axes' variances (g, d), falling; arguments as for `fit`."""
    sample = _sample(keys)
    g, n, d = sample.shape
    mean = sample.mean(axis=1)
    key_map, query_map, variances = np.empty((g, d, d)), np.empty((g, d, d)), np.empty((g, d))
    for head in range(g):
        centred = sample[head] - mean[head]
        moment = None if queries is None else np.matmul(queries[head].T, queries[head], dtype=np.float64)
        second = np.eye(d) if moment is None or queries is None else second_moment(moment, queries.shape[1])
        key_map[head], query_map[head], variances[head] = axes(centred.T @ centred / n, second)
    return mean, key_map, query_map, variances


def axes(covariance: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys' covariance and queries' M, (d, d) float64 -> key_map, query_map (d, d), variances (d,), falling."""
    values, vectors = np.linalg.eigh(second)
    root = vectors * np.sqrt(values)
    variances, turned = np.linalg.eigh(root.T @ covariance @ root)
    turned = turned[:, ::-1]
    return root @ turned, (vectors / np.sqrt(values)) @ turned, np.maximum(variances[::-1], 0.0)


def best_layout(
    variances: np.ndarray, bytes_per_key: int, widths: tuple[int, ...] = WIDTHS, grain: Mapping[int, int] = EVERY
) -> Layout:
    """Variances (d,) of the axes, falling -> the layout of these widths of least expected squared error."""
    return cheapest_layout(variances, bytes_per_key, {width: DISTORTION[width] for width in widths}, 1.0, grain)


def cheapest_layout(
    weights: np.ndarray, bytes_per_key: int, costs: dict[int, float], dropped: float, grain: Mapping[int, int] = EVERY
) -> Layout:
    """The layout of least cost: the sum over axes of a weight (d,), falling, times the cost of its bits, or of none.

    Widths without a cost are not used; a width's words come in multiples of its grain.
    """
    d, words = len(weights), bytes_per_key // BYTES
    first = np.indices((words + 1,) * 3).reshape(3, -1)
    first = first[:, first.sum(axis=0) <= words]
    counts = np.vstack([first, words - first.sum(axis=0)])  # (4, layouts)
    multiples = np.array([grain[width] if width in costs else words + 1 for width in WIDTHS])[:, None]
    counts = counts[:, (counts % multiples == 0).all(axis=0)]
    ends = np.cumsum(counts * (BYTES * 8 // np.array(WIDTHS))[:, None], axis=0)
    upto = np.concatenate([[0.0], np.cumsum(weights)])[np.minimum(ends, d)]  # (4, layouts)
    spans = np.diff(upto, axis=0, prepend=0.0)
    loss = np.array([costs.get(width, 0.0) for width in WIDTHS]) @ spans + dropped * (weights.sum() - upto[-1])
    eights, fours, twos, ones = (int(count) for count in counts[:, np.argmin(loss)])
    return Layout((eights, fours, twos, ones))


def _sample(keys: np.ndarray) -> np.ndarray:
    """At most SAMPLE of keys (g, n, d), evenly spaced, in float64."""
    return keys[:, :: -(-keys.shape[1] // SAMPLE)].astype(np.float64)


def second_moment(products: np.ndarray, m: int) -> np.ndarray:
    """Sum of q q^T over m queries, (d, d) -> M, positive definite.

    The identity, scaled to its trace, has the share d / (d + m).
    """
    d = len(products)
    moment = products / max(m, 1)
    size = np.trace(moment) / d
    share = d / (d + m)
    return (1 - share) * moment + share * size * np.eye(d) if size > 0 else np.eye(d)


def _best_steps(y: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, float]:
    """y (n, axes) -> the best steps (axes,) among STRETCH, and the squared error they leave."""
    gaussian = y.std(axis=0) * np.array([STEP[int(width)] for width in bits])
    steps = np.array(STRETCH)[:, None] * gaussian
    lost = [((y - step * (_rounded(y, step, bits) - (2.0**bits - 1) / 2)) ** 2).mean(axis=0) for step in steps]
    best = np.argmin(lost, axis=0)
    return np.take_along_axis(steps, best[None], axis=0)[0], float(np.min(lost, axis=0).sum())


def _rounded(y: np.ndarray, steps: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """y (n, axes), steps (axes,) -> codes (n, axes) float64 in 0 .. 2^bits - 1; an axis of step 0 has code 0."""
    levels = 2.0**bits
    with np.errstate(over="ignore"):  # far beyond the last level
        cells = np.divide(y, steps, out=np.zeros_like(y), where=steps > 0)
    return np.clip(np.floor(cells) + levels / 2, 0, levels - 1)


def packed(codes: np.ndarray, layout: Layout) -> np.ndarray:
    """codes (g, blocks, 64, axes) uint8 -> (g, blocks, words, 64, 4)."""
    packed = np.zeros((*codes.shape[:2], sum(layout.words), *codes.shape[2:3], BYTES), np.uint8)
    word = axis = 0
    for count, width in zip(layout.words, WIDTHS, strict=True):
        for _ in range(count):
            for plane in range(8 // width):
                packed[:, :, word] |= codes[..., axis : axis + BYTES] << np.uint8(width * plane)
                axis += BYTES
            word += 1
    return packed
