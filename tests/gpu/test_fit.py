"""The coder fitted where the keys lie is `hsr.coder`'s."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpu.fit import fit  # noqa: E402
from hsr import coder  # noqa: E402

HERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("many", [1, 2, 700])
@pytest.mark.parametrize("known", [None, 3, 500])
@pytest.mark.parametrize("kind", ["spectrum", "constant", "zero", "huge"])
def test_maps_layout_steps_and_error_are_the_reference(many: int, known: int | None, kind: str) -> None:
    random = np.random.default_rng(many)
    d, row = 33, 12
    keys = {
        "spectrum": lambda: random.standard_normal((2, many, d)) * np.arange(1, d + 1) ** -1.0 + 3,
        "constant": lambda: np.ones((2, many, d)),
        "zero": lambda: np.zeros((2, many, d)),
        "huge": lambda: 1e30 * random.standard_normal((2, many, d)),
    }[kind]().astype(np.float32)
    queries = None if known is None else (random.standard_normal((2, known, d)) + 1).astype(np.float32)
    wanted = coder.fit(keys, row, queries, (4, 2))
    on = [None if part is None else torch.from_numpy(part).to(HERE) for part in (keys, queries)]
    found = fit(on[0], row, on[1], (4, 2), coder.EVERY)
    size = max(float(np.abs(keys).max()), 1e-30)
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-9, atol=1e-9 * size)
    np.testing.assert_allclose(found.error, wanted.error, rtol=1e-5, atol=1e-9 * size**2)
    if many > d and kind in ("spectrum", "huge"):  # else axes of no variance may turn
        assert found.layout == wanted.layout
        np.testing.assert_allclose(found.steps, wanted.steps, rtol=1e-6)
    products = np.einsum("gdi,gei->gde", found.key_map, found.query_map)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(d), products.shape), atol=1e-8)


def test_codes_of_a_sample_are_as_good() -> None:
    """Scores estimated by either coder err alike."""
    random = np.random.default_rng(7)
    keys = random.standard_normal((3, 2000, 64)) * np.arange(1, 65) ** -0.5
    queries = random.standard_normal((3, 300, 64)) * np.arange(1, 65) ** -0.3
    found = fit(torch.from_numpy(keys).to(HERE), 32, torch.from_numpy(queries).to(HERE), (4, 2), coder.EVERY)
    wanted = coder.fit(keys, 32, queries, (4, 2))
    for one, other in zip(found.encode(keys), wanted.encode(keys), strict=True):
        assert one.shape == other.shape
    np.testing.assert_allclose(found.encode(keys)[1].mean(), wanted.encode(keys)[1].mean(), rtol=1e-6)
