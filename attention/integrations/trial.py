"""Whether sparse attention is faster than dense here: both are timed, on the very keys or on prompts alike."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.block_sampled import BlockSampled
from attention.integrations.dense_rows import allowed, dense
from attention.integrations.masks import Seen
from attention.integrations.steps import Fused, Steps
from attention.key_lists import least_density
from attention.list_tail import ListTail
from attention.prefill import prefill
from attention.selectors.share_prefill import PivotalPatterns, SharePrefill

LEAST = 1024  # tokens from which a layer's steps are tried, and again whenever they have doubled
PROMPT = 1024  # keys from which prompts are tried
PAIRS = 1 << 26  # of rows and keys, in the largest trial of a prompt
TAKES = 3
REPEATS = 8  # calls of a graph


def captured_seconds(call: Callable[[], object]) -> float:
    """Seconds of a call on the GPU, from replays of a graph of REPEATS calls: what the host takes is left out."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(REPEATS):
                call()
        taken = []
        for _ in range(TAKES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1000 / REPEATS)
    torch.cuda.current_stream().wait_stream(stream)
    return min(taken)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the host's included, at best of TAKES after one that may have to compile."""
    taken = []
    for _ in range(TAKES + 1):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return min(taken[1:])


def steps_faster(steps: Steps, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a step of the last row of q (B, h, m, d) gains over dense attention to k (B, g, n, d), v (B, g, n, dv).

    Fused steps are timed as graphs replay them, and so is what they are compared with.
    """
    row = q[:, :, -1:]
    B, h, _, d = row.shape
    packed = row.reshape(B, k.shape[1], h // k.shape[1], d)
    clock = captured_seconds if isinstance(steps, Fused) else partial(seconds, device=q.device)
    return clock(lambda: steps.attend(row)) < clock(lambda: scaled_dot_product_attention(packed, k, v))


class PromptTrials:
    """Verdicts on policies for prompts, remembered; a cache's layers share them."""

    def __init__(self) -> None:
        self._faster: dict[tuple[Any, ...], bool] = {}

    def faster(self, policy: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: int = 0) -> bool:
        """Whether a prompt like q (B, h, m, d) over k (B, g, n, d), v (B, g, n, dv) gains from the policy.

        What the policy cannot serve does not: of the sequence, the first ``hidden`` tokens are padding.
        """
        n = k.shape[2] - hidden
        m = min(q.shape[2], n)
        if m < 1 or n < PROMPT:
            return False
        shape = _tried(m, n)
        if isinstance(policy, BlockSampled):
            density = math.inf if policy.density is None else policy.density
            if density <= least_density(m, n) or (q.device.type == "cuda" and m == n):
                return density > least_density(m, n)  # of whole prompts a GPU's launches look for what is faster
            if density <= least_density(*shape):
                return False
        alike = dataclasses.replace(policy, seed=0) if hasattr(policy, "seed") else policy
        key = repr(alike), q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype, q.device, shape
        if key not in self._faster:
            self._faster[key] = _faster(policy, q, k, v, *shape)
        return self._faster[key]


def _tried(m: int, n: int) -> tuple[int, int]:
    """Powers of two near m rows of n keys, m at most n, and in about their proportion: at most PAIRS pairs."""
    m, n = (1 << round(math.log2(count)) for count in (m, n))
    while m * n > PAIRS:
        m, n = max(m // 2, 1), n // 2
    return m, n


def _alone(policy: Any) -> Any:
    """The policy for a prompt of its own: what the caller's layers leave to each other stays theirs."""
    if isinstance(policy, ListTail):
        return dataclasses.replace(policy, selector=_alone(policy.selector))
    return policy.at(policy.layer, PivotalPatterns()) if isinstance(policy, SharePrefill) else policy


def crossed(policy: Any) -> bool:
    """Whether it goes on from what other layers left of the same prompt."""
    inner = policy.selector if isinstance(policy, ListTail) else policy
    return isinstance(inner, SharePrefill) and inner.patterns.crossed(inner.layer)


def _faster(policy: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: int, n: int) -> bool:
    generator = torch.Generator(q.device).manual_seed(0)
    prompt = [
        torch.randn(part.shape[1], rows, part.shape[3], generator=generator, dtype=q.dtype, device=q.device)
        for part, rows in ((q, m), (k, n), (v, n))
    ]
    queries, keys, values = (part[None] for part in prompt)
    layer: Any = torch.nn.Module()
    layer.num_key_value_groups = q.shape[1] // k.shape[1]
    mask = None if m == n else allowed(torch.arange(n - m, n, device=q.device), 0, n, Seen(), None)
    scale = q.shape[3] ** -0.5
    plain = partial(dense, layer, queries, keys, values, mask, Seen(), scaling=scale)
    sparse = partial(prefill, *prompt, policy=_alone(policy), scale=scale)
    return seconds(sparse, q.device) < seconds(plain, q.device)
