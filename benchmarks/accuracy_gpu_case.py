"""Case ``accuracy-gpu``: errors of the GPU's sampled decode on a real model's heads, beside the oracle's top-k.

The heads are SmolLM2-135M's over 8192 tokens of the essays, all of its context, and over four times as many with its
RoPE scaled; or those in the file that HSR_HEADS names, for a machine without the model (`benchmarks.real_keys` writes
it).  Keys, values and queries are bfloat16.  The last ASKED positions' queries attend to the whole cache.
``oracle-topk-union`` keeps every head's keys of largest score, shared by the group, as many for each as make the union
as large as the sampled list with its sinks and recent keys.  Errors are relative to exact attention over the same
bfloat16 numbers, over all layers that there are, heads and queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks import decode_gpu_case, real_keys
from benchmarks.accuracy_case import error_figures
from benchmarks.decode_cpu_case import ASKED, known_positions
from benchmarks.decode_gpu_case import exact_attention, exact_gate
from benchmarks.gate import WrongAnswer
from benchmarks.ledger import Row
from gpu.sampled import Draws, SampledCache

DEVICE = decode_gpu_case.DEVICE
TOKENS, QUICK_TOKENS = (8192, 32768), (512,)
SHARES = (0.01, 0.05)  # of the keys, drawn for each head
SETTINGS = {"fast": (24, (4, 2)), "quality": (32, (4, 2)), "quality-nibbles": (32, (4,))}
SETTLE = 2  # rounds over the queries before any counts, in which thresholds settle


def missing() -> str | None:
    """What this case needs and has not."""
    return decode_gpu_case.missing() or (None if real_keys.kept() else real_keys.missing("accuracy-gpu"))


def rows(quick: bool, note: Callable[[str], None]) -> Iterator[Row]:
    """A row per length, share of keys and setting, and one for the oracle beside each."""
    exact_gate()
    for layers in _texts(quick):
        note(f"{len(layers)} layers of {len(layers[0].queries)} query heads, {ASKED} queries")
        yield from _measured(layers)


def _texts(quick: bool) -> Iterator[list[real_keys.Layer]]:
    """The heads of each length; a file has one."""
    path = real_keys.kept()
    if path:
        yield real_keys.read_kept(path, known_positions)
        return
    for tokens in QUICK_TOKENS if quick else TOKENS:
        yield real_keys.layers(tokens, known_positions(tokens), "cuda")


def _measured(layers: list[real_keys.Layer]) -> Iterator[Row]:
    tokens = layers[0].keys.shape[1]
    for share in SHARES:
        for name, (size, widths) in SETTINGS.items():
            draws = Draws(share * tokens, size, widths=widths)
            found = [_layer(layer, draws) for layer in layers]
            ours, oracle, union = (np.concatenate(column) for column in zip(*found, strict=True))
            head = {
                "tokens": tokens,
                "rope": real_keys.rope(tokens),
                "keys_per_head": draws.budget,
                "union_keys": float(union.mean()),
            }
            for policy, errors, read in ((f"sampled-{name}-union", ours, size), ("oracle-topk-union", oracle, None)):
                yield head | {
                    "policy": policy,
                    "bytes_per_key": read,
                    **error_figures(errors),
                    "to_oracle_union": float(errors.mean() / oracle.mean()),
                }


def _layer(layer: real_keys.Layer, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Relative errors of ours and of the oracle (ASKED h,), and keys in a group's list (ASKED g,).

    A list that starved or overflew is attended to whole, which would flatter both: that is no measurement.
    """
    queries, k, v = (torch.from_numpy(part).cuda().bfloat16() for part in layer)
    known, asked = queries[:, :-ASKED], queries[:, -ASKED:]
    cache = SampledCache(k[None], v[None], len(queries), draws, k.shape[2] ** -0.5, queries=known[None])
    output = torch.empty_like(asked[None, :, 0])
    for i in [*range(ASKED)] * SETTLE:
        cache.attend(asked[None, :, i], output)
    ours: list[np.ndarray] = []
    oracle: list[np.ndarray] = []
    unions = []
    for i in range(ASKED):
        cache.attend(asked[None, :, i], output)
        wanted, scores = exact_attention(asked[:, i], k, v)
        union = cache.counts[:, 0].long() + draws.sinks + draws.recent
        for errors, outputs in ((ours, output[0].double()), (oracle, oracle_output(scores, v, union))):
            errors.append(((outputs - wanted).norm(dim=1) / wanted.norm(dim=1)).cpu().numpy())
        unions.append(union.cpu().numpy())
    if cache.status[:, 1:].any():
        raise WrongAnswer(f"lists overflew, starved or were refused: {cache.status.sum(0).tolist()}")
    return np.concatenate(ours), np.concatenate(oracle), np.concatenate(unions)


def oracle_output(scores: torch.Tensor, v: torch.Tensor, union: torch.Tensor) -> torch.Tensor:
    """scores (g, G, n), v (g, n, d), union (g,) -> output (h, d) over the most top keys a head whose union fits."""
    rank = scores.argsort(2, descending=True).argsort(2).amin(1)  # (g, n): the best that any head of the group gives
    tops = torch.stack([ranks.sort().values[size - 1] for ranks, size in zip(rank, union.tolist(), strict=True)])
    kept = rank <= tops[:, None]  # ranks tie, at most G of them: so many keys more than the union
    weights = scores.masked_fill(~kept[:, None], -torch.inf).softmax(-1)
    return torch.einsum("gin,gnd->gid", weights, v.double()).reshape(-1, v.shape[2])
