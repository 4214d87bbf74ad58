"""Before the scan: queries into code space, their thresholds, and beside them the new token's row and codes."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu.codes import after_predecessor, log2, successor_may_start
from gpu.encode import write_token

GAIN = tl.constexpr(0.5)  # of the correction from step to step: half, because queries differ
FARTHEST = tl.constexpr(4.0)  # base-2 logarithm of the largest correction of a number of keys
HIGHEST = tl.constexpr(12.0)  # deviations from the mean score between which thresholds stay
LOWEST = tl.constexpr(-8.0)
PARTS = tl.constexpr(16)  # a found key counts so much, see `gpu.scan.scan`


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
def _thresholds(
    Q, MAP, MEANS, SPREADS, FOUND, RHO, COUNTS, QUERIES, SIGMA, TAU, stride_b, stride_h, budget, head, heads,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Quantise the G queries of a key-value head and set their thresholds.

    A threshold lies RHO standard deviations of the head's estimated scores above their mean; both follow from the query
    and the codes' means and variances, axis by axis.  RHO is the query head's own and moves from step to step by how
    many keys the last threshold drew on average, FOUND / PARTS, against ``budget``: since the logarithm of that number
    falls by at most one per unit of threshold, the correction never overshoots for a like query.  Any threshold leaves
    the sums unbiased, because it does not depend on the step's own draw.

    Q (B, heads * G, D) by strides, rows contiguous; MAP (B * heads, PLANES, D + 1, R), MEANS, SPREADS (.., PLANES, R)
    float32; FOUND (.., GP) int32, negative where the last step is no measure -> QUERIES (.., PLANES, GP, R) int8,
    SIGMA, TAU (.., GP) float32; RHO moved, FOUND and COUNTS zero.
    """
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    r = tl.arange(0, R)
    rows = Q + (head // heads).to(tl.int64) * stride_b + ((head % heads) * G + g[None, :]) * stride_h
    q = tl.load(rows + d[:, None], mask=g[None, :] < G, other=0.0).to(tl.float32)
    rho = tl.load(RHO + head * GP + g)
    found = tl.load(FOUND + head * GP + g)
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
    deviation = tl.sqrt(tl.maximum(spread, 1e-20)) * sigma
    off = log2(tl.maximum(found.to(tl.float32), 1e-3) / (PARTS * budget), ASM)
    off = tl.where(found < 0, 0.0, tl.minimum(tl.maximum(off, -FARTHEST), FARTHEST))
    rho = tl.minimum(tl.maximum(rho + GAIN * off / tl.maximum(deviation, 1e-3), LOWEST), HIGHEST)
    tl.store(RHO + head * GP + g, rho)
    tl.store(FOUND + head * GP + g, tl.zeros((GP,), tl.int32))
    tl.store(SIGMA + head * GP + g, sigma)
    tl.store(TAU + head * GP + g, tl.where(g < G, mean * sigma + rho * deviation, float("inf")))
    tl.store(COUNTS + head, 0)


@triton.jit
def prepare(
    Q, MAP, MEANS, SPREADS, FOUND, RHO, COUNTS, QUERIES, SIGMA, TAU, stride_b, stride_h, budget, NEW_K, NEW_V, K, V,
    KEY_MAP, MEAN, CENTRE, FLOOR, HALF, TOP, CODES, LENGTHS, a_b, a_h, b_b, b_h, k_b, k_h, k_n, v_b, v_h, v_n, room,
    heads, scale, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROW: tl.constexpr,
    PLANES: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Thresholds of every head and, where the grid has a second column, beside them its new token.

    grid (B * heads, 1) or, for a growing step, (B * heads, 2).  LENGTHS stay as they are until `gpu.gather.merge`
    raises them: the kernels of a growing step count the token on top.
    """
    head = tl.program_id(0)
    after_predecessor(PDL)
    successor_may_start(PDL)
    if tl.program_id(1) == 0:
        _thresholds(
            Q, MAP, MEANS, SPREADS, FOUND, RHO, COUNTS, QUERIES, SIGMA, TAU, stride_b, stride_h, budget, head, heads, G,
            GP, D, R, PLANES, ASM,
        )  # fmt: skip
    else:
        n = tl.load(LENGTHS + head)
        if n < room:
            write_token(
                n, head, NEW_K, NEW_V, K, V, KEY_MAP, MEAN, CENTRE, FLOOR, HALF, TOP, CODES, a_b, a_h, b_b, b_h, k_b,
                k_h, k_n, v_b, v_h, v_n, room, heads, scale, D, R, ROW, PLANES,
            )  # fmt: skip
