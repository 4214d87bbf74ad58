"""Tails of decode selectors: unbiased samples whose bounds hold, and means of what was left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from attention import DecodeSession, Dense, decode
from attention.chosen_numba import chosen
from attention.decode_selector import Attended, DecodeSelector, Steps
from attention.selectors import Quest, TokenSelect, TopOracle
from attention.step_tail import StepTail
from attention.token_lists import Means, TokenLists, check
from hsr import HSRIndex
from hsr.errors import ArgumentError
from tests.decode_selectors import Cache, Stateless, cache, listed, nothing_read_back, sets, together

SELECTORS = (TopOracle(24), Quest(48), TokenSelect(k=8, sinks=2, window=6))


def exact(made: Cache, x: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (n,) and values (n, dv) of a head, and the logarithm of the weights' sum."""
    q, k = made.head(x)
    scores = k @ q
    return np.exp(scores), made.v[x * len(made.k) // len(made.q)].double().numpy(), np.log(np.exp(scores).sum())


def begun(tail: StepTail, made: Cache) -> Steps:
    return tail.begin(made.k, made.v, None, made.scale)


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_samples_are_unbiased(selector: DecodeSelector) -> None:
    """36 means of 1,500 draws; one that is right lies 5 standard errors off once in 1.7 million cases, about."""
    made, draws = cache(1, 90), 1500
    many = together(*[made] * draws)
    lists = StepTail(selector, sampled=8).begin(many.k, many.v, None, many.scale, draws).choose(*many)
    output, lse = chosen(*many, lists, many.scale)
    totals = np.exp(lse).reshape(draws, 4)
    vectors = output.reshape(draws, 4, 8) * totals[:, :, None]
    for x in range(4):
        weights, values, _ = exact(made, x)
        true = np.append(weights @ values, weights.sum())
        found = np.append(vectors[:, x], totals[:, x, None], axis=1)
        assert found.std(axis=0).min() > 0
        assert (np.abs(found.mean(axis=0) - true) <= 5 * found.std(axis=0) / math.sqrt(draws) + 1e-9).all()


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_a_sample_is_of_what_was_left_out_each_key_once_with_its_weight(selector: DecodeSelector) -> None:
    made = cache(2, 90)
    plain, tail = listed(selector, made), begun(StepTail(selector, sampled=9, seed=5), made)
    drawn = set()
    for _ in range(40):
        lists = tail.choose(*made)
        check(lists, 4, 2, 90)
        assert lists.log_weights is not None
        for x, line in enumerate(sets(lists, 4)):
            assert plain[x] < line and len(line - plain[x]) == 9
            drawn |= {(x, j) for j in line - plain[x]}
        for line in range(len(lists.tokens)):
            count, x = int(lists.counts[line]), line * 4 // len(lists.tokens)
            weights = dict(zip(lists.tokens[line, :count].tolist(), lists.log_weights[line].tolist(), strict=False))
            for j, weight in weights.items():
                assert weight == pytest.approx(0.0 if j in plain[x] else math.log((90 - len(plain[x])) / 9))
    assert len(drawn) > 0.95 * sum(90 - len(line) for line in plain)  # nothing is out of reach
    other = begun(StepTail(selector, sampled=9, seed=6), made).choose(*made)
    again, first = (begun(StepTail(selector, sampled=9, seed=5), made).choose(*made) for _ in range(2))
    assert sets(again, 4) == sets(first, 4) != sets(other, 4)


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_drawing_all_that_is_left_is_dense_attention_and_says_so(selector: DecodeSelector) -> None:
    q, k, v = cache(3, 90)
    found = DecodeSession(k, v, policy=StepTail(selector, sampled=90)).attend(q[:, None])
    true = decode(q[:, None].numpy(), HSRIndex(k.numpy()), v.numpy(), policy=Dense())
    assert np.allclose(found.output, true.output, atol=1e-6) and np.allclose(found.lse, true.lse, atol=1e-6)
    assert found.certificate.kind == "statistical" and found.certificate.confidence == 0.95
    assert found.certificate.lse_error.max() < 1e-6 and found.certificate.output_error.max() < 1e-5
    assert (found.counters.reported == 90).all()


def spread_out(sharp: float) -> Cache:
    """Weights that are log-normal, nearly."""
    return cache(5, 400, sharp=sharp)


def two_kinds() -> Cache:
    """Light keys, and a tenth of them heavier by a factor of e: few draws may meet none of those."""
    q, k, v = cache(5, 400)
    k[:] = 0.0
    k[:, ::10, 0] = math.sqrt(k.shape[2])
    q[:] = 0.0
    q[:, 0] = 1.0
    return Cache(q, k, v)


@pytest.mark.parametrize("confidence", [0.9, 0.99])
@pytest.mark.parametrize("sampled", [16, 48])
@pytest.mark.parametrize(
    "made", [spread_out(1.0), spread_out(2.0), spread_out(3.0), two_kinds()], ids=["even", "skewed", "heavy", "two"]
)
def test_bounds_hold_as_often_as_stated(made: Cache, sampled: int, confidence: float) -> None:
    """Of 1,200 rows, draws that depend on each other in fours: three standard errors of the share of failures."""
    mass, draws = np.empty(4), 300
    true = decode(made.q[:, None].numpy(), HSRIndex(made.k.numpy()), made.v.numpy(), policy=Dense())
    for x, line in enumerate(listed(TopOracle(40), made)):
        weights, _, _ = exact(made, x)
        mass[x] = 1 - weights[list(line)].sum() / weights.sum()
    q, k, v = (torch.stack([x] * draws) for x in made)
    tail = StepTail(TopOracle(40), sampled=sampled, confidence=confidence)
    found = DecodeSession(k, v, policy=tail).attend(q[:, :, None])
    errors, sure = np.linalg.norm(found.output[:, :, 0].numpy() - true.output[:, 0], axis=2), found.certificate
    held = np.stack(
        [
            errors <= sure.output_error[..., 0],
            np.abs(found.lse - true.lse)[..., 0] <= sure.lse_error[..., 0] + 1e-6,
            mass <= sure.dropped_mass[..., 0],
        ],
        axis=2,
    )
    assert (held.mean(axis=(0, 1)) >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / draws)).all()
    assert (sure.dropped_mass[..., 0].mean(axis=0) < 1.0).all(), "a bound that is always 1 is none"


