"""Keys to measure on: kind and unkind to a tree; float32 (n, d) from a generator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CLUSTERS = 64

Law = Callable[[np.random.Generator, int, int], np.ndarray]


def gaussian(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Standard normal keys: nothing to exploit but the dimension."""
    return rng.standard_normal((n, d), np.float32)


def cube(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Uniform in the cube."""
    return rng.random((n, d), np.float32) * 2 - 1


def clusters(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """CLUSTERS equally likely Gaussian clusters with standard normal centres and widths from 0.01 to 1."""
    member = rng.integers(0, CLUSTERS, n)
    centres = rng.standard_normal((CLUSTERS, d), np.float32)
    widths = (10 ** rng.uniform(-2, 0, CLUSTERS)).astype(np.float32)
    return centres[member] + widths[member, None] * gaussian(rng, n, d)


def moment_curve(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """``(t, t^2, .., t^d)``, t uniform in [-1, 1], each coordinate standardised: every key is a vertex of the hull."""
    powers = rng.uniform(-1, 1, n)[:, None] ** np.arange(1, d + 1)
    return ((powers - powers.mean(axis=0)) / powers.std(axis=0)).astype(np.float32)


def sphere(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Uniform on the unit sphere: again all vertices, and norms tell nothing."""
    keys = gaussian(rng, n, d)
    return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def directions(rng: np.random.Generator, m: int, d: int) -> np.ndarray:
    """Queries (m, d) float32 in random directions, of norm sqrt(d): Gaussian keys score N(0, 1) after scaling."""
    queries = gaussian(rng, m, d)
    return queries * (np.float32(np.sqrt(d)) / np.linalg.norm(queries, axis=1, keepdims=True))


LAWS: dict[str, Law] = {
    "cube": cube,
    "gaussian": gaussian,
    "clusters": clusters,
    "moment curve": moment_curve,
    "sphere": sphere,
}
