"""Drawing the keys that blocks share: each stage against its definition, and what the draw promises on average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from attention import Softmax, block_sampled_numba, chances, listed_numba, listed_reference
from attention.key_lists import bands, budget, check, edges, ends, representatives, row_blocks
from attention.reference import dense
from hsr import methods
from hsr.backend import choose
from tests.prompts import Prompt, made, prompts

ALARM = 1e-4  # false alarms of one statistical test, all its comparisons together
few = settings(max_examples=60)
seeds = st.integers(0, 2**32 - 1)


def encoded(prompt: Prompt, rows: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes and histograms of the first head."""
    q, k, v = (np.ascontiguousarray(x[0]) for x in prompt)
    means = listed_reference.pooled(k).astype(k.dtype)
    values = block_sampled_numba.value_codes(v)
    return block_sampled_numba.encoded(q, k, means, values, rows, causal, prompt.scale)


def defined(prompt: Prompt, rows: int, causal: bool) -> Iterator[np.ndarray]:
    """Codes of the first head's blocks, as the definition has them."""
    q, k, v = (x[0] for x in prompt)
    m, n = len(q), len(k)
    queries, values = listed_reference.asked(q, rows, causal), listed_reference.value_codes(v)
    seen = n - m + representatives(m, rows, causal) + 1
    for block, edge in enumerate(edges(m, n)):
        yield listed_reference.codes(queries[block], k, values, edge, seen[block], prompt.scale)


@few
@given(prompt=prompts(), rows=st.sampled_from((1, 8, 128)), causal=st.booleans())
def test_codes_are_the_definition_within_one(prompt: Prompt, rows: int, causal: bool) -> None:
    """A logarithm near a whole number may round either way; in float64 hardly any does, but of exact powers of two."""
    q, k, v = (x[0] for x in prompt)
    codes, histograms = encoded(prompt, rows, causal)
    assert np.array_equal(listed_reference.value_codes(v), block_sampled_numba.value_codes(v))
    for block, wanted in enumerate(defined(prompt, rows, causal)):
        edge = len(wanted)
        most = prompt.scale * np.linalg.norm(q, axis=1).max() * np.linalg.norm(k, axis=1).max()
        slack = 1 if q.dtype == np.float64 else 1 + int(24 * 2.0**-24 * (k.shape[1] + 8) * most)
        assert (np.abs(codes[block, :edge].astype(int) - wanted) <= slack).all()
        assert np.array_equal(np.bincount(codes[block, :edge], minlength=256), histograms[block])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("m", "n"), [(421, 421), (300, 431), (129, 600)])
def test_codes_of_numbers_without_ties_are_the_definition(m: int, n: int, causal: bool) -> None:
    prompt = made(np.random.default_rng(m), m, n, 1, 1, 16, 5, "gaussian")
    codes, _ = encoded(prompt, 8, causal)
    for block, wanted in enumerate(defined(prompt, 8, causal)):
        assert np.array_equal(codes[block, : len(wanted)], wanted)


@given(seed=seeds, lines=st.integers(1, 4), share=st.floats(1e-4, 1.2), kind=st.sampled_from(("wide", "one", "ends")))
def test_thresholds_spend_the_budget(seed: int, lines: int, share: float, kind: str) -> None:
    rng = np.random.default_rng(seed)
    histograms = np.zeros((lines, 256), np.int64)
    for line in histograms:
        codes = {"wide": np.arange(256), "one": rng.integers(0, 256, 1), "ends": np.array([0, 255])}[kind]
        line[rng.choice(codes, min(len(codes), 40))] = rng.integers(1, 1 << 20)
    kept = share * histograms.sum(axis=1)
    found = chances.thresholds(histograms, kept)
    for line, t, b in zip(histograms, found, kept, strict=True):
        assert t == pytest.approx(listed_reference.threshold(line, b), rel=1e-9, abs=1e-9)
        expected = (line * np.minimum(1, 2.0 ** ((np.arange(256) - t) / 8))).sum()
        assert expected == pytest.approx(min(b, line.sum()), rel=1e-9)
        assert np.array_equal(listed_reference.chances(t), chances.chances(np.array([t]))[0])


