"""Attention of a prompt's rows over lists that blocks of rows share (`attention.key_lists`), on the GPU.

One program per block of rows and head (`listed.cu` is the same for Hopper, faster).  It walks the band on the diagonal,
where rows see different keys and scores are masked, then what its line lists: single keys with log weights, whole
blocks, and blocks that their means stand for.  Nothing listed needs a mask.  Lists are read as they lie on the device:
nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention.key_lists import KEYS, ROWS, KeyLists, row_blocks
from gpu import hopper
from gpu.codes import LOG2E
from gpu.tensors import where_it_lies
from hsr.errors import ArgumentError

DTYPES = (torch.float16, torch.bfloat16)
TILES = {64: (64, 3), 128: (64, 3), 256: (32, 2)}  # keys of a tile and stages, by width


@triton.jit
def _attended(q, k, v, factor, bias, m, total, acc):
    """A tile more of keys (N, D) and values (N, DV); bias (1 or M, N) is added to base-2 scores."""
    s = tl.dot(q, tl.trans(k)) * factor + bias
    higher = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    fade = tl.exp2(m - higher)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
    return higher, total, acc


@triton.jit
def listed(
    Q, K, V, MEAN_K, MEAN_V, OUTPUT, LSE, Q_SIZES, K_SIZES, TOKEN_STARTS, TOKENS, LOG_WEIGHTS, BLOCK_STARTS,
    BLOCKS, MEAN_STARTS, MEANS, q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m, rows, keys, heads, blocks,
    scale, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr,
    N: tl.constexpr, STAGES: tl.constexpr,
    HAS_TOKENS: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_MEANS: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """Grid (B * heads, T): T blocks of M rows, the last first, because they have most to do.

    Q (B, heads, rows, D), K (B, heads / G, keys, D), V (.., DV), OUTPUT like Q by strides, columns contiguous; LSE
    (B * heads, rows) float32, natural.  Q_SIZES and K_SIZES (B,): rows and keys of each sequence, where SIZED; a
    sequence's last row sees its last key.
    """
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = (head // heads).to(tl.int64)
    inner = (head % heads).to(tl.int64)
    i = block * M + tl.arange(0, M)
    d = tl.arange(0, D)
    e = tl.arange(0, DV)
    many, size = rows, keys
    if SIZED:
        many, size = tl.load(Q_SIZES + batch), tl.load(K_SIZES + batch)
    here = i < many
    position = size - many + i
    edge = tl.maximum(size - many + block * M, 0) // KEYS * KEYS
    end = tl.minimum(size - many + block * M + M, size)
    q = tl.load(
        Q + batch * q_b + inner * q_h + i.to(tl.int64)[:, None] * q_m + d[None, :], mask=here[:, None], other=0.0
    )
    factor = scale * LOG2E
    k_base = K + batch * k_b + (inner // G) * k_h
    v_base = V + batch * v_b + (inner // G) * v_h
    m = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, DV), tl.float32)

    o = tl.arange(0, N)
    for first in tl.range(edge, end, N):  # every row sees the first key of the first tile: m is finite from then on
        j = first + o
        k = tl.load(k_base + j.to(tl.int64)[:, None] * k_n + d[None, :], mask=j[:, None] < end, other=0.0)
        v = tl.load(v_base + j.to(tl.int64)[:, None] * v_n + e[None, :], mask=j[:, None] < end, other=0.0)
        bias = tl.where(j[None, :] <= position[:, None], 0.0, -float("inf"))
        m, total, acc = _attended(q, k, v, factor, bias, m, total, acc)
    line = head.to(tl.int64) * blocks + block
    if HAS_TOKENS:
        start = tl.load(TOKEN_STARTS + line)
        stop = tl.load(TOKEN_STARTS + line + 1)
        for first in tl.range(0, (stop - start).to(tl.int32), N, num_stages=STAGES):
            ok = first + o < stop - start
            j = tl.load(TOKENS + start + tl.minimum(first + o, stop - start - 1)).to(tl.int64)
            weight = tl.load(LOG_WEIGHTS + start + first + o, mask=ok, other=-float("inf"))
            k = tl.load(k_base + j[:, None] * k_n + d[None, :])
            v = tl.load(v_base + j[:, None] * v_n + e[None, :])
            m, total, acc = _attended(q, k, v, factor, (weight * LOG2E)[None, :], m, total, acc)
    if HAS_BLOCKS:
        start = tl.load(BLOCK_STARTS + line)
        tiles = ((tl.load(BLOCK_STARTS + line + 1) - start) * (KEYS // N)).to(tl.int32)
        for tile in tl.range(0, tiles, num_stages=STAGES):
            j = tl.load(BLOCKS + start + tile // (KEYS // N)) * KEYS + tile % (KEYS // N) * N + o
            k = tl.load(k_base + j.to(tl.int64)[:, None] * k_n + d[None, :])
            v = tl.load(v_base + j.to(tl.int64)[:, None] * v_n + e[None, :])
            m, total, acc = _attended(q, k, v, factor, tl.zeros((1, N), tl.float32), m, total, acc)
    if HAS_MEANS:
        start = tl.load(MEAN_STARTS + line)
        stop = tl.load(MEAN_STARTS + line + 1)
        means = (batch * (heads // G) + inner // G) * (keys // KEYS)
        for first in tl.range(0, (stop - start).to(tl.int32), N, num_stages=STAGES):
            ok = first + o < stop - start
            j = means + tl.load(MEANS + start + tl.minimum(first + o, stop - start - 1))
            k = tl.load(MEAN_K + j[:, None] * D + d[None, :])
            v = tl.load(MEAN_V + j[:, None] * DV + e[None, :])
            bias = tl.where(ok, 7.0, -float("inf"))  # log2(KEYS)
            m, total, acc = _attended(q, k, v, factor, bias[None, :], m, total, acc)
    out = OUTPUT + batch * o_b + inner * o_h + i.to(tl.int64)[:, None] * o_m + e[None, :]
    inside = i < rows
    total = tl.where(here, total, 1.0)
    tl.store(out, tl.where(here[:, None], acc / total[:, None], 0.0).to(OUTPUT.dtype.element_ty), mask=inside[:, None])
    lse = tl.where(here, (m + tl.log2(total)) * (1 / LOG2E), -float("inf"))
    tl.store(LSE + head.to(tl.int64) * rows + i, lse, mask=inside)


@where_it_lies
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: KeyLists,
    scale: float,
    *,
    sizes: tuple[torch.Tensor, torch.Tensor] | None = None,
    single: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every row to its line's keys and to its band.  Nothing waits for the device.

    Args:
        q: (B, h, m, d) float16 or bfloat16, d 64, 128 or 256, rows contiguous.
        k: (B, g, n, d), n >= m; the last row sees the last key.
        v: (B, g, n, d).
        lists: of B h heads, on the device; `attention.key_lists.check` tells whether they are in order, this does not.
        scale: of the scores.
        sizes: (B,) int32 each, rows and keys of every sequence, if fewer than m and n; lists are those of its own
            geometry, with lines for m rows.  Outputs of further rows are zero, their log-sum-exps -inf.
        single: False takes the Triton kernel even where there is a faster one.

    Returns:
        tuple: output (B, h, m, d) of q's dtype, log-sum-exp (B, h, m) float32, natural.

    Raises:
        ArgumentError: shapes and dtypes that the kernels have no form for.
    """
    check_tensors(q, k, v)
    lines = q.shape[0] * q.shape[1] * row_blocks(q.shape[2])
    if lists.lines != lines:
        raise ArgumentError(f"lists must have {lines} lines, one per head and block of {ROWS} rows; got {lists.lines}")
    B, h, m, d = q.shape
    g, n = k.shape[1:3]
    output = torch.empty((B, h, m, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, h, m), dtype=torch.float32, device=q.device)
    weights = lists.log_weights
    if weights is None and len(lists.tokens):
        weights = torch.zeros(len(lists.tokens), dtype=torch.float32, device=q.device)
    lists = KeyLists(**(vars(lists) | {"log_weights": weights}))
    means = (k, v) if lists.means is None else (block_means(k), block_means(v))
    q_sizes, k_sizes = sizes or (None, None)
    if single and hopper.serves(q, k, v):
        hopper.attend(q, k, v, lists, means, (q_sizes, k_sizes), scale, output, lse)
        return output, lse
    tile, stages = TILES[d]
    spare = lse  # for pointers that are not read
    present = (spare if part is None else part for part in (
        q_sizes, k_sizes, lists.token_offsets, lists.tokens, weights, lists.block_offsets, lists.blocks,
        lists.mean_offsets, lists.means,
    ))  # fmt: skip
    listed[(B * h, row_blocks(m))](
        q, k, v, *means, output, lse, *present, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *output.stride()[:3], m, n, h, row_blocks(m), scale, G=h // g, D=d, DV=d, M=ROWS, KEYS=KEYS, N=tile,
        STAGES=stages, HAS_TOKENS=weights is not None, HAS_BLOCKS=lists.blocks is not None,
        HAS_MEANS=lists.means is not None, SIZED=sizes is not None, num_warps=8, num_stages=stages,
    )  # fmt: skip
    return output, lse


