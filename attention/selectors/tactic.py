"""Tactic: the fewest keys that hold a share of the attention, told by clusters and a fitted decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch

from attention.clusters import Clusters, lloyd, scaled
from attention.decode_selector import DecodeSelector, Steps
from attention.draws import permutation
from attention.estimates import products
from attention.token_lists import TokenLists
from hsr import checks

NARROWEST = 16  # keys of a window that is sampled


@dataclass(frozen=True)
class Tactic(DecodeSelector):
    """Keys in the order of their clusters' scores, as many as are estimated to hold a share of the attention.

    Keys are clustered by k-means for each key-value head.  A step ranks the clusters by their mean key's score and
    lists the keys in that order.  The first few weigh what they do; two windows further down are scored too, and
    ``a / rank + b`` through the means of their weights stands for the rest.  The shortest beginning of the list whose
    weights make the share of all is kept, and a group attends to what any of its heads keeps.  Tokens that came after
    the clustering are always attended to; every ``refresh`` of them all keys are clustered anew.

    The share is an estimate.  Where weights fall like 1 / rank nine lists in ten hold it; where a few topics have all
    the attention, which then falls off a cliff, most lists do not (the tests have figures).

    No code is published, so these are ours: the width of a window and where it lies (about its place in the list, and
    after what lies before it); the fit where it would not decay (``a <= 0`` is the mean, ``b < 0`` is 0, each keeping
    the windows' weight); weights relative to the largest one scored; attention to everything below ``dense_below``
    tokens, where windows are no sample; starts that are the same tokens in every head.

    Args:
        share: of the attention, in (0, 1]; 0.9, or 0.75.
        cluster: keys of a cluster in the mean; 16.
        iterations: of k-means; 10.
        head: share of the keys whose weights are known, in (0, 0.1); 0.02, the paper's 1 to 2 %.
        window: share of the keys in a window, in (0, 0.1), at least 16 keys; ours, 0.005.
        refresh: new tokens until all are clustered anew; 2048.
        dense_below: tokens below which every key is attended to, at least 128; ours, 4096.
        seed: of the starts, at least 0.

    Raises:
        ArgumentError: a value out of range.

    Source: arXiv 2502.12216.
    """

    share: float = 0.9
    cluster: int = 16
    iterations: int = 10
    head: float = 0.02
    window: float = 0.005
    refresh: int = 2048
    dense_below: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        checks.real("share", self.share, np.nextafter(0, 1), np.nextafter(1, 2))
        checks.whole("cluster", self.cluster, 1)
        checks.whole("iterations", self.iterations, 0)
        checks.real("head", self.head, np.nextafter(0, 1), 0.1)
        checks.real("window", self.window, np.nextafter(0, 1), 0.1)
        checks.whole("refresh", self.refresh, 1)
        checks.whole("dense_below", self.dense_below, 128)
        checks.whole("seed", self.seed, 0)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `DecodeSelector`."""
        return cls(dense_below=256), cls(share=0.75, cluster=8, window=0.02, refresh=64, dense_below=128)

    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """See `DecodeSelector`."""
        steps = TacticSteps(self, k, scale)
        steps.append(k, v)
        return steps

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """Mean keys and sizes of clusters, and the keys that each head scores, all of them others at worst."""
        if n < self.dense_below:
            return 0.0
        scored = self.spans(n)
        keys = min(n, group * (scored.head + 2 * scored.width))
        return n / self.cluster * (d * max(4, itemsize) + 4) + keys * d * itemsize

    def spans(self, n: int) -> Spans:
        """Which places of the list of n >= 128 keys are scored."""
        head, width = math.ceil(self.head * n), max(NARROWEST, math.ceil(self.window * n))
        first = max(head, int(0.1 * n) - width // 2)
        second = max(first + width, int(0.6 * n) - width // 2)
        return Spans(head, first, second, width)


class Spans(NamedTuple):
    """Places of a list that are scored: those below ``head``, and ``width`` of them from either start on."""

    head: int
    first: int
    second: int
    width: int


class TacticSteps(Steps):
    """Clusters of the first tokens."""

    def __init__(self, settings: Tactic, k: torch.Tensor, scale: float) -> None:
        """k (G, n, d), of which none is clustered yet."""
        self.settings = settings
        self.scale = scale
        self.clusters = Clusters.none(k)
        self.within = self.clusters.owners

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Cluster all keys where there are enough, and enough new ones."""
        n, known = k.shape[1], self.clusters.owners.shape[1]
        if n >= self.settings.dense_below and (known == 0 or n - known >= self.settings.refresh):
            points, count = scaled(k), -(-n // self.settings.cluster)
            start = permutation(self.settings.seed, 0, n, k.device)[:count]
            self.clusters = Clusters.of(k, lloyd(points, points[:, start], self.settings.iterations), count)
            self.within = places_within(self.clusters)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """What any head of a group keeps, and every token that is in no cluster."""
        G, known = self.clusters.owners.shape
        keep = torch.ones(G, k.shape[1], dtype=torch.bool, device=k.device)
        if known:
            keep[:, :known] = self._kept(q, k[:, :known]).view(G, -1, known).any(1)
        return TokenLists.from_mask(keep)

    def _kept(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """q (H, d), k (G, n, d), all clustered -> what each head keeps, (H, n) bool."""
        places = self.ranked(q)
        order = torch.zeros_like(places).scatter_(
            1, places, torch.arange(k.shape[1], device=k.device).expand_as(places)
        )
        spans = self.settings.spans(k.shape[1])
        listed = torch.cat(
            [order[:, : spans.head], *(order[:, at : at + spans.width] for at in (spans.first, spans.second))], dim=1
        )
        weights = estimated(self._scores(q, k, listed), spans, k.shape[1])
        return places < covering(weights, self.settings.share)

    def ranked(self, q: torch.Tensor) -> torch.Tensor:
        """q (H, d) -> each token's place in its head's list, (H, n) int64."""
        group = len(q) // len(self.clusters.owners)
        order = products(q[:, None].to(self.clusters.means.dtype), self.clusters.means)[:, 0].argsort(
            dim=1, descending=True, stable=True
        )
        sizes = self.clusters.sizes.repeat_interleave(group, 0).gather(1, order)
        starts = torch.zeros_like(sizes).scatter_(1, order, sizes.cumsum(1) - sizes)
        owners, within = (x.repeat_interleave(group, 0) for x in (self.clusters.owners, self.within))
        return starts.gather(1, owners) + within

    def _scores(self, q: torch.Tensor, k: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
        """Scaled scores of the keys (H, w) that are listed: (H, w) float64."""
        heads = torch.arange(len(q), device=q.device)[:, None] * len(k) // len(q)
        return (k[heads, listed].double() @ q[:, :, None].double())[:, :, 0] * self.scale


def places_within(clusters: Clusters) -> torch.Tensor:
    """How many earlier tokens each token's cluster has: (G, n) int64."""
    order = clusters.owners.argsort(dim=1, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    starts = clusters.sizes.cumsum(1) - clusters.sizes
    return torch.zeros_like(order).scatter_(1, order, place - starts.gather(1, clusters.owners.gather(1, order)))


def estimated(scores: torch.Tensor, spans: Spans, n: int) -> torch.Tensor:
    """Scaled scores (H, head + 2 width) of a list's head and windows -> weights of all its n places, (H, n) float64.

    Weights are relative to the largest of those scored.
    """
    weights = (scores - scores.amax(1, keepdim=True)).exp()
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=scores.device)
    near, far = (ranks[at : at + spans.width].reciprocal().mean() for at in (spans.first, spans.second))
    y, z = (part.mean(1, keepdim=True) for part in weights[:, spans.head :].split(spans.width, dim=1))
    a, b = decay(near, y, far, z)
    return torch.cat([weights[:, : spans.head], a / ranks[spans.head :] + b], dim=1)


def decay(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``a, b >= 0`` with ``a x + b = y`` and ``a w + b = z``, where x > w; if there are none, those that keep y + z."""
    a = ((y - z) / (x - w)).clamp(min=0)
    b = (y + z - a * (x + w)) / 2
    return torch.where(b < 0, (y + z) / (x + w), a), b.clamp(min=0)


def covering(weights: torch.Tensor, share: float) -> torch.Tensor:
    """Of the shortest beginning of weights (H, n) that holds a share of them: its length, (H, 1) int64."""
    total = weights.cumsum(1)
    return (total - weights < share * total[:, -1:]).sum(1, keepdim=True)
