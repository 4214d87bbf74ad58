"""Attention over the listed keys, the sinks and the recent ones, split along the list; and the merge of the parts."""

from __future__ import annotations

import triton
import triton.language as tl

from gpu.codes import LINE, LOG2E, after_predecessor, entry, length, places, span

CROWDED = tl.constexpr(0)  # columns of STATUS: more keys than expected, chances were lowered on the way;
OVERFLOW = tl.constexpr(1)  # still more than the list can hold, all keys were read;
STARVED = tl.constexpr(2)  # far fewer than expected, all keys were read;
REFUSED = tl.constexpr(3)  # a token that the full cache refused
COLUMNS = tl.constexpr(4)
CERTAIN = tl.constexpr(1 << (32 + 24))  # an entry of chance 1


@triton.jit
def _extent(n, count, cap, floor, sinks, recent):
    """What a head attends to: sinks, recent keys and its list, or every key where the list cannot be trusted.

    Returns (first sampled key, last + 1, keys to attend to, whether all of them).  A list cannot be trusted where it
    overflowed, or where far fewer keys were drawn than the thresholds were set for.
    """
    start, stop = span(n, sinks, recent)
    dense = (count > cap) | (count < tl.minimum(floor, (stop - start) // 4))
    return start, stop, tl.where(dense, n, n - stop + start + count), dense


@triton.jit
def gather(
    Q, K, V, PAGES, DRAWN, COUNTS, LENGTHS, PARTS, SUMS, q_b, q_h, k_b, k_h, k_n, k_p, v_b, v_h, v_n, v_p, most, room,
    cap, sinks, recent, floor, scale, heads, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, PAGE: tl.constexpr, GROW: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Part of a head's keys; grid (splits, B * heads).  Counts stay on the device, parts are cut evenly from them.

    A drawn key's logit is lowered by ``log2 pi``, which weighs it by 1 / pi; the others have pi = 1.

    Q (B, heads * G, D), K, V (B, heads, n, D) by strides, rows contiguous, or
    in pages of PAGE tokens (see `gpu.codes.places`) -> PARTS (B * heads, splits, G, D) float32,
    normalised, not written where empty, and SUMS (B * heads, splits, G) float32, base-2 log-sums, -inf where empty.
    """
    part = tl.program_id(0)
    splits = tl.num_programs(0)
    head = tl.program_id(1)
    batch = (head // heads).to(tl.int64)
    inner = head % heads
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    q = tl.load(Q + batch * q_b + (inner * G + g[:, None]) * q_h + d[None, :], mask=g[:, None] < G, other=0.0)
    n = length(LENGTHS, head, room, GROW)  # no kernel of this step but the last writes it
    after_predecessor(PDL)
    start, stop, size, dense = _extent(n, tl.load(COUNTS + head * LINE), cap, floor, sinks, recent)
    known = tl.where(dense, size, n - stop + start)  # positions before this one name keys without the list
    shift = tl.where(dense, 0, stop - start)
    per = tl.cdiv(tl.cdiv(size, splits), 16) * 16
    first = part * per
    last = tl.minimum(first + per, size)
    keys = K + batch * k_b + inner.to(tl.int64) * k_h
    values = V + batch * v_b + inner.to(tl.int64) * v_h
    drawn = DRAWN + head.to(tl.int64) * cap
    m = tl.full((GP,), -float("inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, D), tl.float32)
    for i in tl.range(first, last, KEYS, num_stages=STAGES):
        o = i + tl.arange(0, KEYS)
        ok = o < last
        listed = ok & (o >= known)
        found, log = entry(tl.load(drawn + (o - known), mask=listed, other=CERTAIN), ASM)
        index = tl.where(listed, found, tl.where(o < start, o, o + shift))
        index = tl.where(ok, index, 0)
        k_row = places(index, PAGES, batch, most, k_n, k_p, PAGE)[:, None]
        v_row = places(index, PAGES, batch, most, v_n, v_p, PAGE)[:, None]
        k = tl.load(keys + k_row + d[None, :], mask=ok[:, None], other=0.0)
        v = tl.load(values + v_row + d[None, :], mask=ok[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k)) * (scale * LOG2E) - log[None, :]
        s = tl.where(ok[None, :], s, -float("inf"))
        higher = tl.maximum(m, tl.max(s, 1))  # finite: the first key of a tile is always ok
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(m - higher)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
        m = higher
    out = (head * splits + part) * G + g
    tl.store(SUMS + out, tl.where(first < last, m + tl.log2(tl.maximum(total, 1e-30)), -float("inf")), mask=g < G)
    if first < last:
        tl.store(PARTS + out[:, None].to(tl.int64) * D + d[None, :], acc / total[:, None], mask=g[:, None] < G)


@triton.jit
def merge(
    PARTS, SUMS, COUNTS, LENGTHS, STATUS, OUTPUT, LSE, o_b, o_h, room, cap, sinks, recent, floor, crowd, heads, splits,
    G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, GROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Parts of `gather` -> OUTPUT (B, heads * G, D) by strides, LSE (B * heads * G,) natural; grid (B * heads, G).

    STATUS (B * heads, COLUMNS) int32 counts what went beside the plan.  A growing step ends here: LENGTHS are raised.
    OUTPUT is zero and LSE -inf where there are no keys.
    """
    head = tl.program_id(0)
    h = tl.program_id(1)
    part = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    after_predecessor(PDL)
    rows = PARTS + ((head * splits + part).to(tl.int64) * G + h)[:, None] * D + d[None, :]
    parts = tl.load(rows, mask=part[:, None] < splits, other=0.0)  # asked for before it is known which are empty
    sums = tl.load(SUMS + (head * splits + part) * G + h, mask=part < splits, other=-float("inf"))
    top = tl.max(sums, 0)
    weight = tl.exp2(sums - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight, 0)
    output = tl.sum(tl.where(weight[:, None] > 0, parts * weight[:, None], 0.0), 0) / tl.maximum(total, 1e-30)
    tl.store(
        OUTPUT + (head // heads).to(tl.int64) * o_b + ((head % heads) * G + h) * o_h + d,
        output.to(OUTPUT.dtype.element_ty),
    )
    tl.store(LSE + head * G + h, (top + tl.log2(tl.maximum(total, 1e-30))) * (1.0 / LOG2E))
    if h == 0:
        count = tl.load(COUNTS + head * LINE)
        before = tl.load(LENGTHS + head)
        n = tl.minimum(before + GROW, room)
        _, _, _, dense = _extent(n, count, cap, floor, sinks, recent)
        status = STATUS + head * COLUMNS
        if dense:
            column = tl.where(count > cap, OVERFLOW, STARVED)
            tl.store(status + column, tl.load(status + column) + 1)
        if count > crowd:
            tl.store(status + CROWDED, tl.load(status + CROWDED) + 1)
        if GROW == 1:
            tl.store(LENGTHS + head, n)
            if before == room:
                tl.store(status + REFUSED, tl.load(status + REFUSED) + 1)
