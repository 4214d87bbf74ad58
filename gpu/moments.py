"""What a cache learns from a sample when codes are made: of its tokens before, of its codes after.

The sample is at most SAMPLE evenly spaced tokens of each sequence, so that its cost does not grow with the cache.
Lengths are read where they lie, on the device: the host waits for nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu.codes import BLOCK, places
from hsr import coder

SAMPLE = tl.constexpr(coder.SAMPLE)
PARTS = tl.constexpr(8)  # programs that share a head's sample
TILE = tl.constexpr(64)  # tokens that a program reads at a time
ROWS = tl.constexpr(64)  # rows of a second moment that a program holds in registers
STRIP = tl.constexpr(8)  # rows of it that are merged at a time
CODES_TILE = tl.constexpr(256)
COLUMNS = tl.constexpr(32)  # of codes, of a program
NEAR = tl.constexpr(0.1)  # as in `attention.values`: nearer values are sampled as if so far from the centre
TINY = tl.constexpr(1e-30)


@triton.jit
def _cut(many, part):
    """First of the ``many`` sampled tokens that lies in a part, or beyond the part before."""
    return many * part // PARTS


@triton.jit
def _evenly(i, n, many):
    """``i n // many``, the place of the i-th of ``many`` tokens spaced evenly among n; i and many are at most SAMPLE.

    It fits int32, which the product itself does not.
    """
    return i * (n // many) + i * (n % many) // many


@triton.jit
def _tile(X, PAGES, o, last, n, many, columns, batch, most, stride, page_stride, PAGE: tl.constexpr):
    """Sampled tokens o < last of X, some columns of theirs, float32 (TILE, columns); zero from ``last`` on."""
    rows = places(_evenly(tl.minimum(o, last - 1), n, many), PAGES, batch, most, stride, page_stride, PAGE)
    return tl.load(X + rows[:, None] + columns[None, :], mask=(o < last)[:, None], other=0.0).to(tl.float32)


@triton.jit
def accumulate(
    K, V, PAGES, LENGTHS, MEANS, MOMENTS, GREATEST, k_b, k_h, k_n, k_p, v_b, v_h, v_n, v_p, most, heads,
    D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A part of a head's sample; grid (PARTS, B * heads, D / ROWS + 1), the last of which looks at the keys.

    K, V (B, heads, n, D) by strides, in pages of PAGE tokens if that is not 0; LENGTHS (B * heads,) int32, at least 1
    -> MEANS (B * heads, PARTS, D) float32 of the part's values, MOMENTS (.., PARTS, D, D) their products about it,
    summed, GREATEST (.., PARTS) the largest squared length of a key.  Zeros where a part is empty.  A part has its own
    mean so that nothing cancels, however far the values lie from the origin.
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    rows = tl.program_id(2)
    n = tl.load(LENGTHS + head)
    many = tl.minimum(n, SAMPLE)
    first = _cut(many, part)
    last = _cut(many, part + 1)
    d = tl.arange(0, D)
    o = tl.arange(0, TILE)
    batch = (head // heads).to(tl.int64)
    inner = (head % heads).to(tl.int64)
    out = head.to(tl.int64) * PARTS + part
    if rows == D // ROWS:
        keys = K + batch * k_b + inner * k_h
        longest = tl.zeros((TILE,), tl.float32)
        for i in range(first, last, TILE):
            k = _tile(keys, PAGES, i + o, last, n, many, d, batch, most, k_n, k_p, PAGE)
            longest = tl.maximum(longest, tl.sum(k * k, 1))
        tl.store(GREATEST + out, tl.max(longest, 0))
    else:
        values = V + batch * v_b + inner * v_h
        r = rows * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((D,), tl.float32)
        some = tl.zeros((ROWS,), tl.float32)
        for i in range(first, last, TILE):
            total += tl.sum(_tile(values, PAGES, i + o, last, n, many, d, batch, most, v_n, v_p, PAGE), 0)
            some += tl.sum(_tile(values, PAGES, i + o, last, n, many, r, batch, most, v_n, v_p, PAGE), 0)
        size = tl.maximum(last - first, 1).to(tl.float32)
        total /= size
        some /= size
        products = tl.zeros((ROWS, D), tl.float32)
        for i in range(first, last, TILE):
            v = _tile(values, PAGES, i + o, last, n, many, d, batch, most, v_n, v_p, PAGE) - total[None, :]
            w = _tile(values, PAGES, i + o, last, n, many, r, batch, most, v_n, v_p, PAGE) - some[None, :]
            w = tl.where((i + o < last)[:, None], w, 0.0)  # one factor of a product is enough
            products = tl.dot(tl.trans(w), v, products, input_precision="tf32")
        tl.store(MOMENTS + (out * D + r[:, None]) * D + d[None, :], products)
        if rows == 0:
            tl.store(MEANS + out * D + d, total)


@triton.jit
def merge(MEANS, MOMENTS, GREATEST, LENGTHS, CENTRE, DISTANCE, FLOOR, LONGEST, DIRECTIONS, D: tl.constexpr):
    """Parts of `accumulate` -> what the sample says of a head; grid (B * heads,), all float32.

    CENTRE (B * heads, D): mean value; DISTANCE (..,): root mean square of the values' distances from it; FLOOR (..,):
    NEAR times that; LONGEST (..,): length of the longest key; DIRECTIONS (..,): tr(M)^2 / ||M||_F^2 of the values'
    second moment M about the centre, the number of directions that they fill.
    """
    head = tl.program_id(0)
    many = tl.minimum(tl.load(LENGTHS + head), SAMPLE)
    p = tl.arange(0, PARTS)
    d = tl.arange(0, D)
    strip = tl.arange(0, STRIP)
    base = head.to(tl.int64) * PARTS
    means = MEANS + base * D
    sizes = (_cut(many, p + 1) - _cut(many, p)).to(tl.float32)
    centre = tl.sum(tl.load(means + p[:, None] * D + d[None, :]) * sizes[:, None], 0) / many.to(tl.float32)
    trace = tl.zeros((STRIP,), tl.float32)
    square = tl.zeros((STRIP,), tl.float32)
    for i in range(0, D, STRIP):
        rows = i + strip
        middle = tl.sum(tl.load(means + p[:, None] * D + rows[None, :]) * sizes[:, None], 0) / many.to(tl.float32)
        moment = tl.zeros((STRIP, D), tl.float32)
        for part in tl.static_range(PARTS):
            size = (_cut(many, part + 1) - _cut(many, part)).to(tl.float32)
            across = tl.load(means + part * D + d) - centre
            down = tl.load(means + part * D + rows) - middle
            moment += tl.load(MOMENTS + ((base + part) * D + rows[:, None]) * D + d[None, :])
            moment += size * down[:, None] * across[None, :]
        trace += tl.sum(tl.where(rows[:, None] == d[None, :], moment, 0.0), 1)
        square += tl.sum(moment * moment, 1)
    whole = tl.sum(trace, 0)
    distance = tl.sqrt(whole / many.to(tl.float32)) + TINY
    tl.store(CENTRE + head * D + d, centre)
    tl.store(DISTANCE + head, distance)
    tl.store(FLOOR + head, distance * NEAR)
    tl.store(LONGEST + head, tl.sqrt(tl.max(tl.load(GREATEST + base + p), 0)))
    tl.store(DIRECTIONS + head, whole * whole / (tl.sum(square, 0) + TINY))


@triton.jit
def codes(
    CODES, LENGTHS, TOP, MEANS, SPREADS, most, room, R: tl.constexpr, ROW: tl.constexpr, PLANES: tl.constexpr,
    NEWEST: tl.constexpr,
):  # fmt: skip
    """Means and variances of codes; grid (R / COLUMNS, PLANES, B * heads).

    CODES (B * heads, room, ROW) uint8, of which the whole blocks of LENGTHS (..,) are coded, TOP (PLANES, R) float32
    -> MEANS, SPREADS (B * heads, PLANES, R) float32 over the ``most`` newest of them, or over as many evenly spaced
    ones; zeros where there are none.  ``most`` is at most SAMPLE.  Sums are of integers, so a column of one code has no
    variance at all.
    """
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    plane = tl.program_id(1)
    head = tl.program_id(2)
    stop = tl.load(LENGTHS + head) // BLOCK * BLOCK
    many = tl.minimum(stop, most)
    start = stop - many if NEWEST else 0
    top = tl.load(TOP + plane * R + c).to(tl.int32)
    shift = 4 * (plane & 1) + 2 * (plane >> 1)
    total = tl.zeros((CODES_TILE, COLUMNS), tl.int32)
    square = tl.zeros((CODES_TILE, COLUMNS), tl.int32)
    for i in range(0, many, CODES_TILE):
        o = i + tl.arange(0, CODES_TILE)
        at = start + _evenly(o, stop - start, many)
        held = (o < many)[:, None] & (c < ROW)[None, :]
        rows = CODES + (head.to(tl.int64) * room + at[:, None]) * ROW
        code = (tl.load(rows + c[None, :], mask=held, other=0).to(tl.int32) >> shift) & top[None, :]
        total += code
        square += code * code
    total = tl.sum(total.to(tl.int64), 0)
    square = tl.sum(square.to(tl.int64), 0)
    size = tl.maximum(many, 1).to(tl.int64)
    out = (head * PLANES + plane) * R + c
    tl.store(MEANS + out, total.to(tl.float32) / size.to(tl.float32))
    tl.store(SPREADS + out, (size * square - total * total).to(tl.float32) / (size * size).to(tl.float32))
