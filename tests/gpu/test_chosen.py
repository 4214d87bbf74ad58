"""Attention to chosen tokens on the GPU or interpreted (float16 there: bfloat16 is wrong), and sessions over it."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import DecodeSession  # noqa: E402
from attention.chosen_reference import chosen as definition  # noqa: E402
from attention.selectors import TopOracle  # noqa: E402
from attention.token_lists import Means, TokenLists  # noqa: E402
from gpu import chosen as module  # noqa: E402
from hsr.backend import named  # noqa: E402
from tests.chosen import some_lists  # noqa: E402
from tests.gpu.interpreted import HERE, normal, poisoned_allocations, pytestmark, waiting_is_an_error  # noqa: E402, F401

pytestmark = [*pytestmark, pytest.mark.usefixtures("poisoned_allocations")]
GPU = pytest.mark.gpu
BF16 = pytest.param(torch.bfloat16, marks=GPU)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def inputs(H, G, n, d, dtype=torch.float16, seed=0):
    """Queries with a gap between heads; keys and values as (n, G, d) lies, poisoned beyond n."""
    q = normal(H, 2 * d, seed=seed).to(dtype)[:, :d]
    room = torch.full((2, n + 3, G, d), torch.nan, dtype=dtype, device=HERE)
    room[:, :n] = normal(2, n, G, d, seed=seed + 1).to(dtype) + 0.25
    return q, *room.transpose(1, 2)[:, :, :n]


def here(lists):
    means = lists.means and Means(*(part.to(HERE) for part in vars(lists.means).values()))
    weights = None if lists.log_weights is None else lists.log_weights.to(HERE)
    return TokenLists(lists.tokens.to(HERE), lists.counts.to(HERE), weights, means)


def assert_close(q, k, v, lists, scale=0.125):
    output, lse = module.chosen(q, k, v, here(lists), scale)
    true, sums = definition(*(x.cpu() for x in (q, k, v)), lists, scale)
    tolerance = TOLERANCE[q.dtype]
    apart = np.linalg.norm(output.double().cpu().numpy() - true, axis=1)
    assert (apart <= tolerance * np.linalg.norm(true, axis=1) + tolerance).all(), apart
    assert np.array_equal(np.isneginf(sums), lse.isneginf().cpu().numpy())
    seen = ~np.isneginf(sums)
    assert (np.abs(lse.double().cpu().numpy() - sums)[seen] <= tolerance + 1e-6 * np.abs(sums[seen])).all()
    assert not output[~torch.from_numpy(seen).to(HERE)].any()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize(("weighted", "means"), [(False, 0), (True, 0), (False, 37), (True, 150)])
@pytest.mark.parametrize("n", [1, 131, 700])
def test_it_is_its_definition(shared, weighted, means, n):
    q, k, v = inputs(6, 2, n, 64, seed=n)
    lists = some_lists(np.random.default_rng(n), 2 if shared else 6, 2, n, 64, weighted, means)
    assert_close(q, k, v, lists)


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 7])
def test_widths_and_groups(d, group, dtype):
    q, k, v = inputs(group, 1, 300, d, dtype, seed=d)
    assert_close(q, k, v, some_lists(np.random.default_rng(d), 1, 1, 300, d, True, 20), d**-0.5)


def test_many_parts_and_counts_that_leave_some_empty():
    q, k, v = inputs(2, 1, 2000, 64)
    counts = torch.tensor([2000, 17], dtype=torch.int32)
    tokens = torch.stack([torch.randperm(2000, generator=torch.Generator().manual_seed(i)) for i in range(2)]).int()
    tokens[1, 17:] = 1 << 30  # what is beyond the count is never read
    assert module._splits(torch.device("cpu"), 2, 2000) == 4
    assert_close(q, k, v, TokenLists(tokens, counts))


def test_lists_and_means_may_have_any_strides():
    q, k, v = inputs(4, 2, 90, 64)
    lists = some_lists(np.random.default_rng(3), 4, 2, 90, 64, True, 20)
    true = module.chosen(q, k, v, here(lists), 0.125)
    strided = [x.mT.contiguous().mT for x in (lists.tokens, lists.log_weights, *vars(lists.means).values())]
    counts = torch.stack([lists.counts, lists.counts], 1)[:, 0]
    other = TokenLists(strided[0], counts, strided[1], Means(*strided[2:]))
    assert not other.tokens.is_contiguous() and not other.counts.is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(module.chosen(q, k, v, here(other), 0.125), true, strict=True))


def test_nothing_listed_gives_zeros_and_minus_infinity():
    q, k, v = inputs(2, 1, 5, 64)
    empty = TokenLists(torch.zeros(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    assert_close(q, k, v, empty)
    heavy = torch.full((2, 3), -torch.inf)
    left_out = Means(torch.randn(1, 3, 64), torch.randn(1, 3, 64), heavy)
    assert_close(q, k, v, TokenLists(empty.tokens, empty.counts, means=left_out))
    none = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32)
    assert_close(q, k, v, TokenLists(*none, torch.full((2, 2), -torch.inf)))


def test_huge_scores_do_not_overflow():
    q, k, v = inputs(2, 1, 70, 64)
    assert_close(q * 50, k * 50, v, some_lists(np.random.default_rng(0), 2, 1, 70, 64, True, 5), 1.0)


def test_what_it_refuses():
    call = {"d": 64, "dv": 64, "dtype": "bfloat16"}
    assert module.refuses(**call) is None
    row = named("chosen", "triton")
    assert "not float32" in str(row.refusal("cuda", **call | {"dtype": "float32"}))
    assert "of one width, 64, 128, 256; got 64 and 32" in str(row.refusal("cuda", **call | {"dv": 32}))
    assert "got 96 and 96" in str(row.refusal("cuda", **call | {"d": 96, "dv": 96}))
    assert "runs on cuda" in str(row.refusal("cpu", **call))


@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_session_on_the_gpu_is_the_one_on_the_cpu_and_never_waits(dtype):
    q, k, v = (normal(2, heads, n, 128, seed=n).to(dtype) for heads, n in ((8, 1), (2, 777), (2, 778)))
    v = v[:, :, :777]
    session = DecodeSession(k[:, :, :700], v[:, :, :700], policy=TopOracle(64))
    session.attend(q)
    with waiting_is_an_error():
        for t in range(700, 777):
            session.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        found = session.attend(q)
    wanted = DecodeSession(k.cpu(), v.cpu(), policy=TopOracle(64)).attend(q.cpu())
    assert session.n == 777 and found.certificate.kind == "none" and found.output.shape == q.shape
    assert (found.output.cpu().float() - wanted.output.float()).abs().max() < 0.05
    assert np.abs(found.lse.cpu().numpy() - wanted.lse).max() < 0.01
    assert np.array_equal(found.counters.reported.cpu().numpy(), wanted.counters.reported)
    assert not found.empty.any() and found.certificate.output_error.isinf().all()
