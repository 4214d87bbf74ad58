"""Random numbers of selectors: a generator's published numbers, and that they look random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from attention.draws import _mixed, gaussians, permutation, uniforms

CPU = torch.device("cpu")
ALARM = 1e-6  # how often a test here would fail of itself, were its seeds not fixed


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as its authors write it."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


def test_it_is_the_published_generator() -> None:
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for seed, stream in ((0, 0), (7, 3), (2**63 - 1, 10**6)):
        start = _mixed((_mixed(seed) + stream * 0x9E3779B97F4A7C15) % 2**64)
        wanted = [((x >> 11) + 0.5) / 2**53 for x in splitmix64(start, 50)]
        assert uniforms(seed, stream, 50, CPU).tolist() == wanted


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_uniforms_are_uniform_and_gaussians_normal(stream: int) -> None:
    assert stats.kstest(uniforms(5, stream, 20000, CPU).numpy(), "uniform").pvalue > ALARM
    assert stats.kstest(gaussians(5, stream, 20000, CPU).numpy(), "norm").pvalue > ALARM


def test_seeds_and_streams_are_unrelated() -> None:
    found = np.stack([uniforms(seed, stream, 20000, CPU).numpy() for seed in range(4) for stream in range(4)])
    correlations = np.corrcoef(found)[np.triu_indices(16, 1)]
    assert abs(correlations * 20000**0.5).max() < stats.norm.isf(ALARM / 2 / len(correlations))


def test_a_permutation_has_every_number_once() -> None:
    assert sorted(permutation(3, 1, 1000, CPU).tolist()) == list(range(1000))
    assert permutation(3, 1, 0, CPU).tolist() == []
