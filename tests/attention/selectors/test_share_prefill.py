"""SharePrefill against its paper in float64, through the layers of a prompt, and what must not pass between prompts."""

from __future__ import annotations

import dataclasses
import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Dense, prefill
from attention.head_clusters import HeadClusters
from attention.selectors import share_prefill
from attention.selectors.share_prefill import PivotalPatterns, SharePrefill
from hsr.errors import ArgumentError
from tests.prompts import Prompt
from tests.selectors import (
    Line,
    block_sums,
    eligible,
    gaussian,
    last_attention,
    lines,
    places,
    reaching,
    softmax,
    top,
)

CLUSTERS = HeadClusters(((0, 1, -1, 0), (1, 0, 2, 1), (2, 0, 0, -1)))
POLICY = SharePrefill(CLUSTERS, gamma=0.8, tau=0.25, delta=0.33, min_budget=128)
SHARING = dataclasses.replace(POLICY, delta=1.0)
Sums = dict[int, tuple[np.ndarray, bool, list[set[int]]]]  # by cluster: attention, whether it is broad, blocks


def layered(seed: int, m: int, n: int, sharp: float = 1.0) -> list[Prompt]:
    """Heads that prefer some key blocks, of which some are alike, within layers and across them."""
    prompts = [gaussian(seed + layer, m, n, sharp=sharp) for layer in range(3)]
    rng = np.random.default_rng(seed)
    for prompt in prompts:
        prompt.q[..., 0] = np.array([8, 3, 8, 6])[:, None]
        prompt.k[..., 0] = 1.5 * np.repeat(rng.random((2, -(-n // 128))) < 0.5, 128, axis=1)[:, :n]
    prompts[1] = prompts[1]._replace(k=0.7 * prompts[0].k + 0.3 * prompts[1].k, q=0.9 * prompts[0].q)
    prompts[2] = prompts[2]._replace(k=prompts[0].k, q=prompts[0].q[::-1].copy())
    return prompts


def apart(p: np.ndarray, q: np.ndarray) -> float:
    middle = (p + q) / 2
    terms = [x[i] * np.log(x[i] / middle[i]) / 2 for x in (p, q) for i in range(len(p)) if x[i] > 0]
    return float(np.sqrt(max(sum(terms), 0)))


def own(q: np.ndarray, k: np.ndarray, policy: SharePrefill) -> list[set[int]]:
    shares, least = last_attention(q, k, 128), -(-policy.min_budget // 128)
    phase, mass = (len(k) - len(q)) % 128, np.zeros(len(k) // 128 + 4)
    slashes = np.zeros(len(k))
    for row, position in zip(shares, range(len(k) - len(shares), len(k)), strict=True):
        slashes[: position + 1] += row[position::-1] / len(shares)
    for row in range(128):
        np.add.at(mass, 1 - (phase + row - np.arange(len(k))) // 128, slashes / 128)
    columns = block_sums(shares.mean(axis=0))
    kept = reaching(columns, policy.gamma, {0}) | top(columns, least, {0})
    back = {s - 1 for s in reaching(mass, policy.gamma, {0, 1}) | top(mass, least, {0, 1})}
    return [kept | {place.own - s for s in back} for place in places(len(q), len(k))]


def exact(q: np.ndarray, k: np.ndarray, gamma: float) -> list[set[int]]:
    found = []
    for place in places(len(q), len(k)):
        scores = np.where(np.arange(len(k)) > place.positions[:, None], -np.inf, q[place.rows] @ k.T)
        found.append(reaching(block_sums(softmax(scores).mean(axis=0)), gamma))
    return found


def reference(prompt: Prompt, layer: int, sums: Sums, policy: SharePrefill) -> list[Line]:
    """Head by head, as the paper goes; what pivotal heads leave is added to sums."""
    found = []
    for head, cluster in enumerate(policy.clusters.labels[layer]):
        q = prompt.q[head].astype(np.float64) * prompt.scale
        k = prompt.k[head * len(prompt.k) // len(prompt.q)].astype(np.float64)
        shares, where = block_sums(last_attention(q, k, 128).mean(axis=0)), places(len(q), len(k))
        even = np.array([len(k[i : i + 128]) for i in range(0, len(k), 128)]) / len(k)
        broad, kept = apart(shares, even) < policy.delta, own(q, k, policy)
        if cluster >= 0 and cluster not in sums:
            sums[cluster] = shares, broad, exact(q, k, policy.gamma)
            kept = [set(range(place.own)) for place in where] if broad else kept
        elif cluster >= 0 and broad and sums[cluster][1] and apart(shares, sums[cluster][0]) < policy.tau:
            kept = sums[cluster][2]
        found += [Line(set(), eligible(a, place), set()) for a, place in zip(kept, where, strict=True)]
    return found


def through(policy: SharePrefill, prompts: list[Prompt]) -> list[list[Line]]:
    patterns = PivotalPatterns()
    return [lines(policy.at(layer, patterns), prompt) for layer, prompt in enumerate(prompts)]


SETTINGS = {
    "gates": {},
    "few broad": {"delta": 0.23},
    "all shared": {"tau": 1.0, "delta": 1.0},
    "none shared": {"delta": 0.0},
}


@pytest.mark.parametrize("shape", [(300, 300), (1, 700), (421, 552), (650, 1100), (300, 1800)])
@pytest.mark.parametrize("given", SETTINGS.values(), ids=SETTINGS)
def test_it_is_the_paper(shape: tuple[int, int], given: dict[str, float]) -> None:
    policy = dataclasses.replace(POLICY, **given)
    for sharp in (0.3, 2.0):
        prompts, sums = layered(2, *shape, sharp=sharp), Sums()
        wanted = [reference(prompt, layer, sums, policy) for layer, prompt in enumerate(prompts)]
        assert through(policy, prompts) == wanted


def test_heads_do_share_and_some_do_not() -> None:
    """So that the other tests see both sides of every gate."""
    own, near, every = (
        through(dataclasses.replace(POLICY, delta=delta, tau=tau), layered(2, 300, 1800, sharp=0.3))
        for delta, tau in ((0.0, 1.0), (1.0, 0.25), (1.0, 1.0))
    )
    shared, all_shared = (
        {(layer, head) for layer in range(3) for head in range(4) if a[layer][3 * head + 2] != own[layer][3 * head + 2]}
        for a in (near, every)
    )
    assert {(0, 0), (0, 1), (1, 2)} < shared < all_shared  # the pivotal heads, and others
    sharp = layered(2, 300, 1800, sharp=2.0)
    assert through(POLICY, sharp) != through(dataclasses.replace(POLICY, delta=1.0), sharp)


@pytest.mark.parametrize("sharp", [0.3, 1.0])
def test_a_batch_is_as_its_sequences_alone(sharp: float) -> None:
    one, other = layered(3, 300, 700, sharp), layered(13, 300, 700, sharp)
    both = [Prompt(*(np.concatenate(pair) for pair in zip(a, b, strict=True))) for a, b in zip(one, other, strict=True)]
    assert through(POLICY, both) == [a + b for a, b in zip(through(POLICY, one), through(POLICY, other), strict=True)]


@settings(max_examples=15)
@given(seed=st.integers(0, 99), gamma=st.floats(0.05, 1.0), sharp=st.floats(0.1, 2))
def test_shared_blocks_cover_gamma_of_the_pivotal_attention(seed: int, gamma: float, sharp: float) -> None:
    """All heads share, and are the same: each keeps a share gamma of its own attention."""
    prompt = gaussian(seed, 384, 640, g=1, group=1, sharp=sharp)
    twice = prompt._replace(q=np.repeat(prompt.q, 2, axis=0))
    policy = SharePrefill(HeadClusters(((0, 0),)), gamma=gamma, tau=0.1, delta=1.0)
    first, second = np.array_split(np.array(lines(policy, twice), object), 2)
    shares = softmax(np.where(np.tri(384, 640, 256, dtype=bool), prompt.scale * prompt.q[0] @ prompt.k[0].T, -np.inf))
    for i, place in enumerate(places(384, 640)):
        assert first[i][1] == set(range(place.own))
        kept = sorted(second[i][1] | {place.own})
        assert block_sums(shares[place.rows].mean(axis=0))[kept].sum() >= gamma - 1e-9


def test_one_prompt_leaves_nothing_to_another() -> None:
    first, second = layered(4, 300, 1800, 0.3), layered(5, 300, 1800, 0.3)
    patterns = PivotalPatterns()
    for layer, prompt in enumerate(first):
        lines(SHARING.at(layer, patterns), prompt)
    with pytest.raises(ArgumentError, match=r"patterns must be new for every prompt.* got layer 0 after 2"):
        lines(SHARING.at(0, patterns), second[0])
    with pytest.raises(ArgumentError, match="patterns must be of one prompt"):
        lines(SHARING.at(2, patterns), gaussian(5, 300, 1801))
    assert sorted(patterns._found) == [0, 1, 2], "a refusal changes nothing"
    fresh = through(SHARING, second)
    assert fresh == through(SHARING, second) and fresh != through(SHARING, first)
    alone = [lines(SHARING.at(layer, PivotalPatterns()), prompt) for layer, prompt in enumerate(second)]
    assert alone[0] == fresh[0] and alone[2] != fresh[2]


def test_a_layer_may_be_asked_again_and_begins_with_what_earlier_ones_left() -> None:
    prompts, patterns = layered(6, 300, 1800, 0.3), PivotalPatterns()
    once = [[lines(SHARING.at(layer, patterns), x) for _ in range(2)] for layer, x in enumerate(prompts)]
    assert all(a == b for a, b in once) and [a for a, _ in once] == through(SHARING, prompts)


def test_settings_without_patterns_share_none() -> None:
    one, other = SharePrefill(CLUSTERS), SharePrefill(CLUSTERS)
    assert one.patterns is not other.patterns and one.tighter(9999).patterns is one.patterns


def test_nothing_is_read_back_in_any_layer() -> None:
    q, k, patterns = torch.empty(8, 300, 16, device="meta"), torch.empty(4, 431, 16, device="meta"), PivotalPatterns()
    for layer in range(3):
        made = POLICY.at(layer, patterns).lists(q, k, 0.25)
        assert made.blocks.device.type == "meta"


def test_a_pivotal_head_is_dense_and_prefill_serves_the_rest() -> None:
    prompt = layered(7, 421, 1300, 0.3)[0]
    result, exact_result = (prefill(*prompt, policy=policy) for policy in (SHARING, Dense()))
    assert np.allclose(result.output[:2], exact_result.output[:2]) and np.allclose(result.densities[:2], 1)
    assert result.densities[2] < 1


def test_the_example_runs() -> None:
    assert doctest.testmod(share_prefill).attempted > 5 and doctest.testmod(share_prefill).failed == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clusters": ((0,),)}, "clusters must be HeadClusters"),
        ({"patterns": None}, "patterns must be PivotalPatterns; got None"),
        ({"layer": 3}, r"layer must be in 0\.\.2; got 3"),
        ({"layer": -1}, r"layer must be in 0\.\.2; got -1"),
        ({"gamma": 0}, "gamma must be in"),
        ({"tau": -0.1}, "tau must be in"),
        ({"delta": 1.1}, "delta must be in"),
        ({"min_budget": 0}, "min_budget must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SharePrefill(**({"clusters": CLUSTERS} | given))  # type: ignore[arg-type]


def test_heads_that_the_clusters_do_not_know_are_refused() -> None:
    with pytest.raises(ArgumentError, match="q must have a multiple of the clusters' 4 heads; got 2"):
        lines(POLICY, gaussian(0, 128, 128, g=1))
