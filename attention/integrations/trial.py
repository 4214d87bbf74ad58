"""Whether sparse attention is faster than dense here: both are timed, on the very keys or on prompts as long."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.block_sampled import BlockSampled
from attention.integrations.steps import Fused, Steps
from attention.key_lists import least_density
from attention.prefill import prefill

LEAST = 1024  # tokens from which a layer's steps are tried, and again whenever they have doubled
PROMPTS = (1024, 8192)  # lengths that prompts are tried at: powers of two between these
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

        What the policy cannot serve does not: of the sequences, one has ``hidden`` tokens of padding.
        """
        n = k.shape[2] - hidden
        m = min(q.shape[2], n)
        sampled = isinstance(policy, BlockSampled)
        if (
            m < 1
            or n < PROMPTS[0]
            or (sampled and policy.density is not None and policy.density <= least_density(m, n))
        ):
            return False
        if sampled and q.device.type == "cuda":
            return True  # it looks itself for what is faster
        length = min(1 << (n.bit_length() - 1), PROMPTS[1])
        alike = dataclasses.replace(policy, seed=0) if hasattr(policy, "seed") else policy
        key = repr(alike), q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.dtype, q.device, length
        if key not in self._faster:
            self._faster[key] = _faster(policy, q, k, v, length)
        return self._faster[key]


def _faster(policy: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> bool:
    generator = torch.Generator(q.device).manual_seed(0)
    prompt = [
        torch.randn(part.shape[1], length, part.shape[3], generator=generator, dtype=q.dtype, device=q.device)
        for part in (q, k, v)
    ]
    queries, keys, values = (part[None] for part in prompt)
    dense = partial(scaled_dot_product_attention, queries, keys, values, is_causal=True, enable_gqa=True)
    return seconds(partial(prefill, *prompt, policy=policy), q.device) < seconds(dense, q.device)
