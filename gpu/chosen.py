"""One decode step over the tokens and means that a selector lists (`attention.token_lists`), on the GPU.

Lines of tokens are split evenly along their counts, which stay on the device; partial outputs are merged by their
log-sums.  A line's means are split likewise, after its tokens.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from attention.token_lists import TokenLists
from gpu.codes import LOG2E
from gpu.tensors import where_it_lies

DTYPES = ("float16", "bfloat16")
TILES = {64: (64, 3), 128: (64, 3), 256: (32, 2)}  # keys of a tile and stages, by width
ROWS = 4  # query heads of a program, at least: what a tensor core's instruction is padded to
SHARE = 128  # keys that a part has, about, before a list is cut into more
RESIDENT = 2  # parts in all for each multiprocessor
MOST = 64  # parts of a list


def refuses(*, d: int, dv: int, dtype: str, **call: object) -> str | None:
    """Why the kernel cannot serve such a cache; None if it can."""
    if dtype not in DTYPES:
        return f"serves {' and '.join(DTYPES)}, not {dtype}"
    if d not in TILES or dv != d:
        return f"serves keys and values of one width, {', '.join(map(str, TILES))}; got {d} and {dv}"
    return None


@triton.jit
def _more(q, k, v, logits, ok, factor, m, total, acc):
    """A tile more of keys (N, D) and values (N, D), those that are ok, of weight above zero or not."""
    s = tl.dot(q, tl.trans(k)) * factor + logits[None, :]
    s = tl.where(ok[None, :], s, -float("inf"))
    higher = tl.maximum(m, tl.max(s, 1))
    base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing of weight yet
    p = tl.exp2(s - base[:, None])
    fade = tl.exp2(m - base)
    return higher, total * fade + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * fade[:, None])


@triton.jit
def chosen_parts(
    Q, K, V, TOKENS, COUNTS, LOG_WEIGHTS, MEAN_K, MEAN_V, MEAN_LOGS, PARTS, SUMS, q_h, k_h, k_n, v_h, v_n, t_l, w_l,
    a_h, a_n, b_h, b_n, c_l, means, scale, LINES: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, STAGES: tl.constexpr, WEIGHTED: tl.constexpr, HAS_MEANS: tl.constexpr,
):  # fmt: skip
    """A part of a line; grid (splits, L).

    Q (L * G, D), K, V (L / LINES, n, D), MEAN_K, MEAN_V (L / LINES, means, D) by strides, rows contiguous; TOKENS,
    LOG_WEIGHTS (L, W), MEAN_LOGS (L, means) by strides, COUNTS (L,) -> PARTS (L * G, splits, D) float32, normalised,
    and SUMS (L * G, splits) float32, base-2 log-sums; zeros and -inf where a part has no weight.
    """
    part = tl.program_id(0)
    splits = tl.num_programs(0)
    line = tl.program_id(1)
    head = (line // LINES).to(tl.int64)
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    o = tl.arange(0, N)
    rows = line.to(tl.int64) * G + g
    q = tl.load(Q + rows[:, None] * q_h + d[None, :], mask=g[:, None] < G, other=0.0)
    factor = scale * LOG2E
    m = tl.full((GP,), -float("inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, D), tl.float32)

    count = tl.load(COUNTS + line)
    per = tl.cdiv(tl.cdiv(count, splits), 16) * 16
    last = tl.minimum(part * per + per, count)
    tokens = TOKENS + line.to(tl.int64) * t_l
    for first in tl.range(part * per, last, N, num_stages=STAGES):
        ok = first + o < last
        j = tl.load(tokens + first + o, mask=ok, other=0).to(tl.int64)
        k = tl.load(K + head * k_h + j[:, None] * k_n + d[None, :], mask=ok[:, None], other=0.0)
        v = tl.load(V + head * v_h + j[:, None] * v_n + d[None, :], mask=ok[:, None], other=0.0)
        logits = tl.zeros((N,), tl.float32)
        if WEIGHTED:
            logits = tl.load(LOG_WEIGHTS + line.to(tl.int64) * w_l + first + o, mask=ok, other=0.0) * LOG2E
        m, total, acc = _more(q, k, v, logits, ok, factor, m, total, acc)
    if HAS_MEANS:
        per = tl.cdiv(tl.cdiv(means, splits), 16) * 16
        last = tl.minimum(part * per + per, means)
        for first in tl.range(part * per, last, N, num_stages=STAGES):
            ok = first + o < last
            j = (first + o).to(tl.int64)
            k = tl.load(MEAN_K + head * a_h + j[:, None] * a_n + d[None, :], mask=ok[:, None], other=0.0)
            v = tl.load(MEAN_V + head * b_h + j[:, None] * b_n + d[None, :], mask=ok[:, None], other=0.0)
            logits = tl.load(MEAN_LOGS + line.to(tl.int64) * c_l + first + o, mask=ok, other=0.0) * LOG2E
            m, total, acc = _more(
                q, k.to(q.dtype), v.to(q.dtype), logits, ok & (logits > -float("inf")), factor, m, total, acc
            )
    out = rows * splits + part
    whole = tl.where(total > 0, total, 1.0)
    tl.store(SUMS + out, tl.where(total > 0, m + tl.log2(whole), -float("inf")), mask=g < G)
    tl.store(PARTS + out[:, None] * D + d[None, :], acc / whole[:, None], mask=g[:, None] < G)


@triton.jit
def chosen_merge(PARTS, SUMS, OUTPUT, LSE, splits, D: tl.constexpr, SPLITS: tl.constexpr):
    """Parts of `chosen_parts` -> OUTPUT (H, D), LSE (H,) float32, natural; grid (H,).  Zeros and -inf of nothing."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    ok = part < splits
    sums = tl.load(SUMS + row * splits + part, mask=ok, other=-float("inf"))
    parts = tl.load(PARTS + (row * splits + part)[:, None] * D + d[None, :], mask=ok[:, None], other=0.0)
    top = tl.max(sums, 0)
    weight = tl.exp2(sums - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight, 0)
    whole = tl.where(total > 0, total, 1.0)
    tl.store(OUTPUT + row * D + d, (tl.sum(parts * weight[:, None], 0) / whole).to(OUTPUT.dtype.element_ty))
    tl.store(LSE + row, tl.where(total > 0, (top + tl.log2(whole)) * (1 / LOG2E), -float("inf")))


