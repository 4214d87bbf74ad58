"""What selectors estimate attention by, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import estimates
from tests.selectors import SHAPES, block_means, block_sums, by_distance, gaussian, last_attention, reaching

few = settings(max_examples=60)


@few
@given(
    mass=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    eighths=st.integers(0, 8),
    forced=st.sets(st.integers(0, 11)),
    least=st.integers(0, 4),
)
def test_covering_is_the_fewest_that_reach_the_share(
    mass: list[int], eighths: int, forced: set[int], least: int
) -> None:
    share, inside = eighths / 8, {i for i in forced if i < len(mass)}
    must = torch.tensor([[i in inside for i in range(len(mass))]])
    found = estimates.covering(torch.tensor([mass], dtype=torch.float64), share, must, least)[0]
    kept = {i for i in range(len(mass)) if found[i]}
    fewest = reaching(np.array(mass), share, inside)  # of equal entries either may be in
    assert inside <= kept and len(kept) == max(len(fewest), min(least, len(mass)))
    assert sum(mass[i] for i in kept) >= share * sum(mass)


@pytest.mark.parametrize("shape", SHAPES)
def test_last_rows_by_key_and_by_distance(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = gaussian(0, *shape, group=1)
    monkeypatch.setattr(estimates, "LARGEST", 1)  # a head at a time
    found = estimates.last_rows(torch.from_numpy(prompt.q), torch.from_numpy(prompt.k), prompt.scale, 64)
    for head in range(2):
        shares = last_attention(prompt.scale * prompt.q[head], prompt.k[head], 64)
        assert np.allclose(found[0][head], shares.mean(axis=0))
        assert np.allclose(found[1][head], by_distance(shares))


@pytest.mark.parametrize("n", [1, 128, 300])
@pytest.mark.parametrize("phase", [0, 1, 127])
def test_a_distance_lies_in_two_block_distances(n: int, phase: int) -> None:
    mass = np.random.default_rng(n).random(n)
    found = estimates.by_block_distance(torch.from_numpy(mass)[None], phase)[0].numpy()
    wanted = np.zeros(len(found))
    for D in range(n):
        for row in range(128):
            wanted[1 - (phase + row - D) // 128] += mass[D] / 128
    assert np.allclose(found, wanted)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (129, 129)])
@pytest.mark.parametrize("largest", [1, 1 << 27])
def test_block_attention_is_the_mean_of_the_rows_there_are(
    shape: tuple[int, int], largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (m, n), prompt = shape, gaussian(1, *shape, sharp=1.0)
    monkeypatch.setattr(estimates, "LARGEST", largest)
    found = estimates.block_attention(torch.from_numpy(prompt.q), torch.from_numpy(prompt.k), prompt.scale).numpy()
    for head in range(4):
        rows = last_attention(prompt.scale * prompt.q[head], prompt.k[head // 2], m)
        wanted = [block_sums(rows[first : first + 128].mean(axis=0)) for first in range(0, m, 128)]
        assert np.allclose(found[head], wanted) and np.allclose(found[head].sum(axis=1), 1)
    assert not found[:, 0, (n - m + min(m, 128) - 1) // 128 + 1 :].any()


def test_distances_of_distributions() -> None:
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    middle = (np.log(4 / 3) + (np.log(2 / 3) + np.log(2)) / 2) / 2
    wanted = np.sqrt([[np.log(2)], [0], [middle]])
    assert np.allclose(estimates.jensen_shannon(p, q), wanted) and np.allclose(estimates.jensen_shannon(q, p), wanted)


def test_means_of_blocks_are_of_the_rows_there_are() -> None:
    x = np.random.default_rng(0).standard_normal((2, 300, 3))
    assert np.allclose(estimates.means(torch.from_numpy(x))[1], block_means(x[1]))
