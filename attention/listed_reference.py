"""What attention over shared lists of keys means, and how lists are drawn: plain numpy in float64, stage by stage.

H query heads, head i reads key-value head ``i // (H / g)``; line ``head T + I`` is of head and block of rows.  The rest
of the notation is `attention.key_lists`'s; products are scaled, ``s = scale <q, k>``.
"""

from __future__ import annotations

import math

import numpy as np

from attention.key_lists import KEYS, ROWS, KeyLists, budget, edges, representatives, row_blocks, spoken_for
from hsr.lifted_numba import BITS, mixed

CODES = 256
STEPS = 8  # codes in an octave
TOP = 223  # code of a key of importance 1 and typical value
ONE = 508  # the bits of 1.0 as float32, without the last 21
FARTHEST = 32  # most codes that a value adds or takes
FIRST = 128  # values that tell what a typical one is
STRIDE = 2  # codes from one threshold to the next that a causal selection chooses from: 0, 2, .. 510
UNITS = 256  # of a key, in which it counts what it spends: blocks of 2^23 keys in 31 bits
ROUNDING = 2.0**-20  # of a unit, which is not rounded up: whole numbers of units are the same however they are summed
RESERVED = 8  # of the budget so many a part is shared out beforehand, alike to all blocks


def listed(q: np.ndarray, k: np.ndarray, v: np.ndarray, lists: KeyLists, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """q (H, m, d), k (g, n, d), v (g, n, dv) -> output (H, m, dv) in their dtype, log-sum-exp (H, m) float64.

    Row i of block I attends to softmax over its tokens (log weights added to the scores), blocks, means (mean key and
    mean value of a block, with log weight ln 128) and the band ``edge_I .. p_i``.
    """
    heads, m, n = len(q), q.shape[1], k.shape[1]
    output, lse = np.empty((heads, m, v.shape[2])), np.empty((heads, m))
    for line in range(heads * row_blocks(m)):
        head, block = divmod(line, row_blocks(m))
        source = head * len(k) // heads
        keys, values = k[source].astype(np.float64), v[source].astype(np.float64)
        single, whole, mean = lines_of(lists, line)
        chosen = np.concatenate([single, (KEYS * whole[:, None] + np.arange(KEYS)).ravel()])
        weights = np.zeros(len(chosen))
        if lists.log_weights is not None:
            weights[: len(single)] = lists.log_weights[lists.token_offsets[line] : lists.token_offsets[line + 1]]
        for i in range(ROWS * block, min(m, ROWS * (block + 1))):
            band = np.arange(edges(m, n)[block], n - m + i + 1)
            every = np.concatenate([keys[chosen], pooled(keys)[mean], keys[band]])
            what = np.concatenate([values[chosen], pooled(values)[mean], values[band]])
            extra = np.concatenate([weights, np.full(len(mean), math.log(KEYS)), np.zeros(len(band))])
            scores = scale * every @ q[head, i].astype(np.float64) + extra
            shares = np.exp(scores - scores.max())
            lse[head, i] = scores.max() + np.log(shares.sum())
            output[head, i] = shares @ what / shares.sum()
    return output.astype(q.dtype), lse


def lines_of(lists: KeyLists, line: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, blocks and means of one line, int64."""
    kinds = (
        (lists.token_offsets, lists.tokens),
        (lists.block_offsets, lists.blocks),
        (lists.mean_offsets, lists.means),
    )
    single, whole, mean = (
        np.empty(0, np.int64) if offsets is None else ids[offsets[line] : offsets[line + 1]].astype(np.int64)
        for offsets, ids in kinds
    )
    return single, whole, mean


def pooled(x: np.ndarray) -> np.ndarray:
    """x (n, d) -> the mean of each whole block of 128 (n // 128, d) float64."""
    whole = len(x) // KEYS
    return x[: whole * KEYS].astype(np.float64).reshape(whole, KEYS, x.shape[1]).mean(axis=1)


def value_codes(v: np.ndarray) -> np.ndarray:
    """w_j: v (n, dv) -> how far each value lies from the typical one, in eighths of octaves: (n,) int8.

    c is the mean of the first min(128, n) values, rms the root mean square of ``|v_j - c|`` over them.
    """
    v = v.astype(np.float64)
    distance = np.sqrt(((v - v[:FIRST].mean(axis=0)) ** 2).sum(axis=1))
    rms = np.sqrt((distance[:FIRST] ** 2).mean())
    if rms == 0:
        return np.zeros(len(v), np.int8)
    with np.errstate(divide="ignore", over="ignore"):
        return np.clip(np.rint(STEPS * np.log2(distance / rms)), -FARTHEST, FARTHEST).astype(np.int8)


def asked(q: np.ndarray, rows: int, causal: bool) -> np.ndarray:
    """q (m, d) -> the representatives of its blocks, means of the rows that they speak for: (T, R, d) float64."""
    return q[spoken_for(len(q), rows, causal)].astype(np.float64).mean(axis=2)


def log_sums(queries: np.ndarray, k: np.ndarray, edge: int, seen: np.ndarray, scale: float) -> np.ndarray:
    """L_r, the log-sum-exp that a block's representatives (R, d) have about, as it sees k (n, d): (R,).

    Exact scores of key block 0, if it is eligible; for later eligible blocks J, ``ln 128 +`` the score of their mean
    key; exact scores of band keys ``edge .. seen_r - 1``, those up to where the representative stands.
    """
    found = np.empty(len(queries))
    for r, query in enumerate(scale * queries.astype(np.float64)):
        first = k[: min(edge, KEYS)] @ query
        later = math.log(KEYS) + pooled(k[:edge])[1:] @ query
        band = k[edge : max(seen[r], edge)] @ query
        found[r] = np.logaddexp.reduce(np.concatenate([first, later, band]))
    return found


def codes(
    queries: np.ndarray, k: np.ndarray, values: np.ndarray, edge: int, seen: np.ndarray, scale: float
) -> np.ndarray:
    """Importance of a block's eligible keys, in eighths of octaves: (edge,) uint8; values (n,) as `value_codes`.

    ``p_rj = min(1, exp(s_rj - L_r))``, ``pb_rJ = min(1, 128 exp(scale <q_r, mean key of J> - L_r))``,
    ``x_j^2 = mean_r p_rj^2 + (mean_r pb_rJ(j) / 128)^2``.  The code is ``8 log2 x_j`` but for ``log2`` being linear
    between powers of two of ``x_j^2``: the bits of that float32 without the last 21, which cost no logarithm; with
    ``w_j + 223``, clipped to 0 .. 255.
    """
    base = log_sums(queries, k, edge, seen, scale)[:, None]
    queries = scale * queries.astype(np.float64)
    p = np.exp(np.minimum(queries @ k[:edge].astype(np.float64).T - base, 0.0))
    whole = np.exp(np.minimum(math.log(KEYS) + queries @ pooled(k[:edge]).T - base, 0.0))
    squares = (p**2).mean(axis=0) + (np.repeat(whole.mean(axis=0), KEYS) / KEYS) ** 2
    eighths = (squares.astype(np.float32).view(np.int32) >> 21) - ONE
    return np.clip(eighths + values[:edge] + TOP, 0, CODES - 1).astype(np.uint8)


def threshold(histogram: np.ndarray, kept: float) -> float:
    """T such that ``E(T) = sum_c histogram[c] min(1, 2^((c - T) / 8))`` is ``kept``; 0 where all keys are fewer.

    For the smallest whole b with E(b) <= kept, N keys have codes of at least b and are certain; the others weigh
    ``S = sum_{c < b} histogram[c] 2^(c / 8)``, and ``T = 8 log2(S / (kept - N))``, which exceeds b by rounding only.
    """
    c = np.arange(CODES)
    for b in range(CODES + 1):
        certain, rest = histogram[b:].sum(), (histogram[:b] * 2.0 ** (c[:b] / STEPS)).sum()
        fits = certain + rest * 2.0 ** (-b / STEPS) <= kept
        if b == 0 and fits:
            return 0.0
        if fits:
            return float(min(STEPS * np.log2(rest / (kept - certain)), b)) if kept > certain else float(b)
    return float(STEPS * np.log2(rest / kept))


def paced(histograms: np.ndarray, kept: float, edge: np.ndarray) -> list[float]:
    """T_I of every block I from the histograms (T, 256) of blocks up to it, their edges (T,) and a head's budget.

    A receding horizon.  In parts of a key, a block of threshold t spends

        E_J(t) = ceil(256 sum_c histogram_J[c] min(1, 2^((c - t) / 8)) - 2^-20);

    T_I is the first of 0, 2, .. 510 at which block I and later ones, if these are as those up to I were on average
    (weighted by edges), would spend no more than what is left:

        E_I(T) + 7/8 later_I mean_{J <= I} E_J(T) + later_I r <= left_I,   left_I = 256 kept - sum_{J < I} E_J(T_J)

    or at which ``E_I(T) <= r``, r an eighth of an even share: no block starves, and all together expect no more than
    ``kept``.  510 where there is no such T, so that next to nothing is spent.
    """
    candidates, c = STRIDE * np.arange(CODES), np.arange(CODES)
    left = math.floor(UNITS * kept)
    least = left // (RESERVED * max(int(np.count_nonzero(edge)), 1))
    sums, weight = np.zeros(CODES), 0
    found: list[float] = []
    for block, histogram in enumerate(histograms):
        later = len(histograms) - 1 - block
        expected = np.array([(histogram * 2.0 ** (np.minimum(c - t, 0) / STEPS)).sum() for t in candidates])
        own = np.ceil(UNITS * expected - ROUNDING)
        sums, weight = sums + own * edge[block], weight + edge[block]
        ahead = own + sums * ((1 - 1 / RESERVED) * later / max(weight, 1)) + later * least
        fits = (ahead <= left) | (own <= least) | (candidates == candidates[-1])
        found.append(float(candidates[fits][0]))
        left -= int(own[fits].max())
    return found


def chances(t: float) -> np.ndarray:
    """u[c], the chance of a key of code c in units of 2^-24: (256,) int32, 1 .. 2^24."""
    grain = 2.0**BITS
    return np.clip(np.rint(grain * np.exp2((np.arange(CODES) - t) / STEPS)), 1, grain).astype(np.int32)


def start(seed: int, head: int, block: int) -> int:
    """Where a line's systematic draw begins, 0 .. 2^24 - 1."""
    first = mixed(np.uint32(seed & 0xFFFFFFFF) ^ mixed(np.uint32((seed >> 32) + 1)))
    second = mixed(first ^ mixed(np.uint32(head + 0x9E3779B9)))
    return int(mixed(second ^ mixed(np.uint32(block + 0x9E3779B9)))) >> (32 - BITS)


def draw(found: np.ndarray, u: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (edge,) uint8, chances (256,) int32 and a start -> tokens (t,) int32, log weights (t,) float32.

    With C_j the sum of chances up to key j, its own included, ``slot_j = (first + C_j) >> 24``; key j is listed where
    the slot rises, with log weight ``-ln(u / 2^24)``.
    """
    slots = (first + np.cumsum(u[found], dtype=np.int64)) >> BITS
    tokens = np.flatnonzero(np.diff(slots, prepend=0)).astype(np.int32)
    return tokens, (-np.log(u / 2.0**BITS)).astype(np.float32)[found[tokens]]


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
    """q (H, m, d), k (g, n, d), v (g, n, dv), densities (H,), starts (H, T) as `start` -> tokens with log weights.

    One threshold for all blocks of a head; where causal, one per block, `paced`.
    """
    heads, m, n = len(q), q.shape[1], k.shape[1]
    seen, edge = n - m + representatives(m, rows, causal) + 1, edges(m, n)
    blocks = range(row_blocks(m))
    parts = []
    for head in range(heads):
        source = head * len(k) // heads
        values = value_codes(v[source])
        queries = asked(q[head], rows, causal)
        found = [codes(queries[i], k[source], values, edge[i], seen[i], scale) for i in blocks]
        histograms = np.array([np.bincount(line, minlength=CODES) for line in found])
        kept = budget(densities[head], m, n)
        if causal:
            thresholds = paced(histograms, kept, edge)
        else:
            thresholds = [threshold(histograms.sum(axis=0), kept)] * len(blocks)
        parts += [draw(found[i], chances(thresholds[i]), int(starts[head, i])) for i in blocks]
    tokens, weights = ([part[i] for part in parts] for i in range(2))
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in tokens])]).astype(np.int64)
    return KeyLists(offsets, np.concatenate(tokens), np.concatenate(weights))
