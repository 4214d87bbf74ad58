"""The scan: every code is read once, its scores live in registers, and only drawn keys leave."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu.codes import (
    BLOCK,
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


@triton.jit
def scan(
    QUERIES, SIGMA, TAU, CODES, LENGTHS, SEEDS, DRAWN, COUNTS, room, cap, sinks, recent,
    R: tl.constexpr, PLANES: tl.constexpr, NIBBLES: tl.constexpr, GP: tl.constexpr, KEYS: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr, SYSTEMATIC: tl.constexpr, REDRAW: tl.constexpr, GROW: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draw keys by their estimated scores: the lifted half-space of `hsr.lifted`, one list per key-value head.

    grid (cdiv(room, KEYS * TILES), heads); keys are the M side of the integer products, KEYS a multiple of 64.

    QUERIES (heads, PLANES, GP, R) int8, SIGMA, TAU (heads, GP) float32: ``log2 pi = sum SIGMA - TAU``, TAU = +inf in
    padded rows; CODES (heads, room, R) bytes; LENGTHS (heads,) int32, SEEDS (heads,) int32
    -> DRAWN (heads, cap) int64, a key's id below ``pi * 2 ** (32 + UNIT)``, unordered between tiles, and COUNTS
    (heads,) int32, zero at the start.  A count above cap says that keys were drawn and not listed.

    A chance is rounded to a multiple of 2 ** -24, at least one, and that multiple is both drawn by and weighed by, so
    sums over the draw stay unbiased.  Systematic: within a block of 64, key j is drawn where the whole part of
    ``u + sum_{i <= j} pi_i`` grows; the whole part before it is its place among the block's draws.
    """
    head = tl.program_id(1)
    tile = tl.program_id(0) * TILES
    r = tl.arange(0, R)
    g = tl.arange(0, GP)
    key = tl.arange(0, KEYS)
    codes = CODES + head.to(tl.int64) * room * R
    if TILES == 1:  # codes do not depend on the kernel before, so they are asked for while it ends
        row = tl.minimum(tile * KEYS + key, room - 1)
        first = tl.load(codes + row[:, None] * R + r[None, :])
    after_predecessor(PDL)
    n = length(LENGTHS, head, room, GROW)
    start, stop = span(n, sinks, recent)
    if tile * KEYS < stop:
        sigma = tl.load(SIGMA + head * GP + g)
        tau = tl.load(TAU + head * GP + g)
        step = n if REDRAW else 0 * n
        seed = generator(tl.load(SEEDS + head), step)
        query = QUERIES + head * (PLANES * GP * R) + g[:, None] * R + r[None, :]
        q0 = tl.trans(tl.load(query))
        q1 = tl.trans(tl.load(query + GP * R))
        if PLANES == 4:
            q2 = tl.trans(tl.load(query + 2 * GP * R))
            q3 = tl.trans(tl.load(query + 3 * GP * R))
            mask = column_mask(R, NIBBLES, KEYS)
        for j in tl.range(0, TILES, num_stages=STAGES):
            base = (tile + j) * KEYS
            if TILES == 1:
                packed = first
            else:
                row = tl.minimum(base + key, room - 1)
                packed = tl.load(codes + row[:, None] * R + r[None, :])
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
            odds = tl.max(sums.to(tl.float32) * sigma[None, :] - tau[None, :], 1)
            odds = tl.reshape(odds, (KEYS // BLOCK, BLOCK))
            block = base // BLOCK + tl.arange(0, KEYS // BLOCK)
            index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            chance = (tl.exp2(tl.minimum(odds, 0.0) + UNIT)).to(tl.int32)
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
                place += (tl.atomic_add(COUNTS + head, total, sem="relaxed") + tl.cumsum(found, 0) - found)[:, None]
                place = tl.where(drawn, place, cap)
                entry = (chance.to(tl.int64) << 32) | index
                tl.store(DRAWN + head.to(tl.int64) * cap + place, entry, mask=place < cap)
