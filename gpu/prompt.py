"""Prefill of prompts that lie on a GPU: what `attention.prefill` hands CUDA tensors to.

A density is served without a look at the GPU; kernels of `gpu.block_sampled` and `gpu.listed` do the work, or, where
rates measured in the process say that it takes no longer, a dense kernel.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from attention.block_sampled import FALL, SHARE, BlockSampled, measured_rows
from attention.key_lists import KEYS, ROWS, KeyLists, budget, check, edges, least_density, row_blocks
from attention.listed import Listed
from attention.policies import Dense
from attention.result import Certificate, Counters, Result
from attention.shared_prompt import BlockResult, Selects
from attention.weights import ReLUPower, Softmax
from gpu import block_sampled, listed, prompt_cost
from gpu.exact_rows import exact_rows
from gpu.tensors import where_it_lies
from hsr import checks
from hsr.errors import ArgumentError

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q (B, h, m, d), k, v (B, g, n, d)


class Answer(NamedTuple):
    """Of B h heads; None of counts and densities is all keys."""

    output: torch.Tensor  # (B, h, m, d)
    lse: torch.Tensor  # (B, h, m)
    counts: torch.Tensor | None  # (B h, T), keys listed
    densities: torch.Tensor | None  # (B h,)


def refuses(*, policy: Any, weight: Softmax | ReLUPower, causal: bool, **call: object) -> str | None:
    """Why prompts on a GPU cannot be served so; None if they can."""
    if not isinstance(policy, BlockSampled | Listed | Dense | Selects):
        return f"serves the policies BlockSampled, Listed, Dense and selectors alone; got {policy!r}"
    if not isinstance(weight, Softmax):
        return f"serves Softmax() alone; got {weight!r}"
    return None if causal else "serves causal prompts alone; got causal=False"


@where_it_lies
def prompt(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policy: BlockSampled | Listed | Dense | Selects,
    scale: float | None,
) -> BlockResult:
    """See `attention.prefill`; float16 or bfloat16 tensors on one GPU, widths 64, 128 or 256, rows contiguous.

    Values are not looked at: NaN or infinity comes out where it goes in.  Output, log-sum-exps (float32), counters and
    densities stay on the GPU.  A density or a time needs no look at the GPU, so that a call can be captured in a CUDA
    graph once one of its shape, dtype and policy has run; an error and `Listed` wait for it.
    Selectors make their lists here, and those of `attention.selectors` do not wait either.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit; a density that the bands alone exceed.
    """
    arrays = batched(q, k, v)
    factor = arrays[1].shape[3] ** -0.5 if scale is None else checks.real("scale", scale, np.nextafter(0, 1), math.inf)
    return result_of(_answer(policy, arrays, factor), q, arrays[1].shape[2], coded=isinstance(policy, BlockSampled))


def result_of(answer: Answer, q: torch.Tensor, n: int, coded: bool) -> BlockResult:
    """What `prompt` returns of an answer; q (.., h, m, d), n keys, whether the eligible ones had codes."""
    output, lse, counts, densities = answer
    lead, m = q.shape[:-1], q.shape[-2]
    row = torch.arange(m, device=q.device)
    seen = row + (n - m + 1)
    edge = (row // ROWS * ROWS + (n - m)) // KEYS * KEYS
    visited = edge.expand(lead) if coded and counts is not None else torch.zeros_like(edge).expand(lead)
    reported = seen.expand(lead) if counts is None else (counts[:, row // ROWS] + (seen - edge)).view(lead)
    unknown = torch.full((), math.inf, device=q.device).expand(lead)
    nothing = torch.zeros((), dtype=torch.bool, device=q.device).expand(lead)
    work: Any = reported, visited, reported
    result = Result(
        output.view(q.shape),
        cast(Any, lse.view(lead)),
        cast(Any, nothing),
        Certificate("none", *[cast(Any, unknown)] * 4),
        Counters(*work),
        n,
    )
    if densities is None:
        densities = torch.ones(math.prod(q.shape[:-2]), dtype=torch.float64, device=q.device)
    return BlockResult(**vars(result), densities=cast(Any, densities.view(q.shape[:-2])))


def batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """With a batch, if they are alike and the kernels have a form for them; ArgumentError if not."""
    for name, part in (("q", q), ("k", k), ("v", v)):
        device, axes = getattr(part, "device", None), getattr(part, "ndim", None)
        if device != q.device or axes != q.ndim or q.ndim not in (3, 4):
            raise ArgumentError(
                f"{name} must have 3 or 4 axes like q, on {q.device}; got {type(part).__name__} of {axes} on {device}"
            )
    full = [part if q.ndim == 4 else part[None] for part in (q, k, v)]
    listed.check_tensors(*full)
    return full[0], full[1], full[2]


def _answer(policy: BlockSampled | Listed | Dense | Selects, arrays: Tensors, scale: float) -> Answer:
    q, k, _ = arrays
    heads, m, n = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    if isinstance(policy, Dense):
        return dense(arrays, scale)
    if isinstance(policy, Listed):
        check(policy.lists, heads, m, n)
        given = {name: _laid(part, q.device) for name, part in vars(policy.lists).items()}
        return _attended(arrays, KeyLists(**given), scale)
    if not isinstance(policy, BlockSampled):
        return _attended(arrays, policy.lists(q.flatten(0, 1), k.flatten(0, 1), scale), scale)
    if policy.error is not None:
        return _within(policy, policy.error, arrays, scale)
    density = policy.density
    if density is not None:
        budget(density, m, n)  # refuses one that the bands exceed
    rates = prompt_cost.rates(q.device, q.dtype, q.shape[3], policy.rows, policy.causal_selection)
    if density is None:
        assert policy.seconds is not None
        density = rates.density_for(policy.seconds, heads, m, n)
    if rates.dense_is_faster(density, heads, m, n):
        return dense(arrays, scale)
    return drawn(policy, density, arrays, scale)


def _laid(part: Any, device: torch.device) -> Any:
    """An array of lists as the kernels read it: contiguous, on the device."""
    return torch.as_tensor(part, device=device).contiguous() if hasattr(part, "shape") else part


def drawn(policy: BlockSampled, density: float | np.ndarray, arrays: Tensors, scale: float) -> Answer:
    """Over keys drawn at a density, of all heads or of each, (B h,)."""
    return _attended(arrays, lists_of(policy, density, arrays, scale), scale)


def lists_of(policy: BlockSampled, density: float | np.ndarray, arrays: Tensors, scale: float) -> KeyLists:
    """The keys that are drawn at a density, of all heads or of each."""
    return block_sampled.key_lists(
        *arrays, density=density, rows=policy.rows, causal_selection=policy.causal_selection, seed=policy.seed,
        scale=scale,
    )  # fmt: skip


def _attended(arrays: Tensors, lists: KeyLists, scale: float) -> Answer:
    m, n = arrays[0].shape[2], arrays[1].shape[2]
    output, lse = listed.attend(*arrays, lists, scale)
    counts = lists.token_offsets.diff()
    for offsets, size in ((lists.block_offsets, KEYS), (lists.mean_offsets, 1)):
        if offsets is not None:
            counts = counts + size * offsets.diff()
    return Answer(output, lse, counts.view(-1, row_blocks(m)), lists.densities(m, n))


def dense(arrays: Tensors, scale: float) -> Answer:
    """Every key: torch's fused kernel where rows and keys are as many, else lists of all blocks."""
    q, k, v = arrays
    heads, m, n = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    if 1 < m == n and q.shape[3] <= 128 and q.is_cuda:
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        output, lse = attend(q, k, v, None, True, 0.0, True, False, scale=scale)[:2]
        return Answer(output.contiguous(), lse.reshape(q.shape[:3]), None, None)
    blocks = edges(m, n) // KEYS
    total = heads * int(blocks.sum())
    counts = (n - m + ROWS * torch.arange(len(blocks), device=q.device)).div(KEYS, rounding_mode="floor").repeat(heads)
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=q.device)
    offsets[1:] = counts.cumsum(0)
    begin = offsets[:-1].repeat_interleave(counts, output_size=total)
    every = (torch.arange(total, device=q.device) - begin).int()
    none = torch.zeros_like(offsets), torch.zeros(0, dtype=torch.int32, device=q.device)
    output, lse = listed.attend(q, k, v, KeyLists(*none, block_offsets=offsets, blocks=every), scale)
    return Answer(output, lse, None, None)


