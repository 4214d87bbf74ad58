"""BlockSampled: what a user of `prefill` sees of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import (
    BlockResult,
    BlockSampled,
    DecodeSession,
    Dense,
    KeyLists,
    Listed,
    ReLUPower,
    Result,
    Softmax,
    audit,
    decode,
    prefill,
    prompt_cost,
)
from attention.key_lists import bands, edges, ends, least_density, row_blocks
from attention.listed_reference import listed
from attention.prompt_cost import Rates, density_for
from attention.reference import dense
from hsr import ArgumentError, HSRIndex
from tests.heads import like_heads
from tests.prompts import BEFORE, LENGTHS, made, some_lists

few = settings(max_examples=40)
normal = np.random.default_rng(7).standard_normal


def prompt_of(batch: int, g: int, group: int, m: int, n: int, dtype: Any = np.float32, seed: int = 0) -> list[Any]:
    q, k, v = made(np.random.default_rng(seed), m, n, batch * g, group, 16, 5, "gaussian")
    return [x.reshape(batch, -1, *x.shape[1:]).astype(dtype) for x in (q, k, v)]


def errors(result: Result, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Relative errors (h, m) of a prompt's rows."""
    exact, _ = dense(q, k, v, Softmax(), q.shape[-1] ** -0.5, causal=True)
    return np.linalg.norm(result.output - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


@pytest.mark.parametrize("causal", [False, True])
@few
@given(
    m=st.sampled_from(LENGTHS),
    before=st.sampled_from(BEFORE),
    batch=st.integers(1, 2),
    g=st.integers(1, 2),
    group=st.integers(1, 3),
    dtype=st.sampled_from((np.float16, np.float32, np.float64)),
    share=st.floats(0.01, 1),
)
def test_results_have_the_shapes_counts_and_densities_that_were_asked_for(
    causal: bool, m: int, before: int, batch: int, g: int, group: int, dtype: Any, share: float
) -> None:
    n = m + before
    q, k, v = prompt_of(batch, g, group, m, n, dtype)
    density = least_density(m, n) + share * (1 - least_density(m, n))
    result = prefill(q, k, v, policy=BlockSampled(density=min(density, 1.0), causal_selection=causal))
    assert isinstance(result, BlockResult)
    assert result.output.shape == (*q.shape[:-1], 5) and result.output.dtype == dtype
    assert result.lse.shape == q.shape[:-1] and result.lse.dtype == np.float64
    assert not result.empty.any() and result.n == n
    seen, block = n - m + np.arange(m) + 1, np.arange(m) // 128
    counters = result.counters
    assert (counters.reported <= seen).all() and (counters.reported > seen - 1 - edges(m, n)[block]).all()
    assert np.array_equal(counters.scanned, counters.reported)
    assert np.array_equal(counters.visited, np.broadcast_to(edges(m, n)[block], q.shape[:-1]))
    listed = (counters.reported - seen + edges(m, n)[block])[..., ::128].sum(axis=-1)
    assert np.allclose(result.densities, (listed + bands(m, n).sum()) / ends(m, n).sum())
    off = result.densities - density
    assert ((off if causal else np.abs(off)) <= row_blocks(m) / ends(m, n).sum() + 1e-6).all()
    certificate = result.certificate
    assert certificate.kind == "none"
    for bound in (
        certificate.dropped_mass,
        certificate.output_error,
        certificate.relative_error,
        certificate.lse_error,
    ):
        assert bound.shape == q.shape[:-1] and np.isposinf(bound).all()


def test_a_batch_and_a_group_are_so_many_heads() -> None:
    """A draw belongs to the head's place, so that all else about a head is as if it stood alone."""
    q, k, v = prompt_of(2, 2, 3, 300, 431)
    policy = BlockSampled(density=0.7)
    whole = prefill(q, k, v, policy=policy)
    folded = prefill(
        *(x.reshape(-1, *x.shape[2:]) for x in (q, np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1))), policy=policy
    )
    assert np.array_equal(whole.output.reshape(12, 300, 5), folded.output)
    assert np.array_equal(whole.lse.reshape(12, 300), folded.lse)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_torch_in_torch_out_of_any_strides(dtype: str) -> None:
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in prompt_of(1, 1, 2, 300, 300))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    one, other = (prefill(*args, policy=BlockSampled(density=0.8)) for args in ((q, k, v), strided))
    assert one.output.dtype == q.dtype
    assert torch.equal(one.output, other.output)


