"""Keys that blocks of query rows share, drawn by importance: `attention.block_sampled` on the GPU.

Six launches and a cumulative sum.  `pool` reads keys and values once; `normalise` finds what the representative rows'
weights sum to, from mean keys; `code` scores every key against every representative row and keeps a byte of it, its
importance in eighths of octaves; `count`, `threshold` and `draw` need no more than these bytes.  Codes, budgets and
draws are defined in `attention.listed_reference`.  Nothing waits for the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from attention.key_lists import KEYS, ROWS, KeyLists, budget, budgets, edges, row_blocks
from gpu import hopper
from gpu.codes import LOG2E, mixed
from gpu.sampled import seed_word

LN2 = tl.constexpr(0.6931471805599453)
LEVELS = tl.constexpr(256)  # codes
MIDDLE = tl.constexpr(223)  # the code of importance 1
EIGHTHS = tl.constexpr(8.0)  # steps of an octave
UNIT = tl.constexpr(24)  # chances are multiples of 2 ** -UNIT
ONE = tl.constexpr(2.0**24)
FARTHEST = tl.constexpr(32.0)  # a value's distance counts within 2 ** (+-FARTHEST / EIGHTHS) of the typical one


@triton.jit
def pool(
    K, V, MEANS, FAR, k_b, k_h, k_n, v_b, v_h, v_n, keys, groups, D: tl.constexpr, DV: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Grid (blocks of KEYS keys, B * groups): MEANS (B * groups, keys // KEYS, D), mean keys of whole blocks in K's
    dtype; FAR (B * groups, keys up to whole blocks) int8, every value's distance from the first block's mean, in eighths of octaves of
    what is typical there."""
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
    typical = tl.sum(tl.where(o < near, tl.sum((first - centre[None, :]) * (first - centre[None, :]), 1), 0.0), 0) / near
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
    """Grid (groups of LINES lines, heads at work): SUMS (heads at work, lines, R) float32, base-2 log-sums of the
    representative rows' weights; exact over the first key block and over the band, from mean keys elsewhere.  SHARES
    (heads at work, keys // KEYS, lines) float32: the square of the mean of the rows' shares of weight, per key of a
    block, by its mean key; written where the block is eligible."""
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
    the block's mean key, together.  Its exponent and first two bits are the code: eighths of octaves, or nearly."""
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


@triton.jit
def count(CODES, HISTOGRAMS, shift, lines, room, ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr):
    """Grid (lines, heads at work): HISTOGRAMS (heads at work, lines, LEVELS) int32 of the eligible keys' codes."""
    line = tl.program_id(0)
    at = tl.program_id(1).to(tl.int64) * lines + line
    edge = (shift + line * ROWS) // KEYS * KEYS
    o = tl.arange(0, TILE)
    found = tl.zeros((LEVELS,), tl.int32)
    for first in tl.range(0, edge, TILE):
        ok = first + o < edge
        codes = tl.load(CODES + at * room + first + o, mask=ok, other=0).to(tl.int32)
        found += tl.histogram(codes, LEVELS, mask=ok)
    tl.store(HISTOGRAMS + at * LEVELS + tl.arange(0, LEVELS), found)


@triton.jit
def threshold(HISTOGRAMS, BUDGETS, CHANCES):
    """Grid (tables,): a table's HISTOGRAMS (LEVELS,) float64 and BUDGETS () float64 -> CHANCES (LEVELS,) int32.

    Chances in units of 2 ** -UNIT: 1 from some code on, falling by an eighth of an octave a code below it, such that
    the budget is what is drawn on average."""
    at = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LEVELS)
    many = tl.load(HISTOGRAMS + at * LEVELS + c)
    budget = tl.load(BUDGETS + at)
    value = tl.exp2(c.to(tl.float32) / EIGHTHS).to(tl.float64)
    weight = many * value
    below = tl.cumsum(weight, 0) - weight  # S, of codes below c
    certain = tl.sum(many, 0) - (tl.cumsum(many, 0) - many)  # N, of c and above
    expected = certain + below / value
    first = tl.min(tl.where(expected <= budget, c, LEVELS), 0)  # all below draw by chance
    S = tl.sum(tl.where(c < first, weight, 0.0), 0)
    left = budget - tl.sum(tl.where(c >= first, many, 0.0), 0)
    ratio = tl.where(first > 0, value * (left / tl.maximum(S, 1e-300)), 1.0)  # 2 ** ((c - t) / EIGHTHS)
    chance = tl.minimum(tl.maximum(tl.floor(ratio * ONE + 0.5), 1.0), ONE)
    chance = tl.where(c >= first, ONE, chance)
    tl.store(CHANCES + at * LEVELS + c, chance.to(tl.int32))


