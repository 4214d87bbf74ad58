"""Slash, vertical, horizontal, our design: fit and choice in float64, and what additive scores give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import time_budget
from attention.block_maps import distances
from attention.key_lists import bands
from attention.selectors.slash_vertical_horizontal import SlashVerticalHorizontal, fitted, modelled
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


@pytest.mark.parametrize("room", [0, 3, 17, 10_000])
def test_time_pays_for_the_blocks_of_largest_share(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is always seen: one threshold for a head, and no more blocks than paid for."""
    m, n, heads = 650, 1100, 4
    rates, spent = (0.25, 2.0**-20), 0.5
    monkeypatch.setattr(time_budget, "attending", lambda *_: rates)
    monkeypatch.setattr(time_budget, "selecting", lambda *_: spent)
    pairs = heads * 128 * (128 * room + int(bands(m, n).sum()))
    policy = SlashVerticalHorizontal(seconds=sum((rates[0], spent, rates[1] * pairs)), sinks=1, window=2, last=1)
    prompt = gaussian(4, m, n, sharp=4.0)
    where, q, k = places(m, n), prompt.q * prompt.scale, prompt.k
    found = lines(policy, prompt)
    for head in range(heads):
        mine = found[head * len(where) : (head + 1) * len(where)]
        shares = modelled(*fitted(*map(torch.from_numpy, (q[head : head + 1], k[head // 2 : head // 2 + 1])), 1.0),
            distances(m, n, torch.device("cpu")), (n - m) % 128)[0].numpy()  # fmt: skip
        older = [(i, J) for i, place in enumerate(where) for J in range(place.own)]
        forced = {(i, J) for i, J in older if J < 1 or where[i].own - J < 2 or i == len(where) - 1}
        others = sorted((x for x in older if x not in forced), key=lambda x: -shares[x])
        wanted = forced | set(others[: max(room - len(forced), 0)])
        assert {(i, J) for i, line in enumerate(mine) for J in line.blocks} == wanted


def test_more_time_lists_more_and_none_lists_what_is_always_seen() -> None:
    prompt = gaussian(1, 700, 700, d=64)
    prompt = Prompt(*(part.astype(np.float32) for part in prompt))
    least, much = (lines(SlashVerticalHorizontal(seconds=x, last=0), prompt) for x in (1e-9, 1e3))
    where = places(700, 700) * 4
    assert [line.blocks for line in least] == [
        {J for J in range(place.own) if J < 1 or place.own - J < 2} for place in where
    ]
    assert [line.blocks for line in much] == [set(range(place.own)) for place in where]
    assert SlashVerticalHorizontal(seconds=1.0).tighter(1 << 20) is None


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


BAD = [{"dropped": 1}, {"dropped": -0.1}, {"sinks": -1}, {"window": 0}, {"last": -1}, {"seconds": 0.0}]


@pytest.mark.parametrize("given", BAD)
def test_settings_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="must be"):
        SlashVerticalHorizontal(**given)  # type: ignore[arg-type]
