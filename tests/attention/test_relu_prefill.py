"""Prefill of ReLU^alpha attention through half-spaces: exact, and on ties a closed half-space."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import ReLUPower, prefill
from attention.reference import dense
from hsr import methods
from tests.strategies import served


@pytest.mark.parametrize("method", methods("build"))
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.sampled_from((1, 2, 31, 64, 90)),
    before=st.sampled_from((0, 1, 37, 128)),
    batch=st.integers(1, 3),
    group=st.integers(1, 3),
    alpha=st.integers(1, 3),
    b=st.sampled_from((-1.0, 0.0, 0.5, 1.0)),
    repeated=st.booleans(),
)
def test_ties_batches_and_cached_prefixes_are_the_definition(
    method: str, seed: int, m: int, before: int, batch: int, group: int, alpha: int, b: float, repeated: bool
) -> None:
    """Whole numbers and a scale of a half: many scores are b exactly, are reported, and weigh nothing."""
    rng = np.random.default_rng(seed)
    d, n = served(method, 4), m + before
    q = rng.integers(-2, 3, (batch, 2 * group, m, d)).astype(np.float64)
    k = rng.integers(-2, 3, (batch, 2, n, d)).astype(np.float64)
    v = rng.standard_normal((batch, 2, n, 3))
    if repeated:
        k = k[:, :, rng.integers(0, n // 4 + 1, n)]
    weight = ReLUPower(alpha, b)
    result = prefill(q, k, v, weight=weight, scale=0.5, method=method)
    for i in range(batch):
        output, lse = dense(q[i], k[i], v[i], weight, 0.5, causal=True)
        assert np.allclose(result.output[i], output, rtol=1e-12, atol=1e-12)
        assert np.array_equal(result.empty[i], np.isneginf(lse))
        assert np.allclose(result.lse[i][~result.empty[i]], lse[~result.empty[i]], rtol=1e-12, atol=1e-12)
        scores = 0.5 * np.einsum("hmd,hNd->hmN", q[i], np.repeat(k[i], group, axis=0))
        inside = (scores >= b) & np.tri(m, n, before, dtype=bool)
        assert np.array_equal(result.counters.reported[i], inside.sum(axis=2))
    assert result.certificate.kind == "exact"
    assert (result.certificate.dropped_mass == 0).all()
