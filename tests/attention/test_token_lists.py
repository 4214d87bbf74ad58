"""Lists of tokens: made of masks and of ids, read back, and refused where they are not sound."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.held_rows import HeldRows
from attention.token_lists import Means, TokenLists, check, check_shapes
from hsr.errors import ArgumentError


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), lines=st.integers(1, 5), n=st.integers(1, 40), share=st.floats(0, 1))
def test_a_mask_comes_back_in_order_with_its_weights(seed: int, lines: int, n: int, share: float) -> None:
    random = np.random.default_rng(seed)
    mask, weights = torch.from_numpy(random.random((lines, n)) < share), torch.from_numpy(random.random((lines, n)))
    lists = TokenLists.from_mask(mask, log_weights=weights)
    check(lists, lines, lines, n)
    assert torch.equal(lists.mask(n), mask) and lists.log_weights is not None
    for line in range(lines):
        ids = lists.tokens[line, : lists.counts[line]].long()
        assert torch.equal(ids, mask[line].nonzero()[:, 0])
        assert torch.equal(lists.log_weights[line, : len(ids)], weights[line, ids].float())
    width = int(random.integers(0, n + 1))
    cut = TokenLists.from_mask(mask, width)
    assert cut.log_weights is None and cut.tokens.shape == (lines, width)
    assert torch.equal(cut.counts, lists.counts.clamp(max=width))
    assert torch.equal(cut.mask(n), mask & (mask.cumsum(1) <= width))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), lines=st.integers(1, 5), n=st.integers(1, 40))
def test_valid_ids_come_first_in_their_order(seed: int, lines: int, n: int) -> None:
    random = np.random.default_rng(seed)
    ids = torch.from_numpy(np.stack([random.permutation(n) for _ in range(lines)]))
    valid, weights = torch.from_numpy(random.random((lines, n)) < 0.5), torch.rand(lines, n)
    lists = TokenLists.from_ids(ids, valid, weights)
    check(lists, lines, lines, n)
    for line in range(lines):
        assert lists.tokens[line, : lists.counts[line]].tolist() == ids[line][valid[line]].tolist()
        assert torch.equal(lists.log_weights[line, : lists.counts[line]], weights[line][valid[line]])
    everything = TokenLists.from_ids(ids)
    assert torch.equal(everything.tokens.long(), ids) and (everything.counts == n).all() and everything.valid().all()


def test_means_of_weight_above_zero_are_attended_to() -> None:
    logs = torch.tensor([[0.0, -torch.inf, 2.0], [-torch.inf] * 3])
    lists = TokenLists.from_ids(torch.zeros(2, 1), means=Means(torch.zeros(1, 3, 4), torch.zeros(1, 3, 2), logs))
    assert lists.attended().tolist() == [3, 1]
    assert dataclasses.replace(lists, means=None).attended().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.tensor([[0, 7], [0, 1]], dtype=torch.int32)}, r"tokens must lie in 0..4; got 0..7"),
        ({"tokens": torch.tensor([[0, -1], [0, 1]], dtype=torch.int32)}, r"tokens must lie in 0..4; got -1..0"),
        ({"tokens": torch.tensor([[3, 3], [0, 1]], dtype=torch.int32)}, "tokens must name a key once in a line"),
        ({"tokens": torch.tensor([[0, 1], [0, 1]])}, "lists must be int32; got torch.int64"),
        ({"counts": torch.tensor([3, 1], dtype=torch.int32)}, r"counts must lie in 0..2; got 1..3"),
        ({"counts": torch.tensor([1], dtype=torch.int32)}, r"lists must be 4 or 2 lines; got 2 of \(1,\) counts"),
        ({"tokens": torch.zeros(3, 2, dtype=torch.int32)}, r"lists must be 4 or 2 lines; got 3"),
        ({"log_weights": torch.zeros(2, 3)}, r"log_weights must be \(2, 2\) float32; got \(2, 3\)"),
        ({"log_weights": torch.zeros(2, 2).double()}, r"log_weights must be \(2, 2\) float32; got .* torch.float64"),
        (
            {"means": Means(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 4))},
            r"means.log_weights must be \(2, 3\) float32; got \(2, 4\)",
        ),
    ],
)
def test_unsound_lists_are_told(change: dict[str, Any], message: str) -> None:
    sound = TokenLists(torch.tensor([[4, 0], [1, 9]], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32))
    check(sound, 4, 2, 5)
    with pytest.raises(ArgumentError, match=message):
        check(dataclasses.replace(sound, **change), 4, 2, 5)


def test_rows_grow_are_rewritten_and_leave_their_source_alone() -> None:
    first = torch.arange(12.0).reshape(2, 3, 2)
    held, before, source = HeldRows(first), first.clone(), first
    held.put(3, torch.ones(2, 2, 2))
    held.put(4, 2 * torch.ones(2, 3, 2))
    assert held.rows.shape == (2, 7, 2) and torch.equal(held.rows[:, :3], before)
    assert held.rows[0, 3:, 0].tolist() == [1, 2, 2, 2] and torch.equal(source, before)
    copies = 0
    for t in range(7, 1000):
        place = held.rows.data_ptr()
        held.put(t, torch.full((2, 1, 2), float(t)))
        copies += held.rows.data_ptr() != place
    assert copies <= 9 and held.rows[1, 7:, 1].tolist() == list(range(7, 1000))


def test_means_must_be_of_the_caches_heads_and_widths() -> None:
    tokens, counts = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    for keys, values in (((1, 3, 4), (2, 3, 8)), ((2, 3, 4), (2, 3, 2)), ((2, 2, 4), (2, 2, 7))):
        lists = TokenLists(tokens, counts, None, Means(torch.zeros(keys), torch.zeros(values), torch.zeros(2, 3)))
        with pytest.raises(ArgumentError, match=r"means\.(keys|values) must be \(2, [23], [48]\); got"):
            check_shapes(lists, 2, 2, (4, 8))
