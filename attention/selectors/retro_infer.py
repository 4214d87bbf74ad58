"""RetroInfer: the best clusters of keys exactly, the next ones by their means, the rest not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from attention.clusters import Clusters, averages, lloyd, unit
from attention.decode_selector import DecodeSelector, Steps
from attention.estimates import products, wide
from attention.token_lists import Means, TokenLists
from hsr import checks
from hsr.errors import ArgumentError


@dataclass(frozen=True)
class RetroInfer(DecodeSelector):
    """Three zones: steady, retrieved and estimated.

    The first and last tokens are always attended to.  The others are clustered by angle, segment by segment, after
    their mean is taken away, from centres spread evenly over the segment.  A group ranks clusters by the attention that
    mean keys get from each head, summed over the heads; the keys of the best clusters are attended to, the next
    clusters by their mean key and mean value with the weight of as many keys, which is never more than the keys
    themselves have in all.  Tokens are attended to until ``refresh`` of them have left the window; then they become
    clusters of their own.

    Departures: the published code rounds numbers of clusters to multiples of 32 and lets segments have one length,
    where here the last is shorter; a cluster's key is the mean of the keys that it stands for.  Memory on the host and
    the cache of clusters are not here: only what is attended to.

    Args:
        retrieved: share of the clusters that are attended to key by key, in [0, 1]; 0.018, at least one cluster.
        estimated: share of the clusters after those that are attended to by their means, in [0, 1]; 0.232.
        cluster: keys of a cluster in the mean; 16.
        segment: tokens that are clustered together; 8192.
        iterations: of k-means; 10.
        sinks: first tokens that are always attended to; 4.
        recent: last tokens that are; 64.
        refresh: tokens that are clustered at a time once decoding goes on; 1024.

    Raises:
        ArgumentError: a value out of range.

    Source: arXiv 2505.02922; microsoft/RetrievalAttention.
    """

    retrieved: float = 0.018
    estimated: float = 0.232
    cluster: int = 16
    segment: int = 8192
    iterations: int = 10
    sinks: int = 4
    recent: int = 64
    refresh: int = 1024

    def __post_init__(self) -> None:
        checks.real("retrieved", self.retrieved, 0.0, np.nextafter(1, 2))
        checks.real("estimated", self.estimated, 0.0, np.nextafter(1, 2))
        if self.retrieved + self.estimated > 1:
            raise ArgumentError(f"estimated must be at most 1 - retrieved; got {self.estimated} and {self.retrieved}")
        for name, least in (("cluster", 1), ("segment", 1), ("iterations", 0), ("sinks", 0), ("recent", 0)):
            checks.whole(name, getattr(self, name), least)
        checks.whole("refresh", self.refresh, 1)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `DecodeSelector`."""
        return (
            cls(retrieved=0.1, estimated=0.3, recent=16, refresh=64),
            cls(retrieved=0.05, estimated=0.95, cluster=8, segment=500, sinks=1, recent=1, refresh=32),
        )

    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """See `DecodeSelector`."""
        return RetroInferSteps(self, k, v, scale)

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """Mean keys and sizes of the clusters; mean values are attention's to read."""
        clustered = max(0, n - self.sinks - self.recent)
        return clustered / self.cluster * (d * max(4, itemsize) + 4)

    def counts(self, clusters: int) -> tuple[int, int]:
        """Of so many clusters, how many are attended to key by key, and how many by key or by mean."""
        first = min(clusters, max(1, round(self.retrieved * clusters)))
        return first, min(clusters, first + round(self.estimated * clusters))


class RetroInferSteps(Steps):
    """Clusters of all tokens but the first and the last."""

    def __init__(self, settings: RetroInfer, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """k (G, n, d), v (G, n, dv)."""
        self.settings = settings
        self.scale = scale
        self.clusters = Clusters.none(k)
        self.values = v[:, :0].to(wide(v))
        self._add(k, v, max(0, k.shape[1] - settings.recent - settings.sinks))

    @property
    def known(self) -> int:
        """Tokens up to the last one that is in a cluster, or a sink."""
        return self.settings.sinks + self.clusters.owners.shape[1]

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Cluster what has left the window, ``refresh`` tokens at a time."""
        while k.shape[1] - self.settings.recent - self.known >= self.settings.refresh:
            self._add(k, v, self.settings.refresh)

    def _add(self, k: torch.Tensor, v: torch.Tensor, count: int) -> None:
        """Cluster the next tokens, about their mean, segment by segment."""
        new = slice(self.known, self.known + count)
        middle = k[:, new].mean(1, keepdim=True, dtype=wide(k))
        parts = range(new.start, new.stop, self.settings.segment)
        found = [self._owners(unit(k[:, i : min(i + self.settings.segment, new.stop)] - middle)) for i in parts]
        owners, total = [], 0
        for own, clusters in found:
            owners.append(own + total)
            total += clusters
        self._extend(Clusters.of(k[:, new], torch.cat([self.clusters.owners[:, :0], *owners], 1), total), v[:, new])

    def _owners(self, points: torch.Tensor) -> tuple[torch.Tensor, int]:
        """points (G, s, d) of one segment -> the cluster of each, (G, s), and how many there are."""
        s = points.shape[1]
        count = -(-s // self.settings.cluster)
        start = (2 * torch.arange(count, device=points.device) + 1) * s // (2 * count)
        return lloyd(points, points[:, start], self.settings.iterations, spherical=True), count

    def _extend(self, new: Clusters, v: torch.Tensor) -> None:
        """Clusters of the next tokens, and their values (G, s, dv), beside those there are."""
        old = self.clusters
        owners = torch.cat([old.owners, new.owners + old.sizes.shape[1]], 1)
        self.clusters = Clusters(owners, torch.cat([old.sizes, new.sizes], 1), torch.cat([old.means, new.means], 1))
        self.values = torch.cat([self.values, averages(v, new.owners, new.sizes)], 1)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """Lists that groups share: whole clusters, the steady zone, and means."""
        keep = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
        if not self.clusters.sizes.shape[1]:
            return TokenLists.from_mask(keep)
        rank = self.ranked(q)
        by_key, by_either = self.settings.counts(rank.shape[1])
        keep[:, self.settings.sinks : self.known] = (rank < by_key).gather(1, self.clusters.owners)
        estimated = (rank >= by_key) & (rank < by_either)
        log_weights = self.clusters.sizes.log().masked_fill(~estimated, -torch.inf)  # -inf of an empty one, too
        return TokenLists.from_mask(keep, means=Means(self.clusters.means, self.values, log_weights.float()))

    def ranked(self, q: torch.Tensor) -> torch.Tensor:
        """q (H, d) -> each cluster's place by attention to the mean keys, summed over the group: (G, C) int64."""
        means, empty = self.clusters.means, self.clusters.sizes == 0
        scores = products(q[:, None].to(means.dtype), means).unflatten(0, (len(means), -1))[:, :, 0] * self.scale
        shares = scores.masked_fill(empty[:, None], -torch.inf).softmax(2).sum(1)
        order = shares.masked_fill(empty, -1).argsort(dim=1, descending=True, stable=True)
        return torch.zeros_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=q.device).expand_as(order)
        )