@pytest.mark.parametrize("size", [1e2, 3e3, 1e4, 1e10])
def test_large_scores_leave_bounds_that_hold(size: float) -> None:
    """All keys alike: a tenth of the mass is listed, whatever the scores' size."""
    q, k, v = cache(7, 200)
    k[:] = k[:, :1]
    q, k = (size**0.5 * x for x in (q, k))
    found = DecodeSession(k, v, policy=StepTail(TopOracle(20), sampled=20)).attend(q[:, None])
    true = decode(q[:, None].numpy(), HSRIndex(k.numpy()), v.numpy(), policy=Dense())
    sure = found.certificate
    assert (sure.dropped_mass >= 0.9 - 1e-6).all()
    assert not np.isnan(sure.output_error).any() and not np.isnan(sure.lse_error).any()
    off = np.linalg.norm(found.output.numpy() - true.output, axis=2)
    assert (off <= sure.output_error).mean() >= 0.5


def left_out_means(made: Cache, tail: StepTail) -> tuple[list[np.ndarray], np.ndarray]:
    """Mean keys and values by block of what no head of a group lists, or of all; left out of each line: (4, C)."""
    plain, size, n = listed(tail.selector, made), tail.block, made.k.shape[1]
    firsts, found = range(0, n, size), []
    for x in (made.k, made.v):
        rows = np.zeros((2, len(firsts), x.shape[2]))
        for g in range(2):
            for c, first in enumerate(firsts):
                block = list(range(first, min(first + size, n)))
                others = [j for j in block if j not in plain[2 * g] | plain[2 * g + 1]]
                rows[g, c] = x[g, others or block].double().numpy().mean(axis=0)
        found.append(rows)
    left = [[len(set(range(first, min(first + size, n))) - line) for first in firsts] for line in plain]
    return found, np.array(left)


