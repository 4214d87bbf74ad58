"""Prompts on a GPU through `attention.prefill` and `audit`; interpreted, through `gpu.prompt` itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import BlockSampled, Dense, Listed, TopR, audit, prefill  # noqa: E402
from attention.key_lists import KeyLists, budget, edges, ends, row_blocks  # noqa: E402
from gpu import prompt, prompt_cost  # noqa: E402
from gpu.prompt_cost import Line, Rates  # noqa: E402
from hsr.errors import ArgumentError, BackendUnavailable  # noqa: E402
from tests.gpu.interpreted import HERE, pytestmark  # noqa: E402, F401

SLOW, FAST = Line(1.0, 0.0), Line(0.0, 1e-9)
SAMPLED_FIRST, DENSE_FIRST = Rates(SLOW, FAST, FAST), Rates(FAST, SLOW, SLOW)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Rates that never call for a dense kernel; a test may ask for others."""
    chosen = {"rates": SAMPLED_FIRST}
    monkeypatch.setattr(prompt_cost, "rates", lambda *_: chosen["rates"])
    return chosen


def made(B=1, h=4, g=2, m=300, n=300, d=64, seed=0) -> tuple[Any, Any, Any]:
    random = torch.Generator().manual_seed(seed)
    k = torch.randn(B, g, n, d, generator=random)
    slow = torch.randn(B, h, -(-m // 64), d, generator=random).repeat_interleave(64, 2)[:, :, :m]
    q = 2 * slow + 0.3 * torch.randn(B, h, m, d, generator=random)
    v = torch.randn(B, g, n, d, generator=random)
    return tuple(part.half().to(HERE) for part in (q, k, v))


def exact(q, k, v):
    m, n = q.shape[2], k.shape[2]
    each = q.shape[1] // k.shape[1]
    k, v = (part.double().repeat_interleave(each, 1) for part in (k, v))
    scores = q.double() @ k.mT * q.shape[3] ** -0.5
    scores.masked_fill_(torch.ones(m, n, dtype=torch.bool, device=q.device).triu(n - m + 1), -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def off(found, wanted) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", [{}, {"B": 2, "m": 70}, {"m": 1, "n": 260}, {"m": 1, "n": 1}, {"h": 2, "g": 2}])
def test_dense_is_dense(shape):
    q, k, v = made(**shape)
    result = prompt.prompt(q, k, v, Dense(), None)
    output, lse = exact(q, k, v)
    assert off(result.output, output) < 2e-3
    assert (result.lse - lse).abs().max() < 1e-3
    assert (result.densities == 1).all()
    m, n = q.shape[2], k.shape[2]
    assert (result.counters.reported == torch.arange(n - m + 1, n + 1, device=HERE)).all()


@pytest.mark.parametrize("shape", [{}, {"B": 2, "m": 200, "n": 411}])
def test_a_result_says_what_a_cpu_says(shape):
    q, k, v = made(**shape)
    policy = BlockSampled(density=0.7, seed=3)
    result = prompt.prompt(q, k, v, policy, None)
    cpu = prefill(*(part.float().cpu().numpy() for part in (q, k, v)), policy=policy)
    assert tuple(result.output.shape) == tuple(q.shape) and result.output.dtype == q.dtype
    assert tuple(result.lse.shape) == cpu.lse.shape and result.n == cpu.n
    assert np.abs(result.densities.cpu().numpy() - cpu.densities).max() < 2 * row_blocks(q.shape[2]) / k.shape[2]
    assert np.array_equal(result.counters.visited.cpu().numpy(), cpu.counters.visited)
    reported = result.counters.reported.cpu().numpy()
    assert np.abs(reported - cpu.counters.reported).max() <= 12  # codes may differ by one level
    assert result.certificate.kind == "none" and torch.isinf(result.certificate.output_error).all()


@pytest.mark.parametrize("m", [300, 200])
def test_rates_choose_a_dense_kernel(rates, m):
    arrays, policy = made(m=m), BlockSampled(density=0.8)
    assert (prompt.prompt(*arrays, policy, None).densities < 0.9).all()
    rates["rates"] = DENSE_FIRST
    found = prompt.prompt(*arrays, policy, None)
    assert (found.densities == 1).all() and off(found.output, exact(*arrays)[0]) < 2e-3


def test_rows_after_a_prefix_are_judged_by_lists_of_every_key():
    found, heads, m, n = Rates(Line(1e9, 0.0), Line(0.0, 1.0), Line(10.0, 1.0)), 2, 256, 640
    even = 1 - edges(m, n).sum() / (128 * ends(m, n).sum())  # there what is not attended to pays for the codes
    assert not found.dense_is_faster(even - 1e-6, heads, m, n) and found.dense_is_faster(even + 1e-6, heads, m, n)
    assert not found.dense_is_faster(even + 1e-6, heads, n, n)


def test_a_density_that_the_bands_exceed_is_refused_whatever_the_rates(rates):
    rates["rates"] = DENSE_FIRST
    with pytest.raises(ArgumentError, match="density must be above"):
        prompt.prompt(*made(), BlockSampled(density=0.1), None)


def test_seconds_buy_keys():
    q, k, v = made(m=500, n=500)
    most, least = (prompt.prompt(q, k, v, BlockSampled(seconds=s), None).densities.mean() for s in (10.0, 1e-9))
    assert most > 0.99 and least < 0.75


@pytest.mark.parametrize("zero", [False, True])
def test_an_error_is_met_in_every_head(zero):
    q, k, v = made(B=2, m=260, n=390)
    if zero:
        v[:, :, :131] = 0  # so that the exact output of the first rows is zero
    result = prompt.prompt(q, k, v, BlockSampled(error=0.02), None)
    output, _ = exact(q, k, v)
    size = output.norm(dim=3)
    errors = torch.where(size == 0, 0.0, (result.output.double() - output).norm(dim=3) / size.clamp(min=1e-30))
    assert errors.mean(2).max() < 0.04  # of all rows; the target is met on those that were measured
    assert (result.densities <= 1).all() and tuple(result.densities.shape) == (2, 4)


def test_heads_draw_for_themselves_each_at_its_density():
    q, k, v = made(h=2, g=1, m=390, n=390)
    q[:, 1] = q[:, 0]
    T = row_blocks(390)

    def drawn(density):
        lists = prompt.lists_of(BlockSampled(density=0.6), density, (q, k, v), 0.125)
        ends = lists.token_offsets[[0, T, 2 * T]].tolist()
        return [lists.tokens[a:b].tolist() for a, b in itertools.pairwise(ends)]

    alike, more = drawn(0.6), drawn(0.8)
    assert alike[0] != alike[1] and len(alike[0]) < len(more[0])
    assert drawn(np.array([0.6, 0.8])) == [alike[0], more[1]]


def listing(m: int, n: int, heads: int) -> KeyLists:
    """Every third eligible key."""
    lines = [np.arange(0, edge, 3, dtype=np.int32) for edge in edges(m, n)] * heads
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    return KeyLists(offsets, np.concatenate(lines), np.full(offsets[-1], np.float32(math.log(3))))


@pytest.mark.parametrize("kind", ["numpy", "strided", "elsewhere"])
def test_lists_of_any_kind_of_array(kind):
    q, k, v = made()
    lists = listing(300, 300, 4)
    wanted = prefill(*(part.float().cpu().numpy() for part in (q, k, v)), policy=Listed(lists))
    tensors = {name: torch.from_numpy(part) for name, part in vars(lists).items() if isinstance(part, np.ndarray)}
    if kind == "strided":
        tensors = {name: torch.stack([part, -part], 1).to(HERE)[:, 0] for name, part in tensors.items()}
    given = lists if kind == "numpy" else KeyLists(**tensors)
    result = prompt.prompt(q, k, v, Listed(given), None)
    assert off(result.output.cpu(), torch.from_numpy(wanted.output).double()) < 2e-3
    assert np.array_equal(result.counters.reported.cpu().numpy(), wanted.counters.reported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda x: x.float()}, "float16 or all bfloat16"),
        ({"q": lambda x: x[0]}, "axes"),
        ({"k": lambda x: x[:, :0], "v": lambda x: x[:, :0]}, "must have heads"),
        ({"q": lambda x: x[:, :3]}, "multiples"),
        ({"k": lambda x: x[:, :, :200], "v": lambda x: x[:, :, :200]}, "rows"),
        ({"v": lambda x: x.mT.contiguous().mT}, "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    parts = dict(zip("qkv", made(), strict=True))
    parts |= {name: alter(parts[name]) for name, alter in change.items()}
    with pytest.raises(ArgumentError, match=message):
        prompt.prompt(*parts.values(), BlockSampled(density=0.7), None)


@pytest.mark.gpu
def test_prefill_and_audit_take_cuda_tensors(rates):
    q, k, v = made(m=1500, n=1500)
    result = prefill(q, k, v, policy=BlockSampled(density=0.5))
    assert result.output.is_cuda
    assert audit(q, k, v, result).error.overall_mean == pytest.approx(off(result.output, exact(q, k, v)[0]), rel=1.0)
    found = audit(q, k, v, BlockSampled(density=0.3), escalate=True, max_error=0.05)
    assert found.passes(max_error=0.05)
    for policy in (None, TopR(10)):
        with pytest.raises(BackendUnavailable, match="serves the policies"):
            prefill(q, k, v, policy=policy)
    with pytest.raises(ArgumentError, match="method must be 'auto'"):
        prefill(q, k, v, policy=BlockSampled(density=0.5), method="numba")


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128, 256])
def test_every_width_with_measured_rates_in_a_graph(monkeypatch, d):
    monkeypatch.undo()
    q, k, v = made(m=2048, n=2048, d=d)
    assert budget(0.5, 2048, 2048) > 0
    policy = BlockSampled(density=0.5)
    once = prefill(q, k, v, policy=policy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = prefill(q, k, v, policy=policy)
    graph.replay()
    assert torch.equal(again.output, once.output) and off(once.output, exact(q, k, v)[0]) < 0.9