def test_a_density_of_one_is_dense_attention() -> None:
    q, k, v = like_heads(2, 2, 400, 531)
    result = prefill(q, k, v, policy=BlockSampled(density=1.0))
    assert errors(result, q, k, v).max() < 1e-5
    assert (result.densities == 1).all()
    assert np.array_equal(result.counters.reported, prefill(q, k, v, policy=Dense()).counters.reported)


def test_more_keys_make_smaller_errors_and_seeds_other_ones() -> None:
    q, k, v = like_heads(2, 2, 1024, 1024)
    found = [prefill(q, k, v, policy=BlockSampled(density=density)) for density in (0.3, 0.5, 0.9)]
    means = [errors(result, q, k, v).mean() for result in found]
    assert means[0] > means[1] > means[2] > 0
    again = prefill(q, k, v, policy=BlockSampled(density=0.3))
    assert np.array_equal(found[0].output, again.output)
    other = prefill(q, k, v, policy=BlockSampled(density=0.3, seed=1))
    assert not np.array_equal(found[0].output, other.output)


@pytest.mark.parametrize("kind", ["sharp", "zero", "huge", "tiny", "constant", "repeated", "lattice"])
@pytest.mark.parametrize("causal", [False, True])
def test_hard_inputs_have_finite_answers_like_the_definition(kind: str, causal: bool) -> None:
    q, k, v = made(np.random.default_rng(3), 300, 431, 1, 2, 16, 5, kind)
    policy = BlockSampled(density=0.75, causal_selection=causal)
    found, wanted = (prefill(q, k, v, policy=policy, method=method) for method in ("numba", "reference"))
    assert np.isfinite(found.output).all() and np.isfinite(found.lse).all()
    assert np.abs(found.densities - wanted.densities).max() < 0.01
    if kind == "constant":
        assert np.allclose(found.output, np.broadcast_to(v[:, :1], found.output.shape))


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize(("m", "n"), [(520, 520), (421, 600), (300, 555)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_causal_selection_never_looks_ahead(rows: int, m: int, n: int, dtype: Any) -> None:
    """Other tokens after row t change no bit of rows up to t."""
    rng = np.random.default_rng(rows)
    q, k, v = (x[0] for x in prompt_of(1, 1, 2, m, n, dtype))
    policy = BlockSampled(density=0.6, rows=rows, causal_selection=True)
    plain = prefill(q, k, v, policy=policy)
    for t in (0, 1, 126, 127, 128, 129, 200, 256, m - 2):
        late = n - m + t + 1
        other = [x.copy() for x in (q, k, v)]
        other[0][:, t + 1 :] = 5 * rng.standard_normal(other[0][:, t + 1 :].shape)
        for x in other[1:]:
            x[:, late:] = 5 * rng.standard_normal(x[:, late:].shape)
        changed = prefill(*other, policy=policy)
        assert np.array_equal(changed.output[:, : t + 1], plain.output[:, : t + 1])
        assert np.array_equal(changed.lse[:, : t + 1], plain.lse[:, : t + 1])
        assert np.array_equal(changed.counters.reported[:, : t + 1], plain.counters.reported[:, : t + 1])


def test_a_causal_selection_keeps_what_all_rows_attend_to() -> None:
    """Few of the keys may be listed for the first blocks; without the first one their error would be 10."""
    q, k, v = like_heads(2, 2, 2048, 2048, d=64)
    found = errors(prefill(q, k, v, policy=BlockSampled(density=0.2, causal_selection=True)), q, k, v)
    assert found.reshape(4, 16, 128).mean(axis=2).max() < 0.2


def test_a_causal_selection_spends_what_it_is_asked_for() -> None:
    """A head whose early rows have little to look for, too."""
    q, k, v = like_heads(2, 2, 4096, 4096, d=64)
    q[1, :2048] *= 0.01
    q[2, 2048:] *= 0.01
    for density in (0.12, 0.3):
        found = prefill(q, k, v, policy=BlockSampled(density=density, causal_selection=True)).densities
        listed = (found - least_density(4096, 4096)) / (density - least_density(4096, 4096))
        assert (listed > 0.95).all() and (listed < 1.01).all() and np.median(listed) > 0.98


def test_by_default_later_tokens_may_change_what_earlier_rows_are_shown() -> None:
    """What the docstring warns of: the threshold is the head's."""
    q, k, v = like_heads(1, 1, 1024, 1024)
    policy = BlockSampled(density=0.35)
    plain = prefill(q, k, v, policy=policy)
    other = q.copy()
    other[:, 900:] *= 0
    assert not np.array_equal(prefill(other, k, v, policy=policy).output[:, :800], plain.output[:, :800])


def test_an_audit_escalates_until_the_error_is_met() -> None:
    q, k, v = like_heads(1, 2, 1024, 1024)
    found = audit(q, k, v, BlockSampled(density=0.3), rows=200, escalate=True, max_error=0.05)
    assert found.passes(max_error=0.05)
    asked = [one.audited.density for one in found.earlier]
    assert asked == [0.3, 0.6][: len(asked)] and asked
    assert errors(found.result, q, k, v).mean() <= 0.05
    strict = audit(q, k, v, BlockSampled(density=0.3), rows=200, escalate=True, max_error=1e-7)
    assert strict.audited == Dense()


def test_an_audit_looks_at_the_whole_prompt() -> None:
    """Rows share keys: the sampled rows alone would be another prompt."""
    q, k, v = like_heads(1, 2, 700, 700)
    policy = BlockSampled(density=0.4)
    found, result = audit(q, k, v, policy, rows=20), prefill(q, k, v, policy=policy)
    wanted = np.take_along_axis(np.minimum(errors(result, q, k, v), 1), found.rows, axis=1)
    assert np.allclose(found.error.values, wanted, atol=1e-6)


@pytest.mark.parametrize("error", [0.3, 0.05, 1e-9])
def test_an_error_is_met_by_giving_keys_to_the_heads_that_need_them(error: float) -> None:
    q, k, v = like_heads(2, 1, 1024, 1024)
    k[0] *= 1e-3
    v[0] = 1 + 1e-6 * v[0]  # any keys will do
    result = prefill(q, k, v, policy=BlockSampled(error=error))
    if error > 1e-6:
        assert (errors(result, q, k, v).mean(axis=1) <= 1.5 * error).all()
        assert result.densities[0] < result.densities[1]
    else:
        assert (result.densities == 1).all()
    assert result.densities.shape == (2,)


def test_a_time_buys_the_keys_that_the_rates_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cost, "rates", lambda *_: Rates(1e-3, 1e-9, 1e-6, 1e-9))
    q, k, v = like_heads(1, 2, 1024, 1024)
    cost = 2e-3 + 1e-9 * 2 * edges(1024, 1024).sum() + 1e-6 * 16 + 1e-9 * 128 * 0.5 * 2 * ends(1024, 1024).sum()
    assert prefill(q, k, v, policy=BlockSampled(seconds=float(cost))).densities == pytest.approx(0.5, abs=0.01)
    assert prefill(q, k, v, policy=BlockSampled(seconds=1e3)).densities == pytest.approx(1)
    least = prefill(q, k, v, policy=BlockSampled(seconds=1e-9)).counters.reported
    assert least.mean() < 0.1 * 1024


def test_rates_are_measured_once() -> None:
    found = prompt_cost.rates(16, 8, "float32", 8, "numba")
    assert all(0 <= rate < 1 for rate in found) and found.code > 0 and found.pair > 0
    assert prompt_cost.rates(16, 8, "float32", 8, "numba") is found
    shape = (4, 8192, 8192)
    assert least_density(8192, 8192) < density_for(1e-6, shape, found) <= density_for(10.0, shape, found) <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockSampled(), "BlockSampled needs one of density, error and seconds; got density=None"),
        (lambda: BlockSampled(density=0.1, error=0.1), "needs one of density, error and seconds"),
        (lambda: BlockSampled(density=0.0), r"density must be in .* got 0.0"),
        (lambda: BlockSampled(density=1.1), r"density must be in .* got 1.1"),
        (lambda: BlockSampled(density=float("nan")), "density must be in .* got nan"),
        (lambda: BlockSampled(density="0.1"), "density must be a number"),
        (lambda: BlockSampled(error=-1.0), "error must be in"),
        (lambda: BlockSampled(error=float("inf")), "error must be in"),
        (lambda: BlockSampled(seconds=0), "seconds must be in"),
        (lambda: BlockSampled(density=0.1, rows=3), "rows must divide 128; got 3"),
        (lambda: BlockSampled(density=0.1, rows=256), r"rows must be in 1..128; got 256"),
        (lambda: BlockSampled(density=0.1, seed=-1), "seed must be in"),
        (lambda: BlockSampled(density=0.1, causal_selection=1), "causal_selection must be True or False; got 1"),
        (lambda: BlockSampled(error=0.1, causal_selection=True), "causal_selection must be False with error"),
    ],
)
def test_bad_policies_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": False}, r"causal must be True for BlockSampled; got False"),
        ({"weight": ReLUPower(1, 0.0)}, r"weight must be Softmax\(\) for BlockSampled"),
        (
            {"policy": BlockSampled(density=0.2)},
            r"density must be above 0.438596, what .* 300 rows of 300 keys make; got 0.2",
        ),
        ({"q": normal((3, 300, 8))}, "q must have a positive multiple of 2 heads"),
        ({"q": normal((4, 301, 8))}, "q must have at most 300 rows"),
        ({"q": normal((4, 300, 7))}, "q must have width 8"),
        ({"q": normal((4, 300, 8)).astype("f4")}, "q, k and v must have one dtype"),
        ({"v": normal((2, 299, 8))}, "v must be"),
        ({"v": np.full((2, 300, 8), 1e160)}, r"v must have entries of at most 1e\+150 in float64; got 1e\+160"),
        ({"k": np.full((2, 300, 8), np.nan)}, "k must be finite"),
        ({"k": np.full((2, 300, 8), 1e200)}, "q and k must have scaled queries and scores of at most"),
        ({"scale": 0.0}, "scale must be in"),
        ({"method": "sketch"}, "method must be one of numba, reference; got 'sketch'"),
    ],
)
def test_bad_prompts_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"q": normal((4, 300, 8)), "k": normal((2, 300, 8)), "v": normal((2, 300, 8))} | change
    with pytest.raises(ArgumentError, match=message):
        prefill(**({"policy": BlockSampled(density=0.9)} | arguments))


