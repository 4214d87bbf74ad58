"""Decode steps of a whole model as replays of one CUDA graph, which its launches no longer wait for."""

from __future__ import annotations

from typing import Any

import torch

from attention.integrations.transformers import HSRCache
from hsr import checks
from hsr.errors import ArgumentError


class CapturedSteps:
    """A model and its `HSRCache`, one token at a time.

        model(input_ids=prompt, past_key_values=cache); model(input_ids=token, past_key_values=cache)
        steps = CapturedSteps(model, cache)
        logits = steps(token)

    Every layer must be served by one launch a step, as ``decode=Sampled(budget=...)`` with ``dense_below=0`` is on a
    GPU once a token was decoded: that one compiles what the graph holds.  Batches have no padding.

    Args:
        model: a causal language model on a GPU, its attn_implementation "hsr".
        cache: which it has decoded a token with, at least.
        room: tokens that the cache is given room for; None is a quarter more than it has. A full one grows, which
            captures the graph anew.

    Raises:
        ArgumentError: a layer that is dense, has a sliding window or another policy; room for too few tokens.
    """

    def __init__(self, model: Any, cache: HSRCache, room: int | None = None) -> None:
        self._model, self._cache = model, cache
        n = cache.get_seq_length()
        self._room = cache.reserve(n + n // 4 if room is None else checks.whole("room", room, n))
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

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """The logits (B, vocabulary) that follow token (B, 1) int64; the next call overwrites them.

        Raises:
            ArgumentError: another shape or dtype.
        """
        if token.shape != self._token.shape or token.dtype != torch.int64:
            raise ArgumentError(
                f"token must be {tuple(self._token.shape)} of int64; got {tuple(token.shape)} of {token.dtype}"
            )
        if self._cache.get_seq_length() >= self._room:
            self._room = self._cache.reserve(2 * self._room)
            self._capture()
        self._token.copy_(token)
        self._graph.replay()
        self._cache.advance(1)
        return self._logits
