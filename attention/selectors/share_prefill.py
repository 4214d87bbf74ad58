"""SharePrefill: heads that attend alike share the exact key blocks of one of them, across layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch

from attention.block_maps import distances, key_blocks, key_lists
from attention.estimates import block_attention, covering, jensen_shannon, last_rows, pooled, vertical_slash
from attention.head_clusters import ALONE, HeadClusters
from attention.key_lists import KEYS, KeyLists
from attention.selector import Selector, nearer_one
from hsr import checks
from hsr.errors import ArgumentError


class Pattern(NamedTuple):
    """What a pivotal head leaves to those like it, for each of B sequences."""

    shares: torch.Tensor  # (B, C), attention of its last rows
    broad: torch.Tensor  # (B, 1) bool, whether that is not too sparse to be shared
    keep: torch.Tensor  # (B, T, C) bool, blocks that cover gamma of its exact attention


class PivotalPatterns:
    """What the pivotal heads of one prompt leave to its later layers: make a new one for every prompt.

    Layers come in order.  A layer that comes a second time, as when an audit tries tighter settings, begins with what
    earlier layers left; an earlier one would be that of another prompt and is refused, and so is another size.
    """

    def __init__(self) -> None:
        self._found: dict[int, dict[int, Pattern]] = {}  # by layer, by cluster
        self._prompt: tuple[object, ...] = ()

    def before(self, layer: int, prompt: tuple[object, ...]) -> dict[int, Pattern]:
        """By cluster, what layers before this one left of a prompt of such sizes; what later ones left is dropped.

        Raises:
            ArgumentError: a layer earlier than the last one, or a prompt unlike that of earlier layers.
        """
        last = max(self._found, default=-1)
        if layer < last:
            raise ArgumentError(
                f"patterns must be new for every prompt, whose layers come in order; got layer {layer} after {last}"
            )
        if self.crossed(layer) and prompt != self._prompt:
            raise ArgumentError(
                f"patterns must be of one prompt (sequences, rows, keys, device), {self._prompt}; got {prompt}"
            )
        self._found.pop(layer, None)
        self._prompt = prompt
        return {cluster: pattern for found in self._found.values() for cluster, pattern in found.items()}

    def crossed(self, layer: int) -> bool:
        """Whether another layer than this one has left something."""
        return bool(self._found.keys() - {layer})

    def leave(self, layer: int, found: Mapping[int, Pattern]) -> None:
        """Keep what a layer found."""
        self._found[layer] = dict(found)


@dataclass(frozen=True)
class SharePrefill(Selector):
    """One head of each cluster attends densely; others of it take over its key blocks where their last rows are alike.

    The pivotal head of a cluster is the first one that is asked for in a prompt.  Its exact attention between blocks
    gives, for each row block, the fewest key blocks that hold a share gamma.  A later head of the cluster, in the same
    layer or another, keeps those if its last 128 rows attend to key blocks much as the pivotal head's do: the
    Jensen-Shannon distance of the two, the square root of the divergence in nats, is below tau.  All other heads keep
    key blocks and block distances that cover gamma of their last rows' attention, as `FlexPrefill` does.  So do
    heads too sparse to share, whose distance from even attention is delta or more, and all heads of a cluster whose
    pivotal head is one.  Which head is pivotal does not depend on the tokens, so that nothing waits for the device.

    A model's layers share through one `PivotalPatterns`, new for every prompt:

    >>> from attention import prefill
    >>> from attention.estimates import block_attention
    >>> def layers(tokens, seed):  # of a model: queries (h, m, d), keys and values (g, n, d)
    ...     make = np.random.default_rng(seed).standard_normal
    ...     return [[make((heads, tokens, 16)) for heads in (4, 2, 2)] for layer in range(3)]
    >>> maps = [block_attention(torch.from_numpy(q), torch.from_numpy(k), 0.25) for q, k, v in layers(512, 0)]
    >>> clusters = HeadClusters.fit(maps)  # once for a model; has save and load
    >>> settings = SharePrefill(clusters, min_budget=256)
    >>> for seed in (1, 2):
    ...     patterns = PivotalPatterns()  # once for a prompt
    ...     for layer, (q, k, v) in enumerate(layers(1024, seed)):
    ...         result = prefill(q, k, v, policy=settings.at(layer, patterns))
    >>> prefill(q, k, v, policy=settings.at(0, patterns))
    Traceback (most recent call last):
    hsr.errors.ArgumentError: patterns must be new for every prompt, whose layers come in order; got layer 0 after 2

    Without ``patterns`` heads share within their layer alone.

    Published code differs from the paper, and both from this.  It has two thresholds of 0.5 in place of tau, for sums
    by key block and by diagonal; leaves a pattern unused whose columns and diagonals would cover most of it, has heads
    that are query-aware as FlexPrefill's code, adds columns and diagonals to shared patterns, and gamma is 0.95 in its
    scripts; in its file for Llama 3.1 one cluster of 42 heads is shared and 982 heads never share.  It looks at the
    device for every head, and where a first head is refused takes the next one as pivotal.  Clusters are found by an
    autoencoder and a cut at a distance in its codes; see `HeadClusters.fit` for ours.  Tau, delta and gamma are the
    paper's as we recall them.

    Args:
        clusters: of the model's query heads.
        layer: of the model, from 0 on.
        patterns: of the prompt; by default the layer's own.
        gamma: share of attention that blocks cover, in (0, 1]; 0.9.
        tau: below which distance heads are alike; 0.2, and 0 for no sharing.
        delta: from which distance on a head is too sparse to share; 0.3, and 1 for none.
        min_budget: least keys of columns and of diagonals, rounded up to blocks; 1024 as in the code.

    Raises:
        ArgumentError: a value out of range, a layer that the clusters do not have; by ``lists``, heads that are no
            multiple of theirs and what `PivotalPatterns` refuses.

    Source: arXiv 2505.19578; opas-lab/SharePrefill.
    """

    causal: ClassVar[bool] = False

    clusters: HeadClusters
    layer: int = 0
    patterns: PivotalPatterns = field(default_factory=PivotalPatterns, repr=False)
    gamma: float = 0.9
    tau: float = 0.2
    delta: float = 0.3
    min_budget: int = 1024

    def __post_init__(self) -> None:
        for name, kind in (("clusters", HeadClusters), ("patterns", PivotalPatterns)):
            if not isinstance(getattr(self, name), kind):
                raise ArgumentError(f"{name} must be {kind.__name__}; got {getattr(self, name)!r}")
        checks.whole("layer", self.layer, 0, self.clusters.layers - 1)
        checks.real("gamma", self.gamma, np.nextafter(0, 1), np.nextafter(1, 2))
        checks.real("tau", self.tau, 0.0, np.nextafter(1, 2))
        checks.real("delta", self.delta, 0.0, np.nextafter(1, 2))
        checks.whole("min_budget", self.min_budget, 1)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """See `Selector`; of models with one head, so that all heads of a prompt are sequences of their own."""
        one = HeadClusters(((0,),))
        return cls(one, min_budget=128, delta=0.5), cls(HeadClusters(((ALONE,),)), gamma=0.6, min_budget=128)

    def at(self, layer: int, patterns: PivotalPatterns) -> Self:
        """The same for a layer of a prompt."""
        return dataclasses.replace(self, layer=layer, patterns=patterns)

    def tighter(self, n: int) -> Self | None:
        """See `ListMaker`: gamma halfway to 1, half of tau, and twice the least budget."""
        gamma = nearer_one(self.gamma)
        if gamma is None or self.min_budget >= n:
            return None
        return dataclasses.replace(self, gamma=gamma, tau=self.tau / 2, min_budget=2 * self.min_budget)

    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """See `Selector`."""
        (heads, m, _), n, each = q.shape, k.shape[1], self.clusters.heads
        if heads % each:
            raise ArgumentError(f"q must have a multiple of the clusters' {each} heads; got {heads}")
        known = self.patterns.before(self.layer, (heads // each, m, n, q.device))
        by_key, by_distance = last_rows(q, k, scale, KEYS)
        columns, offsets = vertical_slash(by_key, by_distance, self.gamma, (n - m) % KEYS, -(-self.min_budget // KEYS))
        keep = columns[:, None] | offsets[:, (distances(m, n, q.device) + 1).clamp(min=0)]  # (H, T, C)
        shares = pooled(by_key)
        sizes = (n - KEYS * torch.arange(key_blocks(n), device=q.device)).clamp(max=KEYS)
        broad = jensen_shannon(shares, (sizes / n).to(shares.dtype).expand_as(shares)) < self.delta  # (H, 1)
        found: dict[int, Pattern] = {}
        for head, cluster in enumerate(self.clusters.labels[self.layer]):
            if cluster == ALONE:
                continue
            of = slice(head, None, each)  # this head of every sequence
            shared = known.get(cluster, found.get(cluster))
            if shared is None:
                found[cluster] = Pattern(shares[of], broad[of], self._pattern(q, k, scale, range(heads)[of]))
                keep[of] |= broad[of][..., None]
            else:
                near = jensen_shannon(shares[of], shared.shares) < self.tau
                alike = broad[of] & shared.broad & near
                keep[of] = torch.where(alike[..., None], shared.keep, keep[of])
        self.patterns.leave(self.layer, found)
        return key_lists(keep, m, n)

    def _pattern(self, q: torch.Tensor, k: torch.Tensor, scale: float, heads: range) -> torch.Tensor:
        """The fewest key blocks that hold a share gamma of the exact attention of some heads: (B, T, C) bool."""
        group = len(q) // len(k)
        maps = torch.cat([block_attention(q[i : i + 1], k[i // group][None], scale) for i in heads])
        none = torch.zeros((), dtype=torch.bool, device=q.device)
        return covering(maps.flatten(0, 1), self.gamma, none).view(maps.shape)