@triton.jit(do_not_specialize=["seed"])
def size(HISTOGRAMS, CHANCES, STARTS, LENGTHS, seed, first_head, lines, tables):
    """Grid (lines, heads at work): STARTS (heads at work, lines) int32, where a draw begins within a unit; LENGTHS (heads at work,
    lines) int64, the keys that it will list.  A head has ``tables`` of chances, one or one per line."""
    line = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, LEVELS)
    table = head * tables + tl.where(tables > 1, line, 0)
    many = tl.load(HISTOGRAMS + (head * lines + line) * LEVELS + c).to(tl.int64)
    all = tl.sum(many * tl.load(CHANCES + table * LEVELS + c), 0)
    own = mixed(seed.to(tl.uint32) ^ mixed((first_head + head).to(tl.uint32) + 0x9E3779B9))
    start = (mixed(own ^ mixed(line.to(tl.uint32) + 0x9E3779B9)) >> 8).to(tl.int32)
    tl.store(STARTS + head * lines + line, start)
    tl.store(LENGTHS + head * lines + line, (start + all) >> UNIT)


@triton.jit
def draw(
    CODES, CHANCES, STARTS, OFFSETS, TOKENS, LOG_WEIGHTS, shift, lines, room, tables, capacity,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (lines, heads at work): a systematic draw along a line's keys; OFFSETS (heads * lines + 1,) say where to.

    A key is listed where the sum of chances passes a whole number, at the place that this number says."""
    line = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    edge = (shift + line * ROWS) // KEYS * KEYS
    o = tl.arange(0, TILE)
    table = CHANCES + (head * tables + tl.where(tables > 1, line, 0)) * LEVELS
    start = tl.load(OFFSETS + head * lines + line)
    carry = tl.load(STARTS + head * lines + line).to(tl.int64)
    codes = CODES + (head * lines + line) * room
    for first in tl.range(0, edge, TILE):
        j = first + o
        ok = j < edge
        chance = tl.load(table + tl.load(codes + j, mask=ok, other=0).to(tl.int32), mask=ok, other=0)
        sums = tl.cumsum(chance.to(tl.int64), 0) + carry
        place = sums >> UNIT
        taken = place > ((sums - chance) >> UNIT)
        to = start + place - 1
        fits = taken & (to < capacity)
        tl.store(TOKENS + to, j, mask=fits)
        tl.store(LOG_WEIGHTS + to, -(tl.log2(chance.to(tl.float32)) - UNIT) * LN2, mask=fits)
        carry += tl.sum(chance.to(tl.int64), 0)


COLUMNS = 128  # representative rows that a program of `code` takes
TILE = 1024  # codes that `count` and `draw` take at once
BYTES = 1 << 31  # of codes that are kept at once, but for a single head's: heads beyond that wait


def key_lists(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    density: float,
    rows: int,
    causal_selection: bool,
    seed: int,
    scale: float,
) -> KeyLists:
    """Draw the keys that blocks of rows attend to.

    Only a causal selection waits for the device: its thresholds do not keep to the budget, so that nothing is known of
    its size beforehand.

    Args:
        q: (B, h, m, d) float16 or bfloat16, rows contiguous.
        k: (B, g, n, d).
        v: (B, g, n, dv), dv a power of two.
        density: of all pairs, as `attention.key_lists.KeyLists.densities` has it.
        rows: representative rows of a block, a power of two up to 128; fastest from 2 to 16.
        causal_selection: whether nothing after a row may bear on what it attends to.
        seed: of the draw.
        scale: of the scores.

    Returns:
        KeyLists: tokens with log weights, on the device.

    Raises:
        ArgumentError: a density that the bands alone exceed.
    """
    B, h, m, d = q.shape
    g, n = k.shape[1:3]
    heads, T, device = B * h, row_blocks(m), q.device
    room = int(edges(m, n)[-1])
    plan = _Plan(q, k, v, rows, causal_selection, scale, T, room)
    if causal_selection:
        spend = torch.from_numpy(budgets(density, m, n)).to(device)
    else:  # filled there: a copy from the host would wait, and a CUDA graph could not hold it
        spend = torch.full((1,), budget(density, m, n), dtype=torch.float64, device=device)
    offsets = torch.zeros(heads * T + 1, dtype=torch.int64, device=device)
    capacity = 0 if causal_selection else min(math.ceil(budget(density, m, n)) + T, int(edges(m, n).sum())) * heads
    tokens = torch.empty(max(capacity, 1), dtype=torch.int32, device=device)
    weights = torch.empty(max(capacity, 1), dtype=torch.float32, device=device)
    if room == 0:
        return KeyLists(offsets, tokens, weights)
    slab = max(BYTES // (T * room), 1)
    for first in range(0, heads, slab):
        many = min(slab, heads - first)
        drawn = plan.drawn(first, many, spend, seed_word(seed))
        own = offsets[first * T : (first + many) * T + 1]  # begins where the heads before end
        own[1:] = own[0] + drawn.lengths.flatten().cumsum(0)
        if causal_selection:
            tokens, weights = (_grown(part, int(own[-1])) for part in (tokens, weights))
        drawn.into(own, tokens, weights)
    return KeyLists(offsets, tokens, weights)


@dataclass(frozen=True)
class _Drawn:
    """Codes and chances of some heads, from which their lists are written."""

    codes: torch.Tensor  # (heads, T, room) uint8
    chances: torch.Tensor  # (heads, 1 or T, 256) int32
    starts: torch.Tensor  # (heads, T) int32
    lengths: torch.Tensor  # (heads, T) int64
    shift: int  # n - m

    def into(self, offsets: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor) -> None:
        """Write the lists from their offsets (heads T + 1,) on."""
        heads, T, room = self.codes.shape
        if self.codes.is_cuda and hopper.present():
            hopper.draw(self.codes, self.chances, self.starts, offsets, tokens, weights, self.shift)
            return
        draw[(T, heads)](
            self.codes, self.chances, self.starts, offsets, tokens, weights, self.shift, T, room, self.chances.shape[1],
            len(tokens), ROWS=ROWS, KEYS=KEYS, TILE=TILE, num_warps=4,
        )  # fmt: skip


class _Plan:
    """What the heads' draws share."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int, causal: bool, scale: float, T: int, room: int
    ) -> None:
        B, g, n, d = k.shape
        self._q, self._k, self._rows, self._causal, self._scale, self._T, self._room = q, k, rows, causal, scale, T, room
        self._means = torch.empty(B * g, n // KEYS, d, dtype=k.dtype, device=k.device)
        self._far = torch.empty(B * g, triton.cdiv(n, KEYS) * KEYS, dtype=torch.int8, device=k.device)
        pool[(triton.cdiv(n, KEYS), B * g)](
            k, v, self._means, self._far, *k.stride()[:3], *v.stride()[:3], n, g, D=d, DV=v.shape[3], KEYS=KEYS,
            num_warps=8,
        )  # fmt: skip

    def drawn(self, first: int, many: int, spend: torch.Tensor, seed: int) -> _Drawn:
        """Codes, thresholds and lengths of heads first .. first + many."""
        q, k, T, room, R = self._q, self._k, self._T, self._room, self._rows
        h, m, d = q.shape[1:]
        g, n = k.shape[1:3]

        def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=q.device)

        sums, shares = new(many, T, R, dtype=torch.float32), new(many, n // KEYS, T, dtype=torch.float32)
        common = {"G": h // g, "D": d, "R": R, "ROWS": ROWS, "KEYS": KEYS, "CAUSAL": self._causal}
        strides = (*q.stride()[:3], *k.stride()[:3])
        lines = max(16 // R, 1)
        normalise[(triton.cdiv(T, lines), many)](
            q, k, self._means, sums, shares, *strides, m, n, h, first, T, self._scale, LINES=lines, num_warps=4, **common
        )
        codes = new(many, T, room, dtype=torch.uint8)
        self._code(sums, shares, codes, first)
        counts = new(many, T, 256, dtype=torch.int32)
        if codes.is_cuda and hopper.present():
            hopper.count(codes, counts, n - m)
        else:
            count[(T, many)](codes, counts, n - m, T, room, ROWS=ROWS, KEYS=KEYS, TILE=TILE, num_warps=4)
        summed = counts.double().cumsum(1) if self._causal else counts.sum(1, keepdim=True, dtype=torch.float64)
        chances = new(*summed.shape, dtype=torch.int32)
        threshold[(summed[..., 0].numel(),)](summed, spend.expand(many, -1).contiguous(), chances, num_warps=4)
        starts, lengths = new(many, T, dtype=torch.int32), new(many, T, dtype=torch.int64)
        size[(T, many)](counts, chances, starts, lengths, seed, first, T, summed.shape[1], num_warps=4)
        return _Drawn(codes, chances, starts, lengths, n - m)

    def _code(self, sums: torch.Tensor, shares: torch.Tensor, codes: torch.Tensor, first: int) -> None:
        q, k, R = self._q, self._k, self._rows
        if R in hopper.REPRESENTATIVES and hopper.serves(q, k, k):
            hopper.importance(q, k, sums, shares, self._far, codes, first, self._causal, self._scale)
            return
        h, m, d = q.shape[1:]
        g, n = k.shape[1:3]
        many, T, room = codes.shape
        lines = COLUMNS // R
        code[(triton.cdiv(T, lines), many)](
            q, k, sums, shares, self._far, codes, *q.stride()[:3], *k.stride()[:3], m, n, h, first, T, room, self._scale,
            G=h // g, D=d, R=R, LINES=lines, ROWS=ROWS, KEYS=KEYS, CAUSAL=self._causal, STAGES=3, num_warps=8,
        )  # fmt: skip


def _grown(part: torch.Tensor, size: int) -> torch.Tensor:
    """The tensor with room for ``size`` entries."""
    return part if size <= len(part) else torch.cat([part, part.new_empty(size - len(part))])
