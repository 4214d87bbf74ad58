"""Case ``prefill-accuracy``: errors of sparse prefill on a real model's heads, at equal density, beside oracles.

SmolLM2 reads the essays, longer prompts with its RoPE scaled; all layers, all positions, or those in the file that
HSR_HEADS names (`benchmarks.real_keys`).  ``block-oracle``, ``token-oracle``, ``pooled-blocks`` and ``vertical-slash``
are `benchmarks.prefill_oracles`' rules, their weights renormalised over what they keep; ``sampled-1`` to
``-64`` and ``sampled-8-causal`` are ours, with so many representatives of a block.  Every method chooses over the whole
prompt of a head; errors are those of every STRIDE-th block of 128 rows, the last one among them.  On a CPU tensors are
float32, on a GPU float16; exact attention is float32 over the same numbers.

``rel_err`` is the mean over heads and rows of ``||out - exact|| / ||exact||``, ``rel_err_median`` the median;
``kept_mass`` the mean probability of the keys attended to, whatever their weights; ``to_block_oracle`` the ratio of
``rel_err`` to block-oracle's, ``worst_head`` the largest such ratio of a head.  ``density`` is asked for, ``realised``
what was attended to.  A method whose keys near the rows, or at the beginning, exceed the density is ``skipped``.

The gate: at density 1 every method is exact attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from attention.chances import starts
from attention.key_lists import KEYS, KeyLists, least_density, row_blocks
from benchmarks import real_keys
from benchmarks.gate import WrongAnswer
from benchmarks.ledger import Row
from benchmarks.prefill_oracles import RULES, Head
from benchmarks.prefill_oracles import density as realised
from benchmarks.real_keys import LAYERS, Prompt, rope
from hsr.backend import choose

CUDA = torch.cuda.is_available()
DEVICE = torch.cuda.get_device_name() if CUDA else "cpu"
HERE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)
TOKENS, QUICK_TOKENS = ((8192, 16384, 32768) if CUDA else (8192,)), (4096,)
QUICK_LAYERS = (3, 17)
DENSITIES = (0.025, 0.05, 0.1, 0.2)
SAMPLED = {  # representatives of a block, causal selection
    "sampled-1": (1, False),
    "sampled-2": (2, False),
    "sampled-4": (4, False),
    "sampled-8": (8, False),
    "sampled-32": (32, False),
    "sampled-64": (64, False),
    "sampled-8-causal": (8, True),
}
METHODS = (*RULES, *SAMPLED)
STRIDE = 4  # blocks of rows to one whose errors count
EXACT = 2e-3  # largest mean relative error at density 1

Setting = tuple[str, float]  # a method and a density


class Drawn(NamedTuple):
    """What our method did to a layer."""

    output: torch.Tensor  # (h, n, d)
    lists: KeyLists  # tensors

    def kept(self, head: int, blocks: int) -> torch.Tensor:
        """The set (T, n) of a head that has so many blocks."""
        offsets = self.lists.token_offsets[head * blocks : (head + 1) * blocks + 1].tolist()
        counts = torch.diff(torch.tensor(offsets, device=self.output.device))
        lines = torch.arange(blocks, device=self.output.device)
        found = torch.eye(blocks, dtype=torch.bool, device=self.output.device).repeat_interleave(KEYS, 1)
        tokens = self.lists.tokens[offsets[0] : offsets[-1]].long()
        found[lines.repeat_interleave(counts), tokens] = True
        return found


class Found(NamedTuple):
    """Of one head and setting."""

    errors: np.ndarray  # (rows,) relative
    mass: float
    density: float


def missing() -> str | None:
    """What this case needs and has not."""
    return None if real_keys.kept() else real_keys.missing("prefill-accuracy")


def rows(quick: bool, note: Callable[[str], None]) -> Iterator[Row]:
    """A row per length, density and method."""
    gate()
    note(f"errors are those of every {STRIDE}th block of rows; choices are made over whole prompts, by all methods")
    for what, read in _texts(quick):
        try:
            found = list(_text(read()))
        except RuntimeError as fault:  # for want of memory, perhaps: shorter prompts are not lost
            note(f"nothing of {what}: {type(fault).__name__}: {str(fault)[:200]}")
            continue
        yield from found


def _texts(quick: bool) -> Iterator[tuple[str, Callable[[], list[Prompt]]]]:
    """What reads each length; a file has one."""
    path = real_keys.kept()
    if path:
        yield path.name, partial(real_keys.read_whole, path, HERE)
        return
    for n in QUICK_TOKENS if quick else TOKENS:
        yield f"{n} tokens", partial(real_keys.prompts, n, QUICK_LAYERS if quick else range(LAYERS), HERE)


def _text(prompts: list[Prompt]) -> Iterator[Row]:
    """All rows of one length."""
    h, n, d = prompts[0].q.shape
    shape = {"h": h, "g": len(prompts[0].k), "d": d, "n": n, "rope": rope(n)}
    heads: list[dict[Setting, Found]] = []
    for seed, prompt in enumerate(prompts):
        heads += measured(Prompt(*(part.to(DTYPE) for part in prompt)), DENSITIES, seed)
    for density in DENSITIES:
        for method in METHODS:
            yield shape | figures(heads, method, density)


def figures(heads: list[dict[Setting, Found]], method: str, density: float) -> Row:
    """What a row says of a setting."""
    row: Row = {"method": method, "density": density} | dict.fromkeys(
        ("realised", "rel_err", "rel_err_median", "kept_mass", "to_block_oracle", "worst_head", "skipped")
    )
    found = [head.get((method, density)) for head in heads]
    present = [one for one in found if one is not None]
    if not present:
        return row | {"skipped": "forced keys exceed the density"}
    errors = np.stack([one.errors for one in present])  # (heads, rows)
    row |= {
        "realised": float(np.mean([one.density for one in present])),
        "rel_err": float(errors.mean()),
        "rel_err_median": float(np.median(errors)),
        "kept_mass": float(np.mean([one.mass for one in present])),
    }
    oracle = [head.get(("block-oracle", density)) for head in heads]
    if all(oracle):
        beside = np.array([one.errors.mean() for one in oracle if one is not None])
        row["to_block_oracle"] = float(errors.mean() / beside.mean())
        row["worst_head"] = float((errors.mean(1) / beside).max())
    return row


def measured(prompt: Prompt, densities: tuple[float, ...], seed: int) -> Iterator[dict[Setting, Found]]:
    """What every method does at every density to each head of a layer."""
    h, n = prompt.q.shape[:2]
    ours = {
        (name, density): drawn(prompt, density, *options, seed)
        for name, options in SAMPLED.items()
        for density in densities
        if density > least_density(n, n)
    }
    for i in range(h):
        source = i * len(prompt.k) // h
        head = Head(prompt.q[i].float(), prompt.k[source].float(), prompt.v[source].float())
        kept = {setting: found.kept(i, head.blocks) for setting, found in ours.items()}
        outputs = {setting: found.output[i].float() for setting, found in ours.items()}
        for name, rule in RULES.items():
            for density in densities:
                chosen = rule(head, density)
                if chosen is not None:
                    kept[name, density] = chosen
        yield judged(head, kept, outputs) if kept else {}


def judged(head: Head, kept: dict[Setting, torch.Tensor], outputs: dict[Setting, torch.Tensor]) -> dict[Setting, Found]:
    """Errors of settings with sets (T, n); outputs (n, d) of theirs, or attention over the set alone."""
    sets = torch.stack([kept[setting] for setting in kept], 2)  # (T, n, settings)
    errors: list[torch.Tensor] = []
    masses: list[torch.Tensor] = []
    alone = [place for place, setting in enumerate(kept) if setting not in outputs]
    for block in range(STRIDE - 1, head.blocks, STRIDE):
        weights = head.weights(block)  # (128, keys)
        keys = weights.shape[1]
        rows = slice(keys - KEYS, keys)
        exact = weights @ head.v[:keys]
        chosen = sets[block, :keys].float()
        mass = weights @ chosen  # (128, settings)
        values = (chosen[:, alone, None] * head.v[:keys, None]).flatten(1)
        sums = (weights @ values).unflatten(1, (len(alone), head.v.shape[1])) / mass[:, alone, None]
        found = torch.empty(KEYS, len(kept), head.v.shape[1], device=exact.device)
        found[:, alone] = sums
        for place, setting in enumerate(kept):
            if setting in outputs:
                found[:, place] = outputs[setting][rows]
        errors.append((found - exact[:, None]).norm(dim=2) / exact.norm(dim=1, keepdim=True))
        masses.append(mass)
    relative, shares = torch.cat(errors).T.cpu().numpy(), torch.cat(masses).mean(0).tolist()
    return {
        setting: Found(relative[place], shares[place], realised(head, kept[setting]))
        for place, setting in enumerate(kept)
    }


def drawn(prompt: Prompt, density: float, rows: int, causal: bool, seed: int) -> Drawn:
    """Ours, of a layer, in the form of its device."""
    form = drawn_on_gpu if prompt.q.is_cuda else drawn_on_cpu
    return form(prompt, density, rows, causal, seed)


def drawn_on_gpu(prompt: Prompt, density: float, rows: int, causal: bool, seed: int) -> Drawn:
    """By the kernels, for float16 and bfloat16."""
    from gpu import block_sampled, listed

    q, k, v = (part[None] for part in prompt)
    scale = q.shape[3] ** -0.5
    lists = block_sampled.key_lists(
        q, k, v, density=density, rows=rows, causal_selection=causal, seed=seed, scale=scale
    )
    return Drawn(listed.attend(q, k, v, lists, scale)[0][0], lists)


def drawn_on_cpu(prompt: Prompt, density: float, rows: int, causal: bool, seed: int) -> Drawn:
    """As `attention.prefill` does with `attention.BlockSampled`, which does not show its lists."""
    q, k, v = (part.numpy() for part in prompt)
    h, n, d = q.shape
    select, attend = choose("key_lists", "numba"), choose("listed", "numba")
    lists = select(q, k, v, np.full(h, density), starts(seed, h, row_blocks(n)), rows, causal, d**-0.5)
    output = torch.from_numpy(attend(q, k, v, lists, d**-0.5)[0])
    return Drawn(output, KeyLists(torch.from_numpy(lists.token_offsets), torch.from_numpy(lists.tokens)))


def gate() -> None:
    """Every method at density 1 must be exact attention, on made-up heads."""
    random = torch.Generator().manual_seed(0)
    n = 2 * STRIDE * KEYS
    parts = (torch.randn(heads, n, 64, generator=random).to(HERE).to(DTYPE) for heads in (3, 1, 1))
    for head in measured(Prompt(*parts), (1.0,), 0):
        for method in METHODS:
            found = head[method, 1.0]
            if not (found.errors.mean() < EXACT and abs(found.mass - 1) < EXACT and found.density == 1):
                raise WrongAnswer(
                    f"{method} at density 1 is off by {found.errors.mean():.2e}, keeps {found.mass:.4f} of the "
                    f"probability and {found.density:.4f} of the keys"
                )
