"""Clusters of heads by their attention maps: against clustering by hand, files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.head_clusters import HeadClusters
from hsr.errors import ArgumentError


def by_hand(maps: np.ndarray, distance: float, least: int) -> list[set[int]]:
    """Average linkage: the two clusters nearest by mean distance are joined until none are near enough."""
    flat = maps.reshape(-1, maps.shape[-2] * maps.shape[-1]).astype(np.float64)
    flat = flat / np.sqrt((flat**2).sum(axis=1))[:, None]
    apart = np.sqrt(((flat[:, None] - flat) ** 2).sum(axis=2))
    clusters = [{i} for i in range(len(flat))]
    while len(clusters) > 1:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]
        means = [np.mean([apart[i, j] for i in clusters[a] for j in clusters[b]]) for a, b in pairs]
        if min(means) > distance:
            break
        a, b = pairs[int(np.argmin(means))]
        clusters[b] |= clusters.pop(a)
    return [found for found in clusters if len(found) >= least]


@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 4),
    heads=st.integers(1, 4),
    distance=st.floats(0.01, 1.9),
    least=st.integers(2, 4),
)
def test_clusters_are_those_of_average_linkage(seed: int, layers: int, heads: int, distance: float, least: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = rng.random((3, 4, 5)) ** 3
    maps = kinds[rng.integers(0, 3, (layers, heads))] + rng.random((layers, heads, 4, 5)) * 0.3
    labels = np.ravel(HeadClusters.fit(maps, distance=distance, least=least).labels)
    found = [set(map(int, np.flatnonzero(labels == label))) for label in range(labels.max(initial=-1) + 1)]
    wanted = by_hand(maps, distance, least)
    assert sorted(found, key=min) == found == sorted(wanted, key=min)  # numbered by their first heads


def test_heads_of_any_layer_are_alike_up_to_a_factor_and_tensors_are_served() -> None:
    one, other = np.eye(3), np.ones((3, 3))
    maps = [torch.from_numpy(np.stack(pair)).float() for pair in ((one, other), (other, 2 * one), (7 * other, one))]
    assert HeadClusters.fit(maps) == HeadClusters(((0, 1), (1, 0), (1, 0)))
    assert HeadClusters.fit(maps, least=4).labels == ((-1, -1),) * 3


def test_a_file_keeps_them(tmp_path: Path) -> None:
    clusters, path = HeadClusters(((0, -1, 1), (1, 0, 0))), tmp_path / "clusters.npz"
    clusters.save(path)
    assert HeadClusters.load(path) == HeadClusters.load(str(path)) == clusters
    assert (clusters.layers, clusters.heads) == (2, 3)


@pytest.mark.parametrize(
    "kind", ["missing", "text", "empty", "cut", "array", "other", "floats", "name", "labels", "pickled"]
)
def test_other_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("clusters.txt" if kind == "name" else "clusters.npz")
    contents = {
        "other": {"marks": np.zeros((2, 2))},
        "floats": {"labels": np.zeros((2, 2))},
        "labels": {"labels": np.full((2, 2), -2)},
        "pickled": {"labels": np.array([{}], object)},
    }
    if kind in contents:
        np.savez(path, **contents[kind])
    elif kind == "text":
        path.write_text("no archive")
    elif kind == "empty":
        path.touch()
    elif kind == "cut":
        path.write_bytes(b"PK\x03\x04 and no more")
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros((2, 2), np.int64))
    with pytest.raises(ArgumentError, match=r"labels\[0\]\[0\] must" if kind == "labels" else "path must"):
        HeadClusters.load(path)


def test_a_name_without_its_ending_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"path must end in \.npz"):
        HeadClusters(((0,),)).save(tmp_path / "clusters")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0]], "labels must be a tuple of layers"),
        ((), "labels must be a tuple of layers"),
        (((),), "labels must be a tuple of layers"),
        (((0, 1), (0,)), "labels must have 2 heads in every layer; got 1 in layer 1"),
        (((0, -2),), r"labels\[0\]\[1\] must be at least -1; got -2"),
        (((0.0,),), r"labels\[0\]\[0\] must be a whole number"),
    ],
)
def test_bad_labels_are_refused(labels: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        HeadClusters(labels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"maps": []}, "maps must have layers"),
        ({"maps": np.ones((1, 0, 2, 2))}, "maps must have layers, heads and blocks"),
        ({"maps": np.ones((2, 3, 4))}, r"maps\[0\] must have 3 axes"),
        ({"maps": [np.ones((2, 3, 3)), np.ones((2, 3, 4))]}, r"maps\[1\] must be \(2, 3, 3\) as those before"),
        ({"maps": -np.ones((1, 2, 3, 3))}, r"maps\[0\] must be shares of attention"),
        ({"maps": np.zeros((1, 2, 3, 3))}, r"maps\[0\] must be shares of attention"),
        ({"maps": np.full((1, 2, 3, 3), np.nan)}, r"maps\[0\] must be finite"),
        ({"distance": 0.0}, "distance must be in"),
        ({"distance": 2.0}, "distance must be in"),
        ({"least": 1}, "least must be at least 2; got 1"),
    ],
)
def test_bad_arguments_are_refused(call: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        HeadClusters.fit(**({"maps": np.ones((1, 2, 3, 3))} | call))  # type: ignore[arg-type]
