"""How well a language model predicts a text when a rule chooses the keys of every layer, head and row.

One teacher-forced pass: row i of every layer attends to keys among the first i + 1 alone, those that the rule keeps.
What a rule does to one layer changes the queries and keys of the next, as it would in use.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from attention import Sampled, prefill
from benchmarks.smollm import Stage, causal_attention

PAIRS = 1 << 24  # (row, key) pairs of all heads that `top_attention` holds at a time
ROWS = 512  # of logits at a time


class Read(NamedTuple):
    """What a model made of a text."""

    states: torch.Tensor  # (n, width), of the last layer
    surprise: torch.Tensor  # (n - 1,) float64, -ln of the probability of each token but the first
    divergence: torch.Tensor  # (n - 1,) float64, KL(p || p') of these predictions p' from those p of another reading
    seconds: float  # of the pass, without the logits

    def perplexity(self, first: int = 0) -> float:
        """Of the text from its token ``first + 1`` on."""
        return float(self.surprise[first:].mean().exp())


def top_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal index-set softmax: each row keeps the r keys of largest score that it sees, or all where it sees fewer.

    Scores are float32; keys that tie with the r-th are kept.

    Returns:
        q (h, m, d), k and v (g, n, d), m <= n -> output (h, m, d) float32, reported (h, m) int64.
    """
    h, m, d = q.shape
    g, n = k.shape[:2]
    queries, keys, values = scale * q.float().reshape(g, h // g, m, d), k.float()[:, None], v.float()[:, None]
    output = queries.new_empty(g, h // g, m, v.shape[2])
    reported = torch.empty(g, h // g, m, dtype=torch.int64, device=q.device)
    step = max(1, PAIRS // (h * n))
    for first in range(0, m, step):
        rows, before = slice(first, min(first + step, m)), first + n - m  # all of these rows see the keys before
        most = rows.stop + n - m
        scores = queries[:, :, rows] @ keys[:, :, :most].mT  # (g, G, rows, most)
        hidden = torch.ones(most - before, most - before, dtype=torch.bool, device=q.device).triu(1)
        scores[..., before:].masked_fill_(hidden, -torch.inf)
        dropped = scores == -torch.inf
        if r < most:
            dropped |= scores < scores.topk(r, dim=-1, sorted=False).values.amin(-1, keepdim=True)
            scores.masked_fill_(dropped, -torch.inf)
        reported[:, :, rows] = most - dropped.sum(-1)
        output[:, :, rows] = scores.softmax(-1) @ values[:, :, :most]
    return output.reshape(h, m, -1), reported.reshape(h, m)


class DenseStage:
    """A `benchmarks.smollm.Stage`: exact attention."""

    def __init__(self) -> None:
        self.reported: list[float] = []  # keys a row, mean over a layer

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See `benchmarks.smollm.Stage`."""
        self.reported.append((q.shape[1] + 1) / 2)
        return causal_attention(q, k, v, scale)


class TopStage(DenseStage):
    """`top_attention`, where the tensors lie."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self._r = r

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See `benchmarks.smollm.Stage`."""
        output, reported = top_attention(q, k, v, self._r, scale)
        self.reported.append(float(reported.double().mean()))
        return output.to(q.dtype)


class PolicyStage(DenseStage):
    """`attention.prefill` on the CPU, in float32, wherever the model runs; layers draw by different seeds."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self._policy = policy

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See `benchmarks.smollm.Stage`."""
        policy = dataclasses.replace(self._policy, seed=layer) if isinstance(self._policy, Sampled) else self._policy
        found = prefill(*(part.float().cpu() for part in (q, k, v)), policy=policy, scale=scale)
        self.reported.append(float(np.mean(found.counters.reported)))
        return found.output.to(q)


class StepStage(DenseStage):
    """`attention.Sampled` with a budget by the GPU's decode steps, row after row, each over the keys that it sees.

    Keys and values are rounded to float16 where the model has float32.
    """

    def __init__(self, policy: Sampled) -> None:
        super().__init__()
        self._policy = policy

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See `benchmarks.smollm.Stage`."""
        from gpu.sampled import Draws, SampledCache

        policy, (h, n) = self._policy, q.shape[:2]
        assert policy.budget is not None
        queries, keys, values = (
            part[None].to(torch.float16 if q.dtype == torch.float32 else q.dtype) for part in (q, k, v)
        )
        cache = SampledCache(keys, values, h, Draws.of(policy, seed=layer), scale, queries=queries)
        rows = queries.transpose(1, 2).contiguous()[0, :, None]  # (n, 1, h, d)
        output, attended = torch.empty_like(rows), torch.zeros_like(cache.counts[:, 0], dtype=torch.int64)
        for i in range(n):
            cache.lengths.fill_(i + 1)
            cache.attend(rows[i], output[i])
            attended += cache.attended(i + 1)
        self.reported.append(float(attended.double().mean()) / n)
        return output[:, 0].transpose(0, 1).to(q.dtype)


@torch.no_grad()
def read(model: Any, tokens: Sequence[int], stage: Stage, beside: torch.Tensor | None = None) -> Read:
    """One pass of a model that `benchmarks.smollm.hook` has prepared; ``beside`` are another reading's states."""
    ids = torch.tensor(tokens, device=model.device)
    start = time.perf_counter()
    positions = torch.arange(len(tokens), device=model.device)[None]
    states = model.get_decoder()(input_ids=ids[None], position_ids=positions, use_cache=False, stage=stage)[0][0]
    if states.is_cuda:
        torch.cuda.synchronize(states.device)
    seconds = time.perf_counter() - start
    head = model.get_output_embeddings()
    surprise, divergence = [], []
    for rows in torch.arange(len(tokens) - 1, device=model.device).split(ROWS):
        predicted = head(states[rows]).float().log_softmax(-1)  # (rows, vocabulary)
        surprise.append(-predicted.gather(1, ids[rows + 1, None])[:, 0].double())
        if beside is None:
            divergence.append(torch.zeros_like(surprise[-1]))
        else:
            wanted = head(beside[rows]).float().log_softmax(-1)
            divergence.append((wanted.exp() * (wanted - predicted)).sum(1).double())
    return Read(states, torch.cat(surprise), torch.cat(divergence), seconds)
