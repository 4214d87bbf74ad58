"""What sampled attention promises on average: unbiased sums, bounds that cover as often as stated, errors of eps."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from scipy.stats import norm

from attention import DecodeSession, Result, Sampled, sampled
from attention.values import Values
from benchmarks import real_keys
from hsr.lifted_numba import generators
from tests.heads import Problem, like_heads

ALARM = 1e-4  # false alarms of one statistical test, all its comparisons together
LAST = 1024  # keys of real heads


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row has its own generator, so that one call makes many draws."""
    monkeypatch.setattr(sampled, "generators", lambda seed, limits: generators(seed, np.indices(limits.shape)[1]))


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("how", sampled.DRAWS)
def test_weights_and_weighted_values_are_unbiased(how: str, size: int) -> None:
    """10,000 draws: z-tests of W_hat and of every coordinate of the numerator, Bonferroni at ALARM in all."""
    one = like_heads(1, 2, 1, 512, d=8, sharp=1.5)
    seeds = 10_000
    problem = one._replace(q=np.repeat(one.q, seeds, axis=1))
    policy = Sampled(budget=25, bytes_per_key=size, sinks=1, recent=0, draw=how)
    result = DecodeSession(problem.k, problem.v, policy=policy, queries=one.q).attend(problem.q)
    exact, lse = one.exact()
    total = np.exp(result.lse - lse)[..., None]  # (2, seeds, 1), W_hat / W
    sums = np.concatenate([total, total * result.output / np.abs(exact).max()], axis=2)
    wanted = np.concatenate([np.ones((2, 1, 1)), exact / np.abs(exact).max()], axis=2)
    error = (sums.mean(axis=1, keepdims=True) - wanted) * np.sqrt(seeds) / sums.std(axis=1, keepdims=True)
    assert np.abs(error).max() < norm.isf(ALARM / 2 / error.size)
    assert sums.std(axis=1).min() > 1e-3, "there is something to test"


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("how", sampled.DRAWS)
@pytest.mark.parametrize("spend", [{"eps": 0.07}, {"budget": 100}])
def test_bounds_cover_as_often_as_they_say(how: str, spend: dict[str, float]) -> None:
    """Rows are independent: binomial limits, widened by what the model may be off, more on the side of caution."""
    problem = like_heads(4, 1, 1000, 2048)
    exact, lse = problem.exact()
    for confidence in (0.95, 0.8):
        policy = Sampled(**spend, draw=how, confidence=confidence)
        result = DecodeSession(problem.k, problem.v, policy=policy).attend(problem.q)
        noise = norm.isf(ALARM / 2) * math.sqrt(confidence * (1 - confidence) / lse.size)
        for held in covered(result, exact, lse):
            assert confidence - 0.02 - noise < held < 1 - 0.2 * (1 - confidence) + noise
        assert (result.certificate.confidence, result.certificate.kind) == (confidence, "statistical")
        assert np.isnan(result.certificate.dropped_mass).all()


@pytest.mark.slow
@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("how", sampled.DRAWS)
def test_bounds_cover_on_real_heads(how: str) -> None:
    """The mean over settings, layers, heads and positions: within 2 points of 95 %, or 4 above."""
    missing = real_keys.missing("this test")
    if missing:
        pytest.skip(missing)
    found = []
    for layer in real_layers()[::5]:
        problem = Problem(layer.queries, layer.keys[:, :LAST], layer.values[:, :LAST])
        exact, lse = problem.exact()
        for settings in ({"eps": 0.05}, {"eps": 0.1}, {"budget": 100, "bytes_per_key": 16}):
            result = DecodeSession(problem.k, problem.v, policy=Sampled(**settings, draw=how)).attend(problem.q)
            found.append(covered(result, exact, lse))
    assert (np.mean(found, axis=0) > 0.93).all() and (np.mean(found, axis=0) < 0.99).all()


@functools.cache
def real_layers() -> list[real_keys.Layer]:
    """Keys of 1024 tokens and the queries of the 64 positions that follow them."""
    return real_keys.layers(LAST + 64, range(LAST, LAST + 64))


def covered(result: Result, exact: np.ndarray, lse: np.ndarray) -> tuple[float, float]:
    """Shares of rows in which the bounds of the output and of the log-sum-exp hold."""
    error = np.linalg.norm(result.output - exact, axis=2)
    held = error <= result.certificate.output_error, np.abs(result.lse - lse) <= result.certificate.lse_error
    return float(held[0].mean()), float(held[1].mean())


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("eps", [0.05, 0.1, 0.2])
def test_eps_bounds_the_error_and_the_keys(eps: float) -> None:
    problem = like_heads(2, 1, 300, 4096)
    result = DecodeSession(problem.k, problem.v, policy=Sampled(eps=eps)).attend(problem.q)
    exact, _ = problem.exact()
    scores = problem.q @ problem.k.swapaxes(1, 2) * 32**-0.5
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    distance = np.linalg.norm(problem.v - Values(problem.v).centre[:, None], axis=2)
    typical = (weights * distance[:, None]).sum(axis=2) / weights.sum(axis=2)
    squares = ((result.output - exact) ** 2).sum(axis=2) / typical**2
    assert np.sqrt(squares.mean()) <= 1.1 * eps
    assert result.counters.reported.mean() <= 1 / eps**2 + 4 + 64 + 63
