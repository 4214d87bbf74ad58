"""RetroInfer against its paper, given the same clusters, in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from attention.chosen_reference import chosen
from attention.selectors.retro_infer import RetroInfer, RetroInferSteps
from hsr.errors import ArgumentError
from tests.caches import (
    KINDS,
    Cache,
    assert_folds,
    assert_serves,
    begun,
    cache,
    chosen_by,
    lloyd_by_loops,
    of_keys,
    scores,
    sets,
)

WIDE = RetroInfer(retrieved=0.2, estimated=0.0, recent=0, sinks=0)
every = pytest.mark.parametrize("policy", [*RetroInfer.examples(), WIDE], ids=str)


def state(policy: RetroInfer, made: Cache, cuts: tuple[int, ...] = ()) -> RetroInferSteps:
    steps = begun(policy, made, cuts)
    assert isinstance(steps, RetroInferSteps)
    return steps


def softmax(x: np.ndarray) -> np.ndarray:
    shares = np.exp(x - x.max())
    return shares / shares.sum()


@every
@pytest.mark.parametrize("kind", ["gaussian", "grouped", "offset"])
@pytest.mark.parametrize("cuts", [(), (300,), (1, 100, 333)])
def test_it_is_the_paper(policy: RetroInfer, kind: str, cuts: tuple[int, ...]) -> None:
    n = 480
    made = cache(n, n, kind, group=3)
    steps = state(policy, made, cuts)
    lists, found = steps.choose(*made[:3]), sets(steps.choose(*made[:3]))
    for g in range(2):
        owners = steps.clusters.owners[g].numpy()
        keys, values = of_keys(made, 3 * g)[policy.sinks :], made.v[g].numpy()[policy.sinks :]
        members = {c: [i for i in range(len(owners)) if owners[i] == c] for c in set(owners)}
        names = sorted(members)
        queries = made.q[3 * g : 3 * g + 3].numpy() * made.scale
        votes = sum(softmax(np.array([keys[members[c]].mean(axis=0) @ q for c in names])) for q in queries)
        ranked = [names[i] for i in np.argsort(-np.asarray(votes), kind="stable")]
        count = steps.clusters.sizes.shape[1]
        best = max(1, round(policy.retrieved * count))
        zone = ranked[best : best + round(policy.estimated * count)]
        wanted = {policy.sinks + i for c in ranked[:best] for i in members[c]}
        assert found[g] == wanted | set(range(policy.sinks)) | set(range(policy.sinks + len(owners), n))
        assert lists.means is not None
        logs = lists.means.log_weights[g].numpy()
        assert set(np.flatnonzero(logs > -np.inf)) == set(zone)
        for c in zone:
            assert logs[c] == pytest.approx(math.log(len(members[c])), abs=1e-6)
            assert np.allclose(lists.means.keys[g, c], keys[members[c]].mean(axis=0))
            assert np.allclose(lists.means.values[g, c], values[members[c]].mean(axis=0))


def test_clusters_are_by_angle_about_the_mean_segment_by_segment() -> None:
    policy = RetroInfer(cluster=16, segment=100, iterations=3, sinks=5, recent=7, refresh=30)
    made = cache(1, 272 + 35)
    steps = state(policy, made, (272,))
    for g in range(2):
        keys = made.k[g].numpy()
        wanted, total = [], 0
        for whole, parts in (((5, 265), (100, 100, 60)), ((265, 295), (30,))):
            centred = keys[slice(*whole)] - keys[slice(*whole)].mean(axis=0)
            centred /= np.linalg.norm(centred, axis=1, keepdims=True)
            for points in np.split(centred, np.cumsum(parts)[:-1]):
                count = math.ceil(len(points) / 16)
                start = points[[int((i + 0.5) * len(points) / count) for i in range(count)]]
                wanted.append(lloyd_by_loops(points, start, 3, True) + total)
                total += count
        assert np.array_equal(steps.clusters.owners[g].numpy(), np.concatenate(wanted))
        assert steps.clusters.sizes.shape == (2, total)


def test_the_window_grows_until_a_block_of_it_is_clustered() -> None:
    policy = RetroInfer(retrieved=0.0, estimated=0.0, sinks=3, recent=20, refresh=50)
    made = cache(2, 400)
    steps = state(policy, made.first(300))
    for end in range(301, 400):
        steps.append(*made.first(end)[1:3])
        found = sets(steps.choose(made.q, *made.first(end)[1:3]))
        first = 280 + (end - 300) // 50 * 50
        assert all({0, 1, 2, *range(first, end)} <= line for line in found)
        assert steps.known == first
    assert sets(steps.choose(made.q, *made.first(399)[1:3])) == sets(chosen_by(policy, made.first(399), (300, 377)))


def test_an_estimate_is_never_more_than_what_it_stands_for() -> None:
    """Jensen: N exp(mean score) is at most the sum of the exponentials."""
    policy = RetroInfer(retrieved=0.0, estimated=1.0, sinks=0, recent=0)
    for kind in ("gaussian", "grouped", "offset"):
        made = cache(3, 300, kind, group=1)
        lists = chosen_by(policy, made)
        estimate = chosen(*made[:3], lists, made.scale)[1]
        exact = [np.log(np.exp(scores(made, head)).sum()) for head in range(2)]
        assert (estimate <= np.array(exact) + 1e-9).all()


def test_clusters_of_equal_keys_are_no_estimate() -> None:
    """Means of equal keys say all there is: output and weight are exact."""
    made = cache(4, 300, "repeated", group=2)
    exact = np.stack([np.log(np.exp(scores(made, head)).sum()) for head in range(4)])
    policy = RetroInfer(retrieved=0.0, estimated=1.0, sinks=0, recent=0)
    assert np.allclose(chosen(*made[:3], chosen_by(policy, made), made.scale)[1], exact)


def test_everything_retrieved_is_everything() -> None:
    policy = RetroInfer(retrieved=1.0, estimated=0.0)
    lists = chosen_by(policy, cache(5, 500))
    assert sets(lists) == [set(range(500))] * 2
    assert lists.means is not None and not (lists.means.log_weights > -torch.inf).any()


def test_estimates_come_nearer_than_none() -> None:
    """Over ten caches, the error of the output with the estimated zone beside the error without."""
    errors = []
    for seed in range(10):
        made = cache(seed, 600)
        dense = chosen(*made[:3], chosen_by(RetroInfer(1.0, 0.0), made), made.scale)[0]
        for policy in (RetroInfer(0.05, 0.3), RetroInfer(0.05, 0.0)):
            output = chosen(*made[:3], chosen_by(policy, made), made.scale)[0]
            errors.append(np.linalg.norm(output - dense) / np.linalg.norm(dense))
    assert np.mean(errors[::2]) < 0.9 * np.mean(errors[1::2])


@every
@pytest.mark.parametrize("kind", KINDS)
def test_it_serves(policy: RetroInfer, kind: str) -> None:
    assert_serves(policy, kind)


@every
def test_a_batch_is_as_its_sequences_alone(policy: RetroInfer) -> None:
    assert_folds(policy)


def test_bytes_are_of_means() -> None:
    policy = RetroInfer(sinks=4, recent=64)
    assert policy.bytes_read(68, 128, 2) == 0
    assert policy.bytes_read(68 + 1600, 128, 2) == 100 * (128 * 4 + 4)
    assert dataclasses.replace(policy, cluster=32).bytes_read(68 + 1600, 128, 2) == 50 * (128 * 4 + 4)


WRONG = {
    "retrieved": (-0.1, 1.1),
    "estimated": (-0.1, 1.1, 0.99),
    "cluster": (0,),
    "segment": (0,),
    "iterations": (-1,),
    "sinks": (-1,),
    "recent": (-1, 0.5),
    "refresh": (0,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"^{name} must be"):
        RetroInfer(**{name: value})  # type: ignore[arg-type]
