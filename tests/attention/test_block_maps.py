"""Lists made of maps, and the key blocks that diagonals touch, entry by entry."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.block_maps import compressed, diagonal_blocks, key_lists
from attention.key_lists import check, plain
from attention.listed_reference import lines_of
from tests.selectors import SHAPES, places

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=40)


@few
@given(seed=seeds, shape=st.tuples(*[st.integers(1, 5)] * 2, st.integers(0, 6)), share=st.sampled_from((0.0, 0.5, 1.0)))
def test_compressed_keeps_what_is_kept_in_order(seed: int, shape: tuple[int, int, int], share: float) -> None:
    rng = np.random.default_rng(seed)
    keep, ids = rng.random(shape) < share, rng.integers(0, 99, (shape[0], 1, shape[2]))
    offsets, found = (x.numpy() for x in compressed(torch.from_numpy(keep), torch.from_numpy(ids)))
    lines = [keep[h, t] for h in range(shape[0]) for t in range(shape[1])]
    assert offsets.tolist() == [0, *np.cumsum([line.sum() for line in lines])]
    wanted = [i for line, h in zip(lines, np.repeat(range(shape[0]), shape[1]), strict=True) for i in ids[h, 0, line]]
    assert found[: offsets[-1]].tolist() == wanted
    assert found.dtype == np.int32 and offsets.dtype == np.int64


@few
@given(seed=seeds, shape=st.sampled_from(SHAPES), count=st.integers(0, 3))
def test_diagonals_touch_the_blocks_that_their_keys_lie_in(seed: int, shape: tuple[int, int], count: int) -> None:
    m, n = shape
    distances = np.random.default_rng(seed).integers(0, n, count)
    chosen = torch.zeros(1, n, dtype=torch.bool)
    chosen[0, distances] = True
    for place, row in zip(places(m, n), diagonal_blocks(chosen, m)[0], strict=True):
        touched = {int(p - D) // 128 for p in place.positions for D in distances if p >= D}
        assert set(np.flatnonzero(row.numpy()).tolist()) == touched


@few
@given(seed=seeds, shape=st.sampled_from(SHAPES))
def test_no_key_is_listed_twice_and_none_that_is_not_eligible(seed: int, shape: tuple[int, int]) -> None:
    (m, n), rng = shape, np.random.default_rng(seed)
    maps = [torch.from_numpy(rng.random((2, -(-m // 128), -(-n // 128))) < 0.4) for _ in range(2)]
    columns = torch.from_numpy(np.array([rng.permutation(n)[: n // 3] for _ in range(2)]))
    lists = key_lists(maps[0], m, n, means=maps[1], columns=columns)
    check(lists, 2, m, n)
    for line, place in enumerate(places(m, n) * 2):
        tokens, blocks, means = lines_of(plain(lists), line)
        keep, mean = (x.flatten(0, 1)[line, : place.own].numpy() for x in maps)
        assert set(blocks) == set(np.flatnonzero(keep)) and set(means) == set(np.flatnonzero(mean & ~keep))
        old = {int(j) for j in columns[line // len(places(m, n))] if j < 128 * place.own}
        assert set(tokens) == {j for j in old if not (keep | mean)[j // 128]}
