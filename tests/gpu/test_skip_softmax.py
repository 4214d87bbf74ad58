"""Prompts whose key blocks of small weight are skipped, on the GPU or interpreted, beside the CPU's definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import Dense, Softmax, audit, prefill  # noqa: E402
from attention.skip_softmax import SkipSoftmax  # noqa: E402
from attention.skip_softmax_reference import skip_softmax as definition  # noqa: E402
from attention.weights import ReLUPower  # noqa: E402
from gpu import skip_softmax as module  # noqa: E402
from hsr.errors import ArgumentError, BackendUnavailable  # noqa: E402
from tests.gpu.interpreted import HERE, normal, poisoned_allocations, pytestmark  # noqa: E402, F401

pytestmark = [*pytestmark, pytest.mark.usefixtures("poisoned_allocations")]
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


def made(B=1, g=1, group=2, m=140, n=140, d=64, dtype=torch.float16, seed=0):
    """Whole numbers in the first column, which decides: no block is near the threshold whatever the rounding."""
    q, k, v = (
        normal(B, heads, rows, d, seed=seed + i) for i, (heads, rows) in enumerate(((g * group, m), (g, n), (g, n)))
    )
    q, k = q / 8, k / 8
    hot = np.random.default_rng(seed).integers(-3, 4, (B, g, -(-n // 32))).repeat(32, axis=2)[:, :, :n]
    q[..., 0], k[..., 0] = d**0.5, torch.from_numpy(4.0 * hot + 2).to(k)
    k[:, :, 0, 0] = 12
    return tuple(x.to(dtype) for x in (q, k, v))


def wanted(q, k, v, level):
    arrays = ((x.double().cpu().flatten(0, 1).numpy()) for x in (q, k, v))
    return definition(*arrays, level, q.shape[3] ** -0.5)


def assert_same(q, k, v, threshold):
    level = math.log(threshold) if threshold else -math.inf
    found, true = module.attend(q, k, v, level, q.shape[3] ** -0.5), wanted(q, k, v, level)
    off = found.output.double().cpu().flatten(0, 1).numpy() - true.output
    assert np.abs(off).max() < TOLERANCE[q.dtype] * np.abs(true.output).max()
    assert np.abs(found.lse.cpu().numpy() - true.lse).max() < 2e-3
    assert np.array_equal(found.kept.cpu().numpy(), true.kept) and np.array_equal(
        found.blocks.cpu().numpy(), true.blocks
    )
    some = np.isfinite(true.log_dropped)
    assert np.array_equal(np.isneginf(found.log_dropped.cpu().numpy()), ~some)
    assert np.abs((found.log_dropped.cpu().numpy() - true.log_dropped)[some]).max(initial=0) < 2e-2
    return true


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"B": 2, "g": 2, "m": 130, "n": 261},
        {"m": 1, "n": 1},
        {"m": 1, "n": 200},
        {"m": 127, "n": 319},
        {"group": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("threshold", [1e-3, 0.0])
def test_it_is_its_definition(shape, threshold):
    true = assert_same(*made(**shape), threshold)
    assert (true.blocks.sum() > 0) == (threshold > 0 and shape.get("n", 140) > 139)


@pytest.mark.parametrize("d", [128, 256])
def test_other_widths(d):
    assert assert_same(*made(group=1, m=70, n=210, d=d), 1e-3).blocks.any()


def test_tensors_that_are_not_contiguous():
    q, k, v = made(m=140, n=300)
    q, k, v = (torch.stack([x, -x], 2).transpose(1, 3)[:, :, 0].transpose(1, 2) for x in (q, k, v))
    assert not q.is_contiguous() and q.stride(3) == 1
    assert_same(q, k, v, 1e-3)


def test_a_result_says_what_a_cpu_says():
    q, k, v = made(B=2, m=140, n=300)
    found = module.prompt(q, k, v, SkipSoftmax(factor=0.3), None)
    cpu = prefill(*(x.float().cpu().numpy() for x in (q, k, v)), policy=SkipSoftmax(factor=0.3))
    assert tuple(found.output.shape) == tuple(q.shape) and found.output.dtype == q.dtype
    assert np.abs(found.output.float().cpu().numpy() - cpu.output).max() < 3e-3 * np.abs(cpu.output).max()
    assert np.abs(found.lse.cpu().numpy() - cpu.lse).max() < 2e-3
    for name in ("scanned", "visited", "reported"):
        assert np.array_equal(getattr(found.counters, name).cpu().numpy(), getattr(cpu.counters, name))
    assert np.allclose(found.densities.cpu().numpy(), cpu.densities) and found.densities.dtype == torch.float64
    assert np.array_equal(found.skipped.cpu().numpy(), cpu.skipped) and cpu.skipped.sum() > 0
    assert found.certificate.kind == "none" and torch.isinf(found.certificate.output_error).all()
    assert not found.empty.any() and found.n == 300


def test_three_axes_are_a_batch_of_one():
    q, k, v = (x[0] for x in made(m=128, n=128))
    assert tuple(module.prompt(q, k, v, SkipSoftmax(1e-3), 0.1).skipped.shape) == (2, 1)


def test_what_does_not_fit_is_refused():
    q, k, v = made()
    assert "SkipSoftmax alone" in str(module.refuses(policy=Dense(), weight=Softmax(), causal=True))
    assert "Softmax() alone" in str(module.refuses(policy=SkipSoftmax(0.1), weight=ReLUPower(), causal=True))
    assert "causal prompts" in str(module.refuses(policy=SkipSoftmax(0.1), weight=Softmax(), causal=False))
    assert module.refuses(policy=SkipSoftmax(0.1), weight=Softmax(), causal=True) is None
    with pytest.raises(ArgumentError, match="float16 or all bfloat16"):
        module.prompt(q.float(), k, v, SkipSoftmax(0.1), None)
    with pytest.raises(ArgumentError, match="scale must be in"):
        module.prompt(q, k, v, SkipSoftmax(0.1), -1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("shape", [(1, 2048, 2048), (2, 1000, 3077)], ids=str)
def test_long_prompts_of_every_width_and_dtype(shape, d, dtype):
    B, m, n = shape
    for threshold in (1e-3, 0.0):
        assert_same(*made(B, 2, 2, m, n, d, dtype), threshold)


@pytest.mark.gpu
def test_prefill_and_audit_take_cuda_tensors_and_a_graph():
    q, k, v = made(m=1500, n=1500)
    result = prefill(q, k, v, policy=SkipSoftmax(1e-3))
    assert result.output.is_cuda and result.skipped.sum() > 0
    assert audit(q, k, v, SkipSoftmax(1e-6), rows=40).error.overall_mean < 2e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = prefill(q, k, v, policy=SkipSoftmax(1e-3))
    graph.replay()
    assert torch.equal(again.output, result.output)
    with pytest.raises(BackendUnavailable, match="SkipSoftmax alone"):
        prefill(q, k, v, policy=None)
