"""Before the scan: queries into code space, their thresholds, and beside them the new token's row and codes.

And before the first of all: what a cache starts from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu.codes import LINE, after_predecessor, length, log2, mixed, span, successor_may_start
from gpu.encode import write_token

GAIN = tl.constexpr(0.5)  # of the correction from step to step: half, because queries differ
FARTHEST = tl.constexpr(8.0)  # base-2 logarithm of the largest ratio of numbers of keys that a step corrects
MOST = tl.constexpr(8.0)  # deviations that all corrections together may move a threshold
NARROWEST = tl.constexpr(1.0)  # deviation, in base-2 scores, by which a correction is divided at least
FLAT = tl.constexpr(0.7)  # deviation below which no key is certain, and a threshold may lie far outside the scores
HIGHEST = tl.constexpr(12.0)  # deviations from the mean score between which normal places stay
LOWEST = tl.constexpr(-8.0)
ROUNDS = tl.constexpr(2)  # of Newton's method, from the last step's place
EVERYTHING = tl.constexpr(-1e30)  # a threshold below every score
LN2 = tl.constexpr(0.6931471805599453)
START = tl.constexpr(3.0)  # deviations above the mean score where thresholds are searched from
PARTS = tl.constexpr(16)  # a found key counts so much, see `gpu.scan.scan`


@triton.jit(do_not_specialize=["seed"])
def begin(SEEDS, COUNTS, FOUND, RHO, TRIM, BUDGET, seed, budget, GP: tl.constexpr):
    """What the steps of a head start from; grid (B * heads,).

    ``seed`` int32, of all heads -> SEEDS (B * heads,) int32, which `generator` mixes the step into; COUNTS (.., LINE)
    zero, FOUND (.., LINE) negative where no step was yet, RHO, TRIM and BUDGET (.., GP) float32.
    """
    head = tl.program_id(0)
    g = tl.arange(0, GP)
    line = tl.arange(0, LINE)
    own = mixed(seed.to(tl.uint32) ^ mixed(head.to(tl.uint32) + 0x9E3779B9))
    tl.store(SEEDS + head, own.to(tl.int32, bitcast=True))
    tl.store(COUNTS + head * LINE + line, tl.zeros((LINE,), tl.int32))
    tl.store(FOUND + head * LINE + line, tl.where(line < GP, -1, 0))
    tl.store(RHO + head * GP + g, tl.full((GP,), START, tl.float32))
    tl.store(TRIM + head * GP + g, tl.zeros((GP,), tl.float32))
    tl.store(BUDGET + head * GP + g, tl.zeros((GP,), tl.float32) + budget)


@triton.jit
def _plane(q, MAP, plane, D: tl.constexpr, R: tl.constexpr):
    """q (D, GP) float32, queries as columns -> their plane (R, GP) float32."""
    d = tl.arange(0, D)
    r = tl.arange(0, R)
    rows = MAP + plane * (D + 1) * R
    m = tl.load(rows + d[None, :] * R + r[:, None])
    lift = tl.load(rows + D * R + r)
    return tl.dot(m, q, input_precision="tf32") + lift[:, None]


@triton.jit
def _quantised(z, sigma, out, MEANS, SPREADS, R: tl.constexpr):
    """Store a plane's integers; returns the mean (GP,) and the variance of its share of the keys' sums."""
    r = tl.arange(0, R)
    whole = tl.floor(z / sigma[None, :] + 0.5)
    tl.store(out, whole.to(tl.int8))
    mean = tl.sum(whole * tl.load(MEANS + r)[:, None], 0)
    return mean, tl.sum(whole * whole * tl.load(SPREADS + r)[:, None], 0)


@triton.jit
def _mills(x):
    """``(1 - Phi(x)) / phi(x)`` of the normal distribution, within 2 %: Sampford's bound (1953), and by symmetry."""
    y = tl.abs(x)
    right = 4.0 / (3.0 * y + tl.sqrt(y * y + 8.0))
    return tl.where(x >= 0, right, 2.5066283 * tl.exp(0.5 * tl.minimum(y * y, 160.0)) - right)


