"""Drawing the keys that blocks of rows share, on the CPU; `attention.listed_reference` has the meaning.

Parallel over the lines of a head, whose codes are held, T n bytes.  Scores of representatives are products of BLAS,
of so few keys at a time that BLAS starts no threads of its own: two pools of threads wait for each other's idle ones.
"""

from __future__ import annotations

import math

import numpy as np
from numba import get_num_threads, njit, prange, types
from numba.extending import overload

from attention.chances import chances, head_thresholds, lengths, log_weights
from attention.key_lists import KEYS, KeyLists, edges, representatives, spoken_for
from attention.listed_reference import CODES, FARTHEST, FIRST, ONE, STEPS, TOP, pooled
from hsr.exp_block import FAST, exp32
from hsr.lifted_numba import BITS

ALONE = 1 << 18  # multiplications up to which OpenBLAS stays in the thread that calls it
LN_KEYS = math.log(KEYS)


def power(x):
    """exp(x) for x <= 0 in the type of x; of a float32 at least 2**-126."""
    return exp32(x) if isinstance(x, np.float32) else math.exp(x)


@overload(power)
def _power(x):
    if x == types.float32:
        return lambda x: exp32(x)
    return lambda x: math.exp(x)


@njit(cache=True)
def _log_sum(scores, means, first, band, last):
    """Of one representative: exact scores of keys 0 .. first - 1 and band .. last - 1, and of means from the second."""
    top = -np.inf
    for j in range(first):
        top = max(top, scores[j])
    for j in range(1, band // KEYS):
        top = max(top, LN_KEYS + means[j])
    for j in range(band, last):
        top = max(top, scores[j])
    best, total = scores.dtype.type(top), 0.0
    for j in range(first):
        total += power(scores[j] - best)
    for j in range(1, band // KEYS):
        total += math.exp(LN_KEYS + means[j] - top)
    for j in range(band, last):
        total += power(scores[j] - best)
    return top + math.log(total)


@njit(cache=True)
def _products(asked, keys, room, scores):
    """scores (R, at least t) of asked (R, d) with keys (t, d), a few keys at a time; room holds at least ALONE / d."""
    rows, d = asked.shape
    step = max(ALONE // (rows * d), 1)
    for first in range(0, len(keys), step):
        count = min(step, len(keys) - first)
        part = room[: rows * count].reshape(rows, count)
        np.dot(asked, keys[first : first + count].T, part)
        scores[:, first : first + count] = part


@njit(parallel=True, cache=True)
def _encode(q, k, pools, values, seen, rate, edge, threads, codes, histograms):
    """Fill codes (T, n) uint8 and histograms (T, 256) int64 of zeros, of one head.

    q (T, R, d) representatives, k (n, d), pools (n // 128, d) mean keys, values (n,) int8, seen (T, R) keys before
    where they stand and there, rate the scale in q's type.
    """
    (_, rows, d), n = q.shape, len(k)
    one = q.dtype.type(1)
    for thread in prange(threads):
        asked, base, x = np.empty((rows, d), q.dtype), np.empty(rows, q.dtype), np.empty(KEYS, q.dtype)
        scores, means = np.empty((rows, n), q.dtype), np.empty((rows, max(len(pools), 1)), q.dtype)
        room = np.empty(max(ALONE // d, rows), q.dtype)
        for block in range(thread, len(edge), threads):
            last = edge[block]
            if last == 0:
                continue
            most = last
            for r in range(rows):
                for c in range(d):
                    asked[r, c] = q[block, r, c] * rate
                most = max(most, seen[block, r])
            _products(asked, k[:most], room, scores)
            _products(asked, pools[: last // KEYS], room, means)
            for r in range(rows):
                base[r] = _log_sum(scores[r], means[r], KEYS, last, max(seen[block, r], last))
            for whole in range(last // KEYS):
                x[:] = 0
                shared = 0.0
                for r in range(rows):
                    shared += math.exp(min(LN_KEYS + means[r, whole] - base[r], 0.0))
                    _add_squares(scores[r, whole * KEYS : (whole + 1) * KEYS], base[r], x)
                extra = q.dtype.type((shared / (rows * KEYS)) ** 2)
                for j in range(KEYS):
                    key = whole * KEYS + j
                    square = np.float32(x[j] * (one / q.dtype.type(rows)) + extra)
                    eighths = (square.view(np.int32) >> 21) - ONE
                    code = np.uint8(min(max(eighths + values[key] + TOP, 0), CODES - 1))
                    codes[block, key] = code
                    histograms[block, code] += 1


@njit(fastmath=FAST, cache=True)
def _add_squares(scores, base, x):
    """x (128,) += min(1, exp(scores - base)) ** 2."""
    zero = scores.dtype.type(0)
    for j in range(KEYS):
        off = min(scores[j] - base, zero)
        x[j] += power(off + off)


@njit(parallel=True, cache=True)
def draw(codes, edge, u, weights, starts, offsets, threads, tokens, log_weights):
    """Fill tokens and log_weights from the offsets (lines + 1,) on; codes (lines, n), u and weights (lines, 256)."""
    for thread in prange(threads):
        for line in range(thread, len(edge), threads):
            running, place = np.int64(starts[line]), offsets[line]
            for key in range(edge[line]):
                code = codes[line, key]
                running += u[line, code]
                if running >> BITS:
                    tokens[place], log_weights[place] = key, weights[line, code]
                    place += 1
                    running &= (1 << BITS) - 1


def value_codes(v: np.ndarray) -> np.ndarray:
    """See `attention.listed_reference.value_codes`; v (n, dv) in slices, so that little of it is float64 at a time."""
    centre = v[:FIRST].astype(np.float64).mean(axis=0)
    distance = np.empty(len(v))
    for first in range(0, len(v), 1 << 12):
        part = v[first : first + (1 << 12)] - centre
        distance[first : first + len(part)] = np.sqrt(np.einsum("nd,nd->n", part, part))
    rms = np.sqrt((distance[:FIRST] ** 2).mean())
    if rms == 0:
        return np.zeros(len(v), np.int8)
    with np.errstate(divide="ignore", over="ignore"):
        return np.clip(np.rint(STEPS * np.log2(distance / rms)), -FARTHEST, FARTHEST).astype(np.int8)


def encoded(
    q: np.ndarray, k: np.ndarray, means: np.ndarray, values: np.ndarray, rows: int, causal: bool, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """One head's q (m, d), k (n, d), mean keys and `value_codes` -> codes and histograms.

    Codes (T, n) uint8, which mean something for a line's eligible keys only; histograms (T, 256) int64.
    """
    m, n = len(q), len(k)
    asked = q[spoken_for(m, rows, causal)].mean(axis=2, dtype=np.float64).astype(q.dtype)
    seen = n - m + representatives(m, rows, causal) + 1
    codes, histograms = np.empty((len(seen), n), np.uint8), np.zeros((len(seen), CODES), np.int64)
    rate = q.dtype.type(scale)
    _encode(asked, k, means, values, seen, rate, edges(m, n), get_num_threads(), codes, histograms)
    return codes, histograms


def key_lists(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    densities: np.ndarray,
    starts: np.ndarray,
    rows: int,
    causal: bool,
    scale: float,
) -> KeyLists:
    """See `attention.listed_reference.key_lists`; float32 input is scored in float32."""
    q, k = (np.ascontiguousarray(x) for x in (q, k))
    heads, m, n = len(q), q.shape[1], k.shape[1]
    edge = edges(m, n)
    repeat = heads // len(k)
    counts, tokens, weights = [], [], []
    for source in range(len(k)):
        means, values = pooled(k[source]).astype(k.dtype), value_codes(v[source])
        for head in range(source * repeat, (source + 1) * repeat):
            codes, histograms = encoded(q[head], k[source], means, values, rows, causal, scale)
            u = chances(head_thresholds(histograms, float(densities[head]), m, n, causal))
            found = lengths(histograms, u, starts[head])
            offsets = np.concatenate([[0], np.cumsum(found)])
            listed, logs = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
            draw(codes, edge, u, log_weights(u), starts[head], offsets, get_num_threads(), listed, logs)
            counts.append(found)
            tokens.append(listed)
            weights.append(logs)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return KeyLists(offsets, np.concatenate(tokens), np.concatenate(weights))
