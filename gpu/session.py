"""A decode session whose keys and values live on the GPU: what `attention.DecodeSession` hands CUDA tensors to."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from attention.engine import Plan
from attention.result import Certificate, Counters, Result
from attention.sampled import Sampled
from gpu import spread, tensors, tokens
from gpu.sampled import Draws, SampledCache
from hsr.errors import ArgumentError

LOOK = 4096  # tokens between looks at the drift, each of which waits for the GPU
DRIFT = 0.5  # of the newest codes, from which all are made anew


def refuses(*, plan: Plan, **call: object) -> str | None:
    """Why the kernels cannot serve the plan; None if they can."""
    policy = plan.policy
    if not isinstance(policy, Sampled):
        return "serves the policy Sampled alone"
    return None


class CudaSession:
    """See `attention.DecodeSession`; k and v (g, n, d) or (B, g, n, d), float16 or bfloat16, on one GPU.

    Codes are made at the first `attend`, from whose queries they take their metric.  `attend` and `append` of one token
    may be captured in a CUDA graph once they have run eagerly; room for the tokens that replays append must then have
    been made with `reserve`.  Results stay on the GPU, those of their certificate too, which is
    statistical (see `gpu.spread`); `Sampled(eps=...)` moves the heads' budgets from step to step by what it says.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> None:
        assert isinstance(plan.policy, Sampled)
        self._plan, self._policy = plan, plan.policy
        self._batched = k.ndim == 4
        if k.shape != v.shape or k.dtype != v.dtype or k.device != v.device:
            raise ArgumentError(
                f"v must be like k on cuda, (g, n, d) or (B, g, n, d); got {tuple(v.shape)} of {v.dtype} on {v.device} "
                f"and {tuple(k.shape)} of {k.dtype} on {k.device}"
            )
        self._waiting = [
            self._full(tensors.floats(name, part, (3, 4), k.device)) for name, part in (("k", k), ("v", v))
        ]
        self._cache: SampledCache | None = None
        self._n = self._waiting[0].shape[2]
        self._coded = self._looked = self._n  # tokens when codes were made, and when their drift was looked at

    @property
    def n(self) -> int:
        """Tokens that were added; replays of a graph add theirs on the GPU alone, see `SampledCache.lengths`."""
        return self._n

    @property
    def alive(self) -> int:
        """All of them: nothing is evicted here."""
        return self._n

    @property
    def cache(self) -> SampledCache:
        """The cache, whose ``step`` a CUDA graph may capture; made by the first `attend`.

        Raises:
            ArgumentError: nothing was attended to yet.
        """
        if self._cache is None:
            raise ArgumentError("cache is made by the first attend; got an unused session")
        return self._cache

    def _full(self, array: torch.Tensor) -> torch.Tensor:
        return array if self._batched else array[None]

    def reserve(self, room: int) -> None:
        """Make room for so many tokens in all."""
        self.cache.reserve(room)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add tokens: k, v (g, t, d), or with a leading B."""
        if k.shape != v.shape or k.ndim != 3 + self._batched or k.dtype != self._waiting[0].dtype:
            raise ArgumentError(
                f"k and v must be {'(B, g, t, d)' if self._batched else '(g, t, d)'} of {self._waiting[0].dtype} to "
                f"match the cache; got {tuple(k.shape)} and {tuple(v.shape)} of {k.dtype}"
            )
        keys, values = tokens.readable(self._full(k)), tokens.readable(self._full(v))
        B, g, _, d = self._waiting[0].shape
        if (keys.shape[0], keys.shape[1], keys.shape[3]) != (B, g, d):
            raise ArgumentError(f"k must have shape ({B}, {g}, t, {d}) to match the cache; got {tuple(keys.shape)}")
        if self._cache is None:
            self._waiting = [torch.cat(pair, 2) for pair in zip(self._waiting, (keys, values), strict=True)]
        else:
            if self._n + keys.shape[2] > self._cache.room:
                self._cache.reserve(2 * (self._n + keys.shape[2]))
            for t in range(keys.shape[2]):
                self._cache.append(keys[:, :, t], values[:, :, t])
        self._n += keys.shape[2]
        if self._cache is not None and not (keys.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._follow(self._cache)

    def _follow(self, cache: SampledCache) -> None:
        """Make codes anew where there were few keys to make them for, or where the newest have drifted away."""
        anew = self._coded < LOOK and self._n >= 2 * self._coded
        if not anew and self._n >= self._looked + LOOK:
            anew = bool((cache.drift() > DRIFT).any())
            self._looked = self._n
        if anew:
            cache.recode()
            self._coded = self._looked = self._n

    def evict(self, ids: Any) -> None:
        """Refused: the codes of the GPU cannot forget."""
        raise ArgumentError(f"evict is not served on cuda; got {len(ids)} ids")

    def attend(self, q: torch.Tensor) -> Result:
        """Attention of q (h, 1, d) or (B, h, 1, d) over every token."""
        queries = self._full(q)
        B, _, _, d = self._waiting[0].shape
        if queries.ndim != 4 or queries.shape[2] != 1 or (queries.shape[0], queries.shape[3]) != (B, d):
            raise ArgumentError(f"q must be one row a head on cuda, ({B}, h, 1, {d}); got {tuple(q.shape)}")
        if q.dtype != self._waiting[0].dtype:
            raise ArgumentError(f"q must have the keys' dtype {self._waiting[0].dtype}; got {q.dtype}")
        rows = tokens.readable(queries[:, :, 0])
        if self._cache is None:
            self._cache = self._made(queries)
        output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        cache = self._cache
        cache.attend(rows, output[:, :, 0])
        found = spread.spread(cache, rows, output[:, :, 0])
        bounds = spread.bounds(cache, found, rows, output[:, :, 0], self._policy.confidence)
        if self._policy.eps is not None:
            spread.adjust(cache, found, self._policy.eps)
        lead = q.shape[:-1]
        lse: Any = cache.lse.reshape(lead).clone()
        count = cache.counts[:, :1].repeat_interleave(queries.shape[1] // cache.groups).reshape(lead)
        empty: Any = torch.isneginf(lse)  # tensors where a CPU's result has arrays
        unknown: Any = torch.full_like(lse, torch.nan)
        output_error, relative_error, lse_error = cast(Any, [part.reshape(lead) for part in bounds])
        work: Any = count, torch.full_like(count, self._n), count
        certificate = Certificate(
            "statistical", unknown, output_error, relative_error, lse_error, self._policy.confidence
        )
        return Result(output.reshape(q.shape), lse, empty, certificate, Counters(*work), self._n)

    def _made(self, queries: torch.Tensor) -> SampledCache:
        policy = self._policy
        k, v = self._waiting
        budget = policy.budget if policy.eps is None else max(policy.eps**-2, spread.LEAST)
        assert budget is not None
        scale = self._plan.scale or 1 / float(np.sqrt(k.shape[3]))
        least = None if policy.eps is None else spread.LEAST
        draws = Draws.of(policy, budget=budget, least=least, listing=True)
        cache = SampledCache(k, v, queries.shape[1], draws, scale, queries=queries)
        self._coded = self._looked = self._n
        self._waiting = [cache.keys[:, :, :0], cache.values[:, :, :0]]  # shapes and dtype, without the memory
        return cache


def session(k: torch.Tensor, v: torch.Tensor, plan: Plan) -> CudaSession:
    """The table's entry."""
    return CudaSession(k, v, plan)
