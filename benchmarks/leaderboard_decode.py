"""Decode steps of the leaderboard: a token is appended and attended to with its own query, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from attention import DecodeSession
from attention.decode_selector import DecodeSelector
from benchmarks.leaderboard_measure import Found, bound, relative, seconds
from benchmarks.real_keys import Prompt
from benchmarks.watched import watched

STEPS = 16
KNOWN = 64  # queries of the cache's last tokens, for methods that calibrate
HALF = 2  # bytes of an entry, as a cache has it


class Exact(NamedTuple):
    """Dense attention of a layer's last STEPS rows."""

    output: torch.Tensor  # (h, STEPS, d) float64
    probability: torch.Tensor  # (h, STEPS, n) float32
    seconds: float  # of torch's kernel, for one row


class Step(NamedTuple):
    """What a step did."""

    seconds: float
    output: torch.Tensor  # (h, 1, d)
    lse: torch.Tensor  # (h, 1)
    mass: float | None  # of probability
    share: float  # of keys
    read: float  # bytes for each key-value head


def exact(prompt: Prompt) -> Exact:
    """By float64, but for the time."""
    q, k, v = prompt
    each, n = len(q) // len(k), k.shape[1]
    keys, values = (part.double().repeat_interleave(each, 0) for part in (k, v))
    scores = q[:, -STEPS:].double() @ keys.mT * q.shape[2] ** -0.5
    later = torch.ones(STEPS, n, dtype=torch.bool, device=q.device).triu(n - STEPS + 1)
    probability = scores.masked_fill_(later, -torch.inf).softmax(2)
    packed = q[:, -1].reshape(1, len(k), each, -1)  # a group's queries as rows: its keys are read once
    dense = partial(torch.nn.functional.scaled_dot_product_attention, packed, k[None], v[None])
    return Exact(probability @ values, probability.float(), float(np.median([seconds(dense)[0] for _ in range(9)])))


def run(prompts: Sequence[Prompt], exacts: Sequence[Exact], policy: Any) -> Found:
    """Every layer's last STEPS tokens by a policy of `DecodeSession`."""
    layers = [list(decoded(*layer, policy)) for layer in zip(prompts, exacts, strict=True)]
    outputs = [torch.cat([step.output for step in steps], 1) for steps in layers]
    lses = [torch.cat([step.lse for step in steps], 1) for steps in layers]
    every = [step for steps in layers for step in steps]
    masses = [step.mass for step in every if step.mass is not None]
    return Found(
        errors=np.stack([relative(output, known.output) for output, known in zip(outputs, exacts, strict=True)]),
        bound=bound(prompts, STEPS, outputs, lses),
        mass=float(np.mean(masses)) if masses else None,
        share=float(np.mean([step.share for step in every])),
        seconds=[step.seconds for steps in layers for step in steps[1:]],  # the first one makes what others use
        dense=float(np.median([known.seconds for known in exacts])),
        kilobytes=float(np.mean([step.read for step in every])) / 1024,
    )


def decoded(prompt: Prompt, known: Exact, policy: Any) -> Iterator[Step]:
    """The steps of one layer."""
    q, k, v = prompt
    n = k.shape[1] - STEPS
    seen = watched(policy)
    session = DecodeSession(k[:, :n].clone(), v[:, :n].clone(), policy=seen.policy, queries=q[:, n - KNOWN : n])
    for t in range(n, n + STEPS):
        taken, result = seconds(partial(_step, session, *(part[:, t : t + 1] for part in prompt)))
        output, lse = torch.as_tensor(result.output), torch.as_tensor(result.lse)
        reported = torch.as_tensor(result.counters.reported).double()  # (h, 1)
        kept = seen.take()
        mass, rows = None, float(reported.view(len(k), -1).amax(1).mean())  # read of keys, and of values
        values = rows
        if kept is not None:
            probability = known.probability[:, t - n, : kept.mask.shape[1]]
            mass = float((probability * kept.mask.repeat_interleave(len(q) // len(kept.mask), 0)).sum(1).mean())
            rows = union(kept.mask, len(k))
            values = rows + (0.0 if kept.means is None else union(kept.means, len(k)))  # mean keys chose
        attended = (rows + values) * HALF * k.shape[2]
        read = attended + choosing(policy, result.counters, t + 1, k.shape[2], len(k))
        yield Step(taken, output, lse, mass, float(reported.mean()) / (t + 1), read)


def union(marks: torch.Tensor, groups: int) -> float:
    """Entries (L, n) that any query head of a key-value head has: mean over those heads."""
    return float(marks.view(groups, -1, marks.shape[1]).any(1).sum(1).double().mean())


def _step(session: DecodeSession, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    session.append(k, v)
    return session.attend(q)


def choosing(policy: Any, counters: Any, n: int, d: int, groups: int) -> float:
    """Bytes read to choose, for a key-value head: by the method's account, codes, or an index's int8 codes and keys.

    An index's keys that were read to decide about them and are attended to are read once; the others' sum over a
    group's heads stands for their union.
    """
    scanned, visited, reported = (
        torch.as_tensor(part).double().view(groups, -1)
        for part in (counters.scanned, counters.visited, counters.reported)
    )
    if isinstance(policy, DecodeSelector):
        return policy.bytes_read(n, d, HALF, scanned.shape[1])
    code = getattr(policy, "bytes_per_key", None)
    if code is not None:
        return float(n * code)
    refused = (scanned - reported).clamp(min=0).sum(1).clamp(max=n)
    return float(visited.amax(1).mean()) * d + float(refused.mean()) * HALF * d
