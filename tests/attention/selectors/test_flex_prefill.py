"""FlexPrefill against its paper, and as published against what the notes of its code say, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.selectors.flex_prefill import FlexPrefill
from hsr.errors import ArgumentError
from tests.selectors import (
    SHAPES,
    Line,
    block_means,
    block_sums,
    by_distance,
    eligible,
    gaussian,
    last_attention,
    lines,
    places,
    reaching,
    softmax,
    top,
    wanted,
)


def query_aware(q: np.ndarray, k: np.ndarray, true: np.ndarray, tau: float) -> bool:
    estimate = softmax(block_means(k) @ q[-128:].mean(axis=0))
    middle = (estimate + true) / 2
    divergence = sum(
        p[i] * np.log(p[i] / middle[i]) / 2 for p in (estimate, true) for i in range(len(true)) if p[i] > 0
    )
    return bool(np.sqrt(max(divergence, 0)) < tau)


def pooled_cover(q: np.ndarray, k: np.ndarray, gamma: float) -> set[tuple[int, int]]:
    """(row block, key block) of the whole pooled map."""
    where = places(len(q), len(k))
    scores = block_means(q) @ block_means(k).T
    shares = np.array(
        [
            softmax(np.where(np.arange(len(row)) <= place.own, row, -np.inf))
            for row, place in zip(scores, where, strict=True)
        ]
    )
    return {divmod(i, shares.shape[1]) for i in reaching(shares.ravel(), gamma)}


def block_distances(mass: np.ndarray, phase: int) -> np.ndarray:
    """Mass by distance, spread over the 128 rows of a block and summed by how many blocks back each meets: from -1."""
    found = np.zeros(len(mass) // 128 + 4)
    for D, share in enumerate(mass):
        for row in range(128):
            found[1 - (phase + row - D) // 128] += share / 128
    return found


def reference(q: np.ndarray, k: np.ndarray, policy: FlexPrefill) -> list[Line]:
    shares = last_attention(q, k, 128)
    columns, slashes, phase = shares.mean(axis=0), by_distance(shares), (len(k) - len(q)) % 128
    least = -(-policy.min_budget // 128)
    aware = query_aware(q, k, block_sums(columns), policy.tau)
    if policy.published:
        flipped = block_sums(slashes[::-1])[::-1]
        counts = [np.sum(np.cumsum(np.sort(x)[::-1]) <= policy.gamma) + 1 for x in (columns, slashes)]
        sizes = [least if aware else max(least, int(count) // 128 + 1) for count in counts]
        kept, back = top(block_sums(columns), sizes[0], {0}), top(flipped, sizes[1], {0})
    else:
        spread = block_distances(slashes, phase)
        goal = 0.0 if aware else policy.gamma
        kept = reaching(block_sums(columns), goal, {0}) | top(block_sums(columns), least, {0})
        back = {s - 1 for s in reaching(spread, goal, {0, 1}) | top(spread, least, {0, 1})}
    pairs = pooled_cover(q, k, policy.gamma) if aware else set()
    found = []
    for i, place in enumerate(places(len(q), len(k))):
        blocks = kept | {place.own - s for s in back} | {J for row, J in pairs if row == i}
        found.append(Line(set(), eligible(blocks, place), set()))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", [*FlexPrefill.examples(), FlexPrefill()], ids=str)
def test_it_is_the_paper(shape: tuple[int, int], policy: FlexPrefill) -> None:
    for sharp in (0.2, 3.0):
        prompt = gaussian(2, *shape, sharp=sharp)
        assert lines(policy, prompt) == wanted(prompt, lambda q, k: reference(q, k, policy))


@settings(max_examples=20)
@given(seed=st.integers(0, 99), gamma=st.floats(0.05, 1), n=st.sampled_from((640, 1024)), sharp=st.floats(0.1, 4))
def test_the_last_rows_keep_a_share_gamma_of_their_attention(seed: int, gamma: float, n: int, sharp: float) -> None:
    prompt = gaussian(seed, 384, n, sharp=sharp)
    found = lines(FlexPrefill(gamma, tau=0.0, min_budget=1), prompt)
    for head, q in enumerate(prompt.q):
        shares = last_attention(q * prompt.scale, prompt.k[head // 2], 128).mean(axis=0)
        kept = found[3 * head + 2].blocks | {n // 128 - 1}
        assert block_sums(shares)[sorted(kept)].sum() >= gamma - 1e-9


def test_a_diagonal_is_two_block_distances_but_one_as_published() -> None:
    """All attention is at distance 300: a third of it three blocks back, the rest two."""
    prompt = gaussian(4, 1024, 1024, g=1, group=1, d=64)
    prompt = prompt._replace(q=3 * np.roll(prompt.k, 300, axis=1))
    policy = FlexPrefill(0.9, tau=0.0, min_budget=256)
    assert lines(policy, prompt)[4].blocks == {0, 1, 2}
    assert lines(dataclasses.replace(policy, published=True), prompt)[4].blocks == {0, 2}


@settings(max_examples=15)
@given(seed=st.integers(0, 99), low=st.floats(0.05, 0.9), more=st.floats(0, 0.1), tau=st.sampled_from((0.0, 0.3, 1.9)))
def test_a_larger_gamma_only_adds(seed: int, low: float, more: float, tau: float) -> None:
    prompt = gaussian(seed, 500, 700)
    for published in (False, True):
        policies = [FlexPrefill(gamma, tau, 128, published) for gamma in (low, low + more)]
        less, larger = (lines(policy, prompt) for policy in policies)
        assert all(a.blocks <= b.blocks for a, b in zip(less, larger, strict=True))


@pytest.mark.parametrize("given", [{"gamma": 0}, {"gamma": 1.1}, {"tau": -1}, {"min_budget": 0}, {"published": 1}])
def test_settings_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="must be"):
        FlexPrefill(**given)  # type: ignore[arg-type]