def test_decode_and_sessions_refuse_what_serves_prompts_alone() -> None:
    policy = BlockSampled(density=0.5)
    q, k, v = normal((2, 1, 8)), normal((1, 50, 8)), normal((1, 50, 8))
    for call in (
        lambda: decode(q, HSRIndex(k), v, policy=policy),
        lambda: DecodeSession(k, v, policy=policy),
    ):
        with pytest.raises(ArgumentError, match=r"policy must choose keys row by row, which BlockSampled\(density=0.5"):
            call()


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_lists_of_others_are_checked_and_attended_to(convert: Any) -> None:
    q, k, v = prompt_of(2, 1, 2, 300, 431, np.float64)
    lists = some_lists(np.random.default_rng(0), (4, 300, 431), 0.3)
    given = KeyLists(**{name: convert(x) for name, x in vars(lists).items() if isinstance(x, np.ndarray)})
    result = prefill(q, k, v, policy=Listed(given))
    folded = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    output, lse = listed(*folded, lists, 16**-0.5)
    assert np.allclose(result.output.reshape(output.shape), output, rtol=1e-10, atol=1e-10)
    assert np.allclose(result.lse.reshape(lse.shape), lse)
    assert np.allclose(result.densities.ravel(), lists.densities(300, 431))
    line = 1
    count = sum(
        size * (offsets[line + 1] - offsets[line])
        for offsets, size in ((lists.token_offsets, 1), (lists.block_offsets, 128), (lists.mean_offsets, 1))
    )
    assert result.counters.reported[0, 0, 128] == count + 131 + 128 + 1 - edges(300, 431)[1]
    assert (result.counters.visited == 0).all()
    with pytest.raises(ArgumentError, match="token_offsets must have 4 entries"):
        prefill(q[0, :1], k[0], v[0], policy=Listed(dataclasses.replace(given, token_offsets=lists.token_offsets[:3])))
    with pytest.raises(ArgumentError, match=r"tokens must lie in .* are not eligible; got 300"):
        prefill(q, k, v, policy=Listed(dataclasses.replace(given, tokens=np.full(len(lists.tokens), 300, np.int32))))
    with pytest.raises(ArgumentError, match="lists must be KeyLists; got list"):
        Listed([])  # type: ignore[arg-type]


def test_tighter_doubles_the_density_and_halves_the_error() -> None:
    policy = BlockSampled(density=0.2, rows=4, seed=3)
    assert policy.tighter(100) == dataclasses.replace(policy, density=0.4)
    assert BlockSampled(density=0.6).tighter(100) is None
    assert BlockSampled(error=0.2).tighter(100) == BlockSampled(error=0.1)
    assert BlockSampled(seconds=1.0).tighter(100) is None
    tighter: Any = BlockSampled(error=0.9)
    for _ in range(20):
        tighter = tighter and tighter.tighter(100)
    assert tighter is None
