"""Audits: exact where every row is drawn, right as often as they say elsewhere, and faults are found."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from attention import (
    Audit,
    BlockSampled,
    Certified,
    Dense,
    Kept,
    ReLUPower,
    Result,
    Sampled,
    Softmax,
    TopR,
    audit,
    decode,
    prefill,
)
from attention.audit_bounds import relative_error
from attention.block_sampled import measured_rows
from attention.finite_population import upper_mean_of_strata, upper_means, upper_shares
from attention.reference import dense
from hsr import ArgumentError, HSRIndex

WEIGHTS = [
    (Softmax(), None),
    (Softmax(), Dense()),
    (Softmax(), TopR(2)),
    (Softmax(), Certified(0.3, sinks=1, recent=0, spread=0)),
    (Softmax(), Certified(0.3, bytes_per_key=8)),
    (ReLUPower(2, 0.3), None),
]
QUANTITIES = ("dropped", "error", "exceeding")


class Problem(NamedTuple):
    q: np.ndarray  # (B, h, m, d)
    k: np.ndarray  # (B, g, n, d)
    v: np.ndarray  # (B, g, n, dv)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, g, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    m, extra = draw(st.integers(1, 12)), draw(st.integers(0, 40))
    sharpness = draw(st.sampled_from((0.5, 3.0, 30.0)))
    dtype = draw(st.sampled_from((np.float32, np.float64)))
    q = sharpness * rng.standard_normal((batch, g * group, m, 6))
    k, v = rng.standard_normal((batch, g, m + extra, 6)), rng.standard_normal((batch, g, m + extra, 3))
    return Problem(q.astype(dtype), k.astype(dtype), v.astype(dtype))


def gaussian(m: int, n: int, heads: int = 1, groups: int = 1, seed: int = 0) -> Problem:
    """Without a batch: q (heads, m, 8), k and v (groups, n, 8)."""
    rng = np.random.default_rng(seed)
    return Problem(*(rng.standard_normal(shape) for shape in ((heads, m, 8), (groups, n, 8), (groups, n, 8))))


def exact(problem: Problem, weight: Any, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Output (B, h, m, dv) and log-sum-exp (B, h, m) by the definition."""
    scale = problem.q.shape[-1] ** -0.5
    parts = [dense(q, k, v, weight, scale, causal) for q, k, v in zip(*problem, strict=True)]
    return np.array([part[0] for part in parts]), np.array([part[1] for part in parts])


def csr(keep: np.ndarray) -> Kept:
    """Masks (..., n) of kept keys -> their CSR."""
    flat = keep.reshape(-1, keep.shape[-1])
    return Kept(np.concatenate(([0], np.cumsum(flat.sum(axis=1)))), np.nonzero(flat)[1])


@pytest.mark.parametrize(("weight", "policy"), WEIGHTS, ids=repr)
@settings(max_examples=60)
@given(problem=problems(), causal=st.booleans(), whole=st.booleans())
def test_an_audit_of_all_rows_is_exact(weight: Any, policy: Any, problem: Problem, causal: bool, whole: bool) -> None:
    """Of a policy and of its result alike: every bound is the mean of what the definition says."""
    result = prefill(*problem, causal=causal, weight=weight, policy=policy)
    output, lse = exact(problem, weight, causal)
    found = audit(
        *problem, result if whole else policy, rows=12, causal=causal, weight=weight, tolerance=0.05, confidence=0.9
    )
    off = np.linalg.norm(result.output - output, axis=-1)
    size = np.linalg.norm(output, axis=-1)
    error = np.minimum(np.divide(off, size, out=1.0 * (off > 0), where=size > 0), 1.0)
    with np.errstate(invalid="ignore"):  # -inf - -inf: both rows empty
        dropped = np.where(lse == result.lse, 0.0, np.minimum(np.abs(np.expm1(result.lse - lse)), 1.0))
    sampled = {"dropped": dropped, "error": error, "exceeding": 1.0 * (error > 0.05)}
    assert found.rows.shape == result.lse.shape
    assert found.population == problem.q.shape[2]
    for name, values in sampled.items():
        estimate = getattr(found, name)
        assert np.allclose(estimate.values, np.take_along_axis(values, found.rows, axis=-1), atol=1e-7)
        assert np.allclose(estimate.upper, values.mean(axis=-1), atol=1e-7)
        assert np.allclose(estimate.mean, estimate.upper, rtol=1e-12)
        assert estimate.overall_mean == pytest.approx(values.mean(), abs=1e-7)
        assert estimate.overall_upper == pytest.approx(estimate.overall_mean, rel=1e-12)


