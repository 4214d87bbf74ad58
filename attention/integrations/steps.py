"""What serves a layer's decode steps once it is sparse: sessions of its sequences, or one sampled cache on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from attention.engine import is_coded
from attention.integrations.masks import Seen
from attention.policies import Policy
from attention.result import Certificate
from attention.sampled import Sampled
from attention.session import DecodeSession

MOST = 2**31 - 1  # tokens that a launch may be told of


class Steps(Protocol):
    """Serves rows one by one; all tensors (B, heads, 1, width).

    Attributes:
        told: tokens that it knows of, padding included.
        keys: keys that steps could have attended to, summed over steps, sequences and query heads.
        steps: steps that are counted in it.
    """

    told: int
    steps: int

    @property
    def keys(self) -> int:
        """See the class."""

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Take in a token and attend."""

    def attend(self, q: torch.Tensor) -> torch.Tensor:
        """Attend to what is there; nothing is counted."""

    def reported(self) -> int:
        """Keys that the counted steps attended to."""

    def certificate(self) -> Certificate | None:
        """Of the last step, arrays (B, h, 1); None where nothing is known."""


class Sessions:
    """A `DecodeSession` for each sequence.

    Args:
        policy: of the sessions.
        k: (B, g, n, d).
        v: (B, g, n, dv).
        seen: padding, which sessions do not hold.
        scale: of the scores.
        queries: (B, h, m, d), the prompt's last rows.
    """

    def __init__(
        self, policy: Policy | Sampled | Any, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float, queries: Any
    ) -> None:
        self._evicts = not is_coded(policy)
        self._sessions = []
        for sequence, (keys, values) in enumerate(zip(k, v, strict=True)):
            left = seen.left(sequence)
            known = None if queries is None else queries[sequence, :, -(k.shape[2] - left) :]
            self._sessions.append(
                DecodeSession(keys[:, left:], values[:, left:], policy=policy, scale=scale, queries=known)
            )
        self._reported: Any = 0
        self._certificates: list[Certificate] = []
        self.told = k.shape[2]
        self.steps = self._keys = 0

    @property
    def keys(self) -> int:
        """See `Steps`."""
        return self._keys

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take in tokens, (B, g, t, d) and (B, g, t, dv)."""
        for session, key, value in zip(self._sessions, k, v, strict=True):
            session.append(key, value)
        self.told += k.shape[2]

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `Steps`."""
        self.extend(k, v)
        results = [session.attend(row) for session, row in zip(self._sessions, q, strict=True)]
        self._certificates = [result.certificate for result in results]
        for result in results:
            self._reported = self._reported + result.counters.reported.sum()
            self._keys += result.n * q.shape[1]
        self.steps += 1
        return torch.stack([result.output for result in results])

    def attend(self, q: torch.Tensor) -> torch.Tensor:
        """See `Steps`."""
        return torch.stack([session.attend(row).output for session, row in zip(self._sessions, q, strict=True)])

    def forget(self, count: int) -> bool:
        """Drop the newest tokens; whether it could: only sessions over an index, without codes, can, and once."""
        cannot = (one.gpu is not None or one.alive <= count or one.alive < one.n for one in self._sessions)
        if not self._evicts or any(cannot):
            return False
        for session in self._sessions:
            session.evict(range(session.n - count, session.n))
        self.told -= count
        return True

    def select(self, sequences: Sequence[int]) -> bool:
        """Go on with these sequences, copies where one comes twice; whether it could, as sessions over an index can."""
        if any(session.gpu is not None for session in self._sessions):
            return False
        moved: set[int] = set()
        chosen = []
        for sequence in sequences:
            session = self._sessions[sequence]
            chosen.append(copy.deepcopy(session) if sequence in moved else session)
            moved.add(sequence)
        self._sessions = chosen
        return True

    def reported(self) -> int:
        """See `Steps`."""
        return int(self._reported)

    def certificate(self) -> Certificate | None:
        """See `Steps`."""
        if not self._certificates:
            return None
        first = self._certificates[0]
        bounds = {
            name: torch.stack([torch.as_tensor(getattr(one, name)) for one in self._certificates]).cpu().numpy()
            for name in ("dropped_mass", "output_error", "relative_error", "lse_error")
        }
        return Certificate(first.kind, **bounds, confidence=first.confidence)


