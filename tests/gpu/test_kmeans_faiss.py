"""k-means by faiss's search, against float64 distances, a plain torch loop and faiss's own loop."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
faiss = pytest.importorskip("faiss")

from gpu.kmeans_faiss import kmeans  # noqa: E402
from tests.tensors import DEVICES, DTYPES, GPU, clustered, problems, tensors  # noqa: E402


def distances(x, centroids):
    """Squared, (n, k) float64, from differences."""
    x, centroids = x.double(), centroids.double()
    return torch.stack([(x - c).square().sum(1) for c in centroids], 1)


def objective(x, centroids):
    return float(distances(x, centroids).amin(1).sum())


def assert_nearest(x, clusters):
    """No centroid is nearer than the one assigned, beyond float32 rounding relative to the spread of the keys."""
    far = distances(x, clusters.centroids)
    own = far.gather(1, clusters.assignment[:, None])[:, 0]
    spread = x.double().sub(x.double().mean(0)).abs().amax() ** 2 + x.double().abs().amax() ** 2 * 2.0**-20
    assert (own <= far.amin(1) + 32 * x.shape[1] * 2.0**-23 * spread).all()


def lloyd(x, start, iterations):
    """The plain loop; an empty cluster stays where it is."""
    for _ in range(iterations):
        own = torch.cdist(x, start).argmin(1)
        counts = torch.bincount(own, minlength=len(start))[:, None]
        means = torch.zeros_like(start).index_add_(0, own, x) / counts.clamp(min=1)
        start = torch.where(counts > 0, means, start)
    return start


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_go_to_their_nearest_centroid(device, dtype):
    @settings(max_examples=60)
    @given(problems(), st.integers(-15, 15))
    def check(problem, power):
        power = power if dtype != torch.float16 else 0
        keys, _, k = tensors((problem[0] * 10.0**power, *problem[1:]), device, dtype)
        found = kmeans(keys, k, iterations=3, seed=k)
        assert found.centroids.shape == (len(keys), k, keys.shape[2])
        assert found.centroids.dtype == torch.float32
        assert found.assignment.shape == keys.shape[:2]
        assert found.assignment.min() >= 0
        assert found.assignment.max() < k
        for block, centroids, assignment in zip(keys, *found, strict=True):
            assert_nearest(block, type(found)(centroids, assignment))
            slack = 1e-5 * block.float().abs().amax()
            assert (centroids >= block.float().amin(0) - slack).all()
            assert (centroids <= block.float().amax(0) + slack).all()

    check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 3e37])
def test_the_size_of_the_keys_does_not_matter(device, scale):
    keys = (clustered(300, 8, 6, device=device).double() * scale).float()
    found = kmeans(keys, 6, iterations=5)
    assert torch.isfinite(found.centroids).all()
    assert len(found.assignment.unique()) == 6
    assert_nearest(keys.double() / scale, type(found)(found.centroids.double() / scale, found.assignment))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters_are_as_tight_as_those_of_plain_loops(device, dtype):
    from faiss.contrib.clustering import kmeans as theirs
    from faiss.contrib.torch.clustering import DatasetAssign, DatasetAssignGPU

    x, k, iterations = clustered(4000, 32, 40, device=device, dtype=dtype), 64, 10
    found = kmeans(x, k, iterations=iterations, seed=5)
    points = x.float()
    start = points[torch.randperm(len(x), generator=torch.Generator().manual_seed(5))[:k].to(device)]
    held = DatasetAssign(points) if device == "cpu" else DatasetAssignGPU(faiss.StandardGpuResources(), points)
    library = theirs(k, held, niter=iterations, seed=5, verbose=False)
    ours = objective(x, found.centroids)
    assert ours <= 1.1 * objective(x, lloyd(points, start, iterations))
    assert ours <= 1.1 * objective(x, library)
    assert ours < 0.9 * objective(x, start)
    assert_nearest(x, found)


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_fixes_the_clusters_and_heads_do_not_meet(device):
    keys = torch.stack([clustered(3000, 16, 20, seed=s, device=device) for s in (0, 1)])
    first, again, other = (kmeans(keys, 32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.assignment, again.assignment)
    assert not torch.equal(first.assignment, other.assignment)
    alone = kmeans(keys[0], 32, seed=1)
    assert torch.equal(alone.assignment, first.assignment[0])


@pytest.mark.parametrize("device", DEVICES)
def test_empty_clusters_go_where_keys_are_badly_served(device):
    far = 50 * torch.eye(6, 16, device=device)
    keys = torch.cat([torch.zeros(300, 16, device=device), far])
    found = kmeans(keys, 7, iterations=10)
    assert len(found.assignment.unique()) == 7
    assert objective(keys, found.centroids) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_as_many_clusters_as_keys_and_fewer_different_keys_than_clusters(device):
    keys = clustered(20, 4, 3, device=device)
    found = kmeans(keys, 20)
    assert sorted(found.assignment.tolist()) == list(range(20))
    assert torch.allclose(found.centroids[found.assignment], keys, atol=1e-5)
    same = kmeans(keys[:1].repeat(30, 1), 5)
    assert torch.allclose(same.centroids, keys[0], atol=1e-5)
    assert kmeans(keys[:1], 1).assignment.tolist() == [0]


@pytest.mark.parametrize("device", [GPU])
def test_clusters_keep_to_the_current_stream(device):
    keys, late = clustered(50_000, 64, 99, device=device), torch.zeros(50_000, 64, device=device)
    wanted = kmeans(keys, 16, iterations=3)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        late.copy_(keys)
        found = kmeans(late, 16, iterations=3)
        late.zero_()
        torch.cuda.current_stream().synchronize()
    assert torch.equal(found.assignment, wanted.assignment)
    assert_nearest(keys, found)
