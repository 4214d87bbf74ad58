"""Attention to chosen tokens: every row of the table on the CPU gives what the definition says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Softmax
from attention.chosen_numba import chosen
from attention.chosen_reference import chosen as definition
from attention.reference import dense
from attention.token_lists import Means, TokenLists
from tests.chosen import some_lists

KINDS = ("gaussian", "lattice", "repeated", "zero", "huge", "mixed")


def spread(random: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: type) -> torch.Tensor:
    x = random.standard_normal(shape)
    if kind == "lattice":
        x = random.integers(-2, 3, shape).astype(float)
    if kind == "repeated":
        x = x[:, random.integers(0, shape[1] // 8 + 1, shape[1])]
    if kind == "zero":
        x *= random.random((*shape[:-1], 1)) < 0.5
    if kind == "huge":
        x *= 1e4
    if kind == "mixed":
        x *= 10.0 ** random.integers(-12, 6, (*shape[:-1], 1))
    return torch.from_numpy(x.astype(dtype))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, ...]:
    """Keys and values in a cache with room to spare or without, a group's lists or a head's own."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    G, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n, d, dv = (
        draw(st.one_of(st.integers(1, 4), st.integers(5, 200))),
        draw(st.integers(1, 24)),
        draw(st.integers(1, 9)),
    )
    dtype, room = draw(st.sampled_from((np.float32, np.float64))), draw(st.sampled_from((0, 3)))
    q = spread(random, (G * group, 2, d), draw(st.sampled_from(KINDS)), dtype)[:, 0]
    k, v = (spread(random, (G, n + room, w), draw(st.sampled_from(KINDS)), dtype)[:, :n] for w in (d, dv))
    lines = G * draw(st.sampled_from((1, group)))
    lists = some_lists(random, lines, G, n, d, draw(st.booleans()), draw(st.sampled_from((0, 0, 1, 20))))
    if lists.means is not None:
        values = torch.from_numpy(random.standard_normal((G, lists.means.keys.shape[1], dv)))
        lists = TokenLists(
            lists.tokens,
            lists.counts,
            lists.log_weights,
            Means(lists.means.keys, values.to(v), lists.means.log_weights),
        )
    return q, k, v, lists, draw(st.sampled_from((d**-0.5, 1.0, 3e-3)))


@settings(max_examples=100)
@given(problem=problems())
def test_numba_is_its_definition(problem: tuple[Any, ...]) -> None:
    q, k, v, lists, scale = problem
    before = [x.clone() for x in (q, k, v, lists.tokens, lists.counts)]
    (output, lse), (true, sums) = chosen(*problem), definition(*problem)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, lists.tokens, lists.counts), before, strict=True))
    assert output.shape == true.shape and output.dtype == lse.dtype == np.float64
    keys = k if lists.means is None else torch.cat([k, lists.means.keys.to(k)], 1)
    largest = scale * float(q.double().norm(dim=1).max() * keys.double().norm(dim=2).max())
    error = 1e-14 * largest + 1e-12  # of a score: the sums are made in another order
    values = v if lists.means is None else torch.cat([v, lists.means.values.to(v)], 1)
    assert np.array_equal(np.isneginf(lse), np.isneginf(sums))
    seen = ~np.isneginf(sums)
    assert (np.abs(lse[seen] - sums[seen]) <= error).all()
    assert (np.abs(output - true) <= 4 * error * float(values.double().norm(dim=2).max()) + 1e-12).all()
    assert not output[~seen].any()


@pytest.mark.parametrize("run", [chosen, definition], ids=["numba", "reference"])
def test_every_key_is_dense_attention_and_lists_may_be_shared(run: Any) -> None:
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal(shape) for shape in [(6, 1, 8), (2, 33, 8), (2, 33, 5)])
    true, sums = dense(q, k, v, Softmax(), 0.3)
    tensors = [torch.from_numpy(x) for x in (q[:, 0], k, v)]
    for lines in (2, 6):
        output, lse = run(*tensors, TokenLists.from_mask(torch.ones(lines, 33, dtype=torch.bool)), 0.3)
        assert np.allclose(output, true[:, 0], atol=1e-14) and np.allclose(lse, sums[:, 0], atol=1e-14)


@pytest.mark.parametrize("run", [chosen, definition], ids=["numba", "reference"])
def test_laws_of_log_weights_and_means(run: Any) -> None:
    random = np.random.default_rng(2)
    q, k, v = (torch.from_numpy(random.standard_normal(shape)) for shape in [(2, 8), (1, 12, 8), (1, 12, 3)])
    everything = TokenLists.from_mask(torch.ones(2, 12, dtype=torch.bool))
    output, lse = run(q, k, v, everything, 0.5)
    heavier = TokenLists(everything.tokens, everything.counts, torch.full((2, 12), np.log(3.0)))
    assert np.allclose(run(q, k, v, heavier, 0.5)[0], output)
    assert np.allclose(run(q, k, v, heavier, 0.5)[1], lse + np.log(3))
    copies = k.clone(), v.clone()
    for x in copies:
        x[:, 4:] = x[:, 4:5]  # eight keys alike, which one mean of log weight ln 8 is
    whole = run(q, *copies, everything, 0.5)
    mean = Means(copies[0][:, 4:5], copies[1][:, 4:5], torch.full((2, 1), np.log(8.0)))
    first = TokenLists.from_ids(torch.arange(4).expand(2, -1), means=mean)
    assert all(np.allclose(x, y, atol=1e-7) for x, y in zip(run(q, *copies, first, 0.5), whole, strict=True))