@pytest.mark.parametrize("selector", SELECTORS, ids=str)
@pytest.mark.parametrize(("size", "n", "begin"), [(16, 90, 90), (16, 91, 1), (1, 40, 33), (7, 90, 20), (500, 90, 89)])
def test_means_stand_for_what_was_left_out(selector: DecodeSelector, size: int, n: int, begin: int) -> None:
    made, tail = cache(6, n), StepTail(selector, means=True, block=size)
    state = tail.begin(made.k[:, :begin], made.v[:, :begin], None, made.scale)
    for end in range(begin, n, 7):
        state.append(made.k[:, :end], made.v[:, :end])
    state.append(made.k, made.v)
    lists = state.choose(*made)
    check(lists, 4, 2, n)
    assert sets(lists, 4) == listed(selector, made) and isinstance(lists.means, Means)
    rows, left = left_out_means(made, tail)
    assert np.allclose(lists.means.keys, rows[0], atol=1e-5) and np.allclose(lists.means.values, rows[1], atol=1e-5)
    weights = lists.means.log_weights.repeat_interleave(4 // len(lists.tokens), 0)
    assert np.allclose(weights.exp(), left)


def test_means_of_one_key_are_dense_attention_and_of_more_weigh_less() -> None:
    q, k, v = made = cache(7, 90, group=1)
    true = decode(q[:, None].numpy(), HSRIndex(k.numpy()), v.numpy(), policy=Dense())
    single = DecodeSession(k, v, policy=StepTail(TopOracle(9), means=True, block=1)).attend(q[:, None])
    assert np.allclose(single.output, true.output, atol=1e-5) and np.allclose(single.lse, true.lse, atol=1e-5)
    several = DecodeSession(k, v, policy=StepTail(TopOracle(9), means=True)).attend(q[:, None])
    without = DecodeSession(k, v, policy=TopOracle(9)).attend(q[:, None])
    assert (without.lse < several.lse).all() and (several.lse < true.lse).all()
    apart = [np.linalg.norm(x.output.numpy() - true.output) for x in (without, several)]
    assert apart[1] < apart[0] and several.certificate.kind == "none"
    assert (several.counters.reported == 9 + 6).all()
    assert listed(TopOracle(9), made) == sets(DecodeSession(k, v, policy=TopOracle(9)).gpu.lists(q[:, None]), 2)


@pytest.mark.parametrize("tail", [{"sampled": 20}, {"means": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_batches_dtypes_and_steps_without_reading_back(tail: dict[str, int], dtype: torch.dtype) -> None:
    made = Cache(*(x.to(dtype) for x in together(cache(8, 120), cache(9, 120))))
    policy = StepTail(TokenSelect(k=8, sinks=2, window=6), **tail)
    state = policy.begin(made.k[:, :100], made.v[:, :100], None, made.scale, batch=2)
    with nothing_read_back():
        for n in (101, 113, 120):
            state.append(made.k[:, :n], made.v[:, :n])
            lists = state.choose(made.q, made.k[:, :n], made.v[:, :n])
    check(lists, 8, 4, 120)
    output, lse = (torch.randn(8, 8), torch.randn(8))
    with nothing_read_back():
        found = state.bounds(Attended(*made, output, lse))
    assert (found is None) == ("means" in tail)
    q, k, v = (x.unflatten(0, (2, -1)) for x in made)
    result = DecodeSession(k, v, policy=policy).attend(q[:, :, None])
    assert torch.isfinite(result.output).all() and result.certificate.output_error.shape == (2, 4, 1)


@dataclass(frozen=True)
class Weighted(Stateless):
    """Lists that make up for what they leave out."""

    means: bool

    def choose(self, q: Any, k: Any, v: Any) -> TokenLists:
        ids, means = torch.zeros(len(k), 1), Means(k[:, :1], v[:, :1], torch.zeros(len(k), 1))
        return TokenLists.from_ids(ids, None, None if self.means else ids, means if self.means else None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either sampled or means must stand for the rest; got 0, False"),
        ({"sampled": 8, "means": True}, "either sampled or means must stand for the rest; got 8, True"),
        ({"sampled": 7}, "sampled must be at least 8, so that the draws show their spread, or 0; got 7"),
        ({"sampled": -1}, "sampled must be at least 0; got -1"),
        ({"means": 16}, "means must be True or False; got 16"),
        ({"means": True, "block": 0}, "block must be at least 1; got 0"),
        ({"sampled": 8, "seed": -1}, "seed must be in"),
        ({"sampled": 8, "confidence": 0.7}, r"confidence must be in \[0.8, 1.0\); got 0.7"),
        ({"sampled": 8, "selector": Dense()}, r"selector must be a decode selector; got Dense\(\)"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        StepTail(**({"selector": TopOracle(4)} | settings))


@pytest.mark.parametrize("tail", [{"sampled": 20}, {"means": True}], ids=str)
@pytest.mark.parametrize(("means", "kind"), [(True, "means"), (False, "log weights")])
def test_lists_that_make_up_for_the_rest_are_refused(tail: dict[str, int], means: bool, kind: str) -> None:
    q, k, v = cache(10, 30)
    with pytest.raises(
        ArgumentError, match=f"selector must leave keys out, which Weighted.* makes up for by its {kind}"
    ):
        DecodeSession(k, v, policy=StepTail(Weighted(means), **tail)).attend(q[:, None])
