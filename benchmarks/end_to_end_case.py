"""Case ``end-to-end``: whole models on the GPU, tokens per second and seconds of a prompt, dense beside ours.

A step is one CUDA graph of the model's forward pass, B = 1, weights and logits included; its token is the largest
logit of the step before, and its time that of a loop of STEPS_TIMED such steps.  Dense: a static cache at a fixed
length, attended to by whichever of torch's kernels and FlashAttention-3 is fastest there (``dense_best``), which no
growing cache can replay; ``static_step_ms`` is with transformers' "sdpa" and a mask, as with its static cache.  Ours:
`HSRCache(decode=Sampled(budget=...))` by `CapturedSteps`, whose cache grows, and whose launches attend to every key
where there are fewer than SPARSE.  In both, torch compiles what lies in a layer before and after the attention, with
tuned matrix products: the same programs for every kernel; beside the attention nothing differs.  Prompts run eagerly:
dense with the fastest kernel, ours with `BlockSampled` at a tenth of the pairs; ``codes_s`` is the first step and the
codes.  Where a prompt would take too long, keys and values are the last one's, repeated.

Models have random weights: Llama-3.1-8B's shape with 4 layers and its whole vocabulary, which then weighs as much as
2.4 layers more, the same with all 32 layers, and SmolLM2-135M's.  The gate: ours over all keys has the dense logits.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from attention import BlockSampled, Sampled
from attention.integrations.captured import CapturedSteps
from attention.integrations.transformers import NAME, HSRCache
from benchmarks import decode_gpu_case
from benchmarks.dense_prefill import KERNELS
from benchmarks.gate import WrongAnswer
from benchmarks.ledger import Row
from benchmarks.measure import Timing
from benchmarks.replays import launched
from benchmarks.whole_models import (
    DENSE,
    PARTS,
    SHAPES,
    STATIC,
    STEPS,
    DenseCache,
    DenseKernels,
    DenseSteps,
    Held,
    Shape,
    compiled_parts,
    dense_cache,
    forward,
    random_tokens,
    registered,
)
from hsr import checks

DEVICE = decode_gpu_case.DEVICE
QUICK_LENGTHS = 1024, 8192
LEAST_TOKENS = 256
DENSITY, SPARSE = 0.1, 4096  # of prompts; tokens below which all attention is dense
ROUNDS, STEPS_TIMED = 7, 40
LONGEST_STATIC = 1 << 15
SETTING = decode_gpu_case.SETTINGS[0]
GATE, LARGEST = 3000, 0.03  # tokens, and the relative distance of logits

Note = Callable[[str], None]


def missing() -> str | None:
    """What this case needs and has not."""
    return None if torch.cuda.is_available() else "end-to-end needs an NVIDIA GPU, and torch and triton built for it"


def options(parser: argparse.ArgumentParser) -> None:
    """What this case can be asked for."""
    parser.add_argument("--tokens", nargs="+", type=int, help="that models have read (every model its own lengths)")


@torch.no_grad()
def rows(quick: bool, note: Callable[[str], None], tokens: Sequence[int] | None = None) -> Iterator[Row]:
    """A row for every model and length, ascending."""
    for n in tokens or ():
        checks.whole("tokens", n, LEAST_TOKENS)
    registered()
    for shape in SHAPES:
        model = shape.model()
        gate(model, note)
        held: Held = ()
        for n in sorted(tokens or (QUICK_LENGTHS if quick else shape.lengths)):
            try:
                row, held = measured(shape, model, n, held, note)
            except torch.cuda.OutOfMemoryError:
                note(f"{shape.name} at {n}: out of memory")
                break
            yield row
            gc.collect()
            torch.cuda.empty_cache()
        if compiled_parts() != PARTS:
            note(f"{shape.name}: {compiled_parts()} compiled parts, not {PARTS}: they differ beside the attention")
        del model, held


def gate(model: Any, note: Note) -> None:
    """WrongAnswer unless captured steps, of every dense kernel and of both of ours, have the same logits."""
    ids = random_tokens(model, GATE + 2)
    last = ids[:, GATE : GATE + 1]
    dense = dense_cache(model, ids[:, : GATE + 1])
    DenseKernels.step = STATIC  # transformers' own
    wanted = forward(model, dense, last, GATE).float()
    found = {name: step(last) for name, step in captured(model, dense, GATE, list(STEPS), note)}
    model.set_attn_implementation(NAME)
    for name, budget, below in (("ours over all keys", float(2 * GATE), 0), ("ours below dense_below", 16.0, 2 * GATE)):
        cache = HSRCache(model.config, decode=Sampled(budget=budget), dense_below=below)
        model(input_ids=ids[:, : GATE - 1], past_key_values=cache, logits_to_keep=1)
        model(input_ids=ids[:, GATE - 1 : GATE], past_key_values=cache)
        found[name] = CapturedSteps(model, cache)(last)
    for name, logits in found.items():
        off = float((logits.float() - wanted).norm() / wanted.norm())
        if not off < LARGEST:
            raise WrongAnswer(f"logits of captured steps, {name}, differ by {off} of their length")


def captured(
    model: Any, cache: DenseCache, place: int, names: list[str], note: Note
) -> Iterator[tuple[str, DenseSteps]]:
    """The dense steps of kernels by name; one that does not serve this model is a note."""
    for name in names:
        DenseKernels.step = name
        try:
            forward(model, cache, random_tokens(model, 1), place)  # what compiles does so here
            yield name, DenseSteps(model, cache, place)
        except (RuntimeError, ImportError, ValueError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            note(f"{name} at {place}: {type(error).__name__}: {str(error).splitlines()[0]}")


def measured(shape: Shape, model: Any, n: int, last: Held, note: Note) -> tuple[Row, Held]:
    """The row of one length, and keys and values of the last prompt that was read."""
    row: Row = {"model": shape.name, "layers": model.config.num_hidden_layers, "n": n}
    ids, read = random_tokens(model, n), n <= shape.prompts
    best: dict[str, float] = {}
    if read:
        for name in KERNELS:
            DenseKernels.prompt = name
            try:
                best[name] = prompt_seconds(lambda: dense_cache(model, ids))
            except (RuntimeError, ImportError, ValueError) as error:  # a kernel that does not serve this shape
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                note(f"{shape.name} at {n}: {name}: {type(error).__name__}")
        DenseKernels.prompt = min(best, key=lambda name: best[name])
        held = dense_cache(model, ids).held()
    else:
        held = last or dense_cache(model, ids[:, : shape.prompts]).held()
    whole = list(held) if read else [(repeated(k, n), repeated(v, n)) for k, v in held]
    row |= dense_steps(model, n, whole, note)
    row |= {"dense_prompt": DenseKernels.prompt if read else None, "dense_prefill_s": min(best.values(), default=None)}
    budget = SETTING.draws(model.config.head_dim, n).budget
    row |= our_steps(model, ids, whole, read, budget)
    assert isinstance(row["step_ms"], float) and isinstance(row["dense_step_ms"], float)
    row["speedup"] = row["dense_step_ms"] / row["step_ms"]
    row["prefill_speedup"] = None if not read else row["dense_prefill_s"] / (row["prefill_s"] + row["codes_s"])  # type: ignore[operator]
    return row, held


def repeated(part: torch.Tensor, n: int) -> torch.Tensor:
    """(1, g, m, d) -> (1, g, n, d)."""
    return part.repeat(1, 1, -(-n // part.shape[2]), 1)[:, :, :n]


def prompt_seconds(call: Callable[[], object]) -> float:
    """Of the second call: the first may compile."""
    call()
    gc.collect()
    return launched(call, 1).median


def looped(step: Callable[[torch.Tensor], torch.Tensor], token: torch.Tensor) -> Timing:
    """Seconds of a step in a loop that feeds back the likeliest token: median over rounds, the first left out."""

    def round_of() -> None:
        fed = token
        for _ in range(STEPS_TIMED):
            fed = step(fed).argmax(-1, keepdim=True)

    round_of()
    found = launched(round_of, ROUNDS)
    return Timing(found.median / STEPS_TIMED, found.spread / STEPS_TIMED)


def dense_steps(model: Any, n: int, held: Held, note: Note) -> Row:
    """Steps of every kernel, and the fastest one's."""
    model.set_attn_implementation(DENSE)
    token, names = random_tokens(model, 1), [*KERNELS, *([STATIC] if n <= LONGEST_STATIC else [])]
    steps = captured(model, DenseCache(len(held), held), n, names, note)
    found = {name: 1e3 * looped(step, token).median for name, step in steps}
    static = found.pop(STATIC, None)
    best = min(found, key=lambda name: found[name])
    return {
        "dense_best": best, "dense_step_ms": found[best], "dense_tokens_per_s": 1e3 / found[best],
        "static_step_ms": static, "dense_ms": found,
    }  # fmt: skip


