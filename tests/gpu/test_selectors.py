"""Selectors through the GPU's prefill, there or interpreted, beside the CPU's."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import Softmax, prefill  # noqa: E402
from attention.key_lists import check  # noqa: E402
from attention.selectors import StreamingLLM, catalogue  # noqa: E402
from attention.with_tail import WithTail  # noqa: E402
from gpu import prompt as module  # noqa: E402
from tests.gpu.interpreted import normal, pytestmark, waiting_is_an_error  # noqa: E402, F401


@pytest.mark.parametrize("tail", [{}, {"sampled": 5}, {"means": True}, {"sampled": 5, "means": True}], ids=str)
def test_a_selector_makes_its_lists_where_the_tensors_are(tail):
    q, k, v = (normal(2, heads, 290, 64, seed=heads).half() for heads in (2, 1, 1))
    q, policy = q[:, :, -140:], StreamingLLM(sinks=3, window=1)
    policy = WithTail(policy, **tail) if tail else policy
    assert module.refuses(policy=policy, weight=Softmax(), causal=True) is None
    assert "selectors" in str(module.refuses(policy=None, weight=Softmax(), causal=True))
    found = module.prompt(q, k, v, policy, None)
    wanted = prefill(*(x.cpu().double().numpy() for x in (q, k, v)), policy=policy)
    assert (found.output.cpu().double() - torch.from_numpy(wanted.output)).abs().max() < 4e-3
    assert torch.equal(found.counters.reported.cpu(), torch.from_numpy(wanted.counters.reported))
    assert torch.allclose(found.densities.cpu().double(), torch.from_numpy(wanted.densities))


@pytest.mark.gpu
@pytest.mark.parametrize("name", catalogue())
def test_lists_wait_for_nothing(name):
    q, k = (normal(heads, rows, 64, seed=heads).bfloat16() for heads, rows in ((8, 1900), (2, 3077)))
    for policy in catalogue()[name].examples():
        wrapped = WithTail(policy, sampled=9), WithTail(policy, sampled=9, means=True)
        for each in (policy, *wrapped):
            each.lists(q, k, 0.125)  # what is set up once may wait
            with waiting_is_an_error():
                lists = each.lists(q, k, 0.125)
            check(lists, 8, 1900, 3077)
