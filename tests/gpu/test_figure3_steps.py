"""The decode steps that figure 3 reads a text with, on the GPU or interpreted."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import Sampled  # noqa: E402
from benchmarks.perplexity import StepStage  # noqa: E402
from benchmarks.smollm import causal_attention  # noqa: E402
from tests.gpu.interpreted import HERE, pytestmark  # noqa: E402, F401


@pytest.mark.parametrize(("n", "budget"), [(136, 30), pytest.param(300, 1000, marks=pytest.mark.gpu)])
def test_each_row_attends_to_what_it_sees(n, budget):
    """Exactly where it sees no more than is certain, or than the budget."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, n, 64, generator=generator).to(HERE) for heads in (4, 2, 2))
    stage, exact = StepStage(Sampled(budget=budget)), max(127, min(n, budget))
    found, wanted = stage.attend(0, q, k, v, 0.125), causal_attention(q, k, v, 0.125)
    assert found.dtype == torch.float32
    assert (found - wanted)[:, :exact].norm() < 2e-3 * wanted[:, :exact].norm()
    if exact == n:
        assert stage.reported == [pytest.approx((n + 1) / 2)]
    else:
        assert 1e-2 < (found - wanted)[:, exact:].norm() / wanted[:, exact:].norm() < 2
        assert stage.reported[0] < (n + 1) / 2
