"""What a step's draws say of its error: held against the true error, and against the CPU's formula for the quantile."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import gammaincinv

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import DecodeSession, Sampled, Softmax  # noqa: E402
from attention.engine import Plan  # noqa: E402
from gpu import spread  # noqa: E402
from gpu.launches import Tuning  # noqa: E402
from gpu.sampled import Draws, SampledCache  # noqa: E402
from gpu.session import CudaSession  # noqa: E402
from tests.gpu.interpreted import HERE, pytestmark  # noqa: E402, F401
from tests.gpu.test_sampled import ALL, exact, inputs  # noqa: E402


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_quantile_is_nearly_the_chi_squared_one(confidence):
    freedom = np.geomspace(0.8, 500, 60)
    wanted = np.maximum(gammaincinv(freedom / 2, confidence) * 2 / freedom, 1.0)
    found = spread.quantile(torch.from_numpy(freedom), confidence).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0.05)


@pytest.mark.parametrize("systematic", [True, False])
def test_the_spread_is_that_of_many_draws(systematic):
    """Means over 40 draws of 4 heads; both sides vary by some 10 %, so 1.6 is five deviations away."""
    k, v, q = inputs(1, 2, 2, 1400 if HERE == "cpu" else 6000, 64, seed=7)
    cache = SampledCache(k, v, 4, Draws(48.0, systematic=systematic), 0.125, tuning=Tuning(single=False))
    wanted, lse = exact(q, k, v)
    output = torch.empty_like(q)
    errors, said, doubts, told = [], [], [], []
    for seed in range(40):
        cache.seeds += 7919 * (seed + 1)
        cache.attend(q, output)
        found = spread.spread(cache, q, output)
        assert (found.draws > 1).all()
        errors.append((output.double() - wanted).square().sum(-1).mean())
        said.append(found.square.double().mean())
        doubts.append((cache.lse - lse).square().mean())
        told.append(found.variance.mean())
    for true, claimed, most in ((errors, said, 1.6), (doubts, told, 8.0 if systematic else 1.6)):
        ratio = torch.stack(claimed).mean() / torch.stack(true).mean()
        assert 0.6 < ratio < most  # systematic draws' sum of weights varies less than independent ones'


def test_bounds_hold_about_as_often_as_they_say():
    """160 pairs at 0.9: fewer than 128 hold with chance under 1e-4 if each does independently."""
    k, v, q = inputs(1, 2, 2, 1400, 64, seed=8)
    cache = SampledCache(k, v, 4, Draws(32.0, systematic=False), 0.125, tuning=Tuning(single=False))
    wanted, lse = exact(q, k, v)
    output = torch.empty_like(q)
    held = near = 0
    for seed in range(40):
        cache.seeds += 104729 * (seed + 1)
        cache.attend(q, output)
        found = spread.bounds(cache, spread.spread(cache, q, output), q, output, 0.9)
        error = (output.double() - wanted).norm(dim=-1)
        held += int((error <= found.output_error).sum())
        near += int(((cache.lse - lse).abs() <= found.lse_error).sum())
        assert (found.relative_error >= found.output_error / output.float().norm(dim=-1)).all()
    assert 128 <= held
    assert 128 <= near


def test_nothing_is_in_doubt_where_every_key_was_read():
    k, v, q = inputs(1, 2, 2, 600, 64, seed=9)
    cache = SampledCache(k, v, 4, Draws(ALL), 0.125, tuning=Tuning(single=False))
    output = torch.empty_like(q)
    cache.attend(q, output)
    found = spread.spread(cache, q, output)
    assert not found.whole.any()  # all were drawn, each with certainty
    assert (found.square == 0).all()
    assert (found.variance == 0).all()
    cache = SampledCache(k, v, 4, Draws(40.0), 0.125, tuning=Tuning(single=False))
    cache.trim.fill_(8.0)
    cache.rho.fill_(12.0)
    cache.attend(q, output)
    assert cache.status[:, 2].eq(1).all()  # starved, so all keys were read
    found = spread.spread(cache, q, output)
    assert found.whole.all()
    assert (found.square == 0).all()
    spread.adjust(cache, found, 0.1)
    assert (cache.budget == 40).all()  # nothing was learnt


def test_budgets_follow_an_error_target():
    k, v, q = inputs(1, 1, 2, 1400, 64, seed=10)
    reached = []
    for eps in (0.3, 0.1):
        cache = SampledCache(k, v, 2, Draws(eps**-2, least=spread.LEAST), 0.125, tuning=Tuning(single=False))
        output = torch.empty_like(q)
        for seed in range(12):
            cache.seeds += 7919 * (seed + 1)
            cache.attend(q, output)
            ratio = cache.found[:, :2] / cache.budget[:, :2]
            spread.adjust(cache, spread.spread(cache, q, output), eps)
            assert torch.allclose(cache.found[:, :2] / cache.budget[:, :2], ratio, atol=0.02, rtol=1e-2)
        assert (cache.budget[:, :2] <= max(16.0, eps**-2) + 1e-3).all()
        error = (output.double() - exact(q, k, v)[0]).norm(dim=-1).mean() / cache.distance.mean()
        assert error < 2 * eps
        reached.append(float(error))
    assert reached[1] < reached[0]


def test_a_budget_beyond_all_keys_falls_until_there_is_an_error_to_follow():
    k, v, q = inputs(1, 1, 2, 1400, 64, seed=15)
    cache = SampledCache(k, v, 2, Draws(0.02**-2, least=spread.LEAST), 0.125, tuning=Tuning(single=False))
    output = torch.empty_like(q)
    for _ in range(6):
        cache.attend(q, output)
        spread.adjust(cache, spread.spread(cache, q, output), 0.1)
    assert (cache.budget[:, :2] < 1000).all()


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [Sampled(eps=0.05), Sampled(budget=300.0)])
def test_a_session_certifies_what_it_samples(policy):
    k, v, q = inputs(1, 2, 4, 8000, 128, torch.bfloat16, seed=11)
    session = DecodeSession(k, v, policy=policy)
    held = total = 0
    for step in range(20):
        query = torch.roll(q, step % 8, 1)[:, :, None]
        found = session.attend(query)
        wanted, lse = exact(query[:, :, 0], k, v)
        error = (found.output[:, :, 0].double() - wanted).norm(dim=-1)
        held += int((error <= found.certificate.output_error[..., 0]).sum())
        total += error.numel()
        assert (found.lse[..., 0] - lse).abs().max() < 0.5
    assert found.certificate.kind == "statistical"
    assert found.certificate.confidence == 0.95
    assert held >= 0.85 * total  # of 160 at 0.95: below 136 with chance under 1e-6 if independent
    if policy.eps is not None:
        scale = session.gpu.cache.distance.mean()
        assert error.square().mean().sqrt() < 3 * policy.eps * scale
        assert math.isfinite(float(session.gpu.cache.budget.max()))


def test_no_draw_tells_nothing():
    k, v, q = inputs(1, 1, 1, 1400, 64, seed=12)
    cache = SampledCache(k, v, 1, Draws(3.0), 0.125, tuning=Tuning(single=False))
    output = torch.empty_like(q)
    cache.attend(q, output)
    cache.counts.zero_()
    cache.floor = 0
    found = spread.spread(cache, q, output)
    assert found.square.isinf().all()
    assert spread.bounds(cache, found, q, output, 0.95).output_error.isinf().all()
    spread.adjust(cache, found, 0.1)
    assert cache.budget.eq(3.0).logical_or(cache.budget.eq(1.0)).all()  # unknown changes nothing


def test_heads_whose_recent_keys_hold_all_weight_settle_without_reading_every_key():
    k, v, q = inputs(1, 1, 1, 1400, 64, seed=13)
    k[:, :, -60:] += (q / q.norm() * 40).to(k.dtype)[:, :, None]
    draws = Draws(0.05**-2, least=spread.LEAST)
    cache = SampledCache(k, v, 1, draws, 0.125, tuning=Tuning(single=False))
    output = torch.empty_like(q)
    for _ in range(10):
        cache.attend(q, output)
        spread.adjust(cache, spread.spread(cache, q, output), 0.05)
    assert cache.status[:, 2].sum() <= 3
    assert (cache.budget[:, 0] < 100).all()


def test_a_session_over_few_tokens_learns_more_as_it_grows():
    k, v, q = inputs(1, 1, 2, 900, 64, seed=14)
    session = CudaSession(k[:, :, :10], v[:, :, :10], Plan(Softmax(), Sampled(budget=100.0), None))
    for t in range(10, 900):
        if t % 100 == 10:
            strided = torch.stack([q, q], -1)[..., 0]  # rows that the kernels cannot read
            found = session.attend(strided[:, :, None])
        session.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert session.cache.spreads.sum() > 0
    assert session.cache.budget[0, 0] == 100
    wanted, _ = exact(q, k[:, :, :810], v[:, :, :810])
    assert ((found.output[:, :, 0].double() - wanted).norm(dim=-1) < 0.5 * wanted.norm(dim=-1)).all()
    assert session.cache.lengths.tolist() == [900]
