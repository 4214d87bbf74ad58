"""Attention that skips blocks: against its definition written out row by row, and its certificate against the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Dense, audit, decode, prefill
from attention.skip_softmax import SkipResult, SkipSoftmax
from hsr.backend import ROWS, choose
from hsr.errors import ArgumentError
from tests.prompts import Prompt, made, prompts
from tests.selectors import SHAPES, gaussian

METHODS = [row.method for row in ROWS if row.op == "skip_softmax"]
every = pytest.mark.parametrize("method", METHODS)


def sinking(seed: int, m: int, n: int, sharp: float = 3.0, **kinds: int) -> Prompt:
    """Scores that vary from block to block of keys, and sinks."""
    prompt = gaussian(seed, m, n, sharp=sharp, **kinds)
    prompt.q[..., 0] = 4.0
    prompt.k[..., 0] = np.repeat(np.random.default_rng(seed).normal(0, 8, (len(prompt.k), -(-n // 32))), 32, 1)[:, :n]
    prompt.k[:, :3, 0] = 14.0
    return prompt


def blocks_of_the_paper(prompt: Prompt, level: float) -> tuple[list[tuple[int, int, int]], float]:
    """(head, row block, first key) of every block skipped, and by how little any decision was made."""
    skipped, nearest = [], math.inf
    _, m, n = prompt.shape
    for head, q in enumerate(prompt.q.astype(np.float64)):
        k = prompt.k[head * len(prompt.k) // len(prompt.q)].astype(np.float64)
        for first_row in range(0, m, 128):
            rows = range(first_row, min(first_row + 128, m))
            running = dict.fromkeys(rows, -math.inf)
            for first in range(0, n - m + rows[-1] + 1, 64):
                best = {i: float((k[first : min(first + 64, n - m + i + 1)] @ q[i] * prompt.scale).max())
                        for i in rows if first <= n - m + i}  # fmt: skip
                gaps = [best[i] - running[i] - level for i in best]
                if max(gaps) < 0:
                    skipped.append((head, first_row // 128, first))
                else:
                    running |= {i: max(running[i], x) for i, x in best.items()}
                nearest = min(nearest, abs(max(gaps)))
    return skipped, nearest


def without(prompt: Prompt, skipped: list[tuple[int, int, int]]) -> tuple[np.ndarray, ...]:
    """Exact attention without those blocks: output, log-sum-exp, dropped share and keys of each row."""
    _, m, n = prompt.shape
    group = len(prompt.q) // len(prompt.k)
    k, v = (np.repeat(x.astype(np.float64), group, axis=0) for x in (prompt.k, prompt.v))
    scores = prompt.scale * prompt.q.astype(np.float64) @ k.swapaxes(1, 2)
    scores = np.where(np.tri(m, n, n - m, dtype=bool), scores, -np.inf)
    seen = scores.copy()
    for head, block, first in skipped:
        seen[head, 128 * block : 128 * block + 128, first : first + 64] = -np.inf
    top = scores.max(axis=2, keepdims=True)
    weights, every_weight = np.exp(seen - top), np.exp(scores - top)
    total = weights.sum(axis=2)
    share = np.where(seen == scores, 0.0, every_weight).sum(axis=2) / every_weight.sum(axis=2)
    return weights @ v / total[..., None], np.log(total) + top[..., 0], share, np.isfinite(seen).sum(axis=2)


@every
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [1.0, 0.05, 1e-4, 0.0])
def test_it_is_the_paper(shape: tuple[int, int], threshold: float, method: str) -> None:
    prompt, policy = sinking(2, *shape), SkipSoftmax(threshold)
    skipped, nearest = blocks_of_the_paper(prompt, policy.level(shape[1]))
    assert nearest > 1e-9  # no ties but those of -inf
    output, lse, share, kept = without(prompt, skipped)
    result = prefill(*prompt, policy=policy, method=method)
    assert isinstance(result, SkipResult)
    assert np.allclose(result.output, output, atol=1e-12) and np.allclose(result.lse, lse, atol=1e-12)
    counts = np.zeros((4, -(-shape[0] // 128)), int)
    np.add.at(counts, tuple(np.array(skipped, int).reshape(-1, 3)[:, :2].T), 1)
    assert np.array_equal(result.skipped, counts) and np.array_equal(result.counters.reported, kept)
    assert np.array_equal(
        result.counters.scanned, np.broadcast_to(np.arange(shape[1] - shape[0], shape[1]) + 1, kept.shape)
    )
    last = [min(i + 127, shape[0] - 1) for i in range(0, shape[0], 128)]
    assert np.allclose(result.densities, kept[:, last].sum(axis=1) / result.counters.scanned[0, last].sum())
    certificate = result.certificate
    assert (share <= certificate.dropped_mass).all() and (certificate.kind == "exact") == (not skipped)
    assert (certificate.dropped_mass <= (result.counters.scanned - kept) * threshold + 1e-9).all()
    assert not threshold or shape[1] < 500 or skipped


@every
@settings(max_examples=60)
@given(
    prompt=prompts(),
    log_threshold=st.floats(-30, 0),
    jitter=st.sampled_from((0.0, 1.0, 30.0)),
    seed=st.integers(0, 99),
)
def test_the_certificate_holds_whatever_the_prompt(
    method: str, prompt: Prompt, log_threshold: float, jitter: float, seed: int
) -> None:
    """Exact attention in extended precision is within every bound; key blocks are pushed up and down."""
    q, k, v = (x.copy() for x in prompt)
    with np.errstate(over="ignore"):
        shift = np.repeat(np.random.default_rng(seed).normal(0, jitter, (len(k), -(-k.shape[1] // 64), 1)), 64, axis=1)
        k += (shift[:, : k.shape[1]]).astype(k.dtype)
    if not all(np.isfinite(x).all() for x in (q, k, v)):
        return
    result = prefill(q, k, v, policy=SkipSoftmax(math.exp(log_threshold)), method=method)
    certificate, (_, m, n) = result.certificate, prompt.shape
    wide = [x.astype(np.longdouble) for x in (q, *(np.repeat(x, len(q) // len(k), axis=0) for x in (k, v)))]
    scores = np.einsum("hmd,hNd->hmN", wide[0], wide[1]) * np.longdouble(prompt.scale)
    scores = np.where(np.tri(m, n, n - m, dtype=bool), scores, -np.inf)
    top = scores.max(axis=2, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=2)
    exact, lse = np.einsum("hmN,hNd->hmd", weights, wide[2]) / total[..., None], np.log(total) + top[..., 0]
    off = np.sqrt(((result.output.astype(np.longdouble) - exact) ** 2).sum(axis=2))
    assert (off <= certificate.output_error).all()
    assert (np.abs(result.lse - lse) <= certificate.lse_error).all()
    sizes = np.abs(wide[0]).sum(axis=2) * np.abs(wide[1]).max() * prompt.scale
    rounding = np.expm1(np.minimum(2.0**-50 * (k.shape[2] + 4) * sizes, 50)) + 1e-12
    assert (-np.expm1(np.minimum(result.lse - lse, 0)) <= certificate.dropped_mass + rounding).all()
    assert (certificate.dropped_mass[result.counters.reported == result.counters.scanned] == 0).all()


@pytest.mark.parametrize("factor", [1e-3, 0.02, 0.5])
def test_a_factor_bounds_the_dropped_mass(factor: float) -> None:
    prompt = sinking(5, 300, 1100)
    result = prefill(*prompt, policy=SkipSoftmax(factor=factor))
    assert result.certificate.dropped_mass.max() <= factor * (1 + 1e-9) and result.skipped.sum() > 0
    share = without(prompt, blocks_of_the_paper(prompt, math.log(factor / 1100))[0])[2]
    assert 0 < share.max() <= result.certificate.dropped_mass.max()


@settings(max_examples=20)
@given(seed=st.integers(0, 99), one=st.floats(0, 1), other=st.floats(0, 1))
def test_what_a_threshold_of_nothing_and_of_one_do(seed: int, one: float, other: float) -> None:
    """Nothing is dense; a smaller one drops less of any row's weight than its bound, and exact rows say so."""
    prompt = sinking(seed, 150, 400)
    dense, nothing = (prefill(*prompt, policy=policy) for policy in (Dense(), SkipSoftmax(0.0)))
    assert np.allclose(dense.output, nothing.output, atol=1e-12) and nothing.certificate.kind == "exact"
    assert nothing.certificate.output_error.max() < 1e-9 and (nothing.densities == 1).all()
    low, high = (prefill(*prompt, policy=SkipSoftmax(10.0 ** -(8 * x))) for x in sorted((one, other), reverse=True))
    assert (low.certificate.dropped_mass <= high.certificate.dropped_mass + 1e-12).all()
    for x, found in ((max(one, other), low), (min(one, other), high)):
        skipped = found.counters.scanned - found.counters.reported  # keys of a row
        assert (found.certificate.dropped_mass <= skipped * 10.0 ** -(8 * x) * (1 + 1e-9)).all()


