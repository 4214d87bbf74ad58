"""Lists of keys that blocks of rows share: their geometry, their density, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention import key_lists
from attention.key_lists import KeyLists, check
from hsr import ArgumentError

ROWS = (1, 2, 127, 128, 129, 256, 3 * 128 + 37)
shapes = st.tuples(st.sampled_from(ROWS), st.sampled_from((0, 1, 5, 127, 128, 131, 300))).map(
    lambda pair: (pair[0], sum(pair))
)


@given(shape=shapes)
def test_the_band_begins_at_a_block_of_keys_and_ends_with_the_row(shape: tuple[int, int]) -> None:
    m, n = shape
    edges, ends, bands = (part(m, n) for part in (key_lists.edges, key_lists.ends, key_lists.bands))
    for block in range(key_lists.row_blocks(m)):
        rows = range(128 * block, min(m, 128 * (block + 1)))
        positions = [n - m + i for i in rows]
        assert edges[block] % 128 == 0
        assert edges[block] <= positions[0] < edges[block] + 128
        assert ends[block] == positions[-1] + 1
        assert bands[block] == ends[block] - edges[block] <= 255
    assert all(part.dtype == np.int64 for part in (edges, ends, bands))


@given(shape=shapes, rows=st.sampled_from((1, 2, 8, 64, 128)))
def test_representatives_lie_in_their_block_or_before_its_second_row(shape: tuple[int, int], rows: int) -> None:
    m, _ = shape
    first = 128 * np.arange(key_lists.row_blocks(m))[:, None]
    inside = key_lists.representatives(m, rows)
    before = key_lists.representatives(m, rows, causal=True)
    assert inside.shape == before.shape == (len(first), rows)
    assert (inside >= first).all() and (inside < np.minimum(first + 128, m)).all()
    assert (before <= first).all() and (before >= 0).all() and (before[:, 0] == first[:, 0]).all()


@given(shape=shapes, rows=st.sampled_from((1, 2, 8, 64, 128)))
def test_representatives_speak_for_rows_of_their_part(shape: tuple[int, int], rows: int) -> None:
    m, _ = shape
    part, first = 128 // rows, 128 * np.arange(key_lists.row_blocks(m))[:, None, None]
    begin = part * np.arange(rows)[:, None]
    inside = key_lists.spoken_for(m, rows)
    before = key_lists.spoken_for(m, rows, causal=True)
    assert inside.shape == before.shape == (len(first), rows, key_lists.spoken(rows))
    assert (inside >= np.minimum(first + begin, m - 1)).all()
    assert (inside < np.minimum(first + begin + part, m)).all()
    assert (np.diff(key_lists.spoken_for(128 * len(first), rows)) > 0).all()
    assert (before <= np.maximum(first - begin, 0)).all() and (before > np.maximum(first - begin - part, -1)).all()
    assert (before[..., 0] == key_lists.representatives(m, rows, causal=True)).all()


def test_budgets_are_what_the_density_leaves_beside_the_bands() -> None:
    assert key_lists.budget(0.1, 8192, 8192) == pytest.approx(0.1 * 128 * 64 * 65 / 2 - 8192)
    with pytest.raises(ArgumentError, match=r"density must be above 0.4, .* 512 rows of 512 keys make; got 0.3"):
        key_lists.budget(0.3, 512, 512)
    assert key_lists.budget(0.3, 100, 100) < 0  # nothing is eligible, so nothing is refused


def some() -> KeyLists:
    """Two heads of (300, 300) rows: edges 0, 128, 256."""
    return KeyLists(
        np.array([0, 0, 2, 4, 4, 4, 5]),
        np.array([5, 127, 130, 4, 200, -9], np.int32),
        np.array([0, 1, 2, 3, 4, np.nan], np.float32),
        np.array([0, 0, 0, 0, 0, 1, 2]),
        np.array([0, 0], np.int32),
        np.array([0, 0, 0, 0, 0, 0, 0]),
        np.array([], np.int32),
    )


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_good_lists_pass_and_have_their_densities(convert: Any) -> None:
    lists = KeyLists(**{name: convert(part) for name, part in vars(some()).items() if isinstance(part, np.ndarray)})
    check(lists, 2, 300, 300)
    seen, bands = 128 + 256 + 300, 128 + 128 + 44
    assert np.allclose(lists.densities(300, 300), [(4 + bands) / seen, (1 + 256 + bands) / seen])
    assert lists.lines == 6


def test_densities_are_float64_whatever_holds_the_lists() -> None:
    offsets = np.array([0, 0, 0, 1])
    for kind in (np.asarray, torch.from_numpy):
        found = KeyLists(kind(offsets), kind(np.array([7], np.int32))).densities(300, 300)
        assert str(found.dtype).endswith("float64")
        assert float(found[0]) == (1 + key_lists.bands(300, 300).sum()) / key_lists.ends(300, 300).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_offsets": np.array([0, 0, 3, 2, 4, 4, 5])}, "token_offsets must rise from 0 to at most 6"),
        ({"token_offsets": np.array([1, 1, 2, 4, 4, 4, 5])}, "token_offsets must rise from 0"),
        ({"token_offsets": np.array([0, 0, 2, 4, 4, 4, 7])}, "token_offsets must rise from 0 to at most 6"),
        ({"token_offsets": np.array([0, 2, 4, 4, 5])}, "token_offsets must have 7 entries"),
        ({"token_offsets": np.zeros(7, np.int32)}, "token_offsets must be .* of int64; got int32"),
        ({"token_offsets": None}, "token_offsets must be .* of int64; got None"),
        ({"tokens": np.array([5, 128, 130, 4, 200, 0], np.int32)}, r"tokens must lie in 0\.\.127 on line 1.*got 128"),
        ({"tokens": np.array([5, -1, 130, 4, 200, 0], np.int32)}, r"tokens must lie in 0\.\.127 on line 1.*got -1"),
        ({"tokens": np.array([5, 5, 130, 4, 200, 0], np.int32)}, "tokens must name each key once.*5 twice on line 1"),
        ({"tokens": np.array([5, 6, 130, 4, 100, 0], np.int32)}, "tokens must not lie in .* token 100 on line 5"),
        ({"tokens": np.array([5.0])}, "tokens must be .* of int32; got float64"),
        ({"log_weights": np.zeros(4, np.float32)}, "log_weights must have 5 entries"),
        ({"log_weights": np.array([0, 1, np.inf, 3, 4, 5], np.float32)}, "log_weights must be finite; got inf at 2"),
        ({"blocks": np.array([0, 2], np.int32)}, r"blocks must lie in 0\.\.1 on line 5"),
        ({"block_offsets": np.array([0, 0, 0, 0, 0, 0, 2])}, "blocks and means must name each key once"),
        ({"means": np.zeros(1, np.int32), "mean_offsets": np.array([0] * 6 + [1])}, "blocks and means must name each"),
        ({"blocks": None}, "blocks must be .* of int32; got None"),
        ({"rows": 64}, "lists must have blocks of 128 rows and 128 keys; got 64 and 128"),
    ],
)
def test_bad_lists_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        check(dataclasses.replace(some(), **change), 2, 300, 300)
