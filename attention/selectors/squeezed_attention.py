"""Squeezed Attention: the clusters of a fixed prefix whose mean keys get enough attention, and everything after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from attention.clusters import Clusters, averages, lloyd, plus_plus, unit
from attention.decode_selector import DecodeSelector, Steps
from attention.squeezed_prefix import Level, SqueezedPrefix, tokens_in
from attention.token_lists import TokenLists
from hsr import checks
from hsr.errors import ArgumentError


@dataclass(frozen=True)
class PrefixClusters:
    """How a prefix is indexed: all tokens but the last ``window`` are clustered by angle, from k-means++ centres.

    The mean keys are of the keys as they are.  Queries, of which the last ``window`` count, set the threshold: the
    quantile ``sparsity`` of the attention per token that they pay to each token's cluster, over all queries, tokens and
    heads of a sequence.  Without queries each one later sets its own, so that every head keeps as many tokens.

    With ``coarse`` the clusters are clustered as well, and a query looks only at those of coarse clusters that pass the
    threshold of ``coarse_sparsity``; ``sparsity`` counts the tokens of the others too.

    Args:
        clusters: clusters per token, in (0, 1]; 0.05.
        coarse: coarse clusters per token, in (0, clusters], 0.01; None for one level.
        sparsity: share of the clustered tokens that calibrating queries leave out, in [0, 1); 0.5, 0.7, 0.8 or 0.9.
        coarse_sparsity: share that the coarse clusters leave out, in [0, sparsity]; ours, 0.5.
        window: last tokens of the prefix, always attended to; 100.
        iterations: of k-means, at most; 300.
        seed: of the centres, at least 0.

    Raises:
        ArgumentError: a value out of range.
    """

    clusters: float = 0.05
    coarse: float | None = None
    sparsity: float = 0.7
    coarse_sparsity: float = 0.5
    window: int = 100
    iterations: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        least, one = np.nextafter(0, 1), np.nextafter(1, 2)
        checks.real("clusters", self.clusters, least, one)
        if self.coarse is not None:
            checks.real("coarse", self.coarse, least, np.nextafter(self.clusters, 2))
        checks.real("sparsity", self.sparsity, 0.0, 1.0)
        checks.real("coarse_sparsity", self.coarse_sparsity, 0.0, np.nextafter(self.sparsity, 2))
        for name, least_whole in (("window", 0), ("iterations", 0), ("seed", 0)):
            checks.whole(name, getattr(self, name), least_whole)

    def prefix(
        self, k: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> SqueezedPrefix | None:
        """The index of a prefix, or None where it is no longer than its window.

        A threshold holds for all heads of a sequence.  For one over several layers, fold them into the heads and take
        them apart with `SqueezedPrefix.heads`.

        Args:
            k: (G, n, d), any float dtype.
            queries: (H, m, d), of the prefix's end, where each sees all clustered tokens; None to set no threshold.
            scale: of the scores.
            batch: sequences that are folded into the heads.
        """
        keys = k[:, : max(0, k.shape[1] - self.window)]
        if not keys.shape[1]:
            return None
        found = SqueezedPrefix(self._levels(keys), k.shape[1])
        if queries is None:
            return found
        return found.calibrated(queries[:, max(0, queries.shape[1] - self.window) :], scale, batch)

    def means_read(self, n: int) -> float:
        """Mean keys that a step reads of n tokens."""
        return max(0, n - self.window) * (self.clusters + (self.coarse or 0))

    def _levels(self, keys: torch.Tensor) -> tuple[Level, ...]:
        """Clusters of keys (G, n, d), the coarse ones first."""
        n = keys.shape[1]
        owners = self._owners(keys, math.ceil(self.clusters * n))
        fine = Clusters.of(keys, owners, math.ceil(self.clusters * n))
        level = Level(owners, fine.sizes, fine.means, self.sparsity)
        if self.coarse is None:
            return (level,)
        count = math.ceil(self.coarse * n)
        parents = self._owners(fine.means, count)
        sizes = tokens_in(parents, fine.sizes, count)
        means = averages(keys, parents.gather(1, owners), sizes)
        return Level(parents, sizes, means, self.coarse_sparsity), level

    def _owners(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """x (G, n, d) -> the cluster of each, by angle, (G, n) int64."""
        points = unit(x)
        return lloyd(points, plus_plus(points, count, self.seed), self.iterations, spherical=True, settle=True)


@dataclass(frozen=True)
class SqueezedAttention(DecodeSelector):
    """Tokens of a fixed prefix whose cluster gets enough attention, and all tokens that are not in a cluster.

    A cluster's attention per token is ``S_i = exp(s_i) / sum_j N_j exp(s_j)``, with s_i the score of its mean key and
    N_j the tokens in cluster j; those with S above a threshold are attended to token by token.  The threshold is one
    number for all heads of a sequence, so that heads keep as many tokens as they need.  The prefix's window and
    everything after the prefix is attended to.

    An index is made where a session begins, or before, once for all sessions that begin with the same tokens::

        PrefixClusters().prefix(k, queries, scale).save("prefix.npz")
        session = DecodeSession(k, v, policy=SqueezedAttention(SqueezedPrefix.load("prefix.npz")))

    Departures: logarithms of S are compared, so that no score overflows; an empty cluster is left out; of two levels, S
    of the fine one counts the clusters of coarse ones that passed; the published code averages S over a block of
    queries, where a step of decoding has one; how the coarse threshold is set is ours, and what is done without
    calibrating queries (`PrefixClusters`).

    Args:
        index: how to index the tokens that a session begins with, `PrefixClusters`; or an index made before,
            `SqueezedPrefix`, of the first tokens of each of its sequences.

    Raises:
        ArgumentError: index is neither.

    Source: arXiv 2411.09688; SqueezeAILab/SqueezedAttention.
    """

    index: PrefixClusters | SqueezedPrefix = PrefixClusters()

    def __post_init__(self) -> None:
        if not isinstance(self.index, PrefixClusters | SqueezedPrefix):
            raise ArgumentError(f"index must be PrefixClusters or SqueezedPrefix; got {type(self.index).__name__}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `DecodeSelector`."""
        return cls(PrefixClusters(window=20, iterations=20)), cls(
            PrefixClusters(0.1, coarse=0.02, sparsity=0.9, window=10, iterations=10)
        )

    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """See `DecodeSelector`.

        Raises:
            ArgumentError: k does not begin with the tokens of an index that was made before.
        """
        return SqueezedAttentionSteps(self.index.prefix(k, queries, scale, batch), scale)

    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """Mean keys and sizes of the clusters of all n tokens, or of an index that was made before."""
        return self.index.means_read(n) * (d * max(4, itemsize) + 4)


class SqueezedAttentionSteps(Steps):
    """An index of the first tokens, which never changes."""

    def __init__(self, index: SqueezedPrefix | None, scale: float) -> None:
        """The index for this cache's heads, or None to attend to everything."""
        self.index = index
        self.scale = scale

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Nothing is held of tokens after the prefix."""

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """A list for each head; of all tokens where it would be of none."""
        keep = torch.ones(len(q), k.shape[1], dtype=torch.bool, device=k.device)
        if self.index is not None:
            keep[:, : self.index.clustered] = self.index.kept(q[:, None], self.scale)[:, 0]
        return TokenLists.from_mask(keep | ~keep.any(1, keepdim=True))
