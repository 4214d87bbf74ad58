"""Whole prompts of the leaderboard, one layer a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from attention import BlockSampled, Dense, prefill
from attention.chances import starts
from attention.key_lists import KEYS, KeyLists, edges, plain, row_blocks
from attention.listed_reference import lines_of
from attention.selectors.share_prefill import PivotalPatterns, SharePrefill
from attention.skip_softmax import SkipSoftmax
from benchmarks.leaderboard_measure import Found, bound, relative, seconds
from benchmarks.real_keys import Prompt
from benchmarks.smollm import causal_attention
from hsr.backend import choose

BY_ROW = (Dense, SkipSoftmax)  # whose choices for a row are by what it sees
LOOKED_AT = 32  # rows of each head whose probabilities are known


class Exact(NamedTuple):
    """Dense attention of a layer."""

    output: torch.Tensor  # (h, n, d) float32
    rows: torch.Tensor  # (LOOKED_AT,) the same of all heads
    probability: torch.Tensor  # (h, LOOKED_AT, n) float32
    lse: torch.Tensor  # (h, LOOKED_AT) float64
    seconds: float


def exact(prompt: Prompt) -> Exact:
    """The output by torch's kernel, probabilities of some rows by float64."""
    q, k, v = prompt
    n, scale = q.shape[1], q.shape[2] ** -0.5
    times = [seconds(partial(causal_attention, q, k, v, scale))[0] for _ in range(3)]
    rows = torch.from_numpy(np.random.default_rng(0).choice(n, LOOKED_AT, replace=False)).to(q.device)
    scores = q[:, rows].double() @ k.double().repeat_interleave(len(q) // len(k), 0).mT * scale
    scores.masked_fill_(torch.arange(n, device=q.device) > rows[:, None], -torch.inf)
    sums = scores.logsumexp(2)
    return Exact(
        causal_attention(q.float(), k.float(), v.float(), scale),
        rows,
        scores.softmax(2).float(),
        sums,
        float(np.median(times)),
    )


def run(prompts: Sequence[Prompt], exacts: Sequence[Exact], policy: Any) -> Found:
    """Every layer by a policy of `prefill`."""
    prefill(*prompts[0], policy=of_layers(policy, 1)[0])  # compiles what is timed
    taken, outputs, lses, masses, shares, select = [], [], [], [], [], []
    for prompt, known, one in zip(prompts, exacts, of_layers(policy, len(prompts)), strict=True):
        spent, result = seconds(partial(prefill, *prompt, policy=one))
        taken.append(spent)
        outputs.append(torch.as_tensor(result.output))
        lses.append(torch.as_tensor(result.lse))
        spent, found = seconds(partial(lists, one, prompt))
        select += [spent] * (found is not None)
        whole = bool((torch.as_tensor(result.counters.reported)[:, -1] == prompt.q.shape[1]).all())
        masses.append(mass(None if whole else found, lses[-1], known))  # a GPU's prefill may turn to a dense kernel
        shares.append(float(torch.as_tensor(result.counters.reported).double().mean()))
    n = prompts[0].q.shape[1]
    return Found(
        errors=np.stack([relative(output, known.output) for output, known in zip(outputs, exacts, strict=True)]),
        bound=bound(prompts, n, outputs, lses),
        mass=float(np.mean(masses)),
        share=float(np.mean(shares)) / ((n + 1) / 2),
        seconds=taken,
        dense=float(np.median([known.seconds for known in exacts])),
        select=select,
        looks_ahead=not getattr(policy, "causal", getattr(policy, "causal_selection", type(policy) in BY_ROW)),
    )


def of_layers(policy: Any, count: int) -> list[Any]:
    """The policy for each layer of one prompt: one that shares between layers needs to be told which it is."""
    if not isinstance(policy, SharePrefill):
        return [policy] * count
    patterns = PivotalPatterns()
    return [policy.at(layer, patterns) for layer in range(count)]


def lists(policy: Any, prompt: Prompt) -> KeyLists | None:
    """What blocks of rows are shown, where the policy says it in lists."""
    q, k, v = prompt
    scale = q.shape[2] ** -0.5
    if hasattr(policy, "lists"):
        found: KeyLists = policy.lists(q, k, scale)
        return found
    if not isinstance(policy, BlockSampled):
        return None
    if q.is_cuda:
        from gpu import block_sampled

        assert policy.density is not None
        return block_sampled.key_lists(
            q[None], k[None], v[None], density=policy.density, rows=policy.rows,
            causal_selection=policy.causal_selection, seed=policy.seed, scale=scale,
        )  # fmt: skip
    first = starts(policy.seed, len(q), row_blocks(q.shape[1]))
    densities = np.full(len(q), policy.density)
    return choose("key_lists", "numba")(
        q.numpy(), k.numpy(), v.numpy(), densities, first, policy.rows, policy.causal_selection, scale
    )


def mass(found: KeyLists | None, lse: torch.Tensor, known: Exact) -> float:
    """Mean probability of the keys attended to; without lists there are no weights, and log-sums tell."""
    if found is None:
        return float((lse[:, known.rows].double() - known.lse).exp().mean())
    h, n = len(known.output), known.output.shape[1]
    kept = torch.zeros(h, LOOKED_AT, n, dtype=torch.bool)
    lists = plain(found)
    blocks, edge = row_blocks(n), edges(n, n)
    for head in range(h):
        for place, row in enumerate(known.rows.tolist()):
            tokens, whole, _ = lines_of(lists, head * blocks + row // KEYS)
            kept[head, place, tokens] = True
            kept[head, place].view(-1, KEYS)[whole] = True
            kept[head, place, edge[row // KEYS] : row + 1] = True
    return float((known.probability * kept.to(known.probability.device)).sum(2).mean())