@settings(max_examples=60)
@given(problem=problems(), seed=st.integers(0, 2**32 - 1), causal=st.booleans())
def test_kept_keys_are_attended_to_alone(problem: Problem, seed: int, causal: bool) -> None:
    """Against the definition's index-set softmax, from masks per query and per key-value head."""
    rng = np.random.default_rng(seed)
    batch, h, m, _ = problem.q.shape
    g, n = problem.k.shape[1:3]
    for heads in (h, g):
        keep = rng.random((batch, heads, m, n)) < 0.5
        keep &= np.tri(m, n, n - m, dtype=bool) if causal else True
        masks = np.repeat(keep, h // heads, axis=1)
        scale = problem.q.shape[-1] ** -0.5
        parts = [dense(*arrays[:3], Softmax(), scale, False, arrays[3]) for arrays in zip(*problem, masks, strict=True)]
        found = audit(*problem, csr(keep), rows=12, causal=causal)
        output, lse = exact(problem, Softmax(), causal)
        for part, rows, (one, other), dropped, error in zip(
            parts, found.rows, zip(output, lse, strict=True), found.dropped.values, found.error.values, strict=True
        ):
            off = np.linalg.norm(part[0] - one, axis=-1) / np.linalg.norm(one, axis=-1)
            assert np.allclose(error, np.take_along_axis(np.minimum(off, 1), rows, axis=1), atol=1e-9)
            assert np.allclose(dropped, np.take_along_axis(1 - np.exp(part[1] - other), rows, axis=1), atol=1e-9)


def test_a_report_is_audited_as_the_keys_it_holds() -> None:
    problem = gaussian(6, 40, heads=4, groups=2)
    report = HSRIndex(problem.k).query(problem.q, 0.5)
    one = audit(*problem, report, causal=False)
    other = audit(*problem, Kept(report.offsets, report.indices), causal=False)
    assert np.array_equal(one.error.values, other.error.values)
    assert one.dropped.overall_mean > 0.1
    relu = audit(*problem, report, causal=False, weight=ReLUPower(2, 0.5 / np.sqrt(8)))
    assert relu.error.overall_upper < 1e-12
    assert relu.dropped.overall_upper < 1e-12


def test_importance_weights_make_up_for_dropped_keys() -> None:
    """A key twice at half its weight is that key; half of equal keys at twice the weight have the sum of all."""
    problem = gaussian(5, 30)
    twice = Kept(60 * np.arange(6), np.tile(np.repeat(np.arange(30), 2), 5), np.full(300, -np.log(2)))
    found = audit(*problem, twice, causal=False)
    assert found.error.overall_mean < 1e-12
    assert found.dropped.overall_mean < 1e-12
    equal = problem._replace(k=np.ones_like(problem.k))
    half = Kept(15 * np.arange(6), np.tile(np.arange(15), 5), np.full(75, np.log(2)))
    assert audit(*equal, half, causal=False).dropped.overall_mean < 1e-12
    unweighted = audit(*equal, dataclasses.replace(half, log_weights=None), causal=False)
    assert np.allclose(unweighted.dropped.values, 0.5)
    double = dataclasses.replace(half, log_weights=np.full(75, np.log(6)))
    assert (audit(*equal, double, causal=False).dropped.values == 1).all()  # three times the sum: cut off at 1


def test_a_decode_is_audited_without_the_causal_mask() -> None:
    problem = gaussian(3, 50, heads=4, groups=2)
    result = decode(problem.q, HSRIndex(problem.k), problem.v, policy=Dense())
    assert audit(*problem, result, causal=False).error.overall_mean < 1e-12
    assert audit(*problem, result).error.overall_mean > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_is_audited_in_its_own_dtype(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    problem = [torch.randn(2, h, 30, 16, generator=generator).to(getattr(torch, dtype)) for h in (4, 2, 2)]
    policy, result = (audit(*problem, x, rows=20) for x in (Dense(), prefill(*problem, policy=Dense())))
    assert policy.rows.shape == (2, 4, 20)
    assert np.array_equal(policy.error.values, result.error.values)
    rounding = float(torch.finfo(getattr(torch, dtype)).eps)
    assert rounding / 100 < policy.error.overall_mean <= rounding


@pytest.fixture(scope="module")
def sharp() -> Problem:
    """3,000 rows, each looking at one key: the top one has nearly all the mass."""
    rng = np.random.default_rng(5)
    k = np.eye(64)[None]
    q = 120 * k[:, rng.integers(0, 64, 3000)]
    return Problem(q, k, rng.standard_normal((1, 64, 4)))


def test_a_selection_that_loses_the_top_key_in_one_row_of_a_hundred_is_found(sharp: Problem) -> None:
    scores = np.einsum("hmd,hNd->hmN", sharp.q, sharp.k)
    keep = np.ones((1, 3000, 64), bool)
    assert audit(*sharp, csr(keep), rows=600, causal=False).passes(max_dropped=0.008, max_error=0.008)
    faulty = np.arange(0, 3000, 100)
    keep[0, faulty, scores.argmax(axis=2)[0, faulty]] = False
    found = audit(*sharp, csr(keep), rows=600, causal=False)
    assert set(found.rows[0][found.exceeding.values[0] > 0]) == set(found.rows[0]) & set(faulty)
    assert found.exceeding.overall_mean > 0
    for name in QUANTITIES:
        assert getattr(found, name).upper[0] >= 0.0099
        assert not found.passes(**{f"max_{name}": 0.008})


@pytest.mark.parametrize("field", ["output", "lse"])
def test_one_wrong_row_of_a_result_is_found(field: str) -> None:
    problem = gaussian(40, 60, heads=2)
    result = prefill(*problem, policy=Dense())
    wrong = getattr(result, field).copy()
    wrong[1, 17] -= 10
    found = audit(*problem, dataclasses.replace(result, **{field: wrong}), rows=40)
    quantity = {"output": found.error, "lse": found.dropped}[field]
    assert found.rows[1, quantity.values[1].argmax()] == 17
    assert (quantity.values > 0.5).sum() == 1
    assert not found.passes(max_dropped=0.005, max_error=0.005)


def test_a_kept_key_that_the_row_cannot_see_is_an_error() -> None:
    problem = gaussian(20, 20)
    everything = csr(np.ones((1, 20, 20), bool))
    assert audit(*problem, everything, causal=False).error.overall_mean < 1e-12
    assert audit(*problem, everything).error.overall_mean > 0.1


def damaged(problem: Problem, seed: int) -> tuple[Result, float, float, float]:
    """A result with random errors of very different sizes; its true mean error, share above 0.1 and mass error."""
    rng = np.random.default_rng(seed)
    result = prefill(*problem, policy=Dense())
    error = np.where(rng.random(result.lse.shape) < 0.04, 0.8, 0.01 * rng.random(result.lse.shape))
    dropped = np.where(rng.random(result.lse.shape) < 0.02, 0.9, 0.003)
    changed = dataclasses.replace(
        result, output=result.output * (1 - error[..., None]), lse=result.lse + np.log1p(-dropped)
    )
    return changed, error.mean(), (error > 0.1).mean(), dropped.mean()


def test_the_bounds_of_an_audit_hold_together_as_often_as_it_says() -> None:
    """End to end, 300 draws: all overall bounds at once, and all bounds of single heads at once."""
    problem = gaussian(80, 80, heads=3, groups=3)
    result, error, above, dropped = damaged(problem, 0)
    everything = audit(*problem, result, rows=80)
    truths = {"dropped": dropped, "error": error, "exceeding": above}
    for name, truth in truths.items():
        assert getattr(everything, name).overall_upper == pytest.approx(truth, rel=1e-6)
    rng = np.random.default_rng(1)
    failed = np.zeros(2, int)
    for _ in range(300):
        found = audit(*problem, result, rows=25, confidence=0.8, rng=rng)
        estimates = [(getattr(found, name), getattr(everything, name)) for name in QUANTITIES]
        failed[0] += any(one.overall_upper < other.overall_mean * (1 - 1e-9) for one, other in estimates)
        failed[1] += any((one.upper < other.mean * (1 - 1e-9)).any() for one, other in estimates)
    assert (failed <= binom.isf(1e-6, 300, 0.2)).all()


def test_the_draw_follows_the_generator() -> None:
    problem = gaussian(50, 50, heads=2)
    one, same, other = (audit(*problem, rows=10, rng=seed) for seed in (3, np.random.default_rng(3), 4))
    assert np.array_equal(one.rows, same.rows)
    assert not np.array_equal(one.rows, other.rows)
    assert not np.array_equal(one.rows[0], one.rows[1]), "heads are drawn independently"
    assert all(len(set(rows)) == 10 for rows in one.rows)
    assert isinstance(one.audited, Certified)


@pytest.mark.parametrize("seed", [0, 5])
def test_what_an_error_was_tuned_on_is_not_what_is_audited(seed: int) -> None:
    """Else bounds would be of rows that the result was made to look good on."""
    m = 2000
    problem = gaussian(m, m, heads=3)
    looked = audit(*problem, BlockSampled(density=1.0), rows=64, rng=seed).rows
    tuned = measured_rows(seed, 3, m)
    shared = [len(np.intersect1d(*pair)) for pair in zip(looked, tuned, strict=True)]
    assert max(shared) < 15  # 2 expected of 64


def test_errors_of_tiny_values_are_not_lost_to_underflow() -> None:
    exact = np.array([[3e-170, 4e-170], [0.0, 0.0], [0.0, 0.0], [5e-324, 0.0], [1e300, 1e300]])
    output = np.array([[3e-170, 8e-170], [1e-200, 0.0], [0.0, 0.0], [5e-324, 0.0], [1e300, 0.9e300]])
    assert relative_error(output, exact) == pytest.approx([0.8, 1.0, 0.0, 0.0, 0.1 / 2**0.5])


class Escalation(NamedTuple):
    selection: Any
    audited: tuple[Any, ...]  # all that are tried when nothing passes


LADDERS = [
    Escalation(Dense(), (Dense(),)),
    Escalation(TopR(20), (TopR(20), TopR(80), Dense())),
    Escalation(TopR(), (TopR(), Dense())),
    Escalation(Sampled(budget=40), (Sampled(budget=40), Sampled(budget=160), Dense())),
    Escalation(Certified(1e-5), (Certified(1e-5), Certified(2.5e-6), Dense())),
    Escalation(None, (*(Certified(0.01 / 4**i) for i in range(7)), Dense())),
]


@pytest.mark.parametrize("ladder", LADDERS, ids=repr)
def test_an_impossible_limit_ends_dense(ladder: Escalation) -> None:
    """Confidence is split over the attempts, and every attempt draws anew."""
    problem = gaussian(40, 200, heads=2)
    found = audit(*problem, ladder.selection, rows=20, escalate=True, max_error=0.0)
    tried = (*found.earlier, found)
    assert tuple(attempt.audited for attempt in tried) == ladder.audited
    assert [attempt.confidence for attempt in tried] == pytest.approx(
        [1 - 0.05 / 2**i for i in range(1, len(tried) + 1)]
    )
    assert len({attempt.rows.tobytes() for attempt in tried}) == len(tried)
    assert not found.passes(max_error=0.0)
    assert all(attempt.result is None for attempt in found.earlier)
    assert np.allclose(found.result.output, prefill(*problem, policy=Dense()).output)


def test_escalation_stops_at_the_first_policy_that_passes() -> None:
    problem = gaussian(200, 1000, heads=2)
    found = audit(*problem, TopR(8), rows=100, escalate=True, max_dropped=0.4)
    assert found.passes(max_dropped=0.4)
    assert isinstance(found.audited, TopR)
    assert found.audited.r > 8
    assert [attempt.passes(max_dropped=0.4) for attempt in found.earlier] == [False] * len(found.earlier)
    assert np.allclose(found.result.output, prefill(*problem, policy=found.audited).output)
    lse = dense(*problem, Softmax(), 8**-0.5, causal=True)[1]
    assert -np.expm1(found.result.lse - lse).mean() <= 0.4
    first = audit(*problem, found.audited, rows=100, escalate=True, max_dropped=0.4)
    assert first.earlier == ()


def test_a_result_or_kept_keys_that_fail_are_replaced_by_the_dense_result() -> None:
    problem = gaussian(30, 30)
    good, bad = (prefill(*problem, policy=policy) for policy in (Dense(), TopR(1)))
    kept = csr(np.ones((1, 30, 30), bool))
    passed = audit(*problem, good, escalate=True, max_error=0.2)
    assert passed.result is good
    assert passed.earlier == ()
    replaced = audit(*problem, bad, escalate=True, max_error=0.2)
    assert replaced.audited == Dense()
    assert np.allclose(replaced.result.output, good.output)
    assert audit(*problem, kept, causal=False, escalate=True, max_error=0.2).result is None
    assert audit(*problem, kept, escalate=True, max_error=0.2).audited == Dense()
    relu = audit(*problem, bad, weight=ReLUPower(1, 0.0), escalate=True, max_error=1e-9)
    assert relu.audited is None
    assert relu.passes(max_error=1e-9)


def test_what_is_tighter() -> None:
    assert Dense().tighter(100) is None
    assert TopR(10).tighter(100) == TopR(40)
    assert TopR(25).tighter(100) is None
    assert TopR().tighter(1 << 15) == TopR(4 * 4096)
    assert Certified(0.4, sinks=3).tighter(100) == Certified(0.1, sinks=3)
    assert Certified(0.0).tighter(100) is None
    assert Sampled(eps=0.2).tighter(101) == Sampled(eps=0.1)
    assert Sampled(eps=0.2).tighter(99) is None
    assert Sampled(budget=10).tighter(40) is None


@pytest.mark.parametrize("policy", [Sampled(budget=30), Certified(0.1, bytes_per_key=8)], ids=repr)
def test_policies_whose_rows_bear_on_each_other_are_run_on_all(policy: Any) -> None:
    """Codes are fitted to the queries of a call, and the heads of a group share a list of drawn keys."""
    problem = gaussian(300, 400, heads=6, groups=2)
    one, other = (audit(*problem, x, rows=20) for x in (policy, prefill(*problem, policy=policy)))
    assert np.allclose(one.error.values, other.error.values, atol=1e-9)
    assert np.allclose(one.dropped.values, other.dropped.values, atol=1e-9)
    assert one.error.overall_mean > 1e-4
    assert one.audited == policy
    assert one.result is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"rows": 0}, "rows must be at least 1; got 0"),
        ({"rows": 2.0}, "rows must be a whole number; got 2.0"),
        ({"confidence": 1.0}, "confidence must be in .* got 1.0"),
        ({"confidence": 0}, "confidence must be in .* got 0"),
        ({"tolerance": -0.1}, "tolerance must be in"),
        ({"tolerance": 1.0}, "tolerance must be in"),
        ({"rng": "seed"}, "rng must be a whole number; got 'seed'"),
        ({"rng": -1}, "rng must be at least 0; got -1"),
        ({"selection": 0.01}, "selection must be a Result, a Kept, a Report or a policy; got 0.01"),
        ({"selection": TopR(1), "weight": ReLUPower()}, "policy must be None for ReLUPower"),
        ({"weight": "softmax"}, "weight must be Softmax"),
        ({"scale": 0.0}, "scale must be in"),
        ({"q": np.zeros((2, 8))}, r"q must be \(heads, rows, width\)"),
        ({"q": np.zeros((3, 5, 8))}, "q must have a positive multiple of 2 heads"),
        ({"q": np.zeros((4, 5, 7))}, "q must have width 8 to match k"),
        ({"q": np.zeros((4, 0, 8))}, r"q and k must have at least one row; got shapes \(4, 0, 8\)"),
        ({"q": np.zeros((4, 31, 8))}, "q must have at most 30 rows, one per key, when causal; got 31"),
        ({"q": np.zeros((1, 4, 5, 8))}, "q must have the batch of k"),
        ({"q": np.zeros((4, 5, 8), "f4")}, "q, k and v must have one dtype; got float32, float64, float64"),
        ({"q": np.full((4, 5, 8), np.nan)}, "q must be finite"),
        ({"q": np.full((4, 5, 8), 1e308)}, "q and k must have scores within float64"),
        ({"v": np.zeros((2, 29, 3))}, r"v must be \(2, 30, 'dv'\) to match k; got \(2, 29, 3\)"),
        ({"max_error": 0.1}, "max_dropped, max_error and max_exceeding must be None without escalate"),
        ({"escalate": True}, "max_dropped, max_error or max_exceeding must be given"),
        ({"escalate": True, "max_error": -1.0}, "max_error must be in"),
        ({"selection": csr(np.ones((6, 30), bool))}, r"selection must have 20 rows, .* or 10, .*; got 6"),
        ({"selection": csr(np.ones((20, 31), bool))}, r"selection must have indices in 0..29; got 0..30"),
        (
            {"selection": Kept(np.zeros(21, int), np.zeros(0, int), np.zeros(0)), "weight": ReLUPower()},
            r"selection must have no log_weights unless weight is Softmax\(\)",
        ),
        (
            {"selection": prefill(*gaussian(5, 30, heads=2))},
            r"selection must have output \(4, 5, 3\) and lse \(4, 5\) to match q and v; got \(2, 5, 8\)",
        ),
    ],
)
def test_bad_arguments_are_refused(call: dict[str, Any], message: str) -> None:
    good = {"q": np.ones((4, 5, 8)), "k": np.ones((2, 30, 8)), "v": np.ones((2, 30, 3))}
    with pytest.raises(ArgumentError, match=message):
        audit(**(good | call))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], np.zeros(1, int)), "offsets must be a numpy array"),
        ((np.array([0, 1]), np.zeros(1)), "indices must be a numpy array .* of whole numbers"),
        ((np.array([0, 1]), np.zeros((1, 1), int)), "indices must be a numpy array"),
        ((np.array([], int), np.zeros(0, int)), "offsets must rise from 0 to 0"),
        ((np.array([0, 2]), np.zeros(1, int)), "offsets must rise from 0 to 1"),
        ((np.array([1, 1]), np.zeros(1, int)), "offsets must rise from 0 to 1"),
        ((np.array([0, 2, 1, 3]), np.zeros(3, int)), "offsets must rise from 0 to 3"),
        ((np.array([0, 1]), np.zeros(1, int), np.zeros(2)), r"log_weights must have shape \(1,\)"),
        ((np.array([0, 1]), np.zeros(1, int), np.array([np.inf])), "log_weights must be finite"),
    ],
)
def test_kept_keys_that_do_not_fit_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Kept(*arguments)


