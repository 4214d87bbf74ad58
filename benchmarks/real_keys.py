"""Queries, keys and values of SmolLM2-135M reading the essays, after the rotary embedding.

Beyond the model's context of 8192 tokens its RoPE is scaled by YaRN (`rope` says how); the essays have about 150,000.
`layers` keeps a few positions' queries, for decode; `prompts` keeps all, for prefill.  Nothing here imports torch
before it is needed; `missing` says what to install.  A machine without the model can use heads that another one kept:

python -m benchmarks.real_keys heads.npz --layers 8    # reads the essays and writes the file
HSR_HEADS=heads.npz python -m benchmarks.run accuracy-gpu        # takes keys, values and queries from it

python -m benchmarks.real_keys prompts.npz --whole --layers 2    # with all positions' queries: 16 MB a layer
HSR_HEADS=prompts.npz python -m benchmarks.run prefill-accuracy  # or prefill-gpu
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from benchmarks import demo
from hsr.errors import ArgumentError

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "transformers", "gguf", "accelerate")
LAYERS = 30  # of the model
LAST = 32  # positions whose queries are kept

Kept = TypeVar("Kept")


class Layer(NamedTuple):
    """One layer of the model; query head i reads key head ``i // (h / g)``."""

    queries: np.ndarray  # (h, m, d) float32, of m positions
    keys: np.ndarray  # (g, n, d) float32, of all positions
    values: np.ndarray  # (g, n, dv) float32, likewise


class Prompt(NamedTuple):
    """One layer's tensors of all n positions, in the dtype that the model ran in."""

    q: torch.Tensor  # (h, n, d)
    k: torch.Tensor  # (g, n, d)
    v: torch.Tensor  # (g, n, d)


def missing(program: str) -> str | None:
    """One line that says what to install, if anything."""
    return demo.missing(program, LIBRARIES)


def rope(tokens: int) -> str:
    """What the model's RoPE is for a prompt of that many tokens."""
    return f"yarn x{tokens / demo.CONTEXT:g}" if tokens > demo.CONTEXT else "as trained"


