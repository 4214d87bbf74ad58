"""Codes of keys: all whole blocks at once after prefill, and one token at a time in place."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu.codes import BLOCK, after_predecessor, places


@triton.jit
def _plane_codes(k, lift, MAP, HALF, TOP, plane, D: tl.constexpr, R: tl.constexpr):
    """Centred k (64, D), lift (64,) float32 -> codes (64, R) int32 of one plane."""
    d = tl.arange(0, D)
    r = tl.arange(0, R)
    rows = MAP + plane * (D + 1) * R
    m = tl.load(rows + d[:, None] * R + r[None, :])
    z = tl.dot(k, m, input_precision="tf32") + lift[:, None] * tl.load(rows + D * R + r)[None, :]
    half = tl.load(HALF + plane * R + r)[None, :]
    top = tl.load(TOP + plane * R + r)[None, :]
    return tl.minimum(tl.maximum(tl.floor(z) + half, 0.0), top).to(tl.int32)


@triton.jit
def _block_codes(
    k, v, MAP, MEAN, CENTRE, FLOOR, HALF, TOP, head, scale, D: tl.constexpr, R: tl.constexpr, PLANES: tl.constexpr
):
    """k, v (64, D) float32 of a head -> rows of codes (64, R) uint8; the lift is ln max(|v - centre|, floor)."""
    d = tl.arange(0, D)
    far = v - tl.load(CENTRE + head * D + d)[None, :]
    lift = tl.log(tl.maximum(tl.sqrt(tl.sum(far * far, 1)), tl.load(FLOOR + head))) / scale
    lift -= tl.load(MEAN + head * (D + 1) + D)
    k -= tl.load(MEAN + head * (D + 1) + d)[None, :]
    maps = MAP + head.to(tl.int64) * (PLANES * (D + 1) * R)
    codes = tl.zeros((BLOCK, R), tl.int32)
    for plane in tl.range(0, PLANES, num_stages=1):  # unrolled, the products would not fit the registers
        codes |= _plane_codes(k, lift, maps, HALF, TOP, plane, D, R) << (4 * (plane & 1) + 2 * (plane >> 1))
    return codes.to(tl.uint8)


@triton.jit
def encode(
    K, V, PAGES, MAP, MEAN, CENTRE, FLOOR, HALF, TOP, CODES, k_b, k_h, k_n, k_p, v_b, v_h, v_n, v_p, most, room, heads,
    scale, D: tl.constexpr, R: tl.constexpr, ROW: tl.constexpr, PLANES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Code blocks of 64 keys; grid (blocks, B * heads), CODES (B * heads, room, ROW) uint8, ROW at most R.

    K, V (B, heads, n, D) by strides, in pages of PAGE tokens if that is not 0 (see `gpu.codes.places`);
    MAP (B * heads, PLANES, D + 1, R), MEAN (.., D + 1), CENTRE (.., D), FLOOR (..,),
    HALF and TOP (PLANES, R), all float32: `gpu.planes.Planes` and the values' `attention.values.Values.lift`.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, D)
    r = tl.arange(0, R)
    o = block * BLOCK + tl.arange(0, BLOCK)
    batch = (head // heads).to(tl.int64)
    inner = (head % heads).to(tl.int64)
    k_row = places(o, PAGES, batch, most, k_n, k_p, PAGE)[:, None]
    v_row = places(o, PAGES, batch, most, v_n, v_p, PAGE)[:, None]
    k = tl.load(K + batch * k_b + inner * k_h + k_row + d[None, :]).to(tl.float32)
    v = tl.load(V + batch * v_b + inner * v_h + v_row + d[None, :]).to(tl.float32)
    codes = _block_codes(k, v, MAP, MEAN, CENTRE, FLOOR, HALF, TOP, head, scale, D, R, PLANES)
    tl.store(CODES + (head.to(tl.int64) * room + o[:, None]) * ROW + r[None, :], codes, mask=r[None, :] < ROW)


@triton.jit
def write_token(
    n, head, NEW_K, NEW_V, K, V, PAGES, MAP, MEAN, CENTRE, FLOOR, HALF, TOP, CODES, a_b, a_h, b_b, b_h, k_b, k_h, k_n,
    k_p, v_b, v_h, v_n, v_p, most, room, heads, scale, D: tl.constexpr, R: tl.constexpr, ROW: tl.constexpr,
    PLANES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Write a head's token at position n < room and, where it fills a block, the block's codes."""
    d = tl.arange(0, D)
    r = tl.arange(0, R)
    batch = (head // heads).to(tl.int64)
    inner = (head % heads).to(tl.int64)
    keys = K + batch * k_b + inner * k_h
    values = V + batch * v_b + inner * v_h
    new_k = tl.load(NEW_K + batch * a_b + inner * a_h + d)
    new_v = tl.load(NEW_V + batch * b_b + inner * b_h + d)
    tl.store(keys + places(n, PAGES, batch, most, k_n, k_p, PAGE) + d, new_k)
    tl.store(values + places(n, PAGES, batch, most, v_n, v_p, PAGE) + d, new_v)
    if n % BLOCK == BLOCK - 1:
        o = n - BLOCK + 1 + tl.arange(0, BLOCK)
        old = (o < n)[:, None]  # the new row is taken from registers: its store may not have landed
        k_row = places(o, PAGES, batch, most, k_n, k_p, PAGE)[:, None]
        v_row = places(o, PAGES, batch, most, v_n, v_p, PAGE)[:, None]
        k = tl.load(keys + k_row + d[None, :], mask=old, other=0.0)
        v = tl.load(values + v_row + d[None, :], mask=old, other=0.0)
        k = tl.where(old, k, new_k[None, :]).to(tl.float32)
        v = tl.where(old, v, new_v[None, :]).to(tl.float32)
        codes = _block_codes(k, v, MAP, MEAN, CENTRE, FLOOR, HALF, TOP, head, scale, D, R, PLANES)
        tl.store(CODES + (head.to(tl.int64) * room + o[:, None]) * ROW + r[None, :], codes, mask=r[None, :] < ROW)


@triton.jit
def append(
    NEW_K, NEW_V, K, V, PAGES, MAP, MEAN, CENTRE, FLOOR, HALF, TOP, CODES, LENGTHS, STATUS, a_b, a_h, b_b, b_h, k_b,
    k_h, k_n, k_p, v_b, v_h, v_n, v_p, most, room, heads, scale, D: tl.constexpr, R: tl.constexpr, ROW: tl.constexpr,
    PLANES: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add one token; grid (B * heads,).

    NEW_K, NEW_V (B, heads, D) by strides.  A head's program alone reads and raises its length.  A full cache stays as
    it is, and STATUS (B * heads, 4) counts the token as refused in its last column.
    """
    head = tl.program_id(0)
    after_predecessor(PDL)
    n = tl.load(LENGTHS + head)
    if n < room:
        write_token(
            n, head, NEW_K, NEW_V, K, V, PAGES, MAP, MEAN, CENTRE, FLOOR, HALF, TOP, CODES, a_b, a_h, b_b, b_h, k_b,
            k_h, k_n, k_p, v_b, v_h, v_n, v_p, most, room, heads, scale, D, R, ROW, PLANES, PAGE,
        )  # fmt: skip
        tl.store(LENGTHS + head, n + 1)
    else:
        tl.store(STATUS + head * 4 + 3, tl.load(STATUS + head * 4 + 3) + 1)