def test_limits_are_checked_and_each_is_asked_for() -> None:
    found: Audit = audit(*gaussian(40, 40), TopR(4), rows=40)
    assert found.passes(max_dropped=found.dropped.overall_upper)
    assert not found.passes(max_dropped=1.0, max_error=found.error.overall_upper / 2)
    assert not found.passes(max_exceeding=found.exceeding.overall_upper / 2)
    with pytest.raises(ArgumentError, match="must be given; got None for each"):
        found.passes()
    with pytest.raises(ArgumentError, match="max_dropped must be a number; got '1'"):
        found.passes(max_dropped="1")


def test_the_risk_is_split_over_quantities_and_heads() -> None:
    problem = gaussian(50, 50, heads=2)
    found = audit(*problem, TopR(5), rows=20, confidence=0.94)
    for name in ("dropped", "error"):
        estimate = getattr(found, name)
        assert estimate.upper.tolist() == upper_means(estimate.values, 50, (1 - 0.94) / 6).tolist()
        assert estimate.overall_upper == upper_mean_of_strata(estimate.values, 50, (1 - 0.94) / 3)
    hits = found.exceeding.values.sum(axis=1).astype(int)
    assert found.exceeding.upper.tolist() == upper_shares(hits, 20, 50, (1 - 0.94) / 6).tolist()
    assert found.exceeding.overall_upper == upper_mean_of_strata(found.exceeding.values, 50, (1 - 0.94) / 3)
