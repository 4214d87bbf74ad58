"""Queries, keys and values of SmolLM2-135M reading the essays, after the rotary embedding.

Nothing here imports torch before it is needed; `missing` says what to install.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks import demo

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


def layers(tokens: int, positions: Sequence[int] | None = None) -> list[Layer]:
    """One forward pass over that many tokens of the essays; 4096 take about a minute on two cores.

    Queries are kept of the given positions, ascending, or of the LAST ones.
    """
    from benchmarks import smollm

    model, tokenizer = smollm.load_model()
    smollm.hook(model)
    recorder = Recorder(range(tokens - LAST, tokens) if positions is None else positions)
    smollm.read_prompt(model, smollm.essay_tokens(tokenizer, tokens), recorder)
    return recorder.layers


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
