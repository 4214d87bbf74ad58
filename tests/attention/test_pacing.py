"""Thresholds of a causal selection, one block after another: what they spend, and what they may not know."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import chances, listed_reference
from attention.key_lists import budget, edges
from attention.listed_reference import RESERVED, STEPS, STRIDE, UNITS
from tests.histograms import KINDS, made

STEP = 2.0 ** (-STRIDE / STEPS)  # what is left of all chances at the next threshold, at least
seeds = st.integers(0, 2**32 - 1)


def spent(histograms: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Keys that each block expects to list."""
    c = np.arange(histograms.shape[1])
    return (histograms * np.minimum(1, 2.0 ** ((c - thresholds[:, None]) / STEPS))).sum(axis=1)


@settings(max_examples=60)
@given(
    seed=seeds,
    kind=st.sampled_from(KINDS),
    T=st.integers(1, 40),
    shift=st.sampled_from((0, 5, 700, 5000)),
    share=st.floats(1e-5, 1),
)
def test_no_head_expects_more_than_its_budget_and_no_block_starves(
    seed: int, kind: str, T: int, shift: int, share: float
) -> None:
    edge = edges(128 * T, 128 * T + shift)
    histograms, kept = made(np.random.default_rng(seed), kind, edge), share * edge.sum()
    found = chances.paced(histograms, kept, edge)
    assert np.array_equal(found, listed_reference.paced(histograms, kept, edge))
    own = spent(histograms, found)
    assert own.sum() <= kept * (1 + 1e-12) + 1e-6
    even = kept / RESERVED / max(np.count_nonzero(edge), 1)
    assert (own >= np.minimum(edge, STEP * even) - 2 / UNITS).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "least"), [(8, 0.88), (64, 0.99), (300, 0.995)])
def test_the_budget_is_spent(kind: str, T: int, least: float) -> None:
    """All but a part of the last block's share; where importance keeps falling, more was kept for it than it takes."""
    edge = edges(128 * T, 128 * T)
    histograms = made(np.random.default_rng(0), kind, edge)
    for share in (0.01, 0.1, 0.5, 0.9, 1.0):
        kept = share * edge.sum()
        own = spent(histograms, chances.paced(histograms, kept, edge)).sum()
        assert own >= (1 if share == 1 else 0.9 if kind == "falling" else least) * kept - 1e-6


def test_of_blocks_alike_the_threshold_stays_the_same_but_for_its_step() -> None:
    edge = edges(0x2000, 0x2000 + (1 << 20))
    shape = np.bincount(np.random.default_rng(0).binomial(255, 0.3, 4096), minlength=256)
    histograms = shape * (edge[:, None] // 4096)
    found = chances.paced(histograms, 0.05 * edge.sum(), edge)
    common = chances.thresholds(histograms.sum(axis=0)[None], np.array([0.05 * edge.sum()]))[0]
    assert np.abs(found - common).max() <= STRIDE
    assert abs(found.mean() - common) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_later_blocks_change_no_earlier_threshold(kind: str) -> None:
    rng, edge = np.random.default_rng(1), edges(128 * 24, 128 * 24 + 300)
    histograms = made(rng, kind, edge)
    before = chances.paced(histograms, 0.1 * edge.sum(), edge)
    for block in (1, 7, 22):
        other = histograms.copy()
        other[block + 1 :] = made(rng, "jumps", edge)[block + 1 :]
        after = chances.paced(other, 0.1 * edge.sum(), edge)
        assert np.array_equal(before[: block + 1], after[: block + 1])


def test_a_density_of_one_keeps_every_key_and_one_below_the_bands_almost_none() -> None:
    edge = edges(1000, 1300)
    histograms = made(np.random.default_rng(2), "any", edge)
    assert (chances.paced(histograms, budget(1.0, 1000, 1300), edge) == 0).all()
    assert spent(histograms, chances.paced(histograms, 0.0, edge)).sum() < 1e-3
