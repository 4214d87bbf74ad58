"""Exact causal attention of some rows of a prompt, on the GPU: one pass over the keys for all heads that share them.

Rows of a group's query heads are sorted by position and cut into tiles, and each tile's keys into pieces of about equal
length, as many as keep the GPU busy; a second launch joins the pieces.  Which piece is which is decided on the host,
where the rows were drawn: nothing waits for the device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from gpu.codes import LOG2E
from gpu.tensors import sent, where_it_lies

TILES = {64: (128, 128, 3, 8), 128: (128, 64, 3, 8), 256: (64, 32, 3, 8)}  # rows, keys, stages, warps, by width
WAVES = 2  # pieces for each multiprocessor
SHORTEST = 256  # keys of a piece, if there are so many
JOINED = 16  # pieces that are read at once


@triton.jit(do_not_specialize=["tiles", "drawn", "before", "groups"])
def pieces(
    Q, K, V, POSITIONS, SLOTS, PIECES, PARTS, SUMS, q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, tiles, drawn, before,
    groups, scale, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (pieces,): a tile of rows over keys ``first .. stop``, PIECES (pieces, 3) int32: tile, first, stop.

    Q (B, groups * G, m, D), K, V (B, groups, n, D) by strides, rows contiguous.  POSITIONS, SLOTS (B * groups,
    G * drawn) int32: rows of q that rise, and where each stands among ``G * drawn``.  A row sees keys up to ``before``
    beyond its own number -> PARTS (pieces, M, D) float32, normalised, SUMS (pieces, M) float32, base-2 log-sums; zeros
    and -inf of a row that sees none of the keys.
    """
    piece = tl.program_id(0).to(tl.int64)
    tile = tl.load(PIECES + piece * 3)
    begin = tl.load(PIECES + piece * 3 + 1)
    stop = tl.load(PIECES + piece * 3 + 2)
    source = (tile // tiles).to(tl.int64)
    batch = source // groups
    group = source % groups
    i = tile % tiles * M + tl.arange(0, M)
    ok = i < G * drawn
    d = tl.arange(0, D)
    o = tl.arange(0, N)
    row = tl.load(POSITIONS + source * G * drawn + i, mask=ok, other=0)
    head = group * G + tl.load(SLOTS + source * G * drawn + i, mask=ok, other=0) // drawn
    at = batch * q_b + head * q_h + row.to(tl.int64) * q_m
    q = tl.load(Q + at[:, None] + d[None, :], mask=ok[:, None], other=0.0)
    last = tl.where(ok, row + before, -1)
    k_base = K + batch * k_b + group * k_h
    v_base = V + batch * v_b + group * v_h
    factor = scale * LOG2E
    m = tl.full((M,), -1e38, tl.float32)  # below any score, but finite: a row may see none of these keys
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for first in tl.range(begin, stop, N, num_stages=STAGES):
        j = first + o
        k = tl.load(k_base + j.to(tl.int64)[:, None] * k_n + d[None, :], mask=j[:, None] < stop, other=0.0)
        v = tl.load(v_base + j.to(tl.int64)[:, None] * v_n + d[None, :], mask=j[:, None] < stop, other=0.0)
        seen = (j[None, :] <= last[:, None]) & (j[None, :] < stop)
        s = tl.where(seen, tl.dot(q, tl.trans(k)) * factor, -float("inf"))
        higher = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(m - higher)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
        m = higher
    whole = tl.where(total > 0, total, 1.0)
    own = piece * M + tl.arange(0, M)
    tl.store(SUMS + own, tl.where(total > 0, m + tl.log2(whole), -float("inf")))
    tl.store(PARTS + own[:, None] * D + d[None, :], acc / whole[:, None])


@triton.jit(do_not_specialize=["tiles", "rows"])
def join(
    PARTS, SUMS, SLOTS, STARTS, OUTPUT, LSE, tiles, rows, D: tl.constexpr, M: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Grid (rows, B * groups): one row each, of ``rows`` in a group; STARTS (B * groups * tiles + 1,) int32.

    PARTS, SUMS as `pieces` leaves them, those of a tile from its start to the next -> OUTPUT (B * groups * rows, D),
    LSE (B * groups * rows,) float32, natural, at the row's slot.
    """
    i = tl.program_id(0)
    source = tl.program_id(1).to(tl.int64)
    tile = source * tiles + i // M
    begin = tl.load(STARTS + tile)
    stop = tl.load(STARTS + tile + 1)
    d = tl.arange(0, D)
    m = -float("inf")
    total = 0.0
    acc = tl.zeros((D,), tl.float32)
    for first in tl.range(begin, stop, JOINED):
        part = first + tl.arange(0, JOINED)
        at = part.to(tl.int64) * M + i % M
        sums = tl.load(SUMS + at, mask=part < stop, other=-float("inf"))
        some = tl.load(PARTS + at[:, None] * D + d[None, :], mask=sums[:, None] > -float("inf"), other=0.0)
        higher = tl.maximum(m, tl.max(sums, 0))  # finite: every row sees the first key, which is in the first piece
        weight = tl.exp2(sums - higher)
        fade = tl.exp2(m - higher)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade + tl.sum(some * weight[:, None], 0)
        m = higher
    slot = source * rows + tl.load(SLOTS + source * rows + i)
    tl.store(OUTPUT + slot * D + d, acc / total)
    tl.store(LSE + slot, (m + tl.log2(total)) * (1 / LOG2E))


class Plan(NamedTuple):
    """Which program does what, for S key-value heads with R rows each in T tiles; int32 but for the counts."""

    positions: np.ndarray  # (S, R), rising
    slots: np.ndarray  # (S, R), where in the group each of them stands
    pieces: np.ndarray  # (U, 3): tile, first key, end
    starts: np.ndarray  # (S T + 1,), first pieces of tiles
    tiles: int


def plan(rows: np.ndarray, before: int, height: int, step: int, wanted: int) -> Plan:
    """Rows (S, R) that see ``before`` keys more than their number -> tiles of ``height``, pieces in whole ``step``s.

    There are about ``wanted`` pieces, but at least one a tile.
    """
    slots = rows.argsort(axis=1, kind="stable").astype(np.int32)
    positions = np.take_along_axis(rows, slots, axis=1)
    lasts = np.append(np.arange(height, rows.shape[1], height), rows.shape[1]) - 1
    ends = (positions[:, lasts] + before + 1).ravel()  # (S T,)
    length = max(-(-int(ends.sum()) // max(wanted - len(ends), len(ends))), SHORTEST)
    many = -(-ends // length)
    width = -(-ends // (many * step)) * step
    starts = np.concatenate([[0], many.cumsum()])
    tile = np.repeat(np.arange(len(ends)), many)
    first = (np.arange(starts[-1]) - starts[tile]) * width[tile]
    table = np.stack([tile, first, np.minimum(first + width[tile], ends[tile])], axis=1)
    return Plan(positions.astype(np.int32), slots, table.astype(np.int32), starts.astype(np.int32), len(lasts))


@where_it_lies
def exact_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: np.ndarray, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact causal attention of some rows; products in the tensors' dtype, sums in float32.

    Args:
        q: (B, h, m, d), as `gpu.listed.check_tensors` wants it.
        k: (B, g, n, d), n >= m; the last row sees the last key.
        v: (B, g, n, d).
        rows: (B h, s) whole numbers in 0 .. m - 1, in any order.
        scale: of the scores.

    Returns:
        tuple: output (B, h, s, d), log-sum-exp (B, h, s), both float32; on the device, not waited for.
    """
    B, h, m, d = q.shape
    g, n = k.shape[1:3]
    s = rows.shape[1]
    height, step, stages, warps = TILES[d]
    made = plan(rows.reshape(B * g, -1), n - m, height, step, WAVES * processors(q.device))
    positions, slots, table, starts = sent((made.positions, made.slots, made.pieces, made.starts), q.device)
    count = len(made.pieces)
    outputs = torch.empty((count, height, d), dtype=torch.float32, device=q.device)
    sums = torch.empty((count, height), dtype=torch.float32, device=q.device)
    output = torch.empty((B, h, s, d), dtype=torch.float32, device=q.device)
    lse = torch.empty((B, h, s), dtype=torch.float32, device=q.device)
    pieces[(count,)](
        q, k, v, positions, slots, table, outputs, sums, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], made.tiles,
        s, n - m, g, scale, G=h // g, D=d, M=height, N=step, STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    join[(h // g * s, B * g)](
        outputs, sums, slots, starts, output, lse, made.tiles, h // g * s, D=d, M=height, JOINED=JOINED, num_warps=4
    )
    return output, lse


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; some, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
