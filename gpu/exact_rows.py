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
WAVES = 1  # pieces for each multiprocessor
SHORTEST = 256  # keys of a piece, if there are so many
LENGTHS = np.linspace(1, 2, 33)  # of pieces that are tried, over what is least
JOINED = 16  # pieces that are read at once


@triton.jit(do_not_specialize=["sources", "tiles", "drawn", "before", "groups"])
def pieces(
    Q, K, V, PLAN, PARTS, SUMS, q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, sources, tiles, drawn, before, groups,
    scale, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (pieces,): a tile of rows over some keys; PLAN as `Plan.packed` has it.

    Q (B, groups * G, m, D), K, V (B, groups, n, D) by strides, rows contiguous.  A row sees keys up to ``before``
    beyond its own number -> PARTS (pieces, M, D) float32, normalised, SUMS (pieces, M) float32, base-2 log-sums; zeros
    and -inf of a row that sees none of the keys.
    """
    piece = tl.program_id(0).to(tl.int64)
    rows = G * drawn
    table = PLAN + 2 * sources * rows + sources * tiles + 1 + piece * 3
    tile = tl.load(table)
    begin = tl.load(table + 1)
    stop = tl.load(table + 2)
    source = (tile // tiles).to(tl.int64)
    batch = source // groups
    group = source % groups
    i = tile % tiles * M + tl.arange(0, M)
    ok = i < rows
    d = tl.arange(0, D)
    o = tl.arange(0, N)
    row = tl.load(PLAN + source * rows + i, mask=ok, other=0)
    head = group * G + tl.load(PLAN + (sources + source) * rows + i, mask=ok, other=0) // drawn
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
    empty = total == 0  # what is not a number stays so
    whole = tl.where(empty, 1.0, total)
    own = piece * M + tl.arange(0, M)
    tl.store(SUMS + own, tl.where(empty, -float("inf"), m + tl.log2(whole)))
    tl.store(PARTS + own[:, None] * D + d[None, :], acc / whole[:, None])


@triton.jit
def joined(PARTS, SUMS, PLAN, i, source, sources, tiles, rows, D: tl.constexpr, M: tl.constexpr, JOINED: tl.constexpr):
    """Row i of a source: its position, its place among all sources' slots, its output (D,) and log-sum, natural."""
    starts = PLAN + 2 * sources * rows + source * tiles + i // M
    begin = tl.load(starts)
    stop = tl.load(starts + 1)
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
    position = tl.load(PLAN + source * rows + i)
    slot = source * rows + tl.load(PLAN + (sources + source) * rows + i)
    return position, slot, acc / total, (m + tl.log2(total)) * (1 / LOG2E)


@triton.jit(do_not_specialize=["tiles", "rows"])
def join(PARTS, SUMS, PLAN, OUTPUT, LSE, tiles, rows, D: tl.constexpr, M: tl.constexpr, JOINED: tl.constexpr):
    """Grid (rows, sources): one row each -> OUTPUT (sources * rows, D), LSE (sources * rows,) float32, at its slot."""
    source = tl.program_id(1).to(tl.int64)
    sources = tl.num_programs(1)
    _, slot, output, lse = joined(PARTS, SUMS, PLAN, tl.program_id(0), source, sources, tiles, rows, D, M, JOINED)
    tl.store(OUTPUT + slot * D + tl.arange(0, D), output)
    tl.store(LSE + slot, lse)


class Plan(NamedTuple):
    """Which program does what, for S sources, key-value heads with R rows each in T tiles."""

    positions: np.ndarray  # (S, R), rising
    slots: np.ndarray  # (S, R), where in the group each of them stands
    starts: np.ndarray  # (S T + 1,), first pieces of tiles
    pieces: np.ndarray  # (U, 3): tile, first key, end

    @property
    def packed(self) -> np.ndarray:
        """All of it in a row, int32."""
        return np.concatenate([part.ravel() for part in self]).astype(np.int32)


def plan(rows: np.ndarray, before: int, height: int, step: int, wanted: int) -> Plan:
    """Rows (S, R) that see ``before`` keys more than their number -> tiles of ``height``, pieces in whole ``step``s.

    There are up to ``wanted`` pieces of about the same length, if there are half as many tiles, else some more.
    """
    slots = rows.argsort(axis=1)
    positions = np.take_along_axis(rows, slots, axis=1)
    lasts = np.append(np.arange(height, rows.shape[1], height), rows.shape[1]) - 1
    ends = (positions[:, lasts] + before + 1).ravel()  # (S T,)
    lengths = ends.sum() / wanted * LENGTHS
    many = -(-ends // np.maximum(lengths, SHORTEST)[:, None]).astype(np.int64)  # (L, S T), pieces by their length
    many = many[np.argmax(many.sum(axis=1) <= wanted)]
    width = -(-ends // (many * step)) * step
    starts = np.concatenate([[0], many.cumsum()])
    tile = np.arange(len(ends)).repeat(many)
    first = (np.arange(starts[-1]) - starts[tile]) * width[tile]
    return Plan(positions, slots, starts, np.stack([tile, first, np.minimum(first + width[tile], ends[tile])], axis=1))


class Parts(NamedTuple):
    """Attention of rows over pieces of the keys, on the device."""

    outputs: torch.Tensor  # (U, M, d) float32
    sums: torch.Tensor  # (U, M) float32
    plan: torch.Tensor  # packed
    grid: tuple[int, int]  # R, S
    tiles: int

    @property
    def shape(self) -> dict[str, int]:
        """What kernels that join them are compiled for."""
        _, height, d = self.outputs.shape
        return {"D": d, "M": height, "JOINED": JOINED}


def parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: np.ndarray, scale: float) -> Parts:
    """As `exact_rows`, for which they only have to be joined."""
    B, h, m, d = q.shape
    g, n = k.shape[1:3]
    height, step, stages, warps = TILES[d]
    made = plan(rows.reshape(B * g, -1), n - m, height, step, WAVES * processors(q.device))
    packed, count, tiles = sent(made.packed, q.device), len(made.pieces), (len(made.starts) - 1) // (B * g)
    outputs = torch.empty((count, height, d), dtype=torch.float32, device=q.device)
    sums = torch.empty((count, height), dtype=torch.float32, device=q.device)
    pieces[(count,)](
        q, k, v, packed, outputs, sums, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], B * g, tiles, rows.shape[1],
        n - m, g, scale, G=h // g, D=d, M=height, N=step, STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return Parts(outputs, sums, packed, made.slots.shape[::-1], tiles)


@where_it_lies
def exact_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: np.ndarray, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact causal attention of some rows; products in the tensors' dtype, sums in float32.

    Args:
        q: (B, h, m, d), as `gpu.listed.check_tensors` wants it.
        k: (B, g, n, d), n >= m; the last row sees the last key.
        v: (B, g, n, d).
        rows: (B h, s) int64 in 0 .. m - 1, in any order.
        scale: of the scores.

    Returns:
        tuple: output (B, h, s, d), log-sum-exp (B, h, s), both float32; on the device, not waited for.
    """
    found = parts(q, k, v, rows, scale)
    shape = (*q.shape[:2], rows.shape[1])
    output = torch.empty((*shape, q.shape[3]), dtype=torch.float32, device=q.device)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    join[found.grid](
        found.outputs, found.sums, found.plan, output, lse, found.tiles, found.grid[0], num_warps=4, **found.shape
    )
    return output, lse


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; some, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