def test_a_budget_of_just_the_certain_keys_keeps_them_certain() -> None:
    """S / (b - N) is infinite there; the whole number of codes is the answer."""
    histogram = np.zeros(256, np.int64)
    histogram[200], histogram[0] = 1 << 30, 1
    for t in (
        listed_reference.threshold(histogram, 1 << 30),
        chances.thresholds(histogram[None], np.array([2**30.0]))[0],
    ):
        assert listed_reference.chances(t)[200] == 1 << 24


@given(
    seed=seeds,
    lines=st.integers(1, 5),
    n=st.sampled_from((128, 384, 1024)),
    kind=st.sampled_from(("any", "certain", "rare")),
)
def test_a_draw_is_the_definition_bit_for_bit(seed: int, lines: int, n: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (lines, n)).astype(np.uint8)
    low, high = {"any": (1, (1 << 24) + 1), "certain": (1 << 24, (1 << 24) + 1), "rare": (1, 9)}[kind]
    u = rng.integers(low, high, (lines, 256)).astype(np.int32)
    first, edge = (
        rng.integers(0, 1 << 24, lines) * rng.integers(0, 2, lines),
        128 * rng.integers(0, n // 128 + 1, lines),
    )
    histograms = np.array([np.bincount(line[:end], minlength=256) for line, end in zip(codes, edge, strict=True)])
    lengths = chances.lengths(histograms, u, first)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens, weights = np.full(offsets[-1], -1, np.int32), np.full(offsets[-1], np.nan, np.float32)
    block_sampled_numba.draw(codes, edge, u, chances.log_weights(u), first, offsets, 2, tokens, weights)
    for line in range(lines):
        wanted = listed_reference.draw(codes[line, : edge[line]], u[line], int(first[line]))
        part = slice(offsets[line], offsets[line + 1])
        assert np.array_equal(tokens[part], wanted[0])
        assert np.array_equal(weights[part], wanted[1])


@given(seed=st.integers(0, 2**63 - 1), heads=st.integers(1, 4), blocks=st.integers(1, 5))
def test_starts_are_the_definition(seed: int, heads: int, blocks: int) -> None:
    found = chances.starts(seed, heads, blocks)
    wanted = [[listed_reference.start(seed, head, block) for block in range(blocks)] for head in range(heads)]
    assert np.array_equal(found, wanted)
    assert ((found >= 0) & (found < 1 << 24)).all()


@pytest.mark.parametrize("method", methods("key_lists"))
@few
@given(prompt=prompts(), seed=seeds, causal=st.booleans(), extra=st.floats(0.01, 1))
def test_lists_may_be_attended_to_and_have_their_density(
    method: str, prompt: Prompt, seed: int, causal: bool, extra: float
) -> None:
    """The draw is systematic along a line, so that no line is off by more than a key."""
    heads, m, n = prompt.shape
    least = bands(m, n).sum() / ends(m, n).sum()
    density = least + extra * (1 - least)
    starts = chances.starts(seed, heads, row_blocks(m))
    lists = choose("key_lists", method)(*prompt, np.full(heads, density), starts, 8, causal, prompt.scale)
    check(lists, *prompt.shape)
    found = lists.densities(m, n)
    assert (found <= 1).all()
    off = (found - density) * ends(m, n).sum()
    assert ((off if causal else np.abs(off)) <= row_blocks(m) + n * heads * 2.0**-20).all()


@few
@given(prompt=prompts(("float64",)), seed=seeds, causal=st.booleans())
def test_lists_are_the_definition_given_the_codes(prompt: Prompt, seed: int, causal: bool) -> None:
    _, m, n = prompt.shape
    one = Prompt(prompt.q[:1], prompt.k, prompt.v) if len(prompt.k) == 1 else Prompt(*(x[:1] for x in prompt))
    density = np.array([(1 + bands(m, n).sum() / ends(m, n).sum()) / 2])
    starts = chances.starts(seed, 1, row_blocks(m))
    lists = choose("key_lists", "numba")(*one, density, starts, 8, causal, prompt.scale)
    codes, histograms = encoded(one, 8, causal)
    u = chances.chances(chances.head_thresholds(histograms, float(density[0]), m, n, causal))
    for line, edge in enumerate(edges(m, n)):
        tokens, weights = listed_reference.draw(codes[line, :edge], u[line], int(starts[0, line]))
        part = slice(lists.token_offsets[line], lists.token_offsets[line + 1])
        assert np.array_equal(lists.tokens[part], tokens)
        assert np.array_equal(lists.log_weights[part], weights)


def repeated(heads: int, m: int, n: int, seed: int = 0) -> Prompt:
    """One head's rows, so many times."""
    q, k, v = made(np.random.default_rng(seed), m, n, 1, 1, 8, 3, "gaussian")
    return Prompt(np.repeat(2 * q, heads, axis=0), k, v + 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("m", "n"), [(300, 300), (140, 333)])
def test_weights_and_weighted_values_are_unbiased(m: int, n: int, causal: bool) -> None:
    """4,000 seeds: z-tests of W_hat and every coordinate of the numerator in some rows, Bonferroni at ALARM in all."""
    heads, rows = 4000, [m - 1, m - 20, 129, 130]
    prompt = repeated(heads, m, n)
    starts = chances.starts(5, heads, row_blocks(m))
    least = bands(m, n).sum() / ends(m, n).sum()
    densities = np.full(heads, least + 0.2 * (1 - least))
    lists = block_sampled_numba.key_lists(*prompt, densities, starts, 8, causal, prompt.scale)
    output, lse = listed_numba.listed(*prompt, lists, prompt.scale)
    exact, exact_lse = dense(prompt.q[:1], prompt.k, prompt.v, Softmax(), prompt.scale, causal=True)
    total = np.exp(lse - exact_lse)[:, rows, None]
    sums = np.concatenate([total, total * output[:, rows]], axis=2)
    wanted = np.concatenate([np.ones((1, len(rows), 1)), exact[:, rows]], axis=2)
    spread = sums.std(axis=0)
    assert spread.min() > 1e-3, "there is something to test"
    error = (sums.mean(axis=0) - wanted[0]) * np.sqrt(heads) / spread
    assert np.abs(error).max() < norm.isf(ALARM / 2 / error.size)


def test_the_expected_number_of_keys_is_the_budget() -> None:
    heads, m, n = 4000, 300, 333
    starts = chances.starts(6, heads, row_blocks(m))
    prompt = repeated(heads, m, n)
    lists = block_sampled_numba.key_lists(*prompt, np.full(heads, 0.8), starts, 8, False, prompt.scale)
    counts = np.diff(lists.token_offsets).reshape(heads, -1).sum(axis=1)
    assert np.abs(counts - budget(0.8, m, n)).max() <= row_blocks(m)
    assert abs(counts.mean() - budget(0.8, m, n)) < norm.isf(ALARM / 2) * counts.std() / np.sqrt(heads)


def unequal() -> Any:
    return np.array([0.7, 0.9])


def test_heads_may_have_densities_of_their_own() -> None:
    m = n = 700
    prompt = made(np.random.default_rng(0), m, n, 1, 2, 8, 3, "gaussian")
    for method in methods("key_lists"):
        lists = choose("key_lists", method)(*prompt, unequal(), chances.starts(0, 2, 6), 8, False, prompt.scale)
        assert np.allclose(lists.densities(m, n), unequal(), atol=0.01)