def _within(policy: BlockSampled, error: float, arrays: Tensors, scale: float) -> Answer:
    """Each head at the first of rising densities whose mean error on `measured_rows` is small enough.

    Heads that miss it are drawn anew together, in one call of all heads: the others' lists are the least, and dropped.
    """
    q, k, v = arrays
    heads, m, n = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    rows = measured_rows(policy.seed, heads, m)
    chosen = torch.from_numpy(rows).to(q.device)
    exact = exact_rows(q, k, v, rows, scale)[0].flatten(0, 1)  # (H, s, d) float32
    least, share = least_density(m, n), np.full(heads, SHARE)
    lowest = least + (1 - least) * SHARE
    answer = drawn(policy, lowest, arrays, scale)
    output, lse, counts, densities = parts = _by_head(answer)
    while True:
        found = output.gather(1, chosen[..., None].expand(-1, -1, q.shape[3])).float()
        off = (found - exact).norm(dim=2)
        missed = torch.where(off == 0, 0.0, off / exact.norm(dim=2)).mean(1).cpu().numpy()
        late = ~(missed <= error) & (share < 1)  # not a number is too much
        if not late.any():
            return answer
        share[late] = np.minimum(share[late] * np.fmax(2.0, (missed[late] / error) ** FALL), 1.0)
        some = late & (share < 1)
        if some.any():
            better = drawn(policy, np.where(some, least + (1 - least) * share, lowest), arrays, scale)
            at = torch.from_numpy(np.flatnonzero(some)).to(q.device)
            for part, other in zip(parts, _by_head(better), strict=True):
                part[at] = other[at]
        for head in np.flatnonzero(late & (share == 1)):
            batch, inner = divmod(int(head), q.shape[1])
            source = inner * k.shape[1] // q.shape[1]
            own = q[batch, inner], k[batch, source], v[batch, source]
            whole = dense((own[0][None, None], own[1][None, None], own[2][None, None]), scale)
            output[head], lse[head], densities[head] = whole.output[0, 0], whole.lse[0, 0], 1.0
            counts[head] = torch.from_numpy(edges(m, n)).to(q.device)


def _by_head(answer: Answer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of its parts, a row of the first axis for each of the B h heads."""
    assert answer.counts is not None and answer.densities is not None
    output = answer.output.view(-1, *answer.output.shape[2:])
    return output, answer.lse.view(len(output), -1), answer.counts, answer.densities
