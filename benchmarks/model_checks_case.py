"""Case ``model-checks``: what `attention.integrations.transformers` promises, measured on a real model.

SmolLM2, or the model that HSR_MODEL names, reads Paul Graham's essays.  A row is a check: ``measured`` beside
``reference``, and whether it ``holds``, that is whether they differ by at most ``allowed`` times the reference.

``generation``: caches whose policies keep every key, and one that is dense below more tokens than there are, write the
same tokens as "sdpa" with transformers' own cache, greedily, from prompts of various lengths; every fifth prompt is in
one batch with left padding.  ``bits``: below ``dense_below`` the logits are the same to the bit, too.  ``passkey``: of
samples of `benchmarks.retrieval_tasks`, whose context is read densely, the exact replies of sparse steps are as many as
those of dense ones.  ``perplexity``: of the essays, teacher-forced token by token through a cache after a short dense
prefix, beside that of the same predictions in one dense pass.

``share`` is what of the keys sparse steps attend to, ``steps`` how many there were; ``seconds`` is no claim of speed.

python -m benchmarks.run model-checks --tokens 2048    # of the perplexity, whose default takes a quarter of an hour
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from attention import BlockSampled, Certified, Sampled, TopR
from attention.integrations.transformers import NAME, HSRCache
from benchmarks import perplexity, real_keys, smollm
from benchmarks.leaderboard_roster import REFUSALS, Entry
from benchmarks.ledger import Row
from benchmarks.retrieval_case import Reader
from benchmarks.retrieval_tasks import sample
from hsr import checks

HERE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, QUICK_TOKENS = 8192, 320  # of the perplexity
PROMPTS, QUICK_PROMPTS = 20, 6
SAMPLES, QUICK_SAMPLES = 10, 1
SHORTEST, LONGEST = 100, 700  # tokens of prompts
BATCHED = 5  # every fifth prompt is in the batch
NEW = 32  # tokens generated
PASSKEY, QUICK_PASSKEY = 2048, 512  # tokens of samples
PREFIX = 128  # tokens that are read densely before the perplexity's steps
ALLOWED = 0.005  # of the perplexity
SPARSE: dict[str, Any] = {"decode": Sampled(eps=0.02), "dense_below": 0}
ALL = 1 << 20  # more tokens than there are
SAME: dict[str, dict[str, Any]] = {  # caches that give the tokens of "sdpa"; the last one its bits
    "Certified": {"decode": Certified(0.0), "dense_below": 0},
    "TopR": {"decode": TopR(ALL), "prefill": TopR(ALL), "dense_below": 0},
    "dense": {"decode": Sampled(eps=0.02), "prefill": BlockSampled(density=0.1), "dense_below": ALL},
}

Inputs = dict[str, torch.Tensor]

missing = partial(real_keys.missing, "model-checks")


class Written(NamedTuple):
    """What a model wrote after some inputs, and what its cache says of it."""

    tokens: torch.Tensor  # (B, NEW)
    logits: torch.Tensor  # (B, NEW, vocabulary)
    reported: int = 0
    keys: int = 0
    steps: int = 0


class Compared(NamedTuple):
    """A sequence beside that of "sdpa"."""

    fault: str  # where they part, if they do
    off: float  # most that logits differ by until then


def options(parser: argparse.ArgumentParser) -> None:
    """What this case can be asked for."""
    parser.add_argument("--tokens", type=int, help=f"of the perplexity, its prefix included ({TOKENS})")
    parser.add_argument("--prompts", type=int, help=f"to write from ({PROMPTS})")
    parser.add_argument("--samples", type=int, help=f"with a pass key ({SAMPLES})")
    parser.add_argument("--device", default=HERE, help=f"where the model runs ({HERE})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model")


def where(device: str, **others: Any) -> str:
    """The device that is measured."""
    return smollm.device_name(device)


def rows(
    quick: bool,
    note: Callable[[str], None],
    tokens: int | None = None,
    prompts: int | None = None,
    samples: int | None = None,
    device: str = HERE,
    dtype: str = "float32",
) -> Iterator[Row]:
    """A row per check and cache, the perplexity last."""
    default = (QUICK_TOKENS, QUICK_PROMPTS, QUICK_SAMPLES) if quick else (TOKENS, PROMPTS, SAMPLES)
    given = zip((tokens, prompts, samples), default, strict=True)
    tokens, prompts, samples = (usual if one is None else one for one, usual in given)
    for name, value, least in (("tokens", tokens, PREFIX + 2), ("prompts", prompts, 1), ("samples", samples, 1)):
        checks.whole(name, value, least)
    passkey = QUICK_PASSKEY if quick else PASSKEY
    model, tokenizer = smollm.load_model(max(tokens, passkey), device, getattr(torch, dtype))
    reader = Reader(model, tokenizer)
    note(f"{smollm.model_name()}, {dtype}, RoPE for {reader.context} tokens")
    sizes = np.linspace(SHORTEST, LONGEST, prompts).astype(int).tolist()
    text = smollm.essay_tokens(tokenizer, max(tokens, sum(sizes)))
    yield from generation(model, inputs(text, sizes, model.device), note)
    yield retrieval(reader, passkey, samples)
    yield surprise(model, text[:tokens])


def row(
    check: str, cache: dict[str, Any], measured: float, reference: float, detail: str, since: float, **more: Any
) -> Row:
    """A check; ``since`` is when it began, ``more`` has what is allowed, share and steps."""
    allowed = more.pop("allowed", 0.0)
    named = {part: said(value) if part in ("decode", "prefill") else value for part, value in cache.items()}
    return {
        "check": check,
        "policy": ", ".join(f"{part}={value}" for part, value in named.items()),
        "measured": measured,
        "reference": reference,
        "allowed": allowed,
        "holds": abs(measured - reference) <= allowed * reference,
        "share": more["share"],
        "steps": more["steps"],
        "seconds": time.perf_counter() - since,
        "detail": detail,
    }


def said(policy: Any) -> str:
    """A policy and its settings."""
    entry = Entry(policy, True)
    return f"{entry.method}({entry.setting})"


def inputs(text: Sequence[int], sizes: Sequence[int], device: Any) -> list[Inputs]:
    """Prompts of these sizes cut from the text one after the other: first the batch, then those that stand alone."""
    ends = np.cumsum(sizes).tolist()
    cut = [list(text[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    alone = [[part] for place, part in enumerate(cut) if place % BATCHED]
    return [padded(group, device) for group in (cut[::BATCHED], *alone)]


def padded(group: Sequence[Sequence[int]], device: Any) -> Inputs:
    """A batch with padding on the left."""
    longest = max(map(len, group))
    ids = torch.tensor([[0] * (longest - len(part)) + list(part) for part in group], device=device)
    kept = torch.tensor([[0] * (longest - len(part)) + [1] * len(part) for part in group], device=device)
    return {"input_ids": ids, "attention_mask": kept}


def generation(model: Any, given: Sequence[Inputs], note: Callable[[str], None]) -> Iterator[Row]:
    """The checks ``generation`` and ``bits``."""
    model.set_attn_implementation("sdpa")
    wanted = [written(model, one, DynamicCache(config=model.config)) for one in given]
    model.set_attn_implementation(NAME)
    many = sum(len(one.tokens) for one in wanted)
    for name, settings in SAME.items():
        since = time.perf_counter()
        try:
            found = [written(model, one, HSRCache(model.config, **settings)) for one in given]
        except REFUSALS as refusal:
            note(f"generation without {said(settings['decode'])}: {refusal}")
            continue
        steps, keys = sum(one.steps for one in found), sum(one.keys for one in found)
        counted = {"steps": steps, "share": sum(one.reported for one in found) / keys if keys else 1.0}
        compared = [one for pair in zip(found, wanted, strict=True) for one in comparisons(*pair)]
        faults = [one.fault for one in compared if one.fault]
        off = max(one.off for one in compared)
        detail = "; ".join([f"sequences with the same {NEW} tokens; logits off by at most {off:.1e}", *faults])
        yield row("generation", settings, many - len(faults), many, detail, since, **counted)
        if name == "dense":
            pairs = zip(found, wanted, strict=True)
            same = sum(int((one.logits == other.logits).all(-1).sum()) for one, other in pairs)
            yield row("bits", settings, same, many * NEW, "rows of logits with the same bits", since, **counted)


@torch.inference_mode()
def written(model: Any, given: Inputs, cache: Any) -> Written:
    """NEW tokens, greedily."""
    found = model.generate(
        **given,
        past_key_values=cache,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens, logits = found.sequences[:, -NEW:], torch.stack(found.logits, 1)
    if not isinstance(cache, HSRCache):
        return Written(tokens, logits)
    report = cache.report()
    return Written(tokens, logits, report.reported, report.keys, report.steps)


def comparisons(found: Written, wanted: Written) -> Iterator[Compared]:
    """One for each sequence."""
    for tokens, others, logits, expected in zip(found.tokens, wanted.tokens, found.logits, wanted.logits, strict=True):
        parted = (tokens != others).nonzero()
        fault, last = "", len(tokens) - 1
        if len(parted):
            last = int(parted[0])
            best, second = expected[last].float().topk(2).values.tolist()
            fault = f"one parts at token {last}, where the two best logits are {best - second:.1e} apart"
        yield Compared(fault, float((logits[: last + 1] - expected[: last + 1]).abs().max()))


def retrieval(reader: Reader, tokens: int, many: int) -> Row:
    """The check ``passkey``."""
    since = time.perf_counter()
    essays = smollm.essays()
    pairs = []
    for seed in range(many):
        one = sample("passkey", tokens, seed, essays, reader.count)
        context = reader.read(one)
        pairs.append([reader.reply(one, context, policy) for policy in (None, SPARSE["decode"])])
    dense, sparse = zip(*pairs, strict=True)
    alike = sum(one.exact == other.exact for one, other in pairs)
    likely = [float(np.mean([one.logprob for one in replies])) for replies in (sparse, dense)]
    detail = (
        f"exact replies of {many} with {tokens} tokens, {alike} of them exact with both or neither; "
        f"log-probability of a token {likely[0]:.4f}, dense {likely[1]:.4f}"
    )
    exact = [sum(int(one.exact) for one in replies) for replies in (sparse, dense)]
    share = float(np.mean([one.share for one in sparse]))
    return row("passkey", SPARSE, exact[0], exact[1], detail, since, share=share, steps=None)


@torch.inference_mode()
def surprise(model: Any, text: list[int]) -> Row:
    """The check ``perplexity``."""
    since = time.perf_counter()
    smollm.hook(model)
    dense = perplexity.read(model, text, perplexity.DenseStage()).surprise[PREFIX:].cpu()
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config, **SPARSE)
    ids = torch.tensor([text], device=model.device)
    model(input_ids=ids[:, :PREFIX], past_key_values=cache, logits_to_keep=1)
    steps = []
    for place in range(PREFIX, len(text) - 1):
        logits = model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits[0, -1]
        steps.append(-logits.float().log_softmax(-1)[text[place + 1]].double().cpu())
    more, half = torch.stack(steps) - dense, len(steps) // 2
    error = float(more.std()) / len(more) ** 0.5
    detail = (
        f"of tokens {PREFIX + 2} to {len(text)}; ratio {float(more.mean().exp()):.5f}, its standard error {error:.5f}, "
        f"over the second half {float(more[half:].mean().exp()):.5f}"
    )
    found, wanted = (float(one.mean().exp()) for one in (dense + more, dense))
    report = cache.report()
    return row(
        "perplexity", SPARSE, found, wanted, detail, since, allowed=ALLOWED, share=report.share, steps=report.steps
    )
