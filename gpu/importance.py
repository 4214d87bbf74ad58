"""Importance of keys to blocks of query rows, a byte each: the kernels of `gpu.block_sampled` that read keys.

`pool` reads keys and values once; `normalise` finds what the representative rows' weights sum to, from mean keys;
`code` scores every key against every representative row.  Codes are defined in `attention.listed_reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu.codes import LOG2E

LEVELS = tl.constexpr(256)  # codes
MIDDLE = tl.constexpr(223)  # the code of importance 1
EIGHTHS = tl.constexpr(8.0)  # steps of an octave
FARTHEST = tl.constexpr(32.0)  # a value's distance counts within 2 ** (+-FARTHEST / EIGHTHS) of the typical one


@triton.jit
def pool(
    K, V, MEANS, FAR, k_b, k_h, k_n, v_b, v_h, v_n, keys, groups, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Grid (blocks of KEYS keys, B * groups): MEANS (B * groups, keys // KEYS, D), mean keys of whole blocks.

    MEANS are of K's dtype; FAR (B * groups, keys up to whole blocks) int8 is every value's distance from the first
    block's mean, in eighths of octaves of what is typical there.
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = head // groups
    inner = head % groups
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    o = tl.arange(0, KEYS)
    j = block * KEYS + o
    v_base = V + batch * v_b + inner * v_h
    near = tl.minimum(keys, KEYS)
    first = tl.load(v_base + o.to(tl.int64)[:, None] * v_n + e[None, :], mask=o[:, None] < near, other=0.0)
    first = first.to(tl.float32)
    centre = tl.sum(first, 0) / near
    typical = (
        tl.sum(tl.where(o < near, tl.sum((first - centre[None, :]) * (first - centre[None, :]), 1), 0.0), 0) / near
    )
    v = tl.load(v_base + j.to(tl.int64)[:, None] * v_n + e[None, :], mask=j[:, None] < keys, other=0.0).to(tl.float32)
    square = tl.sum((v - centre[None, :]) * (v - centre[None, :]), 1)
    octaves = (tl.log2(tl.maximum(square, 1e-38)) - tl.log2(tl.maximum(typical, 1e-38))) * (EIGHTHS / 2)
    far = tl.where(typical > 0, tl.minimum(tl.maximum(tl.floor(octaves + 0.5), -FARTHEST), FARTHEST), 0.0)
    tl.store(FAR + head * (tl.num_programs(0) * KEYS) + j, far.to(tl.int8))
    if (block + 1) * KEYS <= keys:
        k = tl.load(K + batch * k_b + inner * k_h + j.to(tl.int64)[:, None] * k_n + d[None, :]).to(tl.float32)
        mean = tl.sum(k, 0) / KEYS
        tl.store(MEANS + (head * (keys // KEYS) + block) * D + d, mean.to(MEANS.dtype.element_ty))


@triton.jit
def _representative(line, r, rows, R: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """Row r of those that speak for a block of rows."""
    if CAUSAL:
        row = tl.maximum(line * ROWS - r * (ROWS // R), 0)
    else:
        row = tl.minimum(line * ROWS + (2 * r + 1) * (ROWS // 2) // R, rows - 1)
    return row


@triton.jit
def _joined(m, total, s):
    """Running maximum and sum of base-2 powers with scores s (M, N) more; -inf adds nothing."""
    higher = tl.maximum(m, tl.max(s, 1))
    anchor = tl.where(higher == -float("inf"), 0.0, higher)
    return higher, total * tl.exp2(m - anchor) + tl.sum(tl.exp2(s - anchor[:, None]), 1)


@triton.jit
def normalise(
    Q, K, MEANS, SUMS, SHARES, q_b, q_h, q_m, k_b, k_h, k_n, rows, keys, heads, first_head, lines, scale,
    G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Grid (groups of LINES lines, heads at work): SUMS (heads at work, lines, R) float32, base-2 log-sums.

    They are of the representative rows' weights, exact over the first key block and over the band, from mean keys
    elsewhere.  SHARES (heads at work, keys // KEYS, lines) float32: the square of the mean of the rows' shares of
    weight, per key of a block, by its mean key; written where the block is eligible.
    """
    group = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)  # of those at work
    batch = (first_head + head) // heads
    inner = (first_head + head) % heads
    c = tl.arange(0, LINES * R)
    d = tl.arange(0, D)
    o = tl.arange(0, KEYS)
    shift = keys - rows
    of = group * LINES + c // R
    row = tl.minimum(_representative(of, c % R, rows, R, ROWS, CAUSAL), rows - 1)
    edge = (shift + of * ROWS) // KEYS * KEYS
    position = shift + row
    q = tl.load(Q + batch * q_b + inner * q_h + row.to(tl.int64)[:, None] * q_m + d[None, :])
    k_base = K + batch * k_b + (inner // G) * k_h
    factor = scale * LOG2E
    m = tl.full((LINES * R,), -float("inf"), tl.float32)
    total = tl.zeros((LINES * R,), tl.float32)
    begin = (shift + group * LINES * ROWS) // KEYS * KEYS
    for at in tl.range(begin - KEYS, tl.max(position, 0) + 1, KEYS):
        first = tl.where(at < begin, 0, at)  # the first key block, then the bands
        j = first + o
        k = tl.load(k_base + j.to(tl.int64)[:, None] * k_n + d[None, :], mask=j[:, None] < keys, other=0.0)
        s = tl.dot(q, tl.trans(k)) * factor
        band = (j[None, :] >= edge[:, None]) & (j[None, :] <= position[:, None]) & (at >= begin)
        s = tl.where(band | ((at < begin) & (edge >= KEYS)[:, None]), s, -float("inf"))
        m, total = _joined(m, total, s)
    whole = keys // KEYS
    most = tl.max(edge, 0) // KEYS
    means = MEANS + (batch * (heads // G) + inner // G) * whole * D
    for at in tl.range(0, most, KEYS):
        J = at + o
        mean = tl.load(means + J[:, None] * D + d[None, :], mask=J[:, None] < whole, other=0.0)
        s = tl.dot(q, tl.trans(mean)) * factor + tl.log2(KEYS * 1.0)
        eligible = (J > 0)[None, :] & ((J + 1)[None, :] * KEYS <= edge[:, None])
        m, total = _joined(m, total, tl.where(eligible, s, -float("inf")))
    log = m + tl.log2(total)
    tl.store(SUMS + (head * lines + of) * R + c % R, log, mask=of < lines)
    line = group * LINES + tl.arange(0, LINES)
    for at in tl.range(0, most, KEYS):
        J = at + o
        mean = tl.load(means + J[:, None] * D + d[None, :], mask=J[:, None] < whole, other=0.0)
        s = tl.dot(q, tl.trans(mean)) * factor + tl.log2(KEYS * 1.0) - log[:, None]
        share = tl.sum(tl.reshape(tl.exp2(tl.minimum(s, 0.0)), (LINES, R, KEYS)), 1) / (R * KEYS)
        share = share * share
        to = SHARES + (head * whole + J)[None, :] * lines + line[:, None]
        tl.store(to, share, mask=(J[None, :] < whole) & (line[:, None] < lines))


@triton.jit
def code(
    Q, K, SUMS, SHARES, FAR, CODES, q_b, q_h, q_m, k_b, k_h, k_n, rows, keys, heads, first_head, lines, room, scale,
    G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (groups of LINES lines, heads at work): CODES (heads at work, lines, room) uint8 of every eligible key.

    The square of an importance is the mean square of the representative rows' probabilities and that of their share by
    the block's mean key, together.  Its exponent and first two bits are the code: eighths of octaves, or nearly.
    """
    group = tl.num_programs(0) - 1 - tl.program_id(0)  # those with most keys first
    head = tl.program_id(1).to(tl.int64)  # of those at work
    batch = (first_head + head) // heads
    inner = (first_head + head) % heads
    c = tl.arange(0, LINES * R)
    line = group * LINES + tl.arange(0, LINES)
    d = tl.arange(0, D)
    o = tl.arange(0, KEYS)
    shift = keys - rows
    of = group * LINES + c // R
    here = of < lines
    row = tl.minimum(_representative(of, c % R, rows, R, ROWS, CAUSAL), rows - 1)
    edge = (shift + line * ROWS) // KEYS * KEYS
    q = tl.load(Q + batch * q_b + inner * q_h + row.to(tl.int64)[:, None] * q_m + d[None, :])
    log = tl.load(SUMS + (head * lines + of) * R + c % R, mask=here, other=float("inf"))
    k_base = K + batch * k_b + (inner // G) * k_h
    far_base = FAR + (batch * (heads // G) + inner // G) * (tl.cdiv(keys, KEYS) * KEYS)
    factor = scale * LOG2E
    most = tl.max(tl.where(line < lines, edge, 0), 0)
    for first in tl.range(0, most, KEYS, num_stages=STAGES):
        j = first + o
        k = tl.load(k_base + j.to(tl.int64)[:, None] * k_n + d[None, :])
        s = tl.dot(k, tl.trans(q)) * factor - log[None, :]
        square = tl.exp2(2.0 * tl.minimum(s, 0.0))
        share = tl.load(SHARES + (head * (keys // KEYS) + first // KEYS) * lines + line, mask=line < lines, other=0.0)
        x = tl.sum(tl.reshape(square, (KEYS, LINES, R)), 2) / R + share[None, :]
        far = tl.load(far_base + j).to(tl.int32)
        found = (x.to(tl.int32, bitcast=True) >> 21) + far[:, None] + (MIDDLE - 4 * 127)
        found = tl.minimum(tl.maximum(found, 0), LEVELS - 1).to(tl.uint8)
        to = CODES + (head * lines + line)[None, :] * room + j[:, None]
        tl.store(to, found, mask=(line[None, :] < lines) & (first < edge[None, :]))
