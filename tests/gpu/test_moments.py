"""What a cache learns from a sample when its codes are made, beside the same in a few lines of float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpu import encode, moments, planes, prepare  # noqa: E402
from gpu.launches import Tuning  # noqa: E402
from gpu.sampled import NEWEST, Draws, SampledCache  # noqa: E402
from hsr.coder import SAMPLE  # noqa: E402
from hsr.errors import ArgumentError  # noqa: E402
from tests.gpu.interpreted import HERE, pytestmark  # noqa: E402, F401
from tests.gpu.test_sampled import columns  # noqa: E402
from tests.gpu.test_tokens import paged  # noqa: E402
from tests.tensors import spread  # noqa: E402

FOUR = Tuning(single=False)
CLOSE = 1e-4 if HERE == "cpu" else 2e-3  # the GPU cuts factors of products to TF32
EXAMPLES = 12  # two seconds each under the interpreter
KINDS = ("gaussian", "repeated", "offset", "lattice", "zero")


def described(k, v, size):
    """k, v (g, n, d) of one sequence -> centre (g, d), distance, longest key, directions (g,): the definition."""
    many = min(SAMPLE, size)
    at = np.arange(many) * size // many
    keys, values = (part.cpu().double()[:, at] for part in (k, v))
    centre = values.mean(1)
    far = values - centre[:, None]
    moment = far.mT @ far
    trace, square = moment.diagonal(dim1=1, dim2=2).sum(1), moment.square().sum((1, 2))
    return centre, (trace / many).sqrt() + 1e-30, keys.norm(dim=2).amax(1), trace.square() / (square + 1e-30)


def coded_moments(cache, newest):
    """Means and variances (heads, P, R) of a cache's codes: the definition."""
    found = []
    for codes, length in zip(columns(cache).double(), cache.lengths.tolist(), strict=True):
        stop = length // 64 * 64
        many = min(NEWEST if newest else SAMPLE, stop)
        at = np.arange(stop - many, stop) if newest else np.arange(many) * stop // max(many, 1)
        part = codes[:, at] if stop else codes[:, :1] * 0
        found.append((part.mean(1), part.var(1, correction=0)))
    return [torch.stack(part) for part in zip(*found, strict=True)]


@functools.cache
def known(heads, d, row=32):
    """Some coder."""
    random = np.random.default_rng(0)
    keys = torch.from_numpy(random.standard_normal((heads, 500, d)) * np.arange(1, d + 1) ** -0.7)
    return planes.fitted(keys, torch.from_numpy(random.standard_normal((heads, 500))), d**-0.5, row, None)


def inputs(B, g, n, d, kind, seed):
    random = np.random.default_rng(seed)
    k, v = (spread(random, (B * g, n, d), kind).reshape(B, g, n, d) for _ in range(2))
    return tuple(torch.from_numpy(part).half().to(HERE) for part in (k, v))


def padded(part, room):
    """part (B, g, n, d) in a buffer of tokens before heads, NaN where no token lies."""
    B, g, n, d = part.shape
    held = torch.full((B, room, g, d), torch.nan, dtype=part.dtype, device=part.device).transpose(1, 2)
    held[:, :, :n] = part
    return held


def assert_described(cache, k, v, sizes):
    found = cache.centre, cache.distance, cache.longest, cache.directions, cache._maps[3]
    B, g = k.shape[:2]
    for b in range(B):
        centre, distance, longest, directions, floor = (part.cpu().double().view(B, g, -1)[b] for part in found)
        wanted = described(k[b], v[b], sizes[b])
        size = wanted[0].norm(dim=1)
        assert ((centre - wanted[0]).norm(dim=1) <= 1e-5 * (size + wanted[1])).all()
        assert ((distance[:, 0] - wanted[1]).abs() <= CLOSE * wanted[1] + 1e-6 * size).all()
        assert torch.allclose(floor, 0.1 * distance)
        assert torch.allclose(longest[:, 0], wanted[2], rtol=1e-5)
        told = wanted[1] > 1e-2 * size  # else rounding fills directions of its own
        assert ((directions[:, 0] - wanted[3]).abs() <= CLOSE * wanted[3])[told].all()


def assert_coded(cache):
    wanted = coded_moments(cache, newest=False)
    assert torch.allclose(cache.means.cpu().double(), wanted[0], rtol=1e-6)
    assert torch.allclose(cache.spreads.cpu().double(), wanted[1], rtol=1e-5, atol=1e-7)
    assert (cache.spreads.cpu()[wanted[1] == 0] == 0).all()


