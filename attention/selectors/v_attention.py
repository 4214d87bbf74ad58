"""vAttention: the best keys exactly, the rest by a uniform sample of as many as an error needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np
import torch

from attention.decode_selector import DecodeSelector, Steps
from attention.draws import permutation
from attention.estimates import products
from attention.token_lists import TokenLists
from hsr import checks


@dataclass(frozen=True)
class VAttention(DecodeSelector):
    """First, last and best keys as they are, and a uniform sample that stands for all others.

    Of the n_s others, the residual, a first sample tells the spread sigma of their weights and, with the keys that are
    kept, the sum D of all weights.  A second sample of ``b = (Phi^-1(1 - delta / 2) sigma n_s / (eps D))^2`` keys, each
    with log weight ``ln(n_s / b)``, then estimates D within ``eps D`` with probability ``1 - delta``, as far as sums of
    b weights are normal and the first sample told sigma and D.  Both are drawn without replacement.

    The two samples are independent, so that numerator and denominator are unbiased whatever the first one told.  All
    heads draw by the same random order of the tokens; each draws from its own residual.  The best keys are those of the
    largest scores, of every key, where the paper takes any index: reading all keys is not what it saves.  The published
    code has ``1 - delta`` for ``1 - delta / 2``, which is the theorem's.  The denominator alone is bounded, as there.

    Args:
        eps: relative error of the denominator, above 0; 0.05.
        delta: probability that it is larger, in (0, 1); 0.05.
        heavy: share of the keys between the first and the last that are kept for their scores, in [0, 1]; 0.1.
        base: share of the residual in the first sample, in (0, 1]; 0.05, at least 2 keys.
        sinks: first tokens that are always kept; 128.
        recent: last tokens that are; 128.
        seed: of the samples, at least 0; a step's follow from it and from the number of tokens.

    Raises:
        ArgumentError: a value out of range.

    Source: arXiv 2510.05688; skylight-org/sparse-attention-hub.
    """

    eps: float = 0.05
    delta: float = 0.05
    heavy: float = 0.1
    base: float = 0.05
    sinks: int = 128
    recent: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        checks.real("eps", self.eps, np.nextafter(0, 1), np.inf)
        checks.real("delta", self.delta, np.nextafter(0, 1), 1.0)
        checks.real("heavy", self.heavy, 0.0, np.nextafter(1, 2))
        checks.real("base", self.base, np.nextafter(0, 1), np.nextafter(1, 2))
        for name in ("sinks", "recent", "seed"):
            checks.whole(name, getattr(self, name), 0)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `DecodeSelector`."""
        return cls(sinks=16, recent=16), cls(eps=0.3, delta=0.2, heavy=0.02, base=0.1, sinks=4, recent=4)

    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """See `DecodeSelector`; there is nothing to build."""
        return VAttentionSteps(self, scale)

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """Every key."""
        return float(n * d * itemsize)


@dataclass(frozen=True)
class VAttentionSteps(Steps):
    """Nothing is remembered."""

    settings: VAttention
    scale: float

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Nothing is held."""

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """A list for each head."""
        scores = products(q[:, None] * self.scale, k)[:, 0].double()
        kept, rest = self._kept(scores)
        if rest == 0:
            return TokenLists.from_mask(kept)
        n, seed = k.shape[1], self.settings.seed
        first, second = (places(~kept, permutation(seed, 2 * n + which, n, k.device)) for which in (0, 1))
        b = self._needed(scores, kept, ~kept & (first < self._base(rest)), rest)
        sample = ~kept & (second < b)
        log_weights = torch.where(sample, (rest / b).log(), 0.0)
        return TokenLists.from_mask(kept | sample, log_weights=log_weights)

    def _kept(self, scores: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Scores (H, n) -> keys that are kept as they are, (H, n) bool, and how many others each head has."""
        n, settings = scores.shape[1], self.settings
        token = torch.arange(n, device=scores.device)
        kept = ((token < settings.sinks) | (token >= n - settings.recent)).repeat(len(scores), 1)
        middle = max(0, n - settings.sinks - settings.recent)
        heavy = math.ceil(settings.heavy * middle)
        best = scores.masked_fill(kept, -torch.inf).topk(heavy, dim=1).indices
        return kept.scatter_(1, best, True), middle - heavy

    def _base(self, rest: int) -> int:
        """Keys in the first sample of a residual of so many."""
        return min(rest, max(2, math.ceil(self.settings.base * rest)))

    def _needed(self, scores: torch.Tensor, kept: torch.Tensor, told: torch.Tensor, rest: int) -> torch.Tensor:
        """Keys that the second sample needs, (H, 1) float64, as the first one (H, n) tells."""
        seen = scores.masked_fill(~(kept | told), -torch.inf)
        weights = (seen - seen.amax(1, keepdim=True)).exp()
        base = self._base(rest)
        inside = weights * told
        mean = inside.sum(1, keepdim=True) / base
        spread = (((weights - mean) * told).square().sum(1, keepdim=True) / max(1, base - 1)).sqrt()
        total = (weights * kept).sum(1, keepdim=True) + rest * mean
        quantile = NormalDist().inv_cdf(1 - self.settings.delta / 2)
        return (quantile * rest * spread / (self.settings.eps * total)).square().ceil().clamp(1, rest)


def places(among: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """among (H, n) bool, an order of the tokens (n,) -> how many of ``among`` come before each token, (H, n) int64."""
    return (among[:, order].cumsum(1) - among[:, order].long())[:, order.argsort()]