class Fused:
    """`Sampled` with a budget on a GPU: a step is one launch, which also takes in the token, and can be captured.

    The cache holds the layer's keys and values; its sums count the last step alone, and it claims nothing of its error.

    Args:
        policy: has a budget.
        k: (B, g, n, d) float16 or bfloat16.
        v: likewise.
        heads: h.
        scale: of the scores.
        queries: (B, h, m, d), the prompt's last rows, or None.
        dense_below: tokens below which the launch attends to every key; None is below which that is faster.  Where a
            step takes several launches, all of them draw.

    Attributes:
        fitted: tokens when the codes were made.
    """

    def __init__(
        self,
        policy: Sampled,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        scale: float,
        queries: Any,
        dense_below: int | None,
    ) -> None:
        from gpu.sampled import Draws, SampledCache

        assert policy.budget is not None
        self.cache = SampledCache(k, v, heads, Draws.of(policy), scale, queries=queries)
        self.told = self.fitted = k.shape[2]
        self.steps = 0
        least = self.cache.faster_below if dense_below is None else min(dense_below, MOST)
        self._dense_below = least if self.cache.single else 0

    @property
    def keys(self) -> int:
        """See `Steps`; replays of a graph count as well."""
        return self.cache.batch * self.cache.groups * self.cache.per * self.told * self.steps

    def rows(self, which: int) -> torch.Tensor:
        """The keys (0) or the values (1) held, (B, g, n, d), a view."""
        return (self.cache.keys, self.cache.values)[which][:, :, : self.told]

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `Steps`."""
        capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing:
            self.refit()
        if self.told == self.cache.room:
            self.cache.reserve(2 * self.told)
        self.told += 1
        self.steps = self.steps if capturing else 1
        return self._launch(self.cache.step, q, k, v)

    def refit(self) -> None:
        """Make the codes anew where the next step is to draw by those of half of the tokens, or fewer.

        It waits for the GPU, and graphs must be captured again.
        """
        if not self.dense and self.told >= 2 * self.fitted:
            self.cache.recode()
            self.fitted = self.told

    def advance(self, count: int) -> None:
        """Note tokens that replays of a graph took in, or, below zero, that a capture did not."""
        self.told += count
        self.steps = 1 if count > 0 else self.steps

    def attend(self, q: torch.Tensor) -> torch.Tensor:
        """See `Steps`."""
        return self._launch(self.cache.attend, q)

    def forget(self, count: int) -> bool:
        """Drop the newest tokens; whether it could: not where most of those that codes were fitted to would be gone."""
        if 2 * (self.told - count) < self.fitted:
            return False
        self.cache.shorten(count)
        self.told -= count
        self.steps = 0
        return True

    @property
    def dense(self) -> bool:
        """Whether the next step will attend to every key."""
        return self.told + 1 < self._dense_below

    def _launch(self, call: Callable[..., None], q: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        """A step of q and rows (B, heads, 1, d).  One that is to draw knows no limit, and so begins sooner."""
        from gpu.tokens import readable

        self.cache.dense_below = self._dense_below if self.told < self._dense_below else 0
        output = torch.empty_like(q, memory_format=torch.contiguous_format)
        call(*(readable(part[:, :, 0]) for part in (q, *rows)), output[:, :, 0])
        return output

    def reported(self) -> int:
        """See `Steps`."""
        return int(self.cache.attended(self.told).sum()) * self.cache.per if self.steps else 0

    def certificate(self) -> Certificate | None:
        """See `Steps`."""
        return None


def fuses(policy: Any, k: torch.Tensor, seen: Seen) -> bool:
    """Whether `Fused` serves this."""
    return isinstance(policy, Sampled) and policy.eps is None and k.device.type == "cuda" and seen.lefts is None