def our_steps(
    model: Any, ids: torch.Tensor, whole: list[tuple[torch.Tensor, torch.Tensor]], read: bool, budget: float
) -> Row:
    """Ours: the prompt, the codes, steps; whole is emptied, so that no two caches lie in memory."""
    n = ids.shape[1]
    model.set_attn_implementation(NAME)
    decode, prompt = Sampled(budget=budget, bytes_per_key=SETTING.row[model.config.head_dim]), None
    if read and n >= SPARSE:
        prompt = BlockSampled(density=DENSITY)
    row: Row = {"budget": budget, "density": None if prompt is None else DENSITY, "prefill_s": None}
    if read:

        def run() -> HSRCache:
            cache = HSRCache(model.config, decode=decode, prefill=prompt, dense_below=SPARSE)
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            return cache

        cache = run()
        model(input_ids=random_tokens(model, 1), past_key_values=cache)
        cache.fused()  # what compiles did so by now
        del cache
        row["prefill_s"] = launched(run, 1).median
        cache = run()
    else:
        cache = HSRCache(model.config, decode=decode, dense_below=SPARSE)
        for number in range(len(whole)):
            cache.update(*whole.pop(0), number)
    token = random_tokens(model, 1)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    model(input_ids=token, past_key_values=cache)
    cache.fused()
    torch.cuda.synchronize()
    row["codes_s"] = time.perf_counter() - begun  # and one step
    model(input_ids=token, past_key_values=cache)
    steps = CapturedSteps(model, cache, n + (ROUNDS + 1) * STEPS_TIMED + 64)
    step = looped(steps, token)
    row["share"] = cache.report().share
    row["fell_back"] = sum(int(fused.cache.status[:, 1:3].sum()) for fused in cache.fused())  # to all keys
    return row | {
        "step_ms": 1e3 * step.median, "spread_ms": 1e3 * step.spread, "tokens_per_s": 1 / step.median,
    }  # fmt: skip
