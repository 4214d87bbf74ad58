"""Clusters of keys against plain loops, and beside faiss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention.clusters import Clusters, lloyd, plus_plus, scaled, unit
from attention.draws import permutation
from tests.caches import KINDS, cache, lloyd_by_loops


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 7])
@pytest.mark.parametrize(("kind", "count"), [("grouped", 12), ("gaussian", 2)])
def test_it_is_lloyds_iteration(spherical: bool, iterations: int, kind: str, count: int) -> None:
    points = cache(1, 150, kind).k
    points = unit(points) if spherical else points
    start = points[:, permutation(2, 0, 150, points.device)[:count]]
    nobodys = -99 * start.mean(1, keepdim=True) if spherical else 99 + torch.zeros_like(start[:, :1])
    start = torch.cat([nobodys, start], 1)
    found = lloyd(points, start, iterations, spherical=spherical)
    for head in range(len(points)):
        wanted = lloyd_by_loops(points[head].numpy(), start[head].numpy(), iterations, spherical)
        assert np.array_equal(found[head].numpy(), wanted)


def test_settling_ends_it_where_it_would_stay() -> None:
    points = unit(cache(2, 300).k)
    start = plus_plus(points, 20, 0)
    full = lloyd(points, start, 200, spherical=True)
    assert torch.equal(full, lloyd(points, start, 200, spherical=True, settle=True))
    assert torch.equal(full, lloyd(points, start, 201, spherical=True))


def test_clusters_are_about_as_tight_as_those_of_faiss() -> None:
    faiss = pytest.importorskip("faiss", reason="clusters by another library")
    points = cache(3, 600).k.float()
    for head in range(2):
        theirs = faiss.Kmeans(16, 40, niter=20, seed=1, verbose=False, min_points_per_centroid=1)
        theirs.train(points[head].numpy())
        start = points[head : head + 1, permutation(0, 0, 600, points.device)[:40]]
        found = Clusters.of(points[head : head + 1], lloyd(points[head : head + 1], start, 20), 40)
        ours = (points[head] - found.means[0, found.owners[0]]).square().sum()
        assert ours < 1.15 * theirs.obj[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_means_and_sizes_are_of_the_members(kind: str, dtype: torch.dtype) -> None:
    keys = cache(4, 90, kind).k.to(dtype)
    points = scaled(keys)
    assert torch.isfinite(points).all() and torch.isfinite(unit(keys)).all()
    owners = lloyd(points, points[:, :30], 4)
    found = Clusters.of(keys, owners, 30)
    assert int(found.sizes.sum()) == owners.numel()
    for head, cluster in np.ndindex(*found.sizes.shape):
        members = keys[head, owners[head] == cluster].double()
        assert len(members) == found.sizes[head, cluster]
        wanted = members.mean(0) if len(members) else torch.zeros(16)
        assert torch.allclose(found.means[head, cluster].double(), wanted.double(), rtol=1e-5, atol=1e-5 * 30)


def test_centres_to_start_from_are_far_apart() -> None:
    """Of as many directions as centres, with near copies of each, every direction gets one."""
    random = np.random.default_rng(5)
    directions = np.linalg.qr(random.standard_normal((16, 16)))[0]
    points = unit(torch.from_numpy(directions[random.integers(0, 16, (1, 400))] + 1e-5 * random.random((1, 400, 16))))
    start = plus_plus(points, 16, 7)[0].numpy()
    assert sorted((start @ directions.T).argmax(axis=1)) == list(range(16))


def test_more_centres_than_different_points() -> None:
    points = unit(cache(6, 50, "repeated").k)
    owners = lloyd(points, plus_plus(points, 20, 0), 5, spherical=True)
    assert len(owners[0].unique()) == 3


def test_heads_do_not_depend_on_each_other() -> None:
    points = unit(cache(7, 200, g=3).k)
    start = plus_plus(points, 15, 1)
    alone = lloyd(points[2:], plus_plus(points[2:], 15, 1), 6, spherical=True)
    assert torch.equal(lloyd(points, start, 6, spherical=True)[2:], alone)
