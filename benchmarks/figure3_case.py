"""Case ``figure3``: perplexity when every layer, head and row keeps few keys; the experiment of arXiv 2410.10165.

Its Figure 3 replaces softmax by the index-set softmax over the r keys of largest score (``TopR``) and finds no loss of
perplexity on Paul Graham's essays until r < 2^4.  Here the same, on the essays' first tokens, in one teacher-forced
pass (`benchmarks.perplexity`), with SmolLM2 or the model that HSR_MODEL names; beside it `attention.Sampled` and
`attention.Certified`.  ``TopR`` is an oracle: it knows all scores, so its curve says what r keys could hold and nothing
of the cost of finding them.

``reported`` is the number of keys that a row attends to, mean over rows, heads and layers; a row that sees fewer than r
keys keeps all, so early rows are dense in every setting.  ``late_ratio`` is the ratio of perplexities over the second
half of the text alone, whose rows see most.  ``kl`` is the mean of KL(dense || sparse) over the predictions of the next
token, which shows what perplexity averages away.  ``Sampled`` gives each row its own draw from its own prefix, but its
codes are fitted on all keys of the text: that changes the variance of its estimates, never their mean.  On a GPU it has
budgets, and its rows are the decode steps of `gpu.sampled`; targets (``eps``) and ``Certified`` are served on a CPU.
``seconds`` is of a whole forward pass in the form that this case runs it, no claim of speed.

python -m benchmarks.run figure3 --tokens 2048                # on a CPU the default is 4096, on a GPU 8192
python -m benchmarks.run figure3 --dtype bfloat16             # for large models; rounding alone makes kl about 0.002

The gate, on a short text: `benchmarks.perplexity.top_attention` is `attention.prefill` with ``TopR``; with all keys it
gives each token the dense model's surprise, and so does `attention.Dense`; and dense predictions are the model's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from attention import Certified, Dense, Sampled, TopR, prefill
from benchmarks import real_keys, smollm
from benchmarks.gate import WrongAnswer
from benchmarks.leaderboard_roster import Entry
from benchmarks.ledger import Row
from benchmarks.perplexity import DenseStage, PolicyStage, Read, StepStage, TopStage, read, top_attention
from hsr import checks

HERE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, GPU_TOKENS, QUICK_TOKENS = 4096, 8192, 512
SMALLEST = 2  # r from 2^2 on
LEAST_TOKENS = 2 << SMALLEST
OTHERS = (
    *(Sampled(eps=eps) for eps in (0.5, 0.2, 0.1, 0.05, 0.02)),
    *(Sampled(budget=budget) for budget in (64, 256)),
    *(Certified(eps) for eps in (0.5, 0.2, 0.05, 0.02)),
)
GPU_OTHERS = tuple(Sampled(budget=float(1 << k)) for k in range(4, 11))
QUICK_OTHERS = (Sampled(eps=0.1), Certified(0.05))
GATE_TOKENS, GATE_ROWS, GATE_LAYERS = 384, 64, 3
GATE_SIZES = (4, 32, 400)  # r; the last is more than all keys
HALF = 2e-2  # and keys rounded to 16 bits
DTYPES = {"float32": 1e-4, "bfloat16": 0.1, "float16": 2e-2}  # how far the gate lets surprises be off, mean

missing = partial(real_keys.missing, "figure3")


class Setting(NamedTuple):
    """One point of the figure."""

    policy: Any
    stage: DenseStage


def options(parser: argparse.ArgumentParser) -> None:
    """What this case can be asked for."""
    parser.add_argument("--tokens", type=int, help=f"of the essays ({TOKENS}, on a GPU {GPU_TOKENS})")
    parser.add_argument("--device", default=HERE, help=f"where the model runs ({HERE})")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (float32)")


def where(device: str, **others: Any) -> str:
    """The device that is measured."""
    return smollm.device_name(device)


def rows(
    quick: bool, note: Callable[[str], None], tokens: int | None = None, device: str = HERE, dtype: str = "float32"
) -> Iterator[Row]:
    """A row per setting, dense first."""
    if tokens is None:
        tokens = QUICK_TOKENS if quick else TOKENS if torch.device(device).type == "cpu" else GPU_TOKENS
    checks.whole("tokens", tokens, LEAST_TOKENS)
    model, tokenizer = smollm.load_model(tokens, device, getattr(torch, dtype))
    smollm.hook(model)
    text = smollm.essay_tokens(tokenizer, tokens)
    gate(model, text[:GATE_TOKENS], DTYPES[dtype])
    name = smollm.model_name()
    note(f"{name}, {dtype}, RoPE {real_keys.rope(tokens) if name.startswith('SmolLM2') else 'as configured'}")
    dense: Read | None = None
    for policy, stage in settings(tokens, quick, model.device):
        found = read(model, text, stage, dense.states if dense else None)
        dense = dense or found
        half = tokens // 2
        yield {
            "method": Entry(policy, True).method,
            "setting": Entry(policy, True).setting,
            "r": policy.r if isinstance(policy, TopR) else None,
            "reported": sum(stage.reported) / len(stage.reported),
            "tokens": tokens,
            "perplexity": found.perplexity(),
            "dense_perplexity": dense.perplexity(),
            "ratio": found.perplexity() / dense.perplexity(),
            "late_ratio": found.perplexity(half) / dense.perplexity(half),
            "kl": float(found.divergence.mean()),
            "seconds": found.seconds,
        }


def settings(tokens: int, quick: bool, device: torch.device) -> Iterator[Setting]:
    """The points, with a fresh stage each."""
    yield Setting(Dense(), DenseStage())
    r = 1 << SMALLEST
    while r <= tokens:
        yield Setting(TopR(r), TopStage(r))
        r *= 8 if quick else 2
    if device.type == "cuda":
        for policy in GPU_OTHERS[::6] if quick else GPU_OTHERS:
            yield Setting(policy, StepStage(policy))
        return
    for other in QUICK_OTHERS if quick else OTHERS:
        yield Setting(other, PolicyStage(other))


class Compared(DenseStage):
    """A stage that holds some rows of its first layers, as two functions see them, against each other."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See `benchmarks.smollm.Stage`."""
        if layer < GATE_LAYERS:
            last = q[:, -GATE_ROWS:]
            for r in GATE_SIZES:
                output, reported = top_attention(last, k, v, r, scale)
                wanted = prefill(*(part.float().cpu() for part in (last, k, v)), policy=TopR(r), scale=scale)
                off = float((output.cpu() - wanted.output).norm(dim=2).max() / wanted.output.norm(dim=2).mean())
                counts = torch.as_tensor(wanted.counters.reported)
                if not (off < 1e-4 and bool((reported.cpu() >= counts).all())):  # ties are kept
                    raise WrongAnswer(f"top_attention({r}) is off by {off:.1e} in layer {layer}")
        return super().attend(layer, q, k, v, scale)


def gate(model: Any, text: list[int], tolerance: float) -> None:
    """See the module."""
    dense = read(model, text, Compared())
    with torch.no_grad():
        own = model(torch.tensor([text], device=model.device), use_cache=False, stage=DenseStage()).logits[0].float()
    wanted = torch.nn.functional.cross_entropy(own[:-1], torch.tensor(text[1:], device=own.device), reduction="none")
    found = {
        "top_attention of all keys": (read(model, text, TopStage(len(text))).surprise, dense.surprise),
        "prefill of all keys": (read(model, text, PolicyStage(Dense())).surprise, dense.surprise),
        "the dense reading": (dense.surprise, wanted),
    }
    if model.device.type == "cuda":
        every = StepStage(Sampled(budget=float(2 * len(text))))
        found["steps over all keys"] = read(model, text, every).surprise, dense.surprise
    for name, (surprise, right) in found.items():
        far = float((surprise - right).abs().mean())
        if not far < (max(tolerance, HALF) if name.startswith("steps") else tolerance):
            raise WrongAnswer(f"{name}: a token's surprise is off by {far:.1e}, mean")