@settings(deadline=None, max_examples=EXAMPLES)
@given(
    st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]),
    st.sampled_from([64, 128]),
    st.one_of(st.integers(1, 70), st.integers(71, 300)),
    st.sampled_from([16, 24, 32, 48]),
    st.sampled_from(KINDS),
    st.sampled_from(["copied", "strided", 1, 16]),
    st.integers(0, 2**32 - 1),
)
def test_a_sample_is_described_wherever_it_lies(heads, d, n, row, kind, layout, seed):
    B, g = heads
    k, v = inputs(B, g, n, d, kind, seed)
    sizes = np.random.default_rng(seed).integers(1, n + 1, B)
    settings = {"lengths": sizes, "coded": known(B * g, d, row), "tuning": FOUR}
    draws, scale = Draws(32.0, row), d**-0.5
    if layout == "copied":
        cache = SampledCache(k, v, 2 * g, draws, scale, **settings)
    elif layout == "strided":
        cache = SampledCache.adopted(padded(k, 320), padded(v, 320), 2 * g, draws, scale, **settings)
    else:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(B * 320 // layout)).int().to(HERE)
        table = order.view(B, -1).contiguous()
        pools = [paged(part, layout, table, sizes) for part in (k, v)]
        cache = SampledCache.adopted(*pools, 2 * g, draws, scale, pages=table, **settings)
    assert cache.lengths.tolist() == np.repeat(sizes, g).tolist()
    assert_described(cache, k, v, sizes)
    assert_coded(cache)


@pytest.mark.parametrize(("n", "d"), [(2 * SAMPLE + 77, 64), (300, 256)])
def test_the_sample_is_spread_evenly_over_long_sequences(n, d):
    k, v = inputs(1, 1, n, d, "gaussian", 1)
    v[:, :, n // 2 :] += 3  # values drift, and the last key alone is long
    k[:, :, -(n // SAMPLE) - 1 :] *= 50
    cache = SampledCache(k, v, 1, Draws(32.0), d**-0.5, coded=known(1, d), tuning=FOUR)
    assert_described(cache, k, v, [n])
    assert_coded(cache)


def test_values_far_from_the_origin_lose_nothing():
    k, v = inputs(1, 1, 200, 64, "gaussian", 2)
    v = (v + 200).half()
    cache = SampledCache(k, v, 1, Draws(32.0), 0.125, coded=known(1, 64), tuning=FOUR)
    wanted = described(k[0], v[0], 200)
    assert abs(float(cache.distance) / float(wanted[1]) - 1) < CLOSE
    assert abs(float(cache.directions) / float(wanted[3]) - 1) < CLOSE


def test_drift_is_of_the_newest_codes():
    k, v = inputs(1, 2, NEWEST + 300, 64, "gaussian", 3)
    k[:, :, -NEWEST:] += 1
    cache = SampledCache(k, v, 2, Draws(32.0), 0.125, coded=known(2, 64), tuning=FOUR)
    newest, _ = coded_moments(cache, newest=True)
    means, spreads = coded_moments(cache, newest=False)
    wanted = (newest - means).square().sum((1, 2)) / spreads.sum((1, 2))
    assert torch.allclose(cache.drift().cpu().double(), wanted, rtol=1e-4)
    assert (wanted > 0.005).all()
    short = SampledCache(k[:, :, :63], v[:, :, :63], 2, Draws(32.0), 0.125, coded=known(2, 64), tuning=FOUR)
    assert (short.drift() == 0).all()


@pytest.mark.parametrize("G", [2, 16])
def test_what_the_steps_of_a_head_start_from(G):
    k, v = inputs(1, 3, 100, 64, "gaussian", 4)
    cache = SampledCache(k, v, 3 * G, Draws(32.0, seed=(5 << 32) + 7), 0.125, coded=known(3, 64), tuning=FOUR)
    assert (cache.counts == 0).all()
    assert (cache.found[:, : cache.padded] == -1).all()
    assert (cache.found[:, cache.padded :] == 0).all()
    assert cache.rho.unique().tolist() == [3.0]
    assert cache.trim.unique().tolist() == [0.0]
    assert cache.budget.unique().tolist() == [32.0]
    assert len(cache.seeds.unique()) == 3


class Calls(TorchDispatchMode):
    """Names of the torch operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def test_a_build_with_a_known_coder_is_a_few_launches_and_copies_nothing(monkeypatch):
    launched = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **shape: launched.append(self.name)

    k, v = inputs(1, 2, 256, 64, "gaussian", 5)
    coded = known(2, 64)
    coded.on(k.device)
    for module, names in ((moments, ("accumulate", "merge", "codes")), (encode, ("encode",)), (prepare, ("begin",))):
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name))
    with Calls() as calls:
        SampledCache.adopted(k, v, 4, Draws(32.0), 0.125, lengths=[256], coded=coded, tuning=FOUR)
    assert launched == ["accumulate", "merge", "begin", "encode", "codes"]
    assert set(calls.names) == {"empty", "unbind", "full", "zeros"}
    assert len(calls.names) < 25


def test_a_coder_of_other_heads_is_refused():
    k, v = inputs(1, 2, 100, 64, "gaussian", 6)
    with pytest.raises(ArgumentError, match="coded must have maps of 2 heads of width 64; got 3 of width 64"):
        SampledCache(k, v, 4, Draws(32.0), 0.125, coded=known(3, 64), tuning=FOUR)
