"""Sampled attention against the reference, one draw against another, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention import DecodeSession, Dense, Result, Sampled, Softmax, decode, prefill, sampled
from attention.coded import Attended
from attention.reference import attend_weighted, dense
from attention.values import Values
from hsr import ArgumentError, HSRIndex
from hsr.lifted import Draw, Lifted
from hsr.lifted_numba import CHUNK, generators
from tests.heads import Problem, like_heads

ROUNDING = 1e-5  # of an output, over the values' spread


# Against the reference ------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, Sampled]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    g, group, m = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    n = draw(st.one_of(st.integers(1, 70), st.integers(71, 400)))
    d, dv = draw(st.integers(1, 16)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from((np.float32, np.float64, np.float16)))
    most = {np.float32: 1e18, np.float64: 1e145, np.float16: 50.0}[dtype]
    size = draw(st.sampled_from((1.0, 0.0, most, 1 / most)))
    q = draw(st.sampled_from((0.1, 1.0, 10.0))) / (size or 1) * rng.standard_normal((g * group, m, d))
    k = size * (rng.standard_normal((g, n, d)) + draw(st.sampled_from((0.0, 4.0))))
    v = draw(st.sampled_from((1.0, 0.0, most, 1 / most))) * (rng.standard_normal((g, n, dv)) + 3)
    kind = draw(st.sampled_from(("plain", "ties", "duplicates", "equal keys", "equal values")))
    if kind == "ties" and size == 1:
        q, k, v = np.round(q), np.round(k), np.round(v)
    chosen = rng.integers(0, 1 + n // 8, n) if kind == "duplicates" else np.zeros(n, np.int64)
    if kind in ("duplicates", "equal keys"):
        k = k[:, chosen]
    if kind == "equal values":
        v = v[:, chosen]
    with np.errstate(over="ignore", under="ignore"):
        q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    if draw(st.booleans()):
        q, k, v = (np.repeat(x, 2, axis=2)[:, :, ::2] for x in (q, k, v))  # not contiguous
    spend = draw(st.sampled_from(({"eps": 0.1}, {"eps": 0.9}, {"budget": 1.0}, {"budget": 40.0}, {"budget": 1e9})))
    sinks, recent = draw(st.sampled_from(((0, 1), (0, 64), (0, 90), (1, 0), (4, 0), (4, 64), (100, 0), (100, 90))))
    policy = Sampled(
        **spend,
        bytes_per_key=draw(st.sampled_from((4, 8, 64))),
        sinks=sinks,
        recent=recent,
        seed=draw(st.integers(0, 2**63 - 1)),
        redraw=draw(st.booleans()),
        draw=draw(st.sampled_from(sampled.DRAWS)),
    )
    return Problem(q, k, v), policy


class Drawn(NamedTuple):
    """One draw, copied, and what it was drawn from."""

    spans: np.ndarray
    draw: Draw

    def excess(self, head: int, row: int) -> float:
        """By how much independent draws would vary more in number."""
        independent, own = self.draw.variance[head, row]
        return independent - own

    def row(self, head: int, row: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys attended to and their pi."""
        counts = self.draw.counts[head, row]
        kept = np.concatenate([CHUNK * i + np.arange(count) for i, count in enumerate(counts)] or [[]]).astype(int)
        start, stop = self.spans[head, row]
        sure = np.concatenate([np.arange(start), np.arange(max(start, stop), limit)])
        ids = np.concatenate([sure, self.draw.ids[head, row, kept]])
        return ids, np.concatenate([np.ones(len(sure)), self.draw.pis[head, row, kept]])


def watched(call: Callable[[], Result]) -> tuple[Result, Drawn]:
    """The result of a call that draws once, and the draw."""
    notes: list[Drawn] = []
    real = Lifted.draw

    def draw(lifted: Lifted, queries: np.ndarray, spans: np.ndarray, *rest: Any, **options: Any) -> Draw:
        found = real(lifted, queries, spans, *rest, **options)
        notes.append(Drawn(spans.copy(), Draw(*(part.copy() for part in found))))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lifted, "draw", draw)
        result = call()
    assert len(notes) == 1
    return result, notes[0]


