"""Slash, vertical, horizontal, our design: fit and choice in float64, and what additive scores give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.selectors.slash_vertical_horizontal import SlashVerticalHorizontal, fitted
from hsr.errors import ArgumentError
from tests.prompts import Prompt
from tests.selectors import SHAPES, Line, eligible, gaussian, lines, places, reaching, softmax, wanted


def fit(q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S and V by alternating means over the pairs of sampled rows, row by row."""
    m, n = len(q), len(k)
    count = min(128, m)
    rows = [(r + 1) * m // count - 1 for r in range(count)]
    ends = [n - m + i + 1 for i in rows]
    scores = [k[:end] @ q[i] for i, end in zip(rows, ends, strict=True)]
    met = sum((np.arange(n) < end).astype(int) for end in ends)
    S, V, H = np.zeros(n), np.zeros(n), np.zeros(len(rows))
    for _ in range(4):
        total = np.zeros(n)
        for r, end in enumerate(ends):
            total[:end] += scores[r] - S[:end][::-1] - H[r]
        V = total / met
        H = np.array([(scores[r] - S[:end][::-1] - V[:end]).mean() for r, end in enumerate(ends)])
        total = np.zeros(n)
        for r, end in enumerate(ends):
            total[:end] += (scores[r] - V[:end] - H[r])[::-1]
        S = total / met
    return S, V


def reference(q: np.ndarray, k: np.ndarray, policy: SlashVerticalHorizontal) -> list[Line]:
    S, V = fit(q, k)
    where, found = places(len(q), len(k)), []
    for i, place in enumerate(where):
        weights = np.zeros(place.own + 1)
        for J in range(place.own + 1):
            keys = np.arange(128 * J, min(128 * (J + 1), len(k)))
            D = 128 * place.own + (len(k) - len(q)) % 128 + np.arange(128)[:, None] - 128 * J - np.arange(128)
            over = np.where((D >= 0) & (D < len(k)), np.exp(S[D.clip(0, len(k) - 1)]), 0)
            weights[J] = np.mean(over) * np.exp(V[keys]).sum()
        forced = {J for J in range(place.own + 1) if J < policy.sinks or place.own - J < policy.window}
        kept = reaching(weights, 1 - policy.dropped, forced)
        kept = set(range(place.own)) if i >= len(where) - policy.last else kept
        found.append(Line(set(), eligible(kept, place), set()))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", SlashVerticalHorizontal.examples(), ids=str)
def test_it_is_its_definition(shape: tuple[int, int], policy: SlashVerticalHorizontal) -> None:
    prompt = gaussian(2, *shape, sharp=4.0)
    assert lines(policy, prompt) == wanted(prompt, lambda q, k: reference(q, k, policy))


def additive(n: int) -> tuple[Prompt, np.ndarray]:
    """Scores that are a function of the distance and one of the key alone, and these scores."""
    turns = 2 * np.pi * np.arange(n)[:, None] * np.array([3, 7, 11, 20]) / n
    waves = np.concatenate([np.cos(turns), np.sin(turns)], axis=1)
    column = np.random.default_rng(0).standard_normal((n, 1)) * 1.5
    q, k = np.hstack([waves, np.ones((n, 1))]), np.hstack([waves, column])
    prompt = Prompt(3 * q[None], k[None], np.zeros((1, n, 2)))
    return prompt, prompt.scale * prompt.q[0] @ prompt.k[0].T


def test_additive_scores_are_fitted() -> None:
    """Every row's softmax is nearly that of the model; constants and a slope are free."""
    n = 640
    prompt, scores = additive(n)
    S, V = (x[0].numpy() for x in fitted(torch.from_numpy(prompt.q), torch.from_numpy(prompt.k), prompt.scale))
    for i in range(63, n, 64):
        found, exact = softmax(S[: i + 1][::-1] + V[: i + 1]), softmax(scores[i, : i + 1])
        assert np.abs(found - exact).sum() < 0.1


def test_additive_scores_keep_what_they_promise() -> None:
    n = 1024
    prompt, scores = additive(n)
    shares = softmax(np.where(np.tri(n, dtype=bool), scores, -np.inf))
    by_block = shares.reshape(8, 128, 8, 128).sum(axis=(1, 3)) / 128
    for own, line in enumerate(lines(SlashVerticalHorizontal(0.2, sinks=0, window=1, last=0), prompt)):
        assert by_block[own, sorted(line.blocks | {own})].sum() > 0.7
        assert own < 4 or len(line.blocks) < own


@settings(max_examples=15)
@given(seed=st.integers(0, 99), one=st.floats(0, 0.9), other=st.floats(0, 0.9))
def test_dropping_more_only_drops_and_forced_blocks_stay(seed: int, one: float, other: float) -> None:
    prompt, (low, high) = gaussian(seed, 500, 900), sorted((one, other))
    more, less = (lines(SlashVerticalHorizontal(x, last=1), prompt) for x in (low, high))
    for i, (a, b) in enumerate(zip(more, less, strict=True)):
        place = places(500, 900)[i % 4]
        assert b.blocks <= a.blocks and {0, place.own - 1} <= b.blocks
        assert i % 4 < 3 or b.blocks == set(range(place.own))


@pytest.mark.parametrize("given", [{"dropped": 1}, {"dropped": -0.1}, {"sinks": -1}, {"window": 0}, {"last": -1}])
def test_settings_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="must be"):
        SlashVerticalHorizontal(**given)  # type: ignore[arg-type]
