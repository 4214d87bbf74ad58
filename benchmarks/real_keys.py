"""Queries, keys and values of SmolLM2-135M reading the essays, after the rotary embedding.

Nothing here imports torch before it is needed; `missing` says what to install.  A machine without the model can use
heads that another one kept:

python -m benchmarks.real_keys heads.npz --layers 8    # reads the essays and writes the file
HSR_HEADS=heads.npz python -m benchmarks.run accuracy-gpu        # takes keys, values and queries from it
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks import demo
from hsr.errors import ArgumentError

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "transformers", "gguf", "accelerate")
LAST = 32  # positions whose queries are kept


class Layer(NamedTuple):
    """One layer of the model; query head i reads key head ``i // (h / g)``."""

    queries: np.ndarray  # (h, m, d) float32, of m positions
    keys: np.ndarray  # (g, n, d) float32, of all positions
    values: np.ndarray  # (g, n, dv) float32, likewise


def missing(program: str) -> str | None:
    """One line that says what to install, if anything."""
    return demo.missing(program, LIBRARIES)


def layers(tokens: int, positions: Sequence[int] | None = None, path: Path | None = None) -> list[Layer]:
    """One forward pass over that many tokens of the essays; 4096 take about a minute on two cores.

    Queries are kept of the given positions, ascending, or of the LAST ones.  With a path of `kept` heads they come from
    there, in float16.
    """
    positions = range(tokens - LAST, tokens) if positions is None else positions
    if path is not None:
        with np.load(path) as file:
            if file["keys"].shape[2] != tokens or file["positions"].tolist() != list(positions):
                raise ArgumentError(f"HSR_HEADS must name heads of {tokens} tokens at the case's positions; got {path}")
            parts = (file[name].astype(np.float32) for name in Layer._fields)
            return [Layer(*layer) for layer in zip(*parts, strict=True)]
    from benchmarks import smollm

    model, tokenizer = smollm.load_model()
    smollm.hook(model)
    recorder = Recorder(positions)
    smollm.read_prompt(model, smollm.essay_tokens(tokenizer, tokens), recorder)
    return recorder.layers


def kept() -> Path | None:
    """The file of heads that HSR_HEADS names, if it names one."""
    name = os.environ.get("HSR_HEADS")
    if name and not Path(name).is_file():
        raise ArgumentError(f"HSR_HEADS must name a file that python -m benchmarks.real_keys wrote; got {name}")
    return Path(name) if name else None


def keep(path: Path, found: Sequence[Layer], positions: Sequence[int]) -> None:
    """Write layers, with queries of these positions, for `layers` to read."""
    queries, keys, values = (np.stack(parts).astype(np.float16) for parts in zip(*found, strict=True))
    np.savez_compressed(path, positions=np.array(positions), queries=queries, keys=keys, values=values)


class Recorder:
    """A `benchmarks.smollm.Stage`: exact causal attention that keeps what it was given."""

    def __init__(self, positions: Sequence[int]) -> None:
        """Queries of these positions are kept."""
        self.layers: list[Layer] = []
        self._positions = list(positions)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """See `benchmarks.smollm.Stage`."""
        import torch

        assert layer == len(self.layers)
        self.layers.append(Layer(q[:, self._positions].numpy(), k.numpy().copy(), v.numpy().copy()))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)[0]


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


def main() -> None:
    """Write heads to a file that HSR_HEADS can name."""
    from benchmarks.decode_cpu_case import TEXT, known_positions

    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_keys", description="Keep heads in a file.")
    parser.add_argument("file", type=Path, help="where to")
    parser.add_argument("--layers", type=int, default=8, help="how many, evenly spaced (8)")
    options = parser.parse_args()
    positions = known_positions(TEXT)
    found = layers(TEXT, positions)
    if not 1 <= options.layers <= len(found):
        parser.error(f"--layers must be 1 to {len(found)}; got {options.layers}")
    chosen = np.linspace(0, len(found) - 1, options.layers).round().astype(int)
    keep(options.file, [found[i] for i in chosen], positions)


if __name__ == "__main__":
    main()