@given(case=problems())
def test_every_row_is_the_reference_over_its_draw(case: tuple[Problem, Sampled]) -> None:
    problem, policy = case
    q, k, v = problem
    n, scale = k.shape[1], q.shape[2] ** -0.5
    result, drawn = watched(lambda: DecodeSession(k, v, policy=policy).attend(q))
    assert result.output.dtype == q.dtype
    assert result.certificate.kind == "statistical"
    exact, exact_lse = problem.exact()
    group = len(q) // len(k)
    wide = v.astype(np.float64)
    spread = np.abs(wide - wide.mean(axis=1, keepdims=True)).max(axis=(1, 2)) * np.sqrt(v.shape[2])
    own = np.finfo(q.dtype)
    for h, row in np.ndindex(q.shape[:2]):
        head = h // group
        ids, pis = drawn.row(head, row, n)
        assert len(np.unique(ids)) == len(ids) and ids.max() < n
        assert ((pis > 0) & (pis <= 1)).all()
        assert result.counters.reported[h, row] == result.counters.scanned[h, row] == len(ids)
        excess = drawn.excess(head, row)
        output, lse, _ = attend_weighted(
            q[h, row][None], k[head, ids], v[head, ids], pis, wide[head].mean(axis=0), excess, scale
        )
        slack = (
            ROUNDING * spread[head] + 16 * float(own.eps) * np.abs(wide[head]).max() + 8 * float(own.smallest_subnormal)
        )
        assert np.abs(result.output[h, row] - output[0]).max() <= slack
        assert result.lse[h, row] == pytest.approx(lse[0], abs=1e-5, rel=1e-12)
        if len(ids) == n and (pis == 1).all():
            assert np.abs(result.output[h, row] - exact[h, row]).max() <= slack
            assert abs(result.lse[h, row] - exact_lse[h, row]) <= result.certificate.lse_error[h, row]
    if policy.budget == 1e9:
        assert (result.counters.reported == n).all(), "a budget of all keys is dense"
        rounding = 2 * (n + 16) * 2.0**-53 * np.sqrt((wide**2).sum(axis=2)).max()  # of the oracle's own sums
        assert (np.linalg.norm(result.output - exact, axis=2) <= result.certificate.output_error + rounding).all()