@triton.jit
def _normal_place(rho, deviation, target):
    """Where a threshold draws exp(target) of normal scores: rho such that E min(1, exp(deviation (x - rho))) is that.

    With x standard normal the mean is ``phi(rho) (mills(rho) + mills(deviation - rho))``, and its logarithm falls by
    ``deviation mills(deviation - rho) / (mills(rho) + mills(deviation - rho))`` per unit of rho.
    """
    for _ in range(ROUNDS):
        above, below = _mills(rho), _mills(deviation - rho)
        off = tl.log(above + below) - 0.5 * rho * rho - 0.9189385 - target
        slope = deviation * below / (above + below)
        step = off / tl.maximum(slope, 0.1)
        rho = tl.minimum(tl.maximum(rho + tl.minimum(tl.maximum(step, -1.5), 1.5), LOWEST), HIGHEST)
    return rho


@triton.jit
def _thresholds(
    Q, MAP, MEANS, SPREADS, FOUND, TRIM, RHO, BUDGET, COUNTS, QUERIES, SIGMA, TAU, LENGTHS, stride_b, stride_h, room,
    sinks, recent, head, heads, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    PLANES: tl.constexpr, GROW: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Quantise the G queries of a key-value head and set their thresholds.

    A threshold lies where it would draw BUDGET keys on average, were the head's estimated scores normal; their mean
    and deviation follow from the query and the codes' means and variances, axis by axis.  They are not normal, so it
    is moved by TRIM deviations, the query head's own, which follow from step to step how many keys the last threshold
    drew on average, FOUND / PARTS, against the budget.  The logarithm of that number falls by at most one per unit of
    threshold, so that the correction does not overshoot for a query of like deviation.  (A budget corrected instead,
    and put through the normal law, does: where that law takes most keys of a budget for certain, its threshold moves
    by many units, and heads whose scores have long tails drew nearly all keys and next to none by turns.)  Any
    threshold leaves the sums unbiased, because it does not depend on the step's own draw.  A budget beyond all keys
    draws them all.

    Q (B, heads * G, D) by strides, rows contiguous; MAP (B * heads, PLANES, D + 1, R), MEANS, SPREADS (.., PLANES, R)
    float32; BUDGET (.., GP) float32; FOUND (.., LINE) int32, negative where the last step is no measure
    -> QUERIES (.., PLANES, GP, R) int8, SIGMA, TAU (.., GP) float32; TRIM and RHO (the normal place, in deviations)
    moved, FOUND and COUNTS zero.
    """
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    r = tl.arange(0, R)
    rows = Q + (head // heads).to(tl.int64) * stride_b + ((head % heads) * G + g[None, :]) * stride_h
    q = tl.load(rows + d[:, None], mask=g[None, :] < G, other=0.0).to(tl.float32)
    rho = tl.load(RHO + head * GP + g)
    trim = tl.load(TRIM + head * GP + g)
    found = tl.load(FOUND + head * LINE + g)
    budget = tl.load(BUDGET + head * GP + g)
    start, stop = span(length(LENGTHS, head, room, GROW), sinks, recent)
    maps = MAP + head.to(tl.int64) * (PLANES * (D + 1) * R)
    z0 = _plane(q, maps, 0, D, R)
    z1 = _plane(q, maps, 1, D, R)
    largest = tl.maximum(tl.max(tl.abs(z0), 0), tl.max(tl.abs(z1), 0))
    if PLANES == 4:
        z2 = _plane(q, maps, 2, D, R)
        z3 = _plane(q, maps, 3, D, R)
        largest = tl.maximum(largest, tl.maximum(tl.max(tl.abs(z2), 0), tl.max(tl.abs(z3), 0)))
    sigma = tl.where(largest > 1e-30, largest * (1.0 / 127.0), 1.0)
    out = QUERIES + head * (PLANES * GP * R) + g[None, :] * R + r[:, None]
    stats = head * (PLANES * R)
    mean, spread = _quantised(z0, sigma, out, MEANS + stats, SPREADS + stats, R)
    more, wider = _quantised(z1, sigma, out + GP * R, MEANS + stats + R, SPREADS + stats + R, R)
    mean, spread = mean + more, spread + wider
    if PLANES == 4:
        more, wider = _quantised(z2, sigma, out + 2 * GP * R, MEANS + stats + 2 * R, SPREADS + stats + 2 * R, R)
        mean, spread = mean + more, spread + wider
        more, wider = _quantised(z3, sigma, out + 3 * GP * R, MEANS + stats + 3 * R, SPREADS + stats + 3 * R, R)
        mean, spread = mean + more, spread + wider
    deviation = tl.sqrt(tl.maximum(spread, 1e-20)) * sigma  # in base-2 scores, like the thresholds
    off = log2(tl.maximum(found.to(tl.float32), 1e-3) / (PARTS * budget), ASM)
    size = (stop - start).to(tl.float32)
    off = tl.where(found < 0, 0.0, tl.minimum(tl.maximum(off, -FARTHEST), FARTHEST))
    off = tl.where(size <= budget, 0.0, off)
    trim = tl.minimum(tl.maximum(trim + GAIN * off / tl.maximum(deviation, NARROWEST), -MOST), MOST)
    share = tl.minimum(budget / tl.maximum(size, 1.0), 1.0)
    flat = deviation < FLAT
    normal = _normal_place(rho, tl.maximum(deviation, FLAT) * LN2, log2(share, ASM) * LN2)
    rho = tl.where(flat, rho, normal)  # as it was: the next query may tell keys apart
    tl.store(TRIM + head * GP + g, trim)
    tl.store(RHO + head * GP + g, rho)
    tl.store(FOUND + head * LINE + g, tl.zeros((GP,), tl.int32))
    tl.store(SIGMA + head * GP + g, sigma)
    chancy = 0.5 * LN2 * deviation * deviation - log2(share, ASM)  # E 2 ** (deviation x - chancy) is the share
    place = tl.where(flat, chancy, rho * deviation) + trim * deviation
    tau = tl.where(size <= budget, EVERYTHING, mean * sigma + place)
    tl.store(TAU + head * GP + g, tl.where(g < G, tau, float("inf")))
    tl.store(COUNTS + head * LINE, 0)


@triton.jit
def prepare(
    Q, MAP, MEANS, SPREADS, FOUND, TRIM, RHO, BUDGET, COUNTS, QUERIES, SIGMA, TAU, stride_b, stride_h, sinks, recent,
    NEW_K, NEW_V, K, V, PAGES, KEY_MAP, MEAN, CENTRE, FLOOR, HALF, TOP, CODES, LENGTHS, a_b, a_h, b_b, b_h, k_b, k_h,
    k_n, k_p, v_b, v_h, v_n, v_p, most, room, heads, scale, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, ROW: tl.constexpr, PLANES: tl.constexpr, PAGE: tl.constexpr, GROW: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Thresholds of every head and, in a growing step, beside them its new token.

    grid (B * heads, 1 + GROW).  LENGTHS stay as they are until `gpu.gather.merge`
    raises them: the kernels of a growing step count the token on top.
    """
    head = tl.program_id(0)
    after_predecessor(PDL)
    successor_may_start(PDL)
    if tl.program_id(1) == 0:
        _thresholds(
            Q, MAP, MEANS, SPREADS, FOUND, TRIM, RHO, BUDGET, COUNTS, QUERIES, SIGMA, TAU, LENGTHS, stride_b, stride_h,
            room, sinks, recent, head, heads, G, GP, D, R, PLANES, GROW, ASM,
        )  # fmt: skip
    else:
        n = tl.load(LENGTHS + head)
        if n < room:
            write_token(
                n, head, NEW_K, NEW_V, K, V, PAGES, KEY_MAP, MEAN, CENTRE, FLOOR, HALF, TOP, CODES, a_b, a_h, b_b, b_h,
                k_b, k_h, k_n, k_p, v_b, v_h, v_n, v_p, most, room, heads, scale, D, R, ROW, PLANES, PAGE,
            )  # fmt: skip
