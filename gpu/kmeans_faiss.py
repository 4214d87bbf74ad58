"""k-means of keys, one clustering for each key-value head: faiss finds the nearest centroids, torch takes the means.

This is Lloyd's loop over `faiss.knn` and `faiss.knn_gpu`.  The loop that faiss ships for tensors, in
`faiss.contrib.torch.clustering`, fetches the assignment to the host in each iteration, sums float16 in float16 and
prints whatever it is told; the tests hold this one against it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import faiss
import torch

from gpu.faiss_gpu import keys_of, neighbours, resources
from gpu.faiss_gpu import refuses as refuses
from hsr.checks import whole


class Clusters(NamedTuple):
    """What `kmeans` found; both on the keys' device."""

    centroids: torch.Tensor  # (..., k, d) float32
    assignment: torch.Tensor  # (..., n) int64: the nearest centroid of each key, up to float32 rounding


def kmeans(keys: torch.Tensor, k: int, *, iterations: int = 25, seed: int = 0) -> Clusters:
    """keys (g, n, d), float32, float16 or bfloat16 -> centroids (g, k, d) float32, assignment (g, n) int64.

    Keys (n, d) give (k, d) and (n,).  Squared Euclidean distance; the start is k keys drawn by the seed, the same on
    every device, and the same call on one device gives the same result.  A cluster that falls empty is moved to the key
    farthest from its centroid, and the search goes on; the last assignment may still leave some empty, and does where
    there are fewer different keys than k.

    A float32 copy of one head at a time, shifted and scaled, is held during the call.  On a GPU nothing but the check
    that the keys are finite waits.

    Raises:
        ArgumentError: keys not such a tensor, empty, with rows that are not contiguous, NaN or infinite; k not in 1..n;
            iterations below 1; seed negative.

    Source: Lloyd, Least squares quantization in PCM, 1982.
    """
    blocks, layout = keys_of(keys)
    k = whole("k", k, 1, layout.n)
    iterations, seed = whole("iterations", iterations, 1), whole("seed", seed, 0)
    random = torch.Generator().manual_seed(seed)
    centroids = torch.empty(layout.g, k, layout.d, dtype=torch.float32, device=keys.device)
    assignment = torch.empty(layout.g, layout.n, dtype=torch.int64, device=keys.device)
    with resources(keys.device) as held:
        for head, block in enumerate(blocks):
            largest = block.abs().amax().float()
            scale = torch.where(largest > 0, largest, 1)
            points = block.float() / scale  # squares of entries in -1..1 do not overflow
            middle = points.mean(0)
            points -= middle  # distances are made of norms and products, which cancel far from 0
            start = points[torch.randperm(layout.n, generator=random)[:k].to(keys.device)]
            found, assignment[head] = _lloyd(held, points, start, iterations)
            centroids[head] = (found + middle) * scale
    return Clusters(centroids, assignment) if layout.heads_axis else Clusters(centroids[0], assignment[0])


def _lloyd(
    held: Any, points: torch.Tensor, centroids: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """points (n, d), centroids (k, d) to start from -> centroids (k, d), assignment (n,)."""
    k = len(centroids)
    far = torch.empty(len(points), 1, dtype=torch.float32, device=points.device)
    nearest = torch.empty(len(points), 1, dtype=torch.int64, device=points.device)
    own = nearest[:, 0]
    for _ in range(iterations):
        neighbours(held, points, centroids, far, nearest, faiss.METRIC_L2)
        counts = torch.zeros(k, dtype=torch.int64, device=points.device).scatter_add_(0, own, torch.ones_like(own))
        means = _sums(points, own, k) / counts.clamp(min=1)[:, None]
        empty = counts == 0
        strays = far[:, 0].topk(k).indices[(empty.cumsum(0) - 1).clamp(min=0)]  # (k,): the i-th empty one gets the i-th
        centroids = torch.where(empty[:, None], points[strays], means)
    neighbours(held, points, centroids, far, nearest, faiss.METRIC_L2)
    return centroids, own


def _sums(points: torch.Tensor, own: torch.Tensor, k: int) -> torch.Tensor:
    """Sum of each cluster's points: (k, d), added in the same order at each call."""
    sums = points.new_zeros(k, points.shape[1])
    if points.is_cuda:  # sorts first; index_add_ would add atomically, in any order
        return sums.index_put_((own,), points, accumulate=True)
    return sums.index_add_(0, own, points)
