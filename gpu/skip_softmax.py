"""Prompts whose key blocks of small weight are skipped, on a GPU; `attention.skip_softmax` has the meaning.

One program per block of rows and head, flash attention with a test: after the scores of 64 keys it asks whether any row
needs them, and else reads no values and makes no second product.  What the skipped ones may weigh is summed up beside
the output.  The last row block comes first, because it has most to do.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl

from attention.key_lists import ROWS, ends, row_blocks
from attention.result import Certificate, Counters
from attention.skip_softmax import SkipResult, SkipSoftmax
from attention.skip_softmax_reference import BLOCK
from attention.weights import ReLUPower, Softmax
from gpu.codes import LOG2E
from gpu.prompt import batched
from gpu.tensors import where_it_lies
from hsr import checks

STAGES = {64: 3, 128: 3, 256: 2}  # by width


class Attended(NamedTuple):
    """As `attention.skip_softmax_reference.Skipped`, of B h heads."""

    output: torch.Tensor  # (B, h, m, d) of q's dtype
    lse: torch.Tensor  # (B h, m) float32
    log_dropped: torch.Tensor  # (B h, m) float32, natural; of scores as they are computed here
    kept: torch.Tensor  # (B h, m) int32
    blocks: torch.Tensor  # (B h, T) int32


@triton.jit
def _visit(
    q, k_base, v_base, k_n, v_n, first, end, position, here, factor, level, m, total, lost, acc, kept, skipped,
    MASKED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One block of keys more; scores have base 2, and total, lost and acc are relative to 2^m."""
    o = tl.arange(0, N)
    j = first + o
    at = tl.cast(first, tl.int64)
    k_at = k_base + at * k_n + (o[:, None] * k_n + tl.arange(0, D)[None, :])
    v_at = v_base + at * v_n + (o[:, None] * v_n + tl.arange(0, DV)[None, :])
    if MASKED:
        k = tl.load(k_at, mask=j[:, None] < end, other=0.0)
        s = tl.where(j[None, :] <= position[:, None], tl.dot(q, tl.trans(k)) * factor, -float("inf"))
    else:
        s = tl.dot(q, tl.trans(tl.load(k_at))) * factor
    seen = tl.minimum(tl.maximum(position - first + 1, 0), N)
    best = tl.max(s, 1)
    light = (best < m + level) | (here == 0)
    if tl.min(light.to(tl.int32), 0) == 0:
        if MASKED:
            v = tl.load(v_at, mask=j[:, None] < end, other=0.0)
        else:
            v = tl.load(v_at)
        higher = tl.maximum(m, best)
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(m - higher)
        total = total * fade + tl.sum(p, 1)
        lost = lost * fade
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
        m = higher
        kept += seen
    else:
        lost += seen * tl.exp2(best - m)
        skipped += 1
    return m, total, lost, acc, kept, skipped


