"""Importance of keys to blocks of query rows, a byte each: the kernels of `gpu.block_sampled` that read keys.

`pool` reads keys and values once, `represent` the rows that speak for blocks; `normalise` finds what the weights of
these representatives sum to, from mean keys; `code` scores every key against every representative.  Codes are defined
in `attention.listed_reference`.
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
def typical(V, CENTRES, SQUARES, v_b, v_h, v_n, keys, groups, DV: tl.constexpr, KEYS: tl.constexpr):
    """Grid (B * groups,): CENTRES (B * groups, DV), means of the first values, up to KEYS of them.

    SQUARES (B * groups,): their mean squared distance from it.  Both float32.
    """
    head = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, DV)
    o = tl.arange(0, KEYS)
    near = tl.minimum(keys, KEYS)
    first = V + (head // groups) * v_b + (head % groups) * v_h + o.to(tl.int64)[:, None] * v_n + e[None, :]
    v = tl.load(first, mask=o[:, None] < near, other=0.0).to(tl.float32)
    centre = tl.sum(v, 0) / near
    off = v - centre[None, :]
    tl.store(CENTRES + head * DV + e, centre)
    tl.store(SQUARES + head, tl.sum(tl.where(o < near, tl.sum(off * off, 1), 0.0), 0) / near)


@triton.jit
def pool(
    K, V, CENTRES, SQUARES, MEANS, FAR, k_b, k_h, k_n, v_b, v_h, v_n, keys, groups, D: tl.constexpr, DV: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of KEYS keys, B * groups, 2): keys, then values.

    MEANS (B * groups, keys // KEYS, D) of K's dtype, mean keys of whole blocks; FAR (B * groups, keys up to whole
    blocks) int8, every value's distance from the centre, in eighths of octaves of what `typical` says.
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = head // groups
    inner = head % groups
    j = block * KEYS + tl.arange(0, KEYS)
    if tl.program_id(2) == 0:
        d = tl.arange(0, D)
        if (block + 1) * KEYS <= keys:
            k = tl.load(K + batch * k_b + inner * k_h + j.to(tl.int64)[:, None] * k_n + d[None, :]).to(tl.float32)
            mean = tl.sum(k, 0) / KEYS
            tl.store(MEANS + (head * (keys // KEYS) + block) * D + d, mean.to(MEANS.dtype.element_ty))
    else:
        e = tl.arange(0, DV)
        at = V + batch * v_b + inner * v_h + j.to(tl.int64)[:, None] * v_n + e[None, :]
        v = tl.load(at, mask=j[:, None] < keys, other=0.0).to(tl.float32)
        off = v - tl.load(CENTRES + head * DV + e)[None, :]
        typical = tl.load(SQUARES + head)
        octaves = tl.log2(tl.maximum(tl.sum(off * off, 1), 1e-38)) - tl.log2(tl.maximum(typical, 1e-38))
        far = tl.floor(octaves * (EIGHTHS / 2) + 0.5)
        far = tl.where(typical > 0, tl.minimum(tl.maximum(far, -FARTHEST), FARTHEST), 0.0)
        tl.store(FAR + head * (tl.num_programs(0) * KEYS) + j, far.to(tl.int8))


@triton.jit
def represent(
    Q, QUERIES, q_b, q_h, q_m, rows, heads, first_head, lines, D: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    """Grid (groups of TAKEN representatives, heads at work): QUERIES (heads at work, lines, R, D), means of S rows."""
    head = tl.program_id(1).to(tl.int64)  # of those at work
    base = Q + (first_head + head) // heads * q_b + (first_head + head) % heads * q_h
    c = tl.program_id(0) * TAKEN + tl.arange(0, TAKEN)
    d = tl.arange(0, D)
    line = c // R
    here = (line < lines)[:, None]
    total = tl.zeros((TAKEN, D), tl.float32)
    for i in tl.static_range(S):
        if CAUSAL:
            row = tl.maximum(line * ROWS - c % R * (ROWS // R) - i * (ROWS // R // S), 0)
        else:
            row = tl.minimum(line * ROWS + c % R * (ROWS // R) + (2 * i + 1) * (ROWS // R) // (2 * S), rows - 1)
        total += tl.load(base + row.to(tl.int64)[:, None] * q_m + d[None, :], mask=here, other=0.0).to(tl.float32)
    to = QUERIES + (head * lines * R + c)[:, None] * D + d[None, :]
    tl.store(to, (total / S).to(QUERIES.dtype.element_ty), mask=here)


@triton.jit
def _seen(line, r, rows, shift, R: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """Keys before where representative r of a block stands, and there."""
    if CAUSAL:
        row = tl.maximum(line * ROWS - r * (ROWS // R), 0)
    else:
        row = line * ROWS + (2 * r + 1) * (ROWS // 2) // R
    return shift + tl.minimum(row, rows - 1) + 1


@triton.jit
def _joined(m, total, s):
    """Running maximum and sum of base-2 powers with scores s (M, N) more; -inf adds nothing."""
    higher = tl.maximum(m, tl.max(s, 1))
    anchor = tl.where(higher == -float("inf"), 0.0, higher)
    return higher, total * tl.exp2(m - anchor) + tl.sum(tl.exp2(s - anchor[:, None]), 1)


@triton.jit
def normalise(
    QUERIES, K, MEANS, SUMS, SHARES, k_b, k_h, k_n, rows, keys, heads, first_head, lines, scale,
    G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, TOGETHER: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (groups of LINES lines, heads at work / TOGETHER): SUMS (heads at work, lines, R) float32, base-2 log-sums.

    They are of the representatives' weights, exact over the first key block and over the band, from mean keys
    elsewhere.  SHARES (heads at work, keys // KEYS, lines) float32: the square of the mean of their shares of
    weight, per key of a block, by its mean key; written where the block is eligible.

    TOGETHER heads, all of one key-value head, share what is read of it; PADDED is that, up to a power of two.
    """
    group = tl.program_id(0)
    base = tl.program_id(1) * TOGETHER  # the first head, of those at work
    batch = ((first_head + base) // heads).to(tl.int64)
    inner = (first_head + base) % heads
    c = tl.arange(0, PADDED * LINES * R)
    d = tl.arange(0, D)
    o = tl.arange(0, KEYS)
    shift = keys - rows
    of = group * LINES + c // R % LINES
    edge = (shift + of * ROWS) // KEYS * KEYS
    seen = _seen(of, c % R, rows, shift, R, ROWS, CAUSAL)
    own = tl.minimum(c // (LINES * R), TOGETHER - 1)
    place = ((base + own).to(tl.int64) * lines + tl.minimum(of, lines - 1)) * R + c % R
    q = tl.load(QUERIES + place[:, None] * D + d[None, :])
    k_base = K + batch * k_b + (inner // G).to(tl.int64) * k_h
    factor = scale * LOG2E
    m = tl.full((PADDED * LINES * R,), -float("inf"), tl.float32)
    total = tl.zeros((PADDED * LINES * R,), tl.float32)
    begin = (shift + group * LINES * ROWS) // KEYS * KEYS
    for at in tl.range(begin - KEYS, tl.max(seen, 0), KEYS):
        first = tl.where(at < begin, 0, at)  # the first key block, then the bands
        j = first + o
        k = tl.load(k_base + j.to(tl.int64)[:, None] * k_n + d[None, :], mask=j[:, None] < keys, other=0.0)
        s = tl.dot(q, tl.trans(k)) * factor
        band = (j[None, :] >= edge[:, None]) & (j[None, :] < seen[:, None]) & (at >= begin)
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
    here = (of < lines) & (c < TOGETHER * LINES * R)
    tl.store(SUMS + place, log, mask=here)
    share_of = tl.arange(0, PADDED * LINES)
    line = group * LINES + share_of % LINES
    to = SHARES + (base + share_of // LINES).to(tl.int64)[:, None] * whole * lines + line[:, None]
    here = (line < lines) & (share_of < TOGETHER * LINES)
    for at in tl.range(0, most, KEYS):
        J = at + o
        mean = tl.load(means + J[:, None] * D + d[None, :], mask=J[:, None] < whole, other=0.0)
        s = tl.dot(q, tl.trans(mean)) * factor + tl.log2(KEYS * 1.0) - log[:, None]
        share = tl.sum(tl.reshape(tl.exp2(tl.minimum(s, 0.0)), (PADDED * LINES, R, KEYS)), 1) / (R * KEYS)
        tl.store(to + J[None, :] * lines, share * share, mask=(J[None, :] < whole) & here[:, None])


@triton.jit
def code(
    QUERIES, K, SUMS, SHARES, FAR, CODES, k_b, k_h, k_n, rows, keys, heads, first_head, lines, room, scale,
    G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (groups of LINES lines, heads at work): CODES (heads at work, lines, room) uint8 of every eligible key.

    The square of an importance is the mean square of the representatives' probabilities and that of their share by
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
    place = (head * lines + tl.minimum(of, lines - 1)) * R + c % R
    edge = (shift + line * ROWS) // KEYS * KEYS
    q = tl.load(QUERIES + place[:, None] * D + d[None, :])
    log = tl.load(SUMS + place, mask=here, other=float("inf"))
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