@every
def test_a_group_and_a_batch_are_as_their_heads_alone(method: str) -> None:
    prompt, policy = sinking(6, 200, 500, group=3), SkipSoftmax(0.01)
    whole = prefill(*prompt, policy=policy, method=method)
    alone = [prefill(prompt.q[h : h + 1], *(x[h // 3][None] for x in prompt[1:]), policy=policy) for h in range(6)]
    assert np.allclose(whole.output, np.concatenate([x.output for x in alone]))
    assert np.array_equal(whole.skipped, np.concatenate([x.skipped for x in alone]))
    batch = prefill(*(x.reshape(2, -1, *x.shape[1:]) for x in prompt), policy=policy, method=method)
    assert np.array_equal(batch.output.reshape(whole.output.shape), whole.output) and batch.skipped.shape == (2, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_certified_with_its_rounding(dtype: torch.dtype) -> None:
    prompt = [torch.from_numpy(x).to(dtype) for x in sinking(7, 130, 300)]
    result = prefill(*prompt, policy=SkipSoftmax(0.01))
    exact = prefill(*(x.double().numpy() for x in prompt), policy=Dense()).output
    off = np.linalg.norm(result.output.double().numpy() - exact, axis=2)
    assert result.output.dtype == dtype and (off <= result.certificate.output_error).all()
    assert off.max() > 1e-4 and result.certificate.output_error.max() < 1


def test_later_tokens_change_no_earlier_row() -> None:
    prompt = sinking(8, 512, 600)
    other = prompt._replace(k=prompt.k.copy())
    other.k[:, 600 - 512 + 256 :] *= -3
    one, two = (prefill(*x, policy=SkipSoftmax(0.01)).output[:, :256] for x in (prompt, other))
    assert np.array_equal(one, two)


def test_inputs_stay_and_audits_go_on_from_it() -> None:
    prompt = sinking(9, 200, 400)
    before = [x.copy() for x in prompt]
    found = audit(*prompt, SkipSoftmax(1.0), rows=8, escalate=True, max_error=0.0)
    tried = [attempt.audited for attempt in found.earlier]
    assert tried[0] == SkipSoftmax(1.0) and tried[1] == SkipSoftmax(0.25) and found.audited == Dense()
    assert tried[-1].tighter(400) is None and len(tried) < 20
    assert SkipSoftmax(factor=0.1).tighter(400) == SkipSoftmax(factor=0.025)
    assert SkipSoftmax(0.0).tighter(400) is None and SkipSoftmax(factor=9e9).level(400) == 0
    assert all(np.array_equal(x, y) for x, y in zip(prompt, before, strict=True))


@every
def test_huge_scores_and_one_token_are_served(method: str) -> None:
    prompt = made(np.random.default_rng(0), 1, 1, 1, 1, 3, 2, "gaussian")
    assert np.allclose(prefill(*prompt, policy=SkipSoftmax(1.0), method=method).output, prompt.v)
    huge = made(np.random.default_rng(0), 130, 200, 1, 2, 3, 2, "huge")
    result = prefill(huge.q * 1e30, huge.k * 1e30, huge.v, policy=SkipSoftmax(1e-9), method=method)
    assert np.isfinite(result.output).all()


@pytest.mark.parametrize(
    ("settings_of", "message"),
    [
        ({}, "needs one of threshold and factor; got threshold=None, factor=None"),
        ({"threshold": 0.1, "factor": 1.0}, "needs one of threshold and factor"),
        ({"threshold": 1.1}, "threshold must be in"),
        ({"threshold": -0.1}, "threshold must be in"),
        ({"factor": -1.0}, "factor must be in"),
        ({"factor": math.nan}, "factor must be"),
        ({"threshold": "0.1"}, "threshold must be a number"),
    ],
)
def test_settings_out_of_range_are_refused(settings_of: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SkipSoftmax(**settings_of)


def test_what_it_does_not_serve_is_refused() -> None:
    q, k, v = sinking(10, 130, 200)
    with pytest.raises(ArgumentError, match="it serves prefill"):
        decode(q[:, -1:], k, v, policy=SkipSoftmax(0.1))
    with pytest.raises(ArgumentError, match="causal must be True for SkipSoftmax"):
        prefill(q, k, v, policy=SkipSoftmax(0.1), causal=False)
    with pytest.raises(ArgumentError, match="method must be one of numba, reference"):
        prefill(q, k, v, policy=SkipSoftmax(0.1), method="tree")
    assert callable(choose("skip_softmax", "numba"))


def test_tighter_settings_of_a_factor_are_tighter_from_the_first() -> None:
    policy: SkipSoftmax | None = SkipSoftmax(factor=9e9)
    levels = []
    while policy is not None:
        levels.append(policy.level(400))
        policy = policy.tighter(400)
    assert (np.diff(levels) < -1.3).all() and len(levels) < 20
