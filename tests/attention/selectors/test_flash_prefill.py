"""FlashPrefill against its papers in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Dense, prefill
from attention.selectors import flash_prefill
from attention.selectors.flash_prefill import FlashPrefill
from hsr.errors import ArgumentError
from tests.selectors import SHAPES, Line, block_means, gaussian, lines, places, wanted


def reference(q: np.ndarray, k: np.ndarray, policy: FlashPrefill) -> list[Line]:
    pooled, where, found = block_means(k), places(len(q), len(k)), []
    for i, place in enumerate(where):
        scores = q[place.rows] @ pooled[: place.own + 1].T
        energy = np.exp(scores - scores.max()).sum(axis=0)
        kept = {J for J in range(place.own) if energy[J] >= policy.alpha * energy.max()}
        kept |= {J for J in range(place.own) if J < policy.sinks or place.own - J < policy.window}
        kept = set(range(place.own)) if i >= len(where) - policy.last else kept
        found.append(Line(set(), kept, set(range(place.own)) - kept if policy.means else set()))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", [*FlashPrefill.examples(), FlashPrefill(last=2)], ids=str)
def test_it_is_the_paper(shape: tuple[int, int], policy: FlashPrefill) -> None:
    for sharp in (0.5, 4.0):
        prompt = gaussian(2, *shape, sharp=sharp)
        assert lines(policy, prompt) == wanted(prompt, lambda q, k: reference(q, k, policy))


def test_row_blocks_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = gaussian(3, 650, 1100)
    arrays = torch.from_numpy(prompt.q), torch.from_numpy(block_means(prompt.k.swapaxes(0, 1)).swapaxes(0, 1))
    at_once = flash_prefill.energies(*arrays, prompt.scale, 1100)
    monkeypatch.setattr(flash_prefill, "LARGEST", 1)
    assert torch.allclose(flash_prefill.energies(*arrays, prompt.scale, 1100), at_once)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), alpha=st.floats(0.01, 1), other=st.floats(0.01, 1))
def test_a_larger_alpha_only_drops_and_forced_blocks_stay(seed: int, alpha: float, other: float) -> None:
    prompt, (low, high) = gaussian(seed, 500, 900), sorted((alpha, other))
    more, less = (lines(FlashPrefill(x, sinks=1, window=2, last=1), prompt) for x in (low, high))
    for i, (a, b) in enumerate(zip(more, less, strict=True)):
        place = places(500, 900)[i % 4]
        assert b.blocks <= a.blocks and {0, place.own - 1} <= b.blocks
        assert b.blocks | b.means == set(range(place.own))
        assert i % 4 < 3 or not b.means


def test_means_bring_back_what_equal_keys_lose() -> None:
    """Keys alike within a block: their mean is worth as much, and nothing is dropped."""
    prompt = gaussian(5, 1024, 1024)
    k, v = (np.repeat(x[:, ::128], 128, axis=1) for x in (prompt.k, prompt.v))
    policy = FlashPrefill(alpha=1.0, sinks=0, window=1, last=0)
    dense = prefill(prompt.q, k, v, policy=Dense()).output
    assert np.allclose(prefill(prompt.q, k, v, policy=policy).output, dense, atol=1e-9)
    without = dataclasses.replace(policy, means=False)
    assert np.abs(prefill(prompt.q, k, v, policy=without).output - dense).max() > 0.5


def test_energies_of_absent_rows_are_nothing() -> None:
    q, k = torch.ones(1, 130, 4), torch.ones(1, 2, 4)
    found = flash_prefill.energies(q, k, 1.0, 130)
    assert found.tolist() == [[[128, 0], [2, 2]]]


@pytest.mark.parametrize(
    "given", [{"alpha": 0}, {"alpha": 1.1}, {"sinks": -1}, {"window": 0}, {"last": -1}, {"means": 1}]
)
def test_settings_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="must be"):
        FlashPrefill(**given)  # type: ignore[arg-type]
