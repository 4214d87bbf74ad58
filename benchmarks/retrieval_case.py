"""Case ``retrieval``: what a model still finds in a long text when its decode steps read few keys.

SmolLM2, or the model that HSR_MODEL names (beyond its context RoPE is stretched, see `benchmarks.smollm`), reads the
context of a sample of `benchmarks.retrieval_tasks` densely; the question and the reply are served row by row by a
policy, through `attention.integrations.transformers.HSRCache`, in all layers and heads, from the same keys and values.
So every difference is that of decoding.  The last KNOWN tokens of the context are read anew for each policy, densely,
as its codes are fitted to their queries.

``exact`` is the share of samples whose reply, decoded greedily, is the expected one to the token; ``found`` the mean
share of the answers that stand in the greedy reply, in any order; ``logprob`` the mean log-probability of a token of
the expected reply, in nats, which still tells policies apart where a small model finds nothing or everything.
``share`` is what of the keys the rows of question and expected reply read (on a GPU, where a step is one launch, the
last row's).  ``seconds`` is the mean time of a sample's question and reply, building included; no claim of speed.

python -m benchmarks.run retrieval --tokens 2048 4096 --samples 4
python -m benchmarks.run retrieval --tasks passkey multi-key --tokens 32768 --samples 2    # on a GPU, bfloat16

The gate: with `attention.Dense` and with all keys as the top ones, replies are as probable as in one dense pass.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from attention import Certified, Dense, Sampled, TopR
from attention.integrations.transformers import NAME, HSRCache, register
from attention.selectors import Quest, TopOracle
from benchmarks import real_keys, smollm
from benchmarks.gate import WrongAnswer
from benchmarks.leaderboard_roster import REFUSALS, Entry
from benchmarks.ledger import Row
from benchmarks.retrieval_tasks import TASKS, Sample, sample

CUDA = torch.cuda.is_available()
DEVICE = torch.cuda.get_device_name() if CUDA else "cpu"
HERE = "cuda" if CUDA else "cpu"
TOKENS, QUICK_TOKENS = (2048, 4096, 8192) if CUDA else (2048, 4096), (1536,)
SAMPLES, QUICK_SAMPLES = 5 if CUDA else 3, 1
DTYPE = "bfloat16" if CUDA else "float32"
GATES = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.02}  # how far a reply's mean log-probability may be off
GATE_TOKENS = 1280
KNOWN = 128  # tokens of the context that every policy's cache reads itself
ROWS = 16  # tokens of a pass that `HSRCache` serves row by row
EXTRA = 4  # tokens that a greedy reply may be longer than the expected one
Top = TopOracle if CUDA else TopR  # the same rule; the policy runs on a CPU, the selector on either
POLICIES = (
    None,
    *(Top(r) for r in (16, 64, 256)),
    *(Quest(budget) for budget in (256, 1024)),
    *(Sampled(eps=eps) for eps in (0.3, 0.1, 0.02)),
    Sampled(budget=64),
    Certified(0.05),
)

missing = partial(real_keys.missing, "retrieval")


class Reply(NamedTuple):
    """What came of a sample."""

    exact: float
    found: float
    logprob: float
    share: float
    seconds: float


def options(parser: argparse.ArgumentParser) -> None:
    """What this case can be asked for."""
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="all, unless some are named")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"of samples, question and reply included {TOKENS}")
    parser.add_argument("--samples", type=int, help=f"of each task and length ({SAMPLES})")
    parser.add_argument("--device", default=HERE, help=f"where the model runs ({HERE})")
    parser.add_argument("--dtype", choices=GATES, default=DTYPE, help=f"of the model ({DTYPE})")


def rows(
    quick: bool,
    note: Callable[[str], None],
    tasks: Sequence[str] = tuple(TASKS),
    tokens: Sequence[int] | None = None,
    samples: int | None = None,
    device: str = HERE,
    dtype: str = DTYPE,
) -> Iterator[Row]:
    """A row per length, task and policy, dense first."""
    lengths = sorted(tokens or (QUICK_TOKENS if quick else TOKENS))
    many = samples or (QUICK_SAMPLES if quick else SAMPLES)
    essays = smollm.essays()
    reader: Reader | None = None
    for n in lengths:
        if reader is None or n > reader.context:
            reader = Reader(*smollm.load_model(n, device, getattr(torch, dtype)))
            gate(reader, essays, GATES[dtype])
            source, _ = smollm.model_source()
            name = Path(source).name if os.environ.get("HSR_MODEL") else "SmolLM2-135M-Instruct"
            note(f"{name}, {dtype}, RoPE for {reader.context} tokens, {many} samples")
        for task in tasks:
            drawn = [sample(task, n, seed, essays, reader.count) for seed in range(many)]
            yield from measured({"task": task, "tokens": n, "samples": many}, reader, drawn, note)


def measured(head: Row, reader: Reader, drawn: Sequence[Sample], note: Callable[[str], None]) -> Iterator[Row]:
    """The rows of one task and length."""
    found: dict[int, list[Reply]] = {place: [] for place in range(len(POLICIES))}
    for one in drawn:
        context = reader.read(one)
        for place in list(found):
            try:
                found[place].append(reader.reply(one, context, POLICIES[place]))
            except REFUSALS as refusal:
                note(f"{head['task']} at {head['tokens']} without {_entry(POLICIES[place]).method}: {refusal}")
                del found[place]
    dense = Reply(*np.mean(found[0], axis=0).tolist())
    for place, replies in found.items():
        entry, mean = _entry(POLICIES[place]), Reply(*np.mean(replies, axis=0).tolist())
        yield head | {
            "method": entry.method,
            "setting": entry.setting,
            "exact": mean.exact,
            "dense_exact": dense.exact,
            "found": mean.found,
            "dense_found": dense.found,
            "logprob": mean.logprob,
            "dense_logprob": dense.logprob,
            "share": mean.share,
            "seconds": mean.seconds,
        }


def _entry(policy: Any) -> Entry:
    return Entry(policy or Dense(), True)


class Reader:
    """A model, its tokenizer, and what it makes of samples."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        register()
        model.set_attn_implementation(NAME)
        self._model, self._tokenizer = model, tokenizer
        self.context: int = model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        """Its tokens, none of them special."""
        found: list[int] = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def count(self, text: str) -> int:
        """How many tokens it has."""
        return len(self.encode(text))

    @torch.inference_mode()
    def read(self, one: Sample) -> HSRCache:
        """The keys and values of the context but its last tokens."""
        cache = HSRCache(self._model.config, dense_below=0)
        self._pass(cache, self.encode(one.context)[:-KNOWN])
        return cache

    @torch.inference_mode()
    def reply(self, one: Sample, context: HSRCache, policy: Any) -> Reply:
        """What a policy makes of the question after the context; None is dense."""
        cache = HSRCache(self._model.config, decode=policy, dense_below=0)
        held: Sequence[Any] = context.layers
        for place, layer in enumerate(held):
            cache.update(layer.keys, layer.values, place)
        self._pass(cache, self.encode(one.context)[-KNOWN:])
        start = time.perf_counter()
        wanted = self.encode(one.reply)
        asked = self._steps(cache, self.encode(one.question))[-1:]
        before = copy.deepcopy(cache)
        predicted = torch.cat([asked, self._steps(cache, wanted)[:-1]]).log_softmax(-1)
        exact = predicted.argmax(-1).tolist() == wanted
        given = wanted if exact else self._greedy(before, int(predicted[0].argmax()), len(wanted) + EXTRA)
        return Reply(
            float(exact),
            one.found(self._tokenizer.decode(given)),
            float(predicted[range(len(wanted)), wanted].mean()),
            cache.report().share,
            time.perf_counter() - start,
        )

    def _greedy(self, cache: HSRCache, token: int, many: int) -> list[int]:
        """The reply of so many tokens that begins with that one."""
        given = [token]
        while len(given) < many:
            given.append(int(self._steps(cache, given[-1:])[0].argmax()))
        return given

    def _steps(self, cache: HSRCache, tokens: list[int]) -> torch.Tensor:
        """Logits (t, vocabulary) after each of the tokens, which are served row by row."""
        blocks = (tokens[first : first + ROWS] for first in range(0, len(tokens), ROWS))
        return torch.cat([self._pass(cache, block) for block in blocks])

    def _pass(self, cache: HSRCache, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self._model.device)
        kept = 0 if len(tokens) <= ROWS else 1  # 0 are all
        logits: torch.Tensor = self._model(input_ids=ids, past_key_values=cache, logits_to_keep=kept).logits[0].float()
        return logits

    @torch.inference_mode()
    def whole(self, one: Sample) -> float:
        """The mean log-probability of a token of the reply, by one dense pass."""
        wanted = self.encode(one.reply)
        ids = [token for part in (one.context, one.question, one.reply) for token in self.encode(part)]
        cache = HSRCache(self._model.config, dense_below=0)
        inputs = torch.tensor([ids], device=self._model.device)
        logits = self._model(input_ids=inputs, past_key_values=cache, logits_to_keep=len(wanted) + 1).logits[0, :-1]
        return float(logits.float().log_softmax(-1)[range(len(wanted)), wanted].mean())


def gate(reader: Reader, essays: Sequence[str], tolerance: float) -> None:
    """See the module."""
    one = sample("multi-key", GATE_TOKENS, 0, essays, reader.count)
    context, wanted = reader.read(one), reader.whole(one)
    for policy in (None, *([] if CUDA else [Dense()]), TopOracle(2 * GATE_TOKENS)):
        off = abs(reader.reply(one, context, policy).logprob - wanted)
        if not off < tolerance:
            raise WrongAnswer(f"{policy}: the reply's mean log-probability is off by {off:.1e} with all keys")