@triton.jit
def skip_softmax(
    Q, K, V, OUTPUT, LSE, LOST, KEPT, SKIPPED, q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m, rows, keys,
    heads, blocks, scale, level, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (B * heads, T): T blocks of M rows.

    Q (B, heads, rows, D), K (B, heads / G, keys, D), V (.., DV), OUTPUT like Q, by strides, columns contiguous; LSE and
    LOST (B * heads, rows) float32, natural; KEPT (B * heads, rows) int32; SKIPPED (B * heads, T) int32.  ``level`` is
    the base-2 logarithm of the threshold.  The first block has key 0, which every row sees: m is finite from then on.
    """
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = (head // heads).to(tl.int64)
    inner = (head % heads).to(tl.int64)
    i = block * M + tl.arange(0, M)
    here = (i < rows).to(tl.int32)
    position = keys - rows + i
    end = tl.minimum(keys - rows + block * M + M, keys)
    d = tl.arange(0, D)
    q_at = Q + batch * q_b + inner * q_h + i.to(tl.int64)[:, None] * q_m + d[None, :]
    q = tl.load(q_at, mask=here[:, None] > 0, other=0.0)
    factor = scale * LOG2E
    k_base = K + batch * k_b + (inner // G) * k_h
    v_base = V + batch * v_b + (inner // G) * v_h
    m = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    lost = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, DV), tl.float32)
    kept = tl.zeros((M,), tl.int32)
    skipped = tl.full((), 0, tl.int32)
    whole = (keys - rows + block * M + 1) // N * N  # blocks before it are seen by all rows
    for first in tl.range(0, whole, N, num_stages=STAGES):
        m, total, lost, acc, kept, skipped = _visit(
            q, k_base, v_base, k_n, v_n, first, end, position, here, factor, level, m, total, lost, acc, kept, skipped,
            MASKED=False, D=D, DV=DV, N=N,
        )  # fmt: skip
    for first in tl.range(whole, end, N):
        m, total, lost, acc, kept, skipped = _visit(
            q, k_base, v_base, k_n, v_n, first, end, position, here, factor, level, m, total, lost, acc, kept, skipped,
            MASKED=True, D=D, DV=DV, N=N,
        )  # fmt: skip
    e = tl.arange(0, DV)
    inside = i < rows
    out = OUTPUT + batch * o_b + inner * o_h + i.to(tl.int64)[:, None] * o_m + e[None, :]
    tl.store(out, (acc / total[:, None]).to(OUTPUT.dtype.element_ty), mask=inside[:, None])
    row = head.to(tl.int64) * rows + i
    tl.store(LSE + row, (m + tl.log2(total)) * (1 / LOG2E), mask=inside)
    tl.store(LOST + row, (m + tl.log2(lost)) * (1 / LOG2E), mask=inside)
    tl.store(KEPT + row, kept, mask=inside)
    tl.store(SKIPPED + head.to(tl.int64) * blocks + block, skipped)


@where_it_lies
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, level: float, scale: float) -> Attended:
    """q (B, h, m, d), k and v (B, g, n, d) as `gpu.listed.check_tensors` wants them; level natural, -inf for none."""
    B, h, m, d = q.shape
    g, n = k.shape[1:3]
    blocks, shape = row_blocks(m), (B * h, m)
    found = Attended(
        torch.empty((B, h, m, d), dtype=q.dtype, device=q.device),
        torch.empty(shape, dtype=torch.float32, device=q.device),
        torch.empty(shape, dtype=torch.float32, device=q.device),
        torch.empty(shape, dtype=torch.int32, device=q.device),
        torch.empty((B * h, blocks), dtype=torch.int32, device=q.device),
    )
    skip_softmax[(B * h, blocks)](
        q, k, v, *found, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *found.output.stride()[:3], m, n, h, blocks,
        scale, level / math.log(2), G=h // g, D=d, DV=d, M=ROWS, N=BLOCK, STAGES=STAGES[d], num_warps=8,
        num_stages=STAGES[d],
    )  # fmt: skip
    return found


def refuses(*, policy: Any, weight: Softmax | ReLUPower, causal: bool, **call: object) -> str | None:
    """Why prompts on a GPU cannot be served so; None if they can."""
    if not isinstance(policy, SkipSoftmax):
        return f"serves the policy SkipSoftmax alone; got {policy!r}"
    if not isinstance(weight, Softmax):
        return f"serves Softmax() alone; got {weight!r}"
    return None if causal else "serves causal prompts alone; got causal=False"


def prompt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, policy: SkipSoftmax, scale: float | None) -> SkipResult:
    """See `attention.prefill`; tensors as for `gpu.prompt.prompt`, and everything of the result stays on the GPU.

    Products have the tensors' dtype and sums are float32, with whatever rounding the device has: the certificate claims
    nothing.  Nothing waits for the device, so that a call can be captured in a CUDA graph.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit.
    """
    arrays = batched(q, k, v)
    m, n = q.shape[-2], k.shape[-2]
    factor = k.shape[-1] ** -0.5 if scale is None else checks.real("scale", scale, math.nextafter(0, 1), math.inf)
    found = attend(*arrays, policy.level(n), factor)
    lead, kept = q.shape[:-1], found.kept.long()
    seen = torch.arange(n - m + 1, n + 1, device=q.device)
    unknown: Any = torch.full((), math.inf, device=q.device).expand(lead)
    nothing: Any = torch.zeros((), dtype=torch.bool, device=q.device).expand(lead)
    work: Any = seen.expand(lead), torch.zeros_like(seen).expand(lead), kept.view(lead)
    last = kept[:, ROWS - 1 :: ROWS].sum(1) + (kept[:, -1] if m % ROWS else 0)
    densities: Any = (last.double() / float(ends(m, n).sum())).view(q.shape[:-2])
    return SkipResult(
        found.output.view(q.shape),
        cast(Any, found.lse.view(lead)),
        nothing,
        Certificate("none", unknown, unknown, unknown, unknown),
        Counters(*work),
        n,
        densities,
        cast(Any, found.blocks.long().view(*q.shape[:-2], -1)),
    )
