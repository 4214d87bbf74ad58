"""Decode, prefill and sessions against the float64 definition; certificates against attempts to break them."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention import Certified, DecodeSession, Dense, ReLUPower, Result, Softmax, TopR, Values, decode, prefill
from attention.reference import dense
from attention.sampled_numba import ROUNDING
from hsr import ArgumentError, HSRIndex, methods
from tests.strategies import served

POLICIES = [
    Dense(),
    Certified(0.01),
    Certified(0.3),
    Certified(0.0),
    Certified(0.1, sinks=0, recent=1, spread=0),
    Certified(0.1, sinks=0, recent=0, bytes_per_key=4),
    Certified(0.01, sinks=1, recent=8, bytes_per_key=16),
    Certified(0.1, sinks=0, recent=0, bytes_per_key=8, delta=1e-12),
    TopR(),
    TopR(1),
]
WEIGHTS = [(Softmax(), policy) for policy in POLICIES] + [(ReLUPower(1, 0.0), None), (ReLUPower(3, 0.7), None)]
UNCODED = [pair for pair in WEIGHTS if getattr(pair[1], "bytes_per_key", None) is None]


class Problem(NamedTuple):
    q: np.ndarray  # (B, h, m, d)
    k: np.ndarray  # (B, g, n, d)
    v: np.ndarray  # (B, g, n, dv)


@st.composite
def problems(draw: st.DrawFn, method: str) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, g, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n, dv = draw(st.integers(1, 300)), draw(st.integers(1, 6))
    d = served(method, draw(st.integers(1, 16)))
    m = draw(st.integers(1, min(n, 4)))
    sharpness = draw(st.sampled_from((0.1, 1.0, 5.0, 40.0)))
    q = sharpness * rng.standard_normal((batch, g * group, m, d))
    k = rng.standard_normal((batch, g, n, d)) + draw(st.sampled_from((0.0, 4.0)))
    v = rng.standard_normal((batch, g, n, dv)) + draw(st.sampled_from((0.0, 10.0)))
    if draw(st.booleans()):  # values that conspire: the dropped keys pull against the kept ones
        v = np.sign(k.sum(axis=-1, keepdims=True)) * np.ones(dv)
    if draw(st.booleans()):
        q, k = np.round(q), np.round(k)
    dtype = draw(st.sampled_from((np.float32, np.float64, np.float16)))
    return Problem(q.astype(dtype), k.astype(dtype), v.astype(dtype))


served_problems = st.sampled_from(methods("build")).flatmap(lambda name: st.tuples(st.just(name), problems(name)))


def assert_certified(result: Result, problem: Problem, weight: Any, causal: bool) -> None:
    """The error against dense attention never exceeds the certificate, and neither does the dropped mass."""
    for b in range(len(problem.q)):
        scale = problem.q.shape[-1] ** -0.5
        exact, lse = dense(problem.q[b], problem.k[b], problem.v[b], weight, scale, causal)
        error = np.sqrt(((result.output[b].astype(np.float64) - exact) ** 2).sum(axis=-1))
        certificate = result.certificate
        farthest = np.sqrt((problem.v[b].astype(np.float64) ** 2).sum(axis=-1)).max()
        rounding = 2 * (problem.k.shape[2] + 16) * 2.0**-53 * farthest  # of the oracle's own sums
        assert (error <= certificate.output_error[b] + rounding).all()
        size = np.sqrt((exact**2).sum(axis=-1))
        known = np.isfinite(certificate.relative_error[b])
        assert (error[known] <= certificate.relative_error[b][known] * size[known] * (1 + 1e-9) + rounding).all()
        assert np.array_equal(result.empty[b], np.isneginf(lse))
        if isinstance(weight, Softmax):
            dropped = -np.expm1(result.lse[b] - lse)
            assert (dropped <= certificate.dropped_mass[b] + ROUNDING).all()
            assert (np.abs(result.lse[b] - lse) <= certificate.lse_error[b] + 1e-12 * (1 + np.abs(lse))).all()
        else:
            assert (certificate.dropped_mass == 0).all()
            assert np.allclose(result.lse[b], lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("weight", "policy"), WEIGHTS, ids=lambda x: repr(x))
@given(case=served_problems, causal=st.booleans())
def test_no_error_exceeds_its_certificate(weight: Any, policy: Any, case: tuple[str, Problem], causal: bool) -> None:
    method, problem = case
    result = prefill(*problem, causal=causal, weight=weight, policy=policy, method=method)
    assert result.output.dtype == problem.q.dtype
    assert result.output.shape == (*problem.q.shape[:-1], problem.v.shape[-1])
    assert_certified(result, problem, weight, causal)
    if isinstance(policy, Certified):
        assert (result.certificate.dropped_mass <= policy.eps * (1 + 1e-9)).all()
    exact = weight != Softmax() or policy in (Dense(), Certified(0.0))
    assert not exact or (result.certificate.dropped_mass == 0).all()


@pytest.mark.parametrize(("weight", "policy"), WEIGHTS, ids=lambda x: repr(x))
@given(case=served_problems, start=st.floats(0, 1))
def test_a_session_answers_as_decode_over_all_tokens(
    weight: Any, policy: Any, case: tuple[str, Problem], start: float
) -> None:
    method, problem = case
    q, k, v = problem
    n = k.shape[2]
    first = max(1, int(start * n))
    session = DecodeSession(k[:, :, :first], v[:, :, :first], weight=weight, policy=policy, method=method)
    half = (first + n) // 2
    for rows in (slice(first, half), slice(half, n)):
        session.append(k[:, :, rows], v[:, :, rows])
    assert session.n == n
    result = session.attend(q)
    assert_certified(result, problem, weight, causal=False)
    index = HSRIndex(k.reshape(-1, *k.shape[2:]), method)
    assert_certified(decode(q, index, v, weight=weight, policy=policy), problem, weight, causal=False)


@pytest.mark.parametrize("method", methods("attend"))
@pytest.mark.parametrize("weight", [Softmax(), ReLUPower(1, 0.2), ReLUPower(2, -0.5)], ids=repr)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_attend_backend_is_the_reference(method: str, weight: Any, seed: int) -> None:
    from hsr.backend import choose

    rng = np.random.default_rng(seed)
    rows, n, dv = 6, 40, 5
    counts = rng.integers(0, 12, rows)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    indices = rng.integers(0, n, offsets[-1]).astype(np.int32)
    scores = rng.standard_normal(offsets[-1]) * rng.choice([0.1, 1, 300])
    values = rng.standard_normal((2, n, dv)).astype(rng.choice([np.float32, np.float64]))
    arguments = (offsets, indices, scores, values, np.full(rows, 1e-9), weight, 0.4)
    for found, wanted in zip(
        choose("attend", method)(*arguments), choose("attend", "reference")(*arguments), strict=True
    ):
        assert np.allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_relu_half_space_lies_at_b_over_scale() -> None:
    """On raw products the threshold is b sqrt(d); confusing it with b loses or adds keys here."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((1, 4, 64)), rng.standard_normal((1, 500, 64)), rng.standard_normal((1, 500, 8))
    result = decode(q, HSRIndex(k, "brute"), v, weight=ReLUPower(2, 0.5))
    scores = np.einsum("hmd,hNd->hmN", q, k) / 8
    assert np.array_equal(result.counters.reported, (scores >= 0.5).sum(axis=2))
    assert not np.array_equal(result.counters.reported, (scores >= 0.5 / 8).sum(axis=2))
    assert np.allclose(result.output, dense(q, k, v, ReLUPower(2, 0.5), 1 / 8)[0])


