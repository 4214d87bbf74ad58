"""Case ``leaderboard``: every method that chooses keys, published or ours, on the same real heads, in one table.

SmolLM2 reads the essays, or the model that HSR_MODEL names (`benchmarks.smollm`); evenly spaced layers, all heads.
``decode``: a cache of the text but its last STEPS tokens, which are then appended and attended to one by one, each with
its own query.  ``prefill``: the whole text.  Methods and settings are those of `benchmarks.leaderboard_roster`, and
whatever else lies in `attention.selectors`, by its examples; none is treated apart.  Tensors are float32 on a CPU and
float16 on a GPU, where the text is twice as long; what a method does not serve there is noted.  Steps are eager: on a
GPU most of their time is that of launches.

``rel_err`` is the mean of ``||out - exact|| / ||exact||`` over layers, heads and rows, ``rel_err_p90`` their 90th
percentile, ``audit`` the 95 % bound on that mean (each error cut off at 1) which `attention.audit` gives without
knowing more than AUDITED rows of each head.  ``kept_mass`` is the mean probability of the keys attended to, whatever
their weights and without what mean keys stand for; ``share`` their number over the visible keys'.  ``kilobytes``, of a
decode step and key-value head, are what is read to choose, by the method's own account, and the union of its query
heads' keys and values, all in 16 bits.  ``ms`` is the median over steps and layers of an append and an attend, or over
layers of a prompt, ``select_ms`` of making the lists alone; ``dense_ms`` is torch's dense attention over the same
tensors.  ``looks_ahead`` says whether later tokens may change which keys an earlier row is shown.

The gate: whatever attends to all keys is exact, as dense attention and the oracle's top n are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from attention.estimates import block_attention
from attention.head_clusters import HeadClusters
from benchmarks import leaderboard_decode, leaderboard_prefill, real_keys, smollm
from benchmarks import leaderboard_roster as roster
from benchmarks.gate import WrongAnswer
from benchmarks.leaderboard_measure import DTYPE, HERE, Found
from benchmarks.leaderboard_roster import REFUSALS, Entry
from benchmarks.ledger import Row
from benchmarks.real_keys import Prompt, rope

DEVICE = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
TOKENS, QUICK_TOKENS = 16384 if torch.cuda.is_available() else 8192, 1024
CALIBRATED = 2048
DECODED, PREFILLED, QUICK_LAYERS = 10, 6, 2  # layers
WHOLE = 1 - 1e-6  # share of the keys that is all of them
EXACT = 1e-5 if DTYPE == torch.float32 else 5e-3  # largest mean error of attention to them
EMPTY: Row = dict.fromkeys(
    "part n rope layers method setting ours looks_ahead rel_err rel_err_p90 audit kept_mass share kilobytes select_ms "
    "ms dense_ms speedup".split()
)

missing = partial(real_keys.missing, "leaderboard")


def rows(quick: bool, note: Callable[[str], None]) -> Iterator[Row]:
    """A row per part, method and setting."""
    tokens = QUICK_TOKENS if quick else TOKENS
    for part, layers, how, entries in (
        ("decode", DECODED, leaderboard_decode, lambda _: roster.decode(tokens)),
        ("prefill", PREFILLED, leaderboard_prefill, lambda chosen: roster.prefill(tokens, clusters(chosen, tokens))),
    ):
        chosen = spaced(QUICK_LAYERS if quick else layers)
        prompts = [Prompt(*(x.to(DTYPE) for x in found)) for found in real_keys.prompts(tokens, chosen, HERE)]
        run = partial(how.run, prompts, [how.exact(prompt) for prompt in prompts])
        head = {"part": part, "n": tokens, "rope": rope(tokens), "layers": len(prompts)}
        for row in measured(part, entries(chosen), run, note):
            yield EMPTY | head | row


def spaced(layers: int) -> list[int]:
    """Evenly spaced layers of the model."""
    return [round(i * (smollm.layer_count() - 1) / (layers - 1)) for i in range(layers)]


def clusters(chosen: Sequence[int], tokens: int) -> HeadClusters:
    """Heads of these layers that attend alike to CALIBRATED tokens after those that are measured."""
    found = real_keys.prompts(CALIBRATED, chosen, HERE, first=tokens)
    return HeadClusters.fit([block_attention(q, k, q.shape[2] ** -0.5).cpu() for q, k, _ in found])


def measured(
    part: str, methods: Sequence[Entry], run: Callable[[Any], Found], note: Callable[[str], None]
) -> Iterator[Row]:
    """A row per entry that is served."""
    for entry in methods:
        try:
            found = run(entry.policy)
        except REFUSALS as refusal:
            note(f"{part} without {entry.method} {entry.setting}: {refusal}")
            continue
        if found.share > WHOLE and not found.errors.mean() < EXACT:
            raise WrongAnswer(f"{part}: {entry.method} attends to all keys and is off by {found.errors.mean():.2e}")
        yield {"method": entry.method, "setting": entry.setting, "ours": entry.ours, **found.row()}
