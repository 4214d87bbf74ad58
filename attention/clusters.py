"""Clusters of keys for selectors: Lloyd's iteration over all heads at once, in tensors, where the keys are.

Beside the operation ``kmeans``, which measures distances with faiss, this one serves any float dtype, and angles too,
starts every head alike, so that a head's clusters do not depend on which heads lie before it, and needs torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention.draws import uniforms
from attention.estimates import LARGEST, wide


@dataclass(frozen=True, eq=False)
class Clusters:
    """Every token of every head in one of C clusters, of which some may be empty."""

    owners: torch.Tensor  # (G, n) int64, in 0..C-1
    sizes: torch.Tensor  # (G, C) int64
    means: torch.Tensor  # (G, C, d) float32 or float64: of the members; 0 of an empty one

    @classmethod
    def none(cls, x: torch.Tensor) -> Clusters:
        """No cluster, of no token, for the heads of x (G, n, d)."""
        owners = torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
        return cls(owners, owners, x[:, :0].to(wide(x)))

    @classmethod
    def of(cls, x: torch.Tensor, owners: torch.Tensor, count: int) -> Clusters:
        """Those that ``owners`` (G, n) tells, of x (G, n, d), any float dtype."""
        sizes = torch.zeros(len(owners), count, dtype=torch.int64, device=x.device)
        sizes = sizes.scatter_add_(1, owners, torch.ones_like(owners))
        return cls(owners, sizes, averages(x, owners, sizes))


def averages(x: torch.Tensor, owners: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Mean of x (G, n, d) over each cluster: (G, C, d) in float32 or wider, added in one order on each device."""
    G, C = sizes.shape
    points = x.to(wide(x)).flatten(0, 1)
    rows = (owners + C * torch.arange(G, device=x.device)[:, None]).flatten()
    sums = torch.zeros(G * C, x.shape[2], dtype=points.dtype, device=x.device)
    if x.is_cuda:  # sorts first; index_add_ would add atomically, in any order
        sums = sums.index_put_((rows,), points, accumulate=True)
    else:
        sums = sums.index_add_(0, rows, points)
    return sums.view(G, C, x.shape[2]) / sizes.clamp(min=1)[:, :, None]


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows (..., d) of length 1, in float32 or wider; a zero row stays."""
    x = x.to(wide(x))
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)  # squares neither over- nor underflow
    return torch.nn.functional.normalize(x, dim=-1)


def lloyd(
    points: torch.Tensor, start: torch.Tensor, iterations: int, *, spherical: bool = False, settle: bool = False
) -> torch.Tensor:
    """points (G, n, d), centres to start from (G, C, d) -> the cluster of each, (G, n) int64.

    By squared distance; ``spherical``, of rows of length 1 (`unit`), by angle.  An empty cluster stays where it is; of
    equally near centres the first wins.  ``settle`` ends it early where nothing changes any more, which takes a look.
    """
    centres = start
    owners = _nearest(points, centres, spherical)
    for _ in range(iterations):
        found, before = Clusters.of(points, owners, centres.shape[1]), owners
        means = unit(found.means) if spherical else found.means
        centres = torch.where(found.sizes[:, :, None] > 0, means, centres)
        owners = _nearest(points, centres, spherical)
        if settle and torch.equal(owners, before):
            break
    return owners


def _nearest(points: torch.Tensor, centres: torch.Tensor, spherical: bool) -> torch.Tensor:
    """The nearest centre (G, C, d) of each point (G, n, d): (G, n) int64."""
    G, C, _ = centres.shape
    half = centres.square().sum(2)[:, None] * (0 if spherical else 0.5)
    step = max(1, LARGEST // (G * C))
    parts = [(part @ centres.mT - half).argmax(2) for part in points.split(step, dim=1)]
    return torch.cat(parts, dim=1)


def scaled(x: torch.Tensor) -> torch.Tensor:
    """x (G, n, d) moved and scaled head by head, so that distances do not cancel: mean 0, entries in -2..2."""
    x = x.to(wide(x))
    x = x / x.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return x - x.mean(1, keepdim=True)


def plus_plus(points: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Centres to start from, (G, count, d): points (G, n, d) of length 1, each likely to be far from those before.

    A point is drawn with probability proportional to its squared distance to the nearest centre.

    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007.
    """
    G, n, _ = points.shape
    u = uniforms(seed, 0, count, points.device)
    heads = torch.arange(G, device=points.device)
    far = torch.ones(G, n, dtype=points.dtype, device=points.device)
    picked = []
    for i in range(count):
        total = far.double().cumsum(1)
        place = torch.searchsorted(total, u[i] * total[:, -1:], right=True).clamp(max=n - 1)[:, 0]
        picked.append(points[heads, place])
        far = torch.minimum(far, (1 - (points @ picked[-1][:, :, None])[:, :, 0]).clamp(min=0))
    return torch.stack(picked, dim=1)
