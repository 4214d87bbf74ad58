"""Prefill of prompts that lie on a GPU: what `attention.prefill` hands CUDA tensors to.

Nothing is read back, but for a target of error; kernels of `gpu.block_sampled` and `gpu.listed` do the work, or, where
rates measured in the process say that it takes no longer, a dense kernel of torch.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from attention.block_sampled import FALL, MEASURED, SHARE, BlockSampled
from attention.key_lists import KEYS, ROWS, KeyLists, check, edges, least_density, row_blocks
from attention.listed import Listed
from attention.policies import Dense
from attention.result import Certificate, Counters, Result
from attention.shared_prompt import BlockResult, Selects
from attention.weights import ReLUPower, Softmax
from gpu import block_sampled, listed, prompt_cost
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
        return "serves the policies BlockSampled, Listed, Dense and selectors alone"
    if not isinstance(weight, Softmax):
        return "serves Softmax() alone"
    return None if causal else "serves causal prompts alone"


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
    graph once one of its shape has run; a causal selection, an error and `Listed` wait for it.  Selectors make their
    lists here, and those of `attention.selectors` do not wait either.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit; a density that the bands alone exceed.
    """
    arrays = _checked(q, k, v)
    factor = arrays[1].shape[3] ** -0.5 if scale is None else checks.real("scale", scale, np.nextafter(0, 1), math.inf)
    return result_of(_answer(policy, arrays, factor), q, arrays[1].shape[2])


def result_of(answer: Answer, q: torch.Tensor, n: int) -> BlockResult:
    """What `prompt` returns of an answer; q (.., h, m, d), n keys."""
    output, lse, counts, densities = answer
    lead, m = q.shape[:-1], q.shape[-2]
    row = torch.arange(m, device=q.device)
    seen = row + (n - m + 1)
    if counts is None:
        reported = seen.expand(lead)
    else:
        near = seen - (row // ROWS * ROWS + (n - m)) // KEYS * KEYS  # keys of the band
        reported = (counts[:, row // ROWS] + near).view(lead)
    unknown, nothing, none = (
        _constant(value, dtype, q.device).expand(lead)
        for value, dtype in ((math.inf, torch.float32), (False, torch.bool), (0, torch.int64))
    )
    work: Any = reported, none, reported
    result = Result(
        output.view(q.shape),
        cast(Any, lse.view(lead)),
        cast(Any, nothing),
        Certificate("none", *[cast(Any, unknown)] * 4),
        Counters(*work),
        n,
    )
    whole = _constant(1.0, torch.float64, q.device).expand(q.shape[:-2]) if densities is None else densities
    return BlockResult(**vars(result), densities=cast(Any, whole.view(q.shape[:-2])))


@functools.cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), value, dtype=dtype, device=device)


def _checked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """With a batch."""
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
        return _attended(arrays, policy.lists, scale)
    if not isinstance(policy, BlockSampled):
        return _attended(arrays, policy.lists(q.flatten(0, 1), k.flatten(0, 1), scale), scale)
    if policy.error is not None:
        return _within(policy, policy.error, arrays, scale)
    rates = prompt_cost.rates(q.device, q.dtype, q.shape[3], policy.rows)
    density = policy.density
    if density is None:
        assert policy.seconds is not None
        density = rates.density_for(policy.seconds, heads, m, n)
    if rates.dense_is_faster(density, heads, m, n):
        return dense(arrays, scale)
    return drawn(policy, density, arrays, scale)


def drawn(policy: BlockSampled, density: float, arrays: Tensors, scale: float) -> Answer:
    """Over keys drawn at a density."""
    return _attended(arrays, lists_of(policy, density, arrays, scale), scale)


def lists_of(policy: BlockSampled, density: float, arrays: Tensors, scale: float) -> KeyLists:
    """The keys that are drawn at a density."""
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
    if m == n and q.shape[3] <= 128:
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        output, lse = attend(q, k, v, None, True, 0.0, True, False, scale=scale)[:2]
        return Answer(output.contiguous(), lse.reshape(q.shape[:3]), None, None)
    blocks = edges(m, n) // KEYS
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(np.tile(blocks, heads))])).to(q.device)
    ids = np.concatenate([np.arange(count, dtype=np.int32) for count in blocks])
    every = torch.from_numpy(ids).to(q.device).repeat(heads)
    none = torch.zeros_like(offsets), torch.zeros(0, dtype=torch.int32, device=q.device)
    output, lse = listed.attend(q, k, v, KeyLists(*none, block_offsets=offsets, blocks=every), scale)
    return Answer(output, lse, None, None)


def _within(policy: BlockSampled, error: float, arrays: Tensors, scale: float) -> Answer:
    """Each head at the first of rising densities whose mean error on MEASURED rows is small enough."""
    q, k, v = arrays
    heads, m, n = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    rng = np.random.default_rng(policy.seed)
    rows = np.array([rng.choice(m, min(MEASURED, m), replace=False) for _ in range(heads)], np.int32)
    chosen = torch.from_numpy(rows).to(q.device)
    exact = listed.rows(q, k, v, chosen, scale)[0].flatten(0, 1)  # (H, s, d) float32
    least = min(least_density(m, n) + (1 - least_density(m, n)) * SHARE, 1.0)
    answer = drawn(policy, least, arrays, scale)
    output, lse = answer.output.view(heads, m, -1), answer.lse.view(heads, m)
    density = np.full(heads, least)
    while True:
        found = output.gather(1, chosen[..., None].long().expand(-1, -1, q.shape[3])).float()
        missed = ((found - exact).norm(dim=2) / exact.norm(dim=2)).mean(1).cpu().numpy()
        late = np.flatnonzero((missed > error) & (density < 1))
        if not late.size:
            return answer
        density[late] = np.minimum(density[late] * np.maximum(2.0, (missed[late] / error) ** FALL), 1.0)
        for head in late:
            source = head * k.shape[0] * k.shape[1] // heads
            of = zip((q, k, v), (head, source, source), strict=True)
            one = cast(Tensors, tuple(part.reshape(-1, *part.shape[2:])[at][None, None] for part, at in of))
            full = density[head] == 1
            better = dense(one, scale) if full else drawn(policy, float(density[head]), one, scale)
            output[head], lse[head] = better.output[0, 0], better.lse[0, 0]
            assert answer.counts is not None and answer.densities is not None
            answer.counts[head] = (
                torch.from_numpy(edges(m, n)).to(q.device) if better.counts is None else better.counts[0]
            )
            answer.densities[head] = 1.0 if better.densities is None else better.densities[0]
