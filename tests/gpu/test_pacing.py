"""Thresholds of a causal selection on the GPU or interpreted: the definition's own, whatever the codes."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import chances  # noqa: E402
from attention.key_lists import edges  # noqa: E402
from attention.listed_reference import UNITS  # noqa: E402
from gpu import pacing  # noqa: E402
from tests.gpu.interpreted import HERE, poisoned_allocations, pytestmark, waiting_is_an_error  # noqa: E402, F401
from tests.histograms import KINDS, made  # noqa: E402

pytestmark = [*pytestmark, pytest.mark.usefixtures("poisoned_allocations")]


@pytest.mark.parametrize("share", [1e-4, 0.1, 1.0])
@pytest.mark.parametrize(("T", "shift"), [(1, 900), (24, 0), (9, 70_001), pytest.param(1024, 0, marks=pytest.mark.gpu)])
def test_chances_are_the_definition_bit_for_bit(T, shift, share):
    edge = edges(128 * T, 128 * T + shift)
    kept = share * edge.sum()
    histograms = np.array([made(np.random.default_rng(seed), kind, edge) for seed, kind in enumerate(KINDS)])
    found = pacing.chances(torch.from_numpy(histograms).to(torch.int32).to(HERE), kept, shift)
    wanted = [chances.chances(chances.paced(head, kept, edge)) for head in histograms]
    assert np.array_equal(found.cpu().numpy(), wanted)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    histograms = torch.ones(3, 20, 256, dtype=torch.int32, device=HERE)
    for kept in (1 / UNITS, 100.0):  # a one would be a constant to Triton, if it might
        pacing.chances(histograms, kept, 0)  # compiles
        with waiting_is_an_error():
            pacing.chances(histograms, kept, 0)
