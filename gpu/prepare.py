"""Before the scan: queries into code space, and this step's thresholds from the last step's draw."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu.codes import (
    after_predecessor,
    column_mask,
    entry,
    length,
    log2,
    plane_four,
    plane_pair,
    span,
    successor_may_start,
)
from gpu.encode import write_token

LOWEST = tl.constexpr(-1e30)  # a threshold below every score


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
def _whole(z, sigma):
    return tl.floor(z / sigma[None, :] + 0.5).to(tl.int8)


@triton.jit
def _thresholds(
    Q, MAP, CODES, LENGTHS, DRAWN, COUNTS, QUERIES, SIGMA, TAU, stride_b, stride_h, room, cap, sinks, recent, budget,
    head, heads, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PLANES: tl.constexpr,
    NIBBLES: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr, LEAST: tl.constexpr, GROW: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Quantise the G queries of a key-value head and set their thresholds.

    Thresholds are such that a query head draws ``budget`` keys on average.  The number that a threshold would draw is
    estimated from at most SAMPLE keys of the last step's list, each standing for ``1 / pi`` keys: that is unbiased for
    any new query, and sharp while queries resemble each other.  A list of fewer than LEAST keys (the first step's is
    empty) gives way to evenly spaced keys.  No key stands for more than an eighth of the budget (or for its share of
    the evenly spaced), so that a chance draw cannot starve the next step.

    Q (B, heads * G, D) by strides, rows contiguous; MAP (B * heads, PLANES, D + 1, R) float32; DRAWN, COUNTS as
    `gpu.scan.scan` left them -> QUERIES (.., PLANES, GP, R) int8, SIGMA, TAU (.., GP) float32, COUNTS zero.
    """
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    r = tl.arange(0, R)
    i = tl.arange(0, SAMPLE)
    # the sample's addresses hang on each other, so they are asked for first
    count = tl.load(COUNTS + head)
    listed = tl.minimum(count, cap)
    n = length(LENGTHS, head, room, GROW)
    start, stop = span(n, sinks, recent)
    use_list = listed >= LEAST
    size = tl.where(use_list, listed, stop - start)
    taken = tl.minimum(size, SAMPLE)
    ok = i < taken
    place = tl.where(size > SAMPLE, (i.to(tl.int64) * size // SAMPLE).to(tl.int32), i)
    slot = head.to(tl.int64) * cap + place
    ids, logs = entry(tl.load(DRAWN + slot, mask=ok & use_list, other=0), ASM)
    ids = tl.where(use_list, ids, start + place)
    ids = tl.where(ok, ids, 0)
    packed = tl.load(CODES + (head.to(tl.int64) * room + ids)[:, None] * R + r[None, :])
    stands = size.to(tl.float32) / tl.maximum(taken, 1).to(tl.float32)  # entries that one of the sample stands for
    weight = tl.where(use_list, tl.minimum(stands * tl.exp2(-logs), tl.maximum(budget * 0.125, 1.0)), stands)
    weight = tl.where(ok, weight, 0.0)

    rows = Q + (head // heads).to(tl.int64) * stride_b + ((head % heads) * G + g[None, :]) * stride_h
    q = tl.load(rows + d[:, None], mask=g[None, :] < G, other=0.0).to(tl.float32)
    maps = MAP + head.to(tl.int64) * (PLANES * (D + 1) * R)
    z0 = _plane(q, maps, 0, D, R)
    z1 = _plane(q, maps, 1, D, R)
    largest = tl.maximum(tl.max(tl.abs(z0), 0), tl.max(tl.abs(z1), 0))
    if PLANES == 4:
        z2 = _plane(q, maps, 2, D, R)
        z3 = _plane(q, maps, 3, D, R)
        largest = tl.maximum(largest, tl.maximum(tl.max(tl.abs(z2), 0), tl.max(tl.abs(z3), 0)))
    sigma = tl.where(largest > 1e-30, largest * (1.0 / 127.0), 1.0)
    a0 = _whole(z0, sigma)
    a1 = _whole(z1, sigma)
    out = QUERIES + head * (PLANES * GP * R) + g[None, :] * R + r[:, None]
    tl.store(out, a0)
    tl.store(out + GP * R, a1)
    tl.store(SIGMA + head * GP + g, sigma)
    if PLANES == 4:
        a2 = _whole(z2, sigma)
        a3 = _whole(z3, sigma)
        tl.store(out + 2 * GP * R, a2)
        tl.store(out + 3 * GP * R, a3)
        b0, b1, b2, b3 = plane_four(packed, column_mask(R, NIBBLES, SAMPLE), ASM)
        sums = tl.dot(b0, a0, out_dtype=tl.int32)
        sums = tl.dot(b1, a1, acc=sums, out_dtype=tl.int32)
        sums = tl.dot(b2, a2, acc=sums, out_dtype=tl.int32)
        sums = tl.dot(b3, a3, acc=sums, out_dtype=tl.int32)
    else:
        b0, b1 = plane_pair(packed, ASM)
        sums = tl.dot(b0, a0, out_dtype=tl.int32)
        sums = tl.dot(b1, a1, acc=sums, out_dtype=tl.int32)

    scores = tl.where(ok[:, None], sums.to(tl.float32) * sigma[None, :], LOWEST)  # (SAMPLE, GP), base 2
    top = tl.max(scores, 0)
    mass = tl.sum(weight[:, None] * tl.exp2(scores - top[None, :]), 0)
    tau = top + log2(tl.maximum(mass, 1e-30) / budget, ASM)
    for _ in range(ROUNDS):  # from above: each round's step undershoots, as in `hsr.lifted`
        above = scores - tau[None, :]
        sure = tl.sum(tl.where(above >= 0, weight[:, None], 0.0), 0)
        chance = tl.sum(tl.where(above < 0, weight[:, None] * tl.exp2(above), 0.0), 0)
        short = tl.maximum(budget - sure, 0.01 * budget)
        step = log2(short / tl.maximum(chance, 1e-30), ASM)
        tau = tl.where(chance > 0, tl.maximum(tau - tl.maximum(step, 0.0), LOWEST), LOWEST)
    tau = tl.where(taken > 0, tau, 0.0)
    tl.store(TAU + head * GP + g, tl.where(g < G, tau, float("inf")))
    tl.store(COUNTS + head, 0)


@triton.jit
def prepare(
    Q, MAP, CODES, LENGTHS, DRAWN, COUNTS, QUERIES, SIGMA, TAU, stride_b, stride_h, room, cap, sinks, recent, budget,
    heads, NEW_K, NEW_V, K, V, KEY_MAP, MEAN, CENTRE, FLOOR, HALF, TOP, a_b, a_h, b_b, b_h, k_b, k_h, k_n, v_b, v_h,
    v_n, scale, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PLANES: tl.constexpr,
    NIBBLES: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr, LEAST: tl.constexpr, GROW: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries and thresholds of every head and, with GROW = 1, beside them its new token; grid (B * heads, 1 + GROW).

    LENGTHS stay as they are until `gpu.gather.merge` raises them: kernels of a growing step count the token on top.
    """
    head = tl.program_id(0)
    after_predecessor(PDL)
    successor_may_start(PDL)
    if tl.program_id(1) == 0:
        _thresholds(
            Q, MAP, CODES, LENGTHS, DRAWN, COUNTS, QUERIES, SIGMA, TAU, stride_b, stride_h, room, cap, sinks, recent,
            budget, head, heads, G, GP, D, R, PLANES, NIBBLES, SAMPLE, ROUNDS, LEAST, GROW, ASM,
        )  # fmt: skip
    else:
        n = tl.load(LENGTHS + head)
        if n < room:
            write_token(
                n, head, NEW_K, NEW_V, K, V, KEY_MAP, MEAN, CENTRE, FLOOR, HALF, TOP, CODES.to(tl.pointer_type(tl.uint8)),
                a_b, a_h, b_b, b_h, k_b, k_h, k_n, v_b, v_h, v_n, room, heads, scale, D, R, PLANES,
            )  # fmt: skip
