"""XAttention against its paper in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.selectors import x_attention
from attention.selectors.x_attention import XAttention
from hsr.errors import ArgumentError
from tests.selectors import SHAPES, Line, eligible, gaussian, lines, places, reaching, softmax, wanted


def sums_of(q: np.ndarray, k: np.ndarray, S: int) -> np.ndarray:
    """Row blocks by key blocks, cell by cell."""
    m, n = len(q), len(k)
    found = np.zeros((-(-m // 128), -(-n // 128)))
    for a in range(-(-m // S)):
        means = [
            sum(
                q[a * S + S - 1 - t] @ k[c * S + t]
                for t in range(S)
                if a * S + S - 1 - t < m and c * S + t < n
            ) / S
            for c in range((n - m + a * S) // S + 1)
        ]  # fmt: skip
        for c, share in enumerate(softmax(np.array(means))):
            found[a * S // 128, c * S // 128] += share
    return found


def reference(q: np.ndarray, k: np.ndarray, policy: XAttention) -> list[Line]:
    sums = sums_of(q, k, policy.stride)
    found = []
    for place, row in zip(places(len(q), len(k)), sums, strict=True):
        kept = reaching(row, policy.threshold, {0} | set(range(place.own, sums.shape[1])))
        found.append(Line(set(), eligible(kept, place), set()))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", XAttention.examples(), ids=str)
def test_it_is_the_paper(shape: tuple[int, int], policy: XAttention) -> None:
    prompt = gaussian(2, *shape, g=1, sharp=3.0)
    assert lines(policy, prompt) == wanted(prompt, lambda q, k: reference(q, k, policy))


@pytest.mark.parametrize("stride", [1, 128])
def test_sums_of_every_stride(stride: int) -> None:
    prompt = gaussian(3, 130, 300, g=1, group=1, d=4)
    found = x_attention.block_sums(torch.from_numpy(prompt.q), torch.from_numpy(prompt.k), prompt.scale, stride)
    assert np.allclose(found[0], sums_of(prompt.q[0] * prompt.scale, prompt.k[0], stride))


def test_stride_1_sums_attention_itself() -> None:
    prompt = gaussian(4, 256, 256, g=1, group=1)
    found = x_attention.block_sums(torch.from_numpy(prompt.q), torch.from_numpy(prompt.k), prompt.scale, 1)[0]
    scores = np.where(np.tri(256, dtype=bool), prompt.scale * prompt.q[0] @ prompt.k[0].T, -np.inf)
    assert np.allclose(found, softmax(scores).reshape(2, 128, 2, 128).sum(axis=(1, 3)))


def test_row_blocks_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = gaussian(5, 650, 1100)
    arrays = torch.from_numpy(prompt.q), torch.from_numpy(prompt.k)
    at_once = x_attention.block_sums(*arrays, prompt.scale, 8)
    monkeypatch.setattr(x_attention, "LARGEST", 1)
    assert torch.allclose(x_attention.block_sums(*arrays, prompt.scale, 8), at_once)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), low=st.floats(0.05, 1), other=st.floats(0.05, 1))
def test_a_threshold_is_reached_and_a_larger_one_only_adds(seed: int, low: float, other: float) -> None:
    prompt, (small, large) = gaussian(seed, 640, 896, g=1), sorted((low, other))
    less, more = (lines(XAttention(x, stride=16), prompt) for x in (small, large))
    assert all(a.blocks <= b.blocks for a, b in zip(less, more, strict=True))
    sums = x_attention.block_sums(torch.from_numpy(prompt.q), torch.from_numpy(prompt.k), prompt.scale, 16)
    for line, row, place in zip(more, sums.flatten(0, 1).numpy(), places(640, 896) * 2, strict=True):
        kept = sorted(line.blocks | {place.own})
        assert 0 in kept and row[kept].sum() >= large * row.sum() * (1 - 1e-12)


@pytest.mark.parametrize("given", [{"threshold": 0}, {"threshold": 1.1}, {"stride": 0}, {"stride": 24}])
def test_settings_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="must"):
        XAttention(**given)  # type: ignore[arg-type]
