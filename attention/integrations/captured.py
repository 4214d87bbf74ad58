"""Decode steps of a whole model as replays of one CUDA graph, which its launches no longer wait for."""

from __future__ import annotations

from typing import Any

import torch

from attention.integrations.steps import Fused
from attention.integrations.transformers import HSRCache
from hsr import checks
from hsr.errors import ArgumentError


class CapturedSteps:
    """A model and its `HSRCache`, one token at a time.

        model(input_ids=prompt, past_key_values=cache); model(input_ids=token, past_key_values=cache)
        steps = CapturedSteps(model, cache)
        logits = steps(token)

    Every layer must be served by one launch a step, as ``decode=Sampled(budget=...)`` is on a GPU; the token decoded
    before compiles what the graph holds.  With fewer tokens than the cache's ``dense_below`` that launch attends to
    every key, exactly but not to the bit like "sdpa"; "auto" is up to where this is the faster.  Batches have no
    padding.

    Args:
        model: a causal language model on a GPU, its attn_implementation "hsr".
        cache: which it has decoded a token with, at least.
        room: tokens that the cache is given room for; None is a quarter more than it has. A full one grows, which
            captures the graph anew.

    Raises:
        ArgumentError: a layer without a policy, or with another one, or a sliding window; room for too few tokens.
    """

    def __init__(self, model: Any, cache: HSRCache, room: int | None = None) -> None:
        self._model, self._cache = model, cache
        n = cache.get_seq_length()
        cache.refit()
        self._room = cache.reserve(n + n // 4 if room is None else checks.whole("room", room, n + 1))
        batch = cache.batch
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self._place = torch.full((batch, 1), n, dtype=torch.int64, device=model.device)
        self._capture()

    def _capture(self) -> None:
        """The graph of a step; what the host counts while it is made is taken back."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            found = self._model(input_ids=self._token, position_ids=self._place, past_key_values=self._cache)
            self._logits = found.logits[:, -1]
            self._place += 1
        self._cache.advance(-1)
        self._expected = self._cache.get_seq_length()
        self._held = self._memory()

    def _memory(self) -> list[tuple[Fused, int, int, bool]]:
        """What the launches write to, its room and codes, whether they attend to every key: a graph is of no other."""
        return [(steps, steps.cache.room, steps.fitted, steps.dense) for steps in self._cache.fused()]

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """The logits (B, vocabulary) that follow token (B, 1) int64; the next call overwrites them.

        The cache may have been used otherwise in between: then the graph is captured anew where it must be.

        Raises:
            ArgumentError: another shape or dtype, or a cache whose steps are no longer one launch each.
        """
        if token.shape != self._token.shape or token.dtype != torch.int64:
            raise ArgumentError(
                f"token must be {tuple(self._token.shape)} of int64; got {tuple(token.shape)} of {token.dtype}"
            )
        n = self._cache.get_seq_length()
        self._cache.refit()
        if n >= self._room or self._memory() != self._held:
            self._room = self._cache.reserve(n + n // 4 + 1 if n >= self._room else self._room)
            self._place.fill_(n)
            self._capture()
        elif n != self._expected:
            self._place.fill_(n)
        self._token.copy_(token)
        self._graph.replay()
        self._cache.advance(1)
        self._expected = n + 1
        return self._logits
