"""Every decode selector on a GPU: the CPU's lists, and not one wait of the host."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import DecodeSession  # noqa: E402
from attention.decode_selector import DecodeSelector  # noqa: E402
from attention.selectors import catalogue  # noqa: E402
from attention.step_tail import StepTail  # noqa: E402
from attention.token_lists import check  # noqa: E402
from tests.decode_selectors import Cache, cache  # noqa: E402
from tests.gpu.interpreted import waiting_is_an_error  # noqa: E402

EXAMPLES = [example for selector in catalogue(DecodeSelector).values() for example in selector.examples()]
EXAMPLES += StepTail.examples()
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("selector", EXAMPLES, ids=str)]


def on_gpu(made, dtype):
    return Cache(*(x.to(dtype).cuda() for x in made))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_session_never_waits(selector, dtype):
    q, k, v = on_gpu(cache(1, 333, d=64, dv=64), dtype)
    session = DecodeSession(k[:, :300], v[:, :300], policy=selector, queries=q[:, None])
    session.attend(q[:, None])
    with waiting_is_an_error():
        for n in range(300, 333):
            session.append(k[:, n : n + 1], v[:, n : n + 1])
            found = session.attend(q[:, None])
    check(session.gpu.lists(q[:, None]), 4, 2, 333)
    assert torch.isfinite(found.output).all() and (found.counters.reported > 0).all()


def test_lists_are_the_cpus(selector):
    """But for scores that differ in their rounding, and for numbers that torch draws otherwise there."""
    made = Cache(*(x.float() for x in cache(3, 400)))
    here, there = (
        selector.begin(given.k, given.v, None, given.scale).choose(*given)
        for given in (made, on_gpu(made, torch.float32))
    )
    if isinstance(selector, StepTail) and selector.sampled:
        assert torch.equal(there.counts.cpu(), here.counts)
        return
    assert (there.mask(400).cpu() != here.mask(400)).float().mean() < 0.01
    if here.log_weights is not None:
        sums = [(lists.log_weights.exp() * lists.valid()).sum(1).cpu() for lists in (here, there)]
        assert (sums[1] / sums[0] - 1).abs().max() < 0.1


def test_lists_lie_where_the_tensors_do(selector):
    made = on_gpu(cache(2, 200, d=64, dv=64), torch.bfloat16)
    lists = selector.begin(made.k, made.v, None, made.scale).choose(*made)
    assert lists.tokens.is_cuda and lists.counts.is_cuda
