"""MInference's vertical-slash pattern against its paper in float64."""

from __future__ import annotations

import numpy as np
import pytest

from attention.selectors.minference import MInference
from hsr.errors import ArgumentError
from tests.selectors import SHAPES, Line, by_distance, gaussian, last_attention, lines, places, top, wanted


def reference(q: np.ndarray, k: np.ndarray, vertical: int, slash: int) -> list[Line]:
    shares = last_attention(q, k, 64)
    columns = top(shares.sum(axis=0), vertical, set(range(30)))
    diagonals = top(by_distance(shares), slash, set(range(100)))
    found = []
    for place in places(len(q), len(k)):
        touched = {(int(p) - D) // 128 for p in place.positions for D in diagonals if p >= D}
        blocks = {J for J in touched if J < place.own}
        tokens = {j for j in columns if j < 128 * place.own and j // 128 not in blocks}
        found.append(Line(tokens, blocks, set()))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("selector", [*MInference.examples(), MInference()], ids=str)
def test_it_is_the_paper(shape: tuple[int, int], selector: MInference) -> None:
    prompt = gaussian(1, *shape)
    assert lines(selector, prompt) == wanted(prompt, lambda q, k: reference(q, k, selector.vertical, selector.slash))


def test_both_key_blocks_of_a_diagonal_are_touched() -> None:
    """One strong distance, 300: rows of a block meet it in the blocks 2 and 3 before theirs."""
    n = 1024
    turns = 2 * np.pi * np.arange(n)[:, None] * np.arange(1, 33) / 409  # a sum of cosines, largest at distance 300
    k = np.concatenate([np.cos(turns), np.sin(turns)], axis=1)[None]
    q = np.roll(k, 300, axis=1) * 2
    prompt = gaussian(0, n, n, g=1, group=1, d=64)._replace(q=q, k=k)
    found = lines(MInference(30, 101), prompt)
    assert all({own - 2, own - 3} <= line.blocks for own, line in enumerate(found) if own >= 3)


def test_more_columns_and_diagonals_only_add() -> None:
    prompt = gaussian(3, 700, 900)
    less, more = lines(MInference(40, 110), prompt), lines(MInference(90, 130), prompt)
    for a, b in zip(less, more, strict=True):
        assert a.blocks <= b.blocks
        assert {j for j in a.tokens if j // 128 not in b.blocks} <= b.tokens


@pytest.mark.parametrize("given", [{"vertical": 29}, {"slash": 99}])
def test_settings_out_of_range_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match="must be"):
        MInference(**given)
