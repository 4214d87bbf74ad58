"""Case ``retrieval``: what a model still finds in a long text when its decode steps attend to few keys.

SmolLM2, or the model that HSR_MODEL names (beyond its context RoPE is stretched, see `benchmarks.smollm`), reads the
context of a sample of `benchmarks.retrieval_tasks` densely; the question and the reply are served row by row by a
policy, through `attention.integrations.transformers.HSRCache`, in all layers and heads, from the same keys and values.
So every difference is that of decoding.  The last KNOWN tokens of the context are read anew for each policy, densely,
as its codes are fitted to their queries.

``exact`` is the share of samples whose reply, decoded greedily, is the expected one to the token, or for
``common-words``, whose answers have no order, as long and holds all answers in any order and nothing else; ``found``
the mean share of the answers that stand in the greedy reply, in any order; ``logprob`` the mean log-probability of a
token of the expected reply, of ``common-words`` in one order that is drawn, in nats, which still tells policies apart
where a small model finds nothing or everything.  ``share`` is what of the keys the rows of question and expected reply
attend to (on a GPU, where a step is one launch, the last row's); what is read to choose them, as codes or all scores
are, does not count.

python -m benchmarks.run retrieval --tokens 2048 4096 --samples 4
python -m benchmarks.run retrieval --tasks passkey multi-key --tokens 32768 --samples 2    # on a GPU, bfloat16

The gate: with `attention.Dense`, and with all keys as the top ones or as the sample, replies are as probable as in one
dense pass.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
from hsr import checks
from hsr.errors import ArgumentError

HERE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, GPU_TOKENS, QUICK_TOKENS = (2048, 4096), (2048, 4096, 8192), (1536,)
SAMPLES, GPU_SAMPLES, QUICK_SAMPLES = 3, 5, 1
GATES = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.02}  # how far a reply's mean log-probability may be off
GATE_TOKENS = 1280
KNOWN = 128  # tokens of the context that every policy's cache reads itself
ROWS = 16  # tokens of a pass that `HSRCache` serves row by row
EXTRA = 4  # tokens that a greedy reply may be longer than the expected one
missing = partial(real_keys.missing, "retrieval")


class Reply(NamedTuple):
    """What came of a sample."""

    exact: float
    found: float
    logprob: float
    share: float


def options(parser: argparse.ArgumentParser) -> None:
    """What this case can be asked for."""
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="all, unless some are named")
    parser.add_argument(
        "--tokens", nargs="+", type=int, help=f"of samples, question and reply included {TOKENS}, on a GPU {GPU_TOKENS}"
    )
    parser.add_argument("--samples", type=int, help=f"of each task and length ({SAMPLES}, on a GPU {GPU_SAMPLES})")
    parser.add_argument("--device", default=HERE, help=f"where the model runs ({HERE})")
    parser.add_argument("--dtype", choices=GATES, help="of the model (float32, on a GPU bfloat16)")


def where(device: str, **others: Any) -> str:
    """The device that is measured."""
    return smollm.device_name(device)


def top(r: int, device: str) -> Any:
    """The r keys of largest score: the policy runs on a CPU, the selector on either."""
    return TopR(r) if torch.device(device).type == "cpu" else TopOracle(r)


def policies(device: str) -> tuple[Any, ...]:
    """Who is measured on a device, dense first."""
    return (
        None,
        *(top(r, device) for r in (16, 64, 256)),
        *(Quest(budget) for budget in (256, 1024)),
        *(Sampled(eps=eps) for eps in (0.3, 0.1, 0.02)),
        Sampled(budget=64),
        Certified(0.05),
    )


def rows(
    quick: bool,
    note: Callable[[str], None],
    tasks: Sequence[str] = tuple(TASKS),
    tokens: Sequence[int] | None = None,
    samples: int | None = None,
    device: str = HERE,
    dtype: str | None = None,
) -> Iterator[Row]:
    """A row per length, task and policy, dense first."""
    gpu = torch.device(device).type != "cpu"
    dtype = dtype or ("bfloat16" if gpu else "float32")
    if tokens is None:
        tokens = QUICK_TOKENS if quick else GPU_TOKENS if gpu else TOKENS
    if samples is None:
        samples = QUICK_SAMPLES if quick else GPU_SAMPLES if gpu else SAMPLES
    checks.whole("samples", samples, 1)
    checks.whole("tokens", min(tokens), KNOWN + 1)
    essays = smollm.essays()
    reader: Reader | None = None
    for n in sorted(tokens):
        if reader is None or n > reader.context:
            reader = Reader(*smollm.load_model(n, device, getattr(torch, dtype)))
            gate(reader, essays, GATES[dtype], device)
            name = smollm.model_name()
            note(f"{name}, {dtype}, RoPE for {reader.context} tokens, {samples} samples")
        drawn = {task: [sample(task, n, seed, essays, reader.count) for seed in range(samples)] for task in tasks}
        for task, ones in drawn.items():
            _require_room(task, n, ones, reader)
        for task, ones in drawn.items():
            head = {"task": task, "tokens": n, "samples": samples}
            yield from measured(head, reader, ones, policies(device), note)


def _require_room(task: str, n: int, drawn: Sequence[Sample], reader: Reader) -> None:
    """ArgumentError where samples do not fit, or leave nothing of the context to be read densely."""
    for one in drawn:
        context, *rest = (reader.count(part) for part in (one.context, one.question, one.reply))
        if context <= KNOWN or context + sum(rest) > n:
            raise ArgumentError(f"tokens must hold a sample of {task} with a context beyond {KNOWN} tokens; got {n}")


def measured(
    head: Row, reader: Reader, drawn: Sequence[Sample], asked: Sequence[Any], note: Callable[[str], None]
) -> Iterator[Row]:
    """The rows of one task and length; dense, the first of the policies, must serve them."""
    found: dict[int, list[Reply]] = {place: [] for place in range(len(asked))}
    for one in drawn:
        context = reader.read(one)
        for place in list(found):
            try:
                found[place].append(reader.reply(one, context, asked[place]))
            except REFUSALS as refusal:
                if place == 0:
                    raise
                note(f"{head['task']} at {head['tokens']} without {_entry(asked[place]).method}: {refusal}")
                del found[place]
    dense = Reply(*np.mean(found[0], axis=0).tolist())
    for place, replies in found.items():
        entry, mean = _entry(asked[place]), Reply(*np.mean(replies, axis=0).tolist())
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
        wanted = self.encode(one.reply)
        asked = self._steps(cache, self.encode(one.question))[-1:]
        before = copy.deepcopy(cache)
        predicted = torch.cat([asked, self._steps(cache, wanted)[:-1]]).log_softmax(-1)
        same = predicted.argmax(-1).tolist() == wanted
        given = wanted if same else self._greedy(before, int(predicted[0].argmax()), len(wanted) + EXTRA)
        return Reply(
            float(same or one.reordered(self._tokenizer.decode(given[: len(wanted)]))),
            one.found(self._tokenizer.decode(given)),
            float(predicted[range(len(wanted)), wanted].mean()),
            cache.report().share,
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


def gate(reader: Reader, essays: Sequence[str], tolerance: float, device: str) -> None:
    """See the module."""
    one = sample("multi-key", GATE_TOKENS, 0, essays, reader.count)
    context, wanted = reader.read(one), reader.whole(one)
    every = 2 * GATE_TOKENS
    policies = (
        None,
        *([Dense()] if torch.device(device).type == "cpu" else []),
        TopOracle(every),
        Sampled(budget=every),
    )
    for policy in policies:
        off = abs(reader.reply(one, context, policy).logprob - wanted)
        if not off < tolerance:
            raise WrongAnswer(f"{policy}: the reply's mean log-probability is off by {off:.1e} with all keys")