def layers(
    tokens: int, positions: Sequence[int] | None = None, device: str = "cpu", chosen: Sequence[int] | None = None
) -> list[Layer]:
    """One forward pass in float32 over that many tokens of the essays; 4096 take under a minute on two cores.

    Queries are kept of the given positions, ascending, or of the LAST ones; layers are the chosen ones, or all.  An
    ArgumentError says which layers there are.
    """
    asked = list(range(tokens - LAST, tokens) if positions is None else positions)

    def copied(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Layer:
        return Layer(*(part.cpu().numpy().copy() for part in (q[:, asked], k, v)))

    return _read(tokens, chosen, device, "float32", copied)


def prompts(
    tokens: int, chosen: Sequence[int], device: str = "cpu", dtype: str = "float32", first: int = 0
) -> list[Prompt]:
    """All positions' queries, keys and values of the chosen layers, on the device; the model runs in that dtype.

    The text begins with the essays' token ``first``.
    Other layers' tensors are not held: in float32 a layer takes 3.8 KB a token, 500 MB at 131,072.  Errors as `layers`.
    """
    return _read(tokens, chosen, device, dtype, lambda *parts: Prompt(*(part.contiguous() for part in parts)), first)


def _read(
    tokens: int, chosen: Sequence[int] | None, device: str, dtype: str, keep: Callable[..., Kept], first: int = 0
) -> list[Kept]:
    """What ``keep`` makes of the chosen layers, or all, in that order; see `Recorder`."""
    import torch

    from benchmarks import smollm

    model, tokenizer = smollm.load_model(tokens, device, getattr(torch, dtype))
    smollm.hook(model)
    every = range(model.config.num_hidden_layers)
    chosen = every if chosen is None else chosen
    if not set(chosen) <= set(every):
        raise ArgumentError(f"chosen must be layers from 0 to {every[-1]}; got {list(chosen)}")
    recorder = Recorder(keep, chosen)
    smollm.read_prompt(model, smollm.essay_tokens(tokenizer, first + tokens)[first:], recorder)
    return [recorder.kept[layer] for layer in chosen]


class Recorder(Generic[Kept]):
    """A `benchmarks.smollm.Stage`: exact causal attention that keeps something of the chosen layers."""

    def __init__(self, keep: Callable[..., Kept], chosen: Sequence[int]) -> None:
        """``keep`` is given a layer's q (h, n, d), k and v (g, n, d)."""
        self.kept: dict[int, Kept] = {}
        self._keep = keep
        self._chosen = set(chosen)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See `benchmarks.smollm.Stage`."""
        from benchmarks import smollm

        if layer in self._chosen:
            self.kept[layer] = self._keep(q, k, v)
        return smollm.causal_attention(q, k, v, scale)


def kept() -> Path | None:
    """The file of heads that HSR_HEADS names, if it names one."""
    name = os.environ.get("HSR_HEADS")
    if name and not Path(name).is_file():
        raise ArgumentError(f"HSR_HEADS must name a file that python -m benchmarks.real_keys wrote; got {name}")
    return Path(name) if name else None


def keep(path: Path, found: Sequence[Layer], positions: Sequence[int]) -> None:
    """Write layers, with queries of these positions, for `read_kept` to read."""
    queries, keys, values = (np.stack(parts).astype(np.float16) for parts in zip(*found, strict=True))
    np.savez_compressed(path, positions=np.array(positions), queries=queries, keys=keys, values=values)


def read_kept(path: Path, positions: Callable[[int], Sequence[int]]) -> list[Layer]:
    """The layers that `keep` wrote, rounded to float16, of however many tokens.

    An ArgumentError says that their queries are not those of the positions which a case asks for at that length.
    """
    with np.load(path) as file:
        tokens = file["keys"].shape[2]
        if file["positions"].tolist() != list(positions(tokens)):
            raise ArgumentError(f"HSR_HEADS must name heads with queries of the case's positions; got {path}")
        parts = (file[name].astype(np.float32) for name in Layer._fields)
        return [Layer(*layer) for layer in zip(*parts, strict=True)]


def read_whole(path: Path, device: str = "cpu", dtype: str = "float32") -> list[Prompt]:
    """The layers that `keep` wrote with the queries of all positions, rounded to float16, on the device."""
    import torch

    found = read_kept(path, range)
    return [Prompt(*(torch.from_numpy(part).to(device, getattr(torch, dtype)) for part in layer)) for layer in found]


class Pool(NamedTuple):
    """Queries (many, d) and keys (many, d) float32 of all layers and heads, in random order."""

    queries: np.ndarray
    keys: np.ndarray

    def projected(self, d: int, m: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """n -> the first n keys and m queries, new ones for every n, on the keys' d leading principal axes."""
        axes = np.linalg.eigh(np.cov(self.keys, rowvar=False))[1][:, ::-1][:, :d].astype(np.float32)
        queries, keys = self.queries @ axes, np.ascontiguousarray(self.keys @ axes)

        def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
            chosen = np.random.default_rng((n, d)).choice(len(queries), m, replace=False)
            return keys[:n], queries[chosen]

        return draw


def pool(tokens: int, seed: int) -> Pool:
    """All of `layers`, shuffled."""
    found = layers(tokens)
    rng = np.random.default_rng(seed)
    flat = (
        np.concatenate([getattr(layer, name).reshape(-1, layer.keys.shape[2]) for layer in found])
        for name in Pool._fields
    )
    return Pool(*map(rng.permutation, flat))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write heads to a file that HSR_HEADS can name."""
    from benchmarks.decode_cpu_case import QUICK_TEXT, TEXT, known_positions

    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_keys", description="Keep heads in a file.")
    parser.add_argument("file", type=Path, help="where to")
    parser.add_argument("--layers", type=int, default=8, help="how many, evenly spaced (8)")
    parser.add_argument("--tokens", type=int, default=TEXT, help=f"beyond {demo.CONTEXT} RoPE is scaled ({TEXT})")
    parser.add_argument("--whole", action="store_true", help="keep all positions' queries, for prefill")
    parser.add_argument("--device", default="cpu", help="where the model runs (cpu)")
    options = parser.parse_args(arguments)
    if not 1 <= options.layers <= LAYERS:
        parser.error(f"--layers must be 1 to {LAYERS}; got {options.layers}")
    if options.tokens < QUICK_TEXT:
        parser.error(f"--tokens must be at least {QUICK_TEXT}; got {options.tokens}")
    positions = range(options.tokens) if options.whole else known_positions(options.tokens)
    chosen = np.linspace(0, LAYERS - 1, options.layers).round().astype(int).tolist()
    keep(options.file, layers(options.tokens, positions, options.device, chosen), positions)


if __name__ == "__main__":
    main()