def test_an_empty_relu_row_is_zero_and_says_so() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((2, 3, 4)), rng.standard_normal((1, 50, 4)), rng.standard_normal((1, 50, 2))
    q[1] *= 1e-6
    result = decode(q, HSRIndex(k), v, weight=ReLUPower(1, 0.3))
    assert result.empty[1].all()
    assert not result.empty[0].any()
    assert (result.output[1] == 0).all()
    assert (result.certificate.output_error[1] == 0).all()
    assert np.isneginf(result.lse[1]).all()


@pytest.mark.parametrize(("size", "alpha"), [(1e150, 3), (2e8, 60), (1e-150, 3), (1.0, 2)])
@pytest.mark.parametrize("method", methods("attend"))
def test_powers_neither_overflow_nor_vanish(method: str, size: float, alpha: int) -> None:
    from hsr.backend import choose

    scores, values = np.array([1.0, 2.0, -1.0]) * size, np.array([[[1.0], [4.0], [100.0]]])
    arguments = (np.array([0, 3]), np.arange(3, dtype=np.int32), scores, values, np.zeros(1))
    output, lse, slope = choose("attend", method)(*arguments, ReLUPower(alpha, 0.0), 1.0)
    share = 2.0**alpha / (1 + 2.0**alpha)
    assert output[0, 0] == pytest.approx(1 - share + 4 * share)
    assert lse[0] == pytest.approx(alpha * np.log(size) + np.log(1 + 2.0**alpha))
    assert 0 < slope[0] < np.inf


