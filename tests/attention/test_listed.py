"""Attention over shared lists: every row of the table against the definition, and the definition against itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Softmax
from attention.key_lists import KeyLists, check, edges, row_blocks
from attention.listed_reference import listed
from attention.reference import dense
from hsr import methods
from hsr.backend import choose
from tests.prompts import Prompt, made, prompts, some_lists

METHODS = methods("listed")
OTHERS = tuple(method for method in METHODS if method != "reference")
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}
few = settings(max_examples=60)


def assert_same(found: Any, wanted: Any, prompt: Prompt) -> None:
    """Equal but for the rounding of scores in the prompt's dtype, and of the sums."""
    unit = UNIT[prompt.q.dtype.name]
    q, k, v = (x.astype(np.float64) for x in prompt)
    most = prompt.scale * np.linalg.norm(q, axis=2).max() * np.linalg.norm(k, axis=2).max()
    score = (q.shape[2] + 8) * unit * most + 8 * unit * np.abs(wanted[1]).max()
    reach = np.abs(v).max()
    off = np.abs(found[0].astype(np.float64) - wanted[0])
    assert np.isfinite(found[0]).all() and np.isfinite(found[1]).all()
    assert found[0].dtype == prompt.q.dtype and found[1].dtype == np.float64
    assert (off <= reach * (np.minimum(np.expm1(2 * score), 2) + 64 * unit)).all()
    assert (np.abs(found[1] - wanted[1]) <= 2 * score + 64 * unit).all()


def no_lists(shape: tuple[int, int, int]) -> KeyLists:
    return KeyLists(np.zeros(shape[0] * row_blocks(shape[1]) + 1, np.int64), np.empty(0, np.int32))


@pytest.mark.parametrize("method", OTHERS)
@few
@given(prompt=prompts(), seed=st.integers(0, 2**32 - 1), share=st.sampled_from((0.02, 0.3, 1.0)))
def test_every_row_of_the_table_is_the_definition(method: str, prompt: Prompt, seed: int, share: float) -> None:
    lists = some_lists(np.random.default_rng(seed), prompt.shape, share)
    check(lists, *prompt.shape)
    assert_same(choose("listed", method)(*prompt, lists, prompt.scale), listed(*prompt, lists, prompt.scale), prompt)
    bare = dataclasses.replace(lists, log_weights=None, means=None, mean_offsets=None)
    assert_same(choose("listed", method)(*prompt, bare, prompt.scale), listed(*prompt, bare, prompt.scale), prompt)


@pytest.mark.parametrize("method", METHODS)
@few
@given(prompt=prompts(), whole=st.booleans())
def test_lists_of_everything_are_dense_attention(method: str, prompt: Prompt, whole: bool) -> None:
    heads, m, n = prompt.shape
    size = 128 if whole else 1
    counts = np.tile(edges(m, n) // size, heads)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ids = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    lists = no_lists(prompt.shape)
    lists = dataclasses.replace(lists, block_offsets=offsets, blocks=ids) if whole else KeyLists(offsets, ids)
    check(lists, *prompt.shape)
    assert np.allclose(lists.densities(m, n), 1)
    wanted = dense(*prompt, Softmax(), prompt.scale, causal=True)
    assert_same(choose("listed", method)(*prompt, lists, prompt.scale), wanted, prompt)


@pytest.mark.parametrize("method", METHODS)
@few
@given(prompt=prompts())
def test_empty_lists_leave_the_band(method: str, prompt: Prompt) -> None:
    _, m, n = prompt.shape
    seen = np.arange(n) >= edges(m, n)[np.arange(m) // 128, None]
    wanted = dense(*prompt, Softmax(), prompt.scale, causal=True, keep=np.broadcast_to(seen, prompt.shape))
    assert_same(choose("listed", method)(*prompt, no_lists(prompt.shape), prompt.scale), wanted, prompt)


@pytest.mark.parametrize("method", METHODS)
@few
@given(prompt=prompts(("float64",)), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_a_line_means_nothing(method: str, prompt: Prompt, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lists = some_lists(rng, prompt.shape, 0.2)
    tokens, weights = lists.tokens.copy(), lists.log_weights.copy()
    for first, last in zip(lists.token_offsets, lists.token_offsets[1:], strict=False):
        order = first + rng.permutation(last - first)
        tokens[first:last], weights[first:last] = tokens[order], weights[order]
    run = choose("listed", method)
    mixed = dataclasses.replace(lists, tokens=tokens, log_weights=weights)
    assert_same(run(*prompt, mixed, prompt.scale), run(*prompt, lists, prompt.scale), prompt)


@pytest.mark.parametrize("method", METHODS)
@few
@given(seed=st.integers(0, 2**32 - 1), m=st.sampled_from((129, 300, 421)), before=st.sampled_from((0, 131)))
def test_log_sums_merge_what_was_attended_apart(method: str, seed: int, m: int, before: int) -> None:
    """Weights add up: tokens alone and blocks alone, each with the band, make both together with the band twice."""
    rng = np.random.default_rng(seed)
    prompt = made(rng, m, m + before, 1, 2, 16, 3, "gaussian")
    both = dataclasses.replace(some_lists(rng, prompt.shape, 0.3), mean_offsets=None, means=None)
    single = dataclasses.replace(both, block_offsets=None, blocks=None)
    whole = dataclasses.replace(no_lists(prompt.shape), block_offsets=both.block_offsets, blocks=both.blocks)
    run = choose("listed", method)
    parts = [run(*prompt, lists, prompt.scale) for lists in (both, no_lists(prompt.shape), single, whole)]
    sums = [(np.exp(lse), np.exp(lse)[..., None] * output) for output, lse in parts]
    for found in zip(*sums, strict=True):
        assert np.allclose(found[0] + found[1], found[2] + found[3], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize(("d", "dv"), [(256, 7), (5, 256), (128, 128)])
def test_wide_heads(method: str, d: int, dv: int) -> None:
    rng = np.random.default_rng(0)
    prompt = Prompt(*(x.astype(np.float32) for x in made(rng, 300, 431, 1, 2, d, dv, "sharp")))
    lists = some_lists(rng, prompt.shape, 0.5)
    assert_same(choose("listed", method)(*prompt, lists, prompt.scale), listed(*prompt, lists, prompt.scale), prompt)


@pytest.mark.parametrize("method", OTHERS)
def test_inputs_may_have_any_strides_and_stay_as_they_are(method: str) -> None:
    rng = np.random.default_rng(1)
    prompt = made(rng, 200, 333, 2, 2, 16, 8, "gaussian")
    strided = Prompt(*(np.repeat(x.swapaxes(0, 1), 2, axis=0)[::2].swapaxes(0, 1) for x in prompt))
    before = [x.copy() for x in strided]
    lists = some_lists(rng, prompt.shape, 0.5)
    assert_same(choose("listed", method)(*strided, lists, prompt.scale), listed(*prompt, lists, prompt.scale), prompt)
    assert all(np.array_equal(x, y) for x, y in zip(strided, before, strict=True))