@where_it_lies
def chosen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: TokenLists, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `attention.chosen_reference.chosen`; float16 or bfloat16, output likewise, log-sum-exp float32.

    Rows of keys and values are contiguous, other strides anything.  Nothing waits for the GPU.
    """
    (H, d), L, q = q.shape, len(lists.tokens), _lined(q)
    lines, heads = L // len(k), H // L
    means, tokens, counts = lists.means, _lined(lists.tokens), lists.counts.contiguous()
    weights = None if lists.log_weights is None else _lined(lists.log_weights)
    none = counts  # for pointers that are not read
    pseudo = (k, v, none[:, None]) if means is None else (means.keys, means.values, means.log_weights)
    mean_k, mean_v, mean_logs = (_lined(part) for part in pseudo)
    many = 0 if means is None else mean_k.shape[1]
    splits = _splits(q.device, L, tokens.shape[1] + many)
    parts = torch.empty((H, splits, d), dtype=torch.float32, device=q.device)
    sums = torch.empty((H, splits), dtype=torch.float32, device=q.device)
    output, lse = torch.empty_like(q, memory_format=torch.contiguous_format), sums.new_empty(H)
    tile, stages = TILES[d]
    chosen_parts[(splits, L)](
        q, k, v, tokens, counts, none if weights is None else weights, mean_k, mean_v, mean_logs, parts, sums,
        q.stride(0), *k.stride()[:2], *v.stride()[:2], tokens.stride(0), 0 if weights is None else weights.stride(0),
        *mean_k.stride()[:2], *mean_v.stride()[:2], mean_logs.stride(0), many, scale, LINES=lines, G=heads,
        GP=max(ROWS, triton.next_power_of_2(heads)), D=d, N=tile, STAGES=stages, WEIGHTED=weights is not None,
        HAS_MEANS=many > 0, num_warps=warps(d), num_stages=stages,
    )  # fmt: skip
    chosen_merge[(H,)](parts, sums, output, lse, splits, D=d, SPLITS=splits, num_warps=warps(d))
    return output, lse


def _lined(x: torch.Tensor) -> torch.Tensor:
    """With contiguous rows, as queries, lists and means nearly always have them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def warps(d: int) -> int:
    """Of a program, by width."""
    return max(4, d // 32)


def _splits(device: torch.device, lines: int, width: int) -> int:
    """Parts of a line, a power of two: what fills the multiprocessors, but some keys for each."""
    most = max(min(_processors(device) * RESIDENT // lines, width // SHARE, MOST), 1)
    return 1 << (most.bit_length() - 1)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