def test_moments_are_those_of_the_reference() -> None:
    problem = like_heads(2, 3, 2, 1000)
    policy, kept = Sampled(budget=60, sinks=2, recent=10), []
    real = Sampled.certificate

    def certificate(self: Sampled, attended: Attended, *rest: Any) -> Any:
        kept.append(attended.moments)
        return real(self, attended, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampled, "certificate", certificate)
        _, drawn = watched(lambda: DecodeSession(problem.k, problem.v, policy=policy).attend(problem.q))
    centre = Values(problem.v).centre
    for h, row in np.ndindex(6, 2):
        ids, pis = drawn.row(h // 3, row, 1000)
        query, excess = problem.q[h, row][None], drawn.excess(h // 3, row)
        keys, values = problem.k[h // 3, ids], problem.v[h // 3, ids]
        wanted = attend_weighted(query, keys, values, pis, centre[h // 3], excess, 32**-0.5)[2][0]
        assert np.allclose(kept[0][h, row], wanted, rtol=1e-4)


def test_causal_rows_see_their_own_keys_only() -> None:
    problem = like_heads(2, 2, 300, 300)
    result, drawn = watched(lambda: prefill(*problem, policy=Sampled(eps=0.3)))
    scale = 32**-0.5
    for row in range(0, 300, 7):
        ids, pis = drawn.row(1, row, row + 1)
        assert ids.max() == row
        centre, excess = problem.v[1].mean(axis=0), drawn.excess(1, row)
        output, _, _ = attend_weighted(
            problem.q[2, row][None], problem.k[1, ids], problem.v[1, ids], pis, centre, excess, scale
        )
        assert np.allclose(result.output[2, row], output[0], atol=1e-4)
    nothing = prefill(problem.q[:, :0], problem.k, problem.v, policy=Sampled(eps=0.3))
    assert nothing.output.shape == (4, 0, 32)


# One draw and another -------------------------------------------------------------------------------------------------


def same(one: Result, other: Result) -> bool:
    return np.array_equal(one.output, other.output) and np.array_equal(one.lse, other.lse)


@pytest.mark.parametrize("how", sampled.DRAWS)
def test_a_seed_is_a_result_whatever_the_threads(how: str) -> None:
    problem = like_heads(2, 2, 2, 5000)

    def attended(seed: int) -> Result:
        return DecodeSession(problem.k, problem.v, policy=Sampled(budget=80, seed=seed, draw=how)).attend(problem.q)

    wanted = attended(3)
    assert same(wanted, attended(3))
    assert not same(wanted, attended(4))
    most = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert same(wanted, attended(3))
    finally:
        numba.set_num_threads(most)


@pytest.mark.parametrize("redraw", [True, False])
def test_without_redraw_all_steps_share_their_numbers(redraw: bool) -> None:
    problem = like_heads(1, 1, 1, 1024)
    session = DecodeSession(
        problem.k, problem.v, policy=Sampled(budget=40, recent=0, redraw=redraw, draw="independent")
    )
    _, first = watched(lambda: session.attend(problem.q))
    session.append(problem.k[:, :3], problem.v[:, :3])
    _, later = watched(lambda: session.attend(problem.q))
    chosen = [set(drawn.draw.ids[0, 0, : drawn.draw.counts[0, 0, 0]]) for drawn in (first, later)]
    assert (chosen[0] == chosen[1]) != redraw


def test_a_session_that_grew_has_the_law_of_one_made_at_once() -> None:
    problem = like_heads(2, 2, 1, 1400, d=16)
    q, k, v = problem
    policy = Sampled(budget=60)
    session = DecodeSession(k[:, :1000], v[:, :1000], policy=policy, queries=q)
    for n in range(1000, 1400):
        session.append(k[:, n : n + 1], v[:, n : n + 1])
        if n % 50 == 0:
            session.attend(q)
    exact, _ = problem.exact()
    errors = {}
    for name, made in (("grown", session), ("at once", DecodeSession(k, v, policy=policy, queries=q))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampled, "generators", lambda seed, limits: generators(seed, np.indices(limits.shape)[1]))
            found = made.attend(np.repeat(q, 400, axis=1))
        errors[name] = np.sqrt(((found.output - exact) ** 2).sum(axis=2).mean())
        assert found.n == 1400
    assert errors["grown"] == pytest.approx(errors["at once"], rel=0.15)


def test_buffers_grow_geometrically() -> None:
    rng = np.random.default_rng(0)
    session = DecodeSession(*rng.standard_normal((2, 1, 1, 4)), policy=Sampled(eps=0.5))
    sizes = set()
    for _ in range(300):
        session.append(*rng.standard_normal((2, 1, 5, 4)))
        session.attend(rng.standard_normal((1, 1, 4)))
        values = session._values
        codes = next(iter(values._lifted.values()))._codes
        sizes.add(
            (values.store.shape[1], values.lift.shape[1], codes.shape[1], session.index.held(np.array(0)).keys.shape[1])
        )
        assert max(values.store.shape[1], values.lift.shape[1], 64 * codes.shape[1] - 64) <= 2 * session.n
    assert len(sizes) < 4 * 12


@pytest.mark.parametrize("how", sampled.DRAWS)
@pytest.mark.parametrize("certain", [{"sinks": 1, "recent": 0}, {"sinks": 0, "recent": 1}])
def test_a_draw_of_nothing_leaves_what_is_certain(how: str, certain: dict[str, int]) -> None:
    problem = like_heads(1, 1, 1, 257)
    policy = Sampled(budget=1, redraw=False, draw=how, **certain)
    for seed in range(40):
        session = DecodeSession(problem.k, problem.v, policy=dataclasses.replace(policy, seed=seed))
        result = session.attend(problem.q)
        assert np.isfinite(result.output).all()
        assert np.isfinite(result.lse).all()
        assert not result.empty.any()


# Edges ----------------------------------------------------------------------------------------------------------------


def test_policies_choose_the_index_that_they_use() -> None:
    k = np.random.default_rng(0).standard_normal((1, 3000, 64))
    for policy, method in ((Sampled(eps=0.1), "brute"), (Dense(), "brute"), (None, "sketch")):
        assert DecodeSession(k, k, policy=policy).index.method == method
    assert DecodeSession(k, k, policy=Sampled(eps=0.1), method="tree").index.method == "tree"


def test_queries_known_beforehand_set_the_metric() -> None:
    problem = like_heads(1, 2, 200, 2048)
    q, k, v = problem
    narrow = (q * np.geomspace(30, 0.03, 32)).astype(np.float32)
    policy, exact = Sampled(budget=40, bytes_per_key=8), dense(narrow[:, 100:], k, v, Softmax(), 32**-0.5)[0]
    errors = []
    for known in (narrow[:, :100], None):
        session = DecodeSession(k, v, policy=policy, queries=known)
        session.attend(narrow[:, :1] if known is not None else q[:, ::-1, ::-1][:, :1].copy())
        errors.append(((session.attend(narrow[:, 100:]).output - exact) ** 2).sum(axis=2).mean())
    assert errors[0] < 0.5 * errors[1]


def test_an_index_that_lost_keys_is_refused() -> None:
    problem = like_heads(1, 1, 1, 200)
    session = DecodeSession(problem.k, problem.v, policy=Sampled(eps=0.1))
    session.evict([3])
    with pytest.raises(ArgumentError, match="codes need an index from which nothing was deleted; got one that lost 1"):
        session.attend(problem.q)


def test_scores_that_no_estimate_can_hold_are_refused() -> None:
    k = np.full((1, 100, 2), 1e100)
    with pytest.raises(ArgumentError, match=r"q and k must have scaled scores below 1e\+20 for codes"):
        decode(k[:, :1], HSRIndex(k), k, policy=Sampled(eps=0.1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Sampled needs either eps or budget; got eps=None, budget=None"),
        ({"eps": 0.1, "budget": 3}, "Sampled needs either eps or budget"),
        ({"eps": 0.0}, "eps must be in"),
        ({"eps": 0.1, "sinks": 0, "recent": 0}, "sinks and recent must not both be 0"),
        ({"eps": 1.0}, "eps must be in"),
        ({"budget": 0.5}, r"budget must be in \[1.0, inf\); got 0.5"),
        ({"budget": math.inf}, "budget must be in"),
        ({"eps": 0.1, "bytes_per_key": 6}, "bytes_per_key must be a multiple of 4; got 6"),
        ({"eps": 0.1, "bytes_per_key": 0}, "bytes_per_key must be at least 4; got 0"),
        ({"eps": 0.1, "sinks": -1}, "sinks must be at least 0"),
        ({"eps": 0.1, "recent": 1.5}, "recent must be a whole number"),
        ({"eps": 0.1, "seed": -1}, "seed must be in"),
        ({"eps": 0.1, "seed": 2**63}, "seed must be in"),
        ({"eps": 0.1, "draw": "poisson"}, "draw must be one of systematic, independent; got 'poisson'"),
        ({"eps": 0.1, "confidence": 1.0}, "confidence must be in"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Sampled(**arguments)
