"""The scan: every code is read once, its scores live in registers, and only drawn keys leave."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu.codes import (
    BLOCK,
    LINE,
    UNIT,
    after_predecessor,
    column_mask,
    generator,
    length,
    plane_four,
    plane_pair,
    span,
    uniform,
)

WHOLE = tl.constexpr(16777216.0)  # 2 ** UNIT
PARTS = tl.constexpr(16)  # a found key counts so much in FOUND
STEEP = tl.constexpr(16.0)  # a list that is full lowers chances by 2 ** -STEEP


@triton.jit
def _compact(x, ANY, KEYS: tl.constexpr):
    """x (KEYS,) as it is, but spread over the threads without repeats.

    The products leave every key's maximum in four threads, and all that follows would be done four times over.  A load
    has a layout of its own, so that what stands in for masked elements must come in it: none is read here.
    """
    key = tl.arange(0, KEYS)
    return tl.load(ANY + key, mask=key < 0, other=x, volatile=True)  # volatile: not worth pipelining


@triton.jit
def scan(
    QUERIES, SIGMA, TAU, CODES, LENGTHS, SEEDS, DRAWN, COUNTS, FOUND, room, cap, sinks, recent, crowd,
    R: tl.constexpr, ROW: tl.constexpr, PLANES: tl.constexpr, NIBBLES: tl.constexpr, GP: tl.constexpr,
    KEYS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, SYSTEMATIC: tl.constexpr, REDRAW: tl.constexpr,
    GROW: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draw keys by their estimated scores: the lifted half-space of `hsr.lifted`, one list per key-value head.

    grid (cdiv(room, KEYS * TILES), heads); keys are the M side of the integer products, KEYS a multiple of 64.

    QUERIES (heads, PLANES, GP, R) int8, SIGMA, TAU (heads, GP) float32: ``log2 pi = sum SIGMA - TAU``, TAU = +inf in
    padded rows; CODES (heads, room, ROW) bytes, ROW at most R; LENGTHS (heads,) int32, SEEDS (heads,) int32
    -> DRAWN (heads, cap) int64, a key's id below ``pi * 2 ** (32 + UNIT)``, unordered between tiles; COUNTS (heads,
    LINE) int32, first column, zero at the start, above cap where keys were drawn and not listed; FOUND (heads, LINE)
    int32, first GP columns, PARTS times how many keys each query head alone draws on average, as the draw estimates it.

    A chance is rounded to a multiple of 2 ** -24, at least one, and that multiple is both drawn by and weighed by, so
    sums over the draw stay unbiased.  Systematic: within a block of 64, key j is drawn where the whole part of
    ``u + sum_{i <= j} pi_i`` grows; the whole part before it is its place among the block's draws.

    The guard: tiles that find more than ``crowd`` keys listed lower all chances, the more the fuller the list.  Each
    key's chance then depends on the draws of others and not on its own, so that sums stay unbiased; only which keys are
    drawn depends on the order in which tiles run.
    """
    head = tl.program_id(1)
    tile = tl.program_id(0) * TILES
    r = tl.arange(0, R)
    g = tl.arange(0, GP)
    key = tl.arange(0, KEYS)
    codes = CODES + head.to(tl.int64) * room * ROW
    if TILES == 1:  # codes do not depend on the kernel before, so they are asked for while it ends
        row = tl.minimum(tile * KEYS + key, room - 1)
        if ROW == R:
            first = tl.load(codes + row[:, None] * ROW + r[None, :])
        else:
            first = tl.load(codes + row[:, None] * ROW + r[None, :], mask=r[None, :] < ROW, other=0)
    n = length(LENGTHS, head, room, GROW)  # nor do these
    start, stop = span(n, sinks, recent)
    seed = generator(tl.load(SEEDS + head), n if REDRAW else 0 * n)
    after_predecessor(PDL)
    query = QUERIES + head * (PLANES * GP * R) + g[:, None] * R + r[None, :]
    q0 = tl.trans(tl.load(query))
    q1 = tl.trans(tl.load(query + GP * R))
    if PLANES == 4:
        q2 = tl.trans(tl.load(query + 2 * GP * R))
        q3 = tl.trans(tl.load(query + 3 * GP * R))
        mask = column_mask(R, NIBBLES, KEYS)
    sigma = tl.load(SIGMA + head * GP + g)
    tau = tl.load(TAU + head * GP + g)
    over = tl.load(COUNTS + head * LINE, cache_modifier=".cg") - crowd
    top = UNIT - STEEP * tl.maximum(over, 0).to(tl.float32) / (cap - crowd).to(tl.float32)
    if tile * KEYS < stop:
        for j in tl.range(0, TILES, num_stages=STAGES):
            base = (tile + j) * KEYS
            if TILES == 1:
                packed = first
            else:
                row = tl.minimum(base + key, room - 1)
                if ROW == R:
                    packed = tl.load(codes + row[:, None] * ROW + r[None, :])
                else:
                    packed = tl.load(codes + row[:, None] * ROW + r[None, :], mask=r[None, :] < ROW, other=0)
            if PLANES == 4:
                a, b, c, d = plane_four(packed, mask, ASM)
                sums = tl.dot(a, q0, out_dtype=tl.int32)
                sums = tl.dot(b, q1, acc=sums, out_dtype=tl.int32)
                sums = tl.dot(c, q2, acc=sums, out_dtype=tl.int32)
                sums = tl.dot(d, q3, acc=sums, out_dtype=tl.int32)
            else:
                a, b = plane_pair(packed, ASM)
                sums = tl.dot(a, q0, out_dtype=tl.int32)
                sums = tl.dot(b, q1, acc=sums, out_dtype=tl.int32)
            each = sums.to(tl.float32) * sigma[None, :] - tau[None, :]
            odds = tl.reshape(_compact(tl.max(each, 1), TAU, KEYS), (KEYS // BLOCK, BLOCK))
            block = base // BLOCK + tl.arange(0, KEYS // BLOCK)
            index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            chance = tl.exp2(tl.minimum(odds, 0.0) + top).to(tl.int32)
            chance = tl.where((index >= start) & (index < stop), tl.maximum(chance, 1), 0)
            if SYSTEMATIC:
                after = tl.cumsum(chance, 1) + uniform(seed, block)[:, None]
                before = after - chance
                drawn = (after >> UNIT) > (before >> UNIT)
                found = tl.max(after, 1) >> UNIT
                place = before >> UNIT
            else:
                drawn = uniform(seed, index) < chance
                one = drawn.to(tl.int32)
                found = tl.sum(one, 1)
                place = tl.cumsum(one, 1) - one
            total = tl.sum(found, 0)
            if total > 0:
                place += (tl.atomic_add(COUNTS + head * LINE, total, sem="relaxed") + tl.cumsum(found, 0) - found)[
                    :, None
                ]
                place = tl.where(drawn, place, cap)
                listed = (chance.to(tl.int64) << 32) | index
                tl.store(DRAWN + head.to(tl.int64) * cap + place, listed, mask=place < cap)
                stands = tl.where(drawn, WHOLE / tl.maximum(chance, 1).to(tl.float32), 0.0)
                alone = tl.exp2(tl.minimum(each, 0.0)) * tl.reshape(stands, (KEYS,))[:, None]
                number = tl.minimum(tl.sum(alone, 0) * PARTS, 1e8).to(tl.int32)
                tl.atomic_add(FOUND + head * LINE + g, number, sem="relaxed")