def test_a_tie_that_rounding_decides_is_within_its_certificate() -> None:
    """The exact score is at most b and the float score above it: exactly, the row is empty and its output zero."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        q, k, v = rng.standard_normal((1, 1, 5)), rng.standard_normal((1, 1, 5)), rng.standard_normal((1, 1, 3))
        b = np.nextafter(float(q[0, 0] @ k[0, 0]), -np.inf)
        result = decode(q, HSRIndex(k), v, weight=ReLUPower(1, b), scale=1.0)
        if not result.empty.all():
            assert result.certificate.output_error[0, 0] >= np.linalg.norm(result.output)


def test_values_too_large_for_a_certificate_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"v must have entries of at most 1e\+150 in magnitude; got 1e\+200"):
        Values(np.full((1, 2, 2), 1e200))


def test_topr_keeps_the_r_largest_and_defaults_to_n_to_the_four_fifths() -> None:
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((4, 2, 16)), rng.standard_normal((2, 1024, 16)), rng.standard_normal((2, 1024, 3))
    assert (decode(q, HSRIndex(k), v, policy=TopR()).counters.reported == 256).all()  # 1024 ** 0.8
    result = decode(q, HSRIndex(k, "sketch"), v, policy=TopR(10))
    scores = np.einsum("hmd,hNd->hmN", q, np.repeat(k, 2, axis=0)) / 4
    keep = scores >= np.sort(scores, axis=2)[:, :, -10:-9]
    assert np.allclose(result.output, dense(q, k, v, Softmax(), 0.25, keep=keep)[0])
    assert result.certificate.kind == "deterministic"


def test_causal_prefill_is_bottom_right_aligned() -> None:
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((2, 5, 8)), rng.standard_normal((1, 9, 8)), rng.standard_normal((1, 9, 4))
    result = prefill(q, k, v, policy=Dense())
    for i in range(5):
        alone = dense(q[:, i : i + 1], k[:, : i + 5], v[:, : i + 5], Softmax(), 8**-0.5)[0]
        assert np.allclose(result.output[:, i : i + 1], alone)
    assert (result.counters.reported == np.arange(5, 10)).all()
    with pytest.raises(ArgumentError, match="q must have at most 4 rows, one per key, when causal; got 5"):
        prefill(q, k[:, :4], v[:, :4])
    assert prefill(q, k[:, :4], v[:, :4], causal=False).output.shape == (2, 5, 4)


def test_prefill_in_blocks_of_rows_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, 300, 8)).astype(np.float32) for _ in range(3))
    whole = prefill(q, k, v, policy=Certified(0.05))
    monkeypatch.setattr(sys.modules["attention.prefill"], "PAIRS", 2 * 300 * 37)
    blocks = prefill(q, k, v, policy=Certified(0.05))
    for one, other in ((whole.output, blocks.output), (whole.lse, blocks.lse)):
        assert np.array_equal(one, other)
    assert np.array_equal(whole.certificate.output_error, blocks.certificate.output_error)
    assert np.array_equal(whole.counters.reported, blocks.counters.reported)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_torch_in_torch_out(dtype: str) -> None:
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, 16, generator=generator).to(kind) for h in (4, 2, 2))
    result = prefill(q, k, v, policy=Dense())
    assert result.output.dtype == kind
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    error = torch.linalg.vector_norm(result.output.double() - wanted, dim=-1).numpy()
    assert (error <= result.certificate.output_error).all()
    session = DecodeSession(k, v, policy=Dense())
    session.append(k[:, :, :1], v[:, :, :1])
    assert session.attend(q[:, :, :1]).output.shape == (2, 4, 1, 16)


def test_certified_reads_few_keys_where_attention_is_sharp() -> None:
    """Most mass on the first and the recent tokens, as in real heads: the half-space then lies near its ideal place."""
    rng = np.random.default_rng(4)
    k, v = (rng.standard_normal((1, 8192, 64)).astype(np.float32) for _ in range(2))
    q = 4 * rng.standard_normal((4, 1, 64)).astype(np.float32)
    k[0, :1] += q.mean(axis=(0, 1)) * 2
    result = decode(q, HSRIndex(k), v, policy=Certified(0.01))
    assert (result.counters.reported < 0.15 * 8192).all()
    assert (result.counters.reported > 0).all()
    assert (result.certificate.dropped_mass <= 0.01).all()


normal = np.random.default_rng(5).standard_normal


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Certified(-0.1), r"eps must be in \[0.0, 1.0\); got -0.1"),
        (lambda: Certified(1.0), "eps must be in"),
        (lambda: Certified(float("nan")), "eps must be in .* got nan"),
        (lambda: Certified("0.1"), "eps must be a number"),
        (lambda: Certified(0.1, sinks=-1), "sinks must be at least 0; got -1"),
        (lambda: TopR(0), "r must be at least 1; got 0"),
        (lambda: TopR(2.5), "r must be a whole number; got 2.5"),
        (lambda: ReLUPower(1.5, 0.0), "alpha must be a whole number; got 1.5"),
        (lambda: ReLUPower(0, 0.0), "alpha must be at least 1; got 0"),
        (lambda: ReLUPower(1, float("nan")), "b must be"),
        (lambda: ReLUPower(1, float("inf")), "b must be"),
        (lambda: ReLUPower(1, float("-inf")), "b must be finite"),
    ],
)
def test_bad_variants_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"q": normal((4, 8))}, r"q must be \(heads, rows, width\) or .*got shape \(4, 8\)"),
        ({"q": [1.0]}, r"q must be \(heads, rows, width\)"),
        ({"q": normal((3, 2, 8))}, "q must have a positive multiple of 2 heads"),
        ({"q": normal((4, 2, 7))}, "q must have width 8"),
        ({"q": normal((4, 2, 8)).astype("f4")}, "dtype float64; got float32"),
        ({"q": np.full((4, 2, 8), np.nan)}, "q must be finite"),
        ({"q": np.full((4, 2, 8), 1e308)}, "q and k must have scores within float64"),
        ({"values": normal((2, 49, 3))}, r"v must be \(2, 50, dv\) of float64 to match keys; got \(2, 49, 3\)"),
        ({"values": normal((2, 50, 3)).astype("f4")}, "v must be .* of float64 to match keys; got .* of float32"),
        ({"values": np.full((2, 50, 3), np.inf)}, "v must be finite"),
        ({"weight": "softmax"}, "weight must be Softmax"),
        (
            {"policy": 0.01},
            r"policy must be Dense\(\), .* or Sampled\(eps\), or a decode selector of attention.selectors; got 0.01",
        ),
        ({"policy": TopR}, r"policy must be Dense\(\), .* got <class"),
        ({"weight": ReLUPower(1, 0.0), "policy": TopR(3)}, "policy must be None for ReLUPower"),
        ({"scale": 0.0}, "scale must be in"),
        ({"scale": -1.0}, "scale must be in"),
        ({"scale": float("inf")}, "scale must be in"),
    ],
)
def test_bad_decode_arguments_are_refused(call: dict[str, Any], message: str) -> None:
    index = HSRIndex(normal((2, 50, 8)) + (1 if "values" in call else 0), "brute")
    arguments = {"q": normal((4, 2, 8)), "index": index, "values": normal((2, 50, 3))} | call
    with pytest.raises(ArgumentError, match=message):
        decode(arguments.pop("q"), arguments.pop("index"), arguments.pop("values"), **arguments)


def test_a_refused_append_changes_neither_keys_nor_values() -> None:
    session = DecodeSession(normal((2, 10, 4)), normal((2, 10, 3)), policy=Dense())
    wanted = session.attend(normal((2, 1, 4))).counters.reported
    good_k, good_v = normal((2, 1, 4)), normal((2, 1, 3))
    for k, v in [
        (normal((2, 1, 5)), good_v),
        (good_k, normal((2, 1, 4))),
        (good_k, normal((2, 2, 3))),
        (good_k, np.full((2, 1, 3), np.nan)),
        (np.full((2, 1, 4), np.nan), good_v),
        (good_k.astype("f4"), good_v),
        (good_k, good_v.astype("f4")),
        (normal((1, 2, 1, 4)), normal((1, 2, 1, 3))),
    ]:
        with pytest.raises(ArgumentError):
            session.append(k, v)
        assert session.n == 10
    assert np.array_equal(session.attend(normal((2, 1, 4))).counters.reported, wanted)
    session.append(good_k, good_v)
    assert session.n == 11


def test_session_refuses_queries_of_another_batch() -> None:
    session = DecodeSession(normal((2, 2, 10, 4)), normal((2, 2, 10, 3)))
    for shape in [(4, 1, 4), (3, 2, 1, 4)]:
        with pytest.raises(ArgumentError, match="q must have the cache's batch"):
            session.attend(normal(shape))
    with pytest.raises(ArgumentError, match="v must be"):
        DecodeSession(normal((2, 10, 4)), normal((2, 9, 4)))


def test_values_stay_inside_their_ball_as_they_grow() -> None:
    rng = np.random.default_rng(6)
    values = Values(rng.standard_normal((2, 20, 3)).astype(np.float32))
    for size in (0, 1, 7, 100):
        values.append(values.checked(rng.standard_normal((2, size, 3)).astype(np.float32) * (1 + size)))
        distance = np.linalg.norm(values.array - values.centre[:, None], axis=2)
        assert (distance <= values.radius[:, None]).all()
    assert values.array.shape == (2, 128, 3)


@pytest.mark.parametrize(("weight", "policy"), UNCODED, ids=lambda x: repr(x))
@given(case=served_problems, share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_a_session_that_evicts_answers_as_if_the_tokens_had_never_been(
    weight: Any, policy: Any, case: tuple[str, Problem], share: float, seed: int
) -> None:
    method, (q, k, v) = case
    n = k.shape[2]
    gone = np.random.default_rng(seed).permutation(n)[: min(int(share * n), n - 1)]
    session = DecodeSession(k, v, weight=weight, policy=policy, method=method)
    session.evict(gone[: len(gone) // 3])
    session.evict(gone[len(gone) // 3 :])
    assert (session.n, session.alive) == (n, n - len(gone))
    left = Problem(q, np.delete(k, gone, axis=2), np.delete(v, gone, axis=2))
    result = session.attend(q)
    assert result.n == session.alive
    assert_certified(result, left, weight, causal=False)
    assert_certified(decode(q, session.index, v, weight=weight, policy=policy), left, weight, causal=False)
    if isinstance(policy, Certified):
        assert (result.certificate.dropped_mass <= policy.eps * (1 + 1e-9)).all()
    if policy == TopR(None):
        assert (result.counters.reported == np.ceil(session.alive**0.8 - 1e-9)).all()


@pytest.mark.parametrize(("weight", "policy"), UNCODED, ids=lambda x: repr(x))
def test_a_cache_without_tokens_gives_empty_rows_until_one_comes(weight: Any, policy: Any) -> None:
    session = DecodeSession(normal((2, 10, 4)), normal((2, 10, 3)), weight=weight, policy=policy)
    session.evict(range(10))
    result = session.attend(normal((4, 2, 4)))
    assert result.empty.all()
    assert (result.output == 0).all()
    assert (result.certificate.output_error == 0).all()
    assert (result.certificate.dropped_mass == 0).all()
    value = normal((2, 1, 3))
    session.append(np.full((2, 1, 4), 10.0), value)
    result = session.attend(np.ones((4, 1, 4)))
    assert np.allclose(result.output, np.repeat(value, 2, axis=0))


def test_a_certificate_counts_the_living_only() -> None:
    """Three of four tokens are evicted: a bound that still counted them would be far looser."""
    q, k, v = normal((2, 1, 16)), normal((1, 4000, 16)), normal((1, 4000, 3))
    session = DecodeSession(k, v, policy=TopR(50))
    session.evict(range(1000, 4000))
    alone = DecodeSession(k[:, :1000], v[:, :1000], policy=TopR(50)).attend(q)
    assert np.allclose(session.attend(q).certificate.dropped_mass, alone.certificate.dropped_mass)


def test_a_window_with_sinks_that_slides() -> None:
    """The policy of streaming language models: the first tokens and the latest stay, the rest is evicted as it ages."""
    rng = np.random.default_rng(7)
    k, v = rng.standard_normal((2, 600, 8)), rng.standard_normal((2, 600, 3))
    session = DecodeSession(k[:, :40], v[:, :40], policy=Dense(), method="brute")
    for t in range(40, 600):
        session.append(k[:, t : t + 1], v[:, t : t + 1])
        session.evict([t - 36])
        if t % 40 == 0:
            q = rng.standard_normal((4, 1, 8))
            left = [*range(4), *range(t - 35, t + 1)]
            assert np.allclose(session.attend(q).output, dense(q, k[:, left], v[:, left], Softmax(), 8**-0.5)[0])
    assert session.index.explain()["dead"] < 45


def test_a_refused_eviction_changes_nothing() -> None:
    session = DecodeSession(normal((2, 10, 4)), normal((2, 10, 3)))
    with pytest.raises(ArgumentError, match=r"ids must lie in 0..9; got 3..10"):
        session.evict([3, 10])
    assert session.alive == 10


def test_codes_refuse_an_index_that_lost_keys() -> None:
    rng = np.random.default_rng(5)
    session = DecodeSession(*rng.standard_normal((2, 1, 9, 4)), policy=Certified(0.1, bytes_per_key=4))
    session.evict([2, 3])
    with pytest.raises(ArgumentError, match="from which nothing was deleted; got one that lost 2 keys"):
        session.attend(rng.standard_normal((1, 1, 4)))
