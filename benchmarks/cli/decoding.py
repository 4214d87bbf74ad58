"""Token by token: what the model says, what share of the keys a step attended to, and what is known of its error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attention.integrations.transformers import HSRCache, Reading
from attention.result import Certificate


@dataclass(frozen=True)
class Bound:
    """The certificates of one step, layers and query heads together.

    Attributes:
        kind: as `attention.Certificate` has it; of all layers, where they differ.
        confidence: the least.
        dropped: the largest bound on the dropped mass; NaN where a sample makes up for what was dropped.
        relative: median and largest bound on the relative output error; infinite where there is none.
    """

    kind: str
    confidence: float
    dropped: float
    relative: tuple[float, float]


@dataclass(frozen=True)
class Step:
    """One token that was made.

    Attributes:
        token: its id.
        seconds: of the forward pass that chose it; the first token's is the prompt's.
        keys, reported: keys that this pass could have attended to and did, over layers and heads; 0 where it was dense.
        bound: None where it was dense.
    """

    token: int
    seconds: float
    keys: int
    reported: int
    bound: Bound | None


@torch.no_grad()
def steps(
    model: Any,
    prompt: Sequence[int],
    cache: HSRCache,
    most: int,
    temperature: float,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Step]:
    """At most so many tokens after the prompt, fewer where the model ends its text.

    Args:
        model: with "hsr" attention.
        prompt: its tokens.
        cache: empty.
        most: tokens, at least 1.
        temperature: 0 takes the likeliest token; else the softmax of the logits over it is drawn from.
        seed: of the draws.
        advance: called as each layer has read the prompt.
    """
    ends = _ends(model)
    draws = torch.Generator().manual_seed(seed)
    fed = torch.tensor([list(prompt)], device=model.device)
    hooks = [layer.register_forward_hook(lambda *_: advance()) for layer in attention_layers(model)]
    before = cache.report()
    for made in range(most):
        start = time.perf_counter()
        logits = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        token = _chosen(logits.float().cpu(), temperature, draws)
        seconds = time.perf_counter() - start
        if made == 0:
            for hook in hooks:
                hook.remove()
        after = cache.report()
        yield Step(token, seconds, *read(before, after), _bound(after.certificates))
        if token in ends:
            return
        before, fed = after, torch.tensor([[token]], device=model.device)


def attention_layers(model: Any) -> list[torch.nn.Module]:
    """A module of each layer that attends."""
    return list({found.layer_idx: found for found in model.modules() if hasattr(found, "layer_idx")}.values())


def _ends(model: Any) -> set[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    return set(found if isinstance(found, list) else [] if found is None else [found])


def _chosen(logits: torch.Tensor, temperature: float, draws: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    falls = (logits - logits.max()).double()  # so that nothing overflows near a temperature of 0
    return int(torch.multinomial(torch.softmax(falls / temperature, 0), 1, generator=draws))


def read(before: Reading, after: Reading) -> tuple[int, int]:
    """Keys and reported keys of the last pass; a step that is one launch on a GPU is reported alone, not summed."""
    if after.steps > before.steps:
        return after.keys - before.keys, after.reported - before.reported
    return after.keys, after.reported


def _bound(certificates: Sequence[Certificate | None]) -> Bound | None:
    known = [one for one in certificates if one is not None]
    if not known:
        return None
    relative = np.concatenate([np.ravel(one.relative_error) for one in known])
    dropped = np.concatenate([np.ravel(one.dropped_mass) for one in known])
    return Bound(
        ", ".join(dict.fromkeys(one.kind for one in known)),
        min(one.confidence for one in known),
        float(dropped.max()),
        (float(np.median(relative)), float(relative.max())),
    )