def block_means(x: torch.Tensor) -> torch.Tensor:
    """Means of whole blocks of KEYS rows: (B, g, n, d) -> (B, g, n // KEYS, d), contiguous, of the same dtype."""
    B, g, n, d = x.shape
    return x[:, :, : n // KEYS * KEYS].reshape(B, g, -1, KEYS, d).mean(3, dtype=torch.float32).to(x.dtype)


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Whether the kernels have a form for a prompt (B, h, m, d) over keys (B, g, n, d); ArgumentError if not."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ArgumentError(
            f"q, k and v must be (B, h, m, d), (B, g, n, d) and (B, g, n, d) on cuda; got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if 0 in (*q.shape[:2], *k.shape[:2]) or not q.device == k.device == v.device:
        raise ArgumentError(
            f"q, k and v must have heads, on one device; got {tuple(q.shape)} and {tuple(k.shape)} on "
            f"{q.device}, {k.device} and {v.device}"
        )
    if q.dtype not in DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        raise ArgumentError(
            f"q, k and v must be all float16 or all bfloat16 on cuda; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.shape[3] not in TILES:
        raise ArgumentError(f"q must have width {', '.join(map(str, TILES))} on cuda; got {q.shape[3]}")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ArgumentError(f"q must have 1 to {k.shape[2]} rows, one per key, when causal; got {q.shape[2]}")
    if q.shape[1] % k.shape[1]:
        raise ArgumentError(f"q must have heads in multiples of {k.shape[1]}; got {q.shape[1]}")
    if any(part.stride(3) != 1 for part in (q, k, v)):
        raise ArgumentError(
            f"q, k and v must have contiguous rows; got strides {q.stride()}, {k.stride()}, {v.stride()}"
        )
