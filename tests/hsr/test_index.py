"""The index as its user sees it: arguments, growth, top-k, grouped heads, and what it promises about its input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hsr import ArgumentError, BackendUnavailable, HSRIndex, methods
from hsr.backend import named
from hsr.reference import topk as reference_topk
from tests.assertions import assert_reports
from tests.strategies import DTYPES, cases, served

METHODS = methods("build")


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([[1.0, 2.0]], "keys must be a numpy array or a torch CPU tensor; got list"),
        (np.ones(3), r"keys must have 2 axes or 3 axes; got shape \(3,\)"),
        (np.ones((2, 2, 2, 2)), r"keys must have 2 axes or 3 axes; got shape \(2, 2, 2, 2\)"),
        (np.ones((3, 2), np.int64), "keys must have dtype float64, float32, float16, bfloat16; got int64"),
        (np.ones((3, 2), np.complex128), "got complex128"),
        (np.ones((0, 2)), r"keys must hold at least one key, head and dimension; got shape \(0, 2\)"),
        (np.ones((0, 4, 2)), "at least one key"),
        (np.ones((4, 0)), "at least one key"),
        (np.array([[1.0, np.nan]]), r"keys must be finite; got nan at \(0, 1\)"),
        (np.array([[1.0], [np.inf]]), r"keys must be finite; got inf at \(1, 0\)"),
        (torch.ones(3, 2, dtype=torch.int8), "got int8"),
        (torch.tensor([[float("nan")]], dtype=torch.bfloat16), "keys must be finite"),
        (torch.ones(3, 2, device="meta"), "keys must be on the CPU; got device meta"),
    ],
)
def test_bad_keys_are_refused(keys: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        HSRIndex(keys)


@pytest.mark.parametrize(
    ("queries", "threshold", "prefix", "message"),
    [
        (normal(2, 5), 0.0, None, r"queries must have width 4 to match keys; got shape \(2, 5\)"),
        (normal(4), 0.0, None, "queries must have 2 axes"),
        (normal(1, 2, 4), 0.0, None, "queries must have 2 axes"),
        (normal(2, 4, dtype=np.float64), 0.0, None, "queries must have the index's dtype float32; got float64"),
        (np.full((1, 4), np.nan, np.float32), 0.0, None, "queries must be finite"),
        (np.full((1, 4), -np.inf, np.float32), 0.0, None, "queries must be finite; got -inf"),
        (normal(2, 4), np.nan, None, "threshold must not be NaN"),
        (
            normal(2, 4),
            np.zeros(3),
            None,
            r"threshold must be a scalar or have shape \(2,\) to match queries; got \(3,\)",
        ),
        (normal(2, 4), "high", None, "threshold must be a real number"),
        (normal(2, 4), 1j, None, "threshold must be a real number"),
        (normal(2, 4), 0.0, 11, r"prefix must lie in 0..10; got 11..11"),
        (normal(2, 4), 0.0, -1, "prefix must lie in 0..10"),
        (normal(2, 4), 0.0, 1.5, "prefix must be whole numbers"),
        (normal(2, 4), 0.0, np.zeros(3, int), "prefix must be a scalar or have shape"),
    ],
)
def test_bad_queries_are_refused(queries: Any, threshold: Any, prefix: Any, message: str) -> None:
    index = HSRIndex(normal(10, 4), "brute")
    with pytest.raises(ArgumentError, match=message):
        index.query(queries, threshold, prefix=prefix)
    with pytest.raises(ArgumentError, match=message):
        index.count(queries, threshold, prefix=prefix)


def test_heads_that_do_not_group_are_refused() -> None:
    index = HSRIndex(normal(2, 10, 4), "brute")
    for heads in (3, 1, 0):
        with pytest.raises(ArgumentError, match=f"queries must have a positive multiple of 2 heads.*got {heads}"):
            index.query(normal(heads, 1, 4), 0.0)
    with pytest.raises(ArgumentError, match="queries must have 3 axes"):
        index.query(normal(2, 4), 0.0)


@pytest.mark.parametrize("r", [0, 11, 1.5, True, np.zeros(2, int)])
def test_topk_refuses_r_out_of_range(r: Any) -> None:
    with pytest.raises(ArgumentError, match="r must"):
        HSRIndex(normal(10, 4), "brute").topk(normal(2, 4), r)


@pytest.mark.parametrize("method", METHODS)
def test_infinite_thresholds_and_no_queries(method: str) -> None:
    d = served(method, 4)
    index = HSRIndex(normal(70, d), method)
    queries = normal(3, d, seed=1)
    everything = index.query(queries, -np.inf)
    assert (everything.counts == 70).all()
    assert (np.sort(everything.indices.reshape(3, 70), axis=1) == np.arange(70)).all()
    assert index.query(queries, np.inf).indices.size == 0
    nothing = index.query(np.empty((0, d), np.float32), 0.0)
    assert nothing.counts.shape == (0,)
    assert nothing.to_scipy().shape == (0, 70)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_torch_views_give_the_same_and_stay_unchanged(method: str, dtype: str) -> None:
    d = served(method, 6)
    base = torch.from_numpy(normal(2, 30, 2 * d)).to(getattr(torch, dtype))
    keys, queries = base.transpose(0, 1)[:, :, ::2].transpose(0, 1), base[:1, :3, d:].expand(2, 3, d)
    before = base.clone()
    report = HSRIndex(keys, method).query(queries, 0.3)
    if dtype != "bfloat16":
        other = HSRIndex(keys.numpy(), method).query(queries.numpy(), np.float32(0.3))
        assert np.array_equal(report.offsets, other.offsets)
    assert torch.equal(base, before)
    scores = torch.einsum("hmd,hNd->hmN", queries.double(), keys.double()).numpy()
    assert np.array_equal(report.counts, (scores >= 0.3).sum(axis=2))


@pytest.mark.parametrize("method", METHODS)
def test_the_index_does_not_see_later_changes_of_its_input(method: str) -> None:
    keys = normal(100, served(method, 6))
    index = HSRIndex(keys, method)
    wanted = index.query(keys[:2], 0.0).counts
    queries = keys[:2].copy()
    keys[:] = 0
    assert np.array_equal(index.query(queries, 0.0).counts, wanted)
    with pytest.raises(ValueError, match="read-only"):
        index.keys[0] = 1


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_topk_is_the_reference_top_k(method: str, data: st.DataObject) -> None:
    case = data.draw(cases("float32", method))
    n, m = len(case.plain_keys), len(case.plain_queries)
    r = data.draw(st.integers(1, n))
    prefix = np.array(data.draw(st.lists(st.integers(0, n), min_size=m, max_size=m)))
    report = HSRIndex(case.keys, method).topk(case.queries, r, prefix=prefix)
    scores = case.plain_queries @ case.plain_keys.T
    absolute = np.abs(case.plain_queries) @ np.abs(case.plain_keys).T
    for i in range(m):
        indices, found = report.row(i)
        wanted = reference_topk(case.plain_queries[i : i + 1], case.plain_keys[: prefix[i]], r)[0]
        assert len(indices) == len(np.unique(indices)) == min(r, prefix[i])
        assert (np.diff(found) <= 0).all()
        best = scores[i, wanted]  # ties are interchangeable, so compare the scores themselves
        assert np.allclose(found, best, rtol=0, atol=1e-13 * absolute[i].max(initial=0) + 1e-300)


def test_topk_with_one_r_per_query_and_grouped_heads() -> None:
    keys, queries = normal(2, 3000, 8), normal(4, 5, 8, seed=1)
    r = np.random.default_rng(2).integers(1, 3000, (4, 5))
    report = HSRIndex(keys, "sketch").topk(queries, r)
    assert np.array_equal(report.counts, r)
    scores = np.einsum("hmd,hNd->hmN", queries.astype(float), np.repeat(keys, 2, axis=0).astype(float))
    for head in range(4):
        for i in range(5):
            best = np.argsort(-scores[head, i])[: r[head, i]]
            assert np.array_equal(report.row(head, i)[0], best)


def test_topk_survives_a_sample_that_misleads() -> None:
    keys = np.zeros((8192, 2), np.float32)
    keys[::8, 0] = np.arange(1024)  # the evenly spaced sample sees exactly these
    report = HSRIndex(keys, "brute").topk(np.array([[1.0, 0.0]], np.float32), 2000)
    assert report.counts[0] == 2000
    assert report.scores[:1023].min() == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_append_equals_building_at_once(method: str) -> None:
    d = served(method, 6)
    keys, queries = normal(2, 1500, d), normal(4, 3, d, seed=1)
    index = HSRIndex(keys[:, :100], method, buffer=64)
    for start in range(100, 1500, 7):
        index.append(keys[:, start : start + 7])
    assert index.n == 1500
    assert np.array_equal(index.keys, keys)
    report = index.query(queries, 1.0)
    whole = HSRIndex(keys, "reference").query(queries, 1.0)
    for head in range(4):
        for i in range(3):
            assert set(report.row(head, i)[0]) == set(whole.row(head, i)[0])
    assert len(index.explain()["segments"]) <= 6  # logarithmically many


def test_a_refused_append_changes_nothing() -> None:
    index = HSRIndex(normal(2, 20, 4), "tree", buffer=1)
    bad = [
        normal(2, 3, 5),
        normal(3, 3, 4),
        normal(3, 4),
        normal(2, 3, 4, dtype=np.float64),
        np.full((2, 1, 4), np.nan, "f4"),
    ]
    for keys in bad:
        with pytest.raises(ArgumentError, match="keys must"):
            index.append(keys)
        assert index.n == 20
        assert index.explain()["segments"] == [(0, 20)]
    index.append(np.empty((2, 0, 4), np.float32))
    assert index.n == 20


class Growth(RuleBasedStateMachine):
    """Appends and queries in any order agree with brute force over all keys so far."""

    @initialize(seed=st.integers(0, 1000), method=st.sampled_from(METHODS), buffer=st.integers(1, 40))
    def begin(self, seed: int, method: str, buffer: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.d = served(method, 3)
        self.keys = self.rng.integers(-3, 4, (self.rng.integers(1, 30), self.d)).astype(np.float32)
        self.index = HSRIndex(self.keys, method, buffer=buffer)

    @rule(count=st.integers(0, 60))
    def append(self, count: int) -> None:
        new = self.rng.integers(-3, 4, (count, self.d)).astype(np.float32)
        self.index.append(new)
        self.keys = np.concatenate([self.keys, new])

    @precondition(lambda self: hasattr(self, "index"))
    @invariant()
    def answers_are_complete(self) -> None:
        queries = self.rng.integers(-3, 4, (2, self.d)).astype(np.float32)
        thresholds = self.rng.integers(-6, 10, 2).astype(np.float64)
        limits = self.rng.integers(0, len(self.keys) + 1, 2)
        report = self.index.query(queries, thresholds, prefix=limits)
        assert_reports(report, queries.astype(float), self.keys.astype(float), thresholds, limits)


TestGrowth = Growth.TestCase
TestGrowth.settings = settings(max_examples=50, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize(("shape", "method"), [((500, 64), "brute"), ((40_000, 2), "tree"), ((8192, 64), "sketch")])
def test_auto_chooses_by_measurement_and_says_why(shape: tuple[int, int], method: str) -> None:
    explained = HSRIndex(normal(*shape)).explain()
    assert explained["method"] == method
    assert all(any(c.isdigit() for c in reason) for reason in explained["reasons"])
    assert explained["keys"] == (1, *shape)
    assert explained["work"] == named("build", method).work != ""
    assert explained["index_bytes_per_key"] < explained["key_bytes_per_key"] * 3


def test_auto_leaves_the_plane_to_the_tree_and_says_what_layers_would_do() -> None:
    explained = HSRIndex(normal(5000, 2)).explain()
    assert explained["method"] == "tree"
    assert "layers" in explained["reasons"][-1]
    assert not any("layers" in reason for reason in HSRIndex(normal(5000, 3)).explain()["reasons"])


def test_a_width_that_a_method_does_not_serve_is_refused_with_the_reason() -> None:
    message = "method 'layers' cannot serve this call: it needs keys of width 2, got width 3"
    with pytest.raises(BackendUnavailable, match=message):
        HSRIndex(normal(2, 10, 3), "layers")


def test_repr_and_properties() -> None:
    index = HSRIndex(normal(2, 30, 4), "brute")
    assert repr(index) == "HSRIndex(heads=2, n=30, alive=30, d=4, dtype=float32, method=brute)"
    assert index.largest == np.abs(index.keys).max()
    with pytest.raises(ArgumentError, match="buffer must be at least 1; got 0"):
        HSRIndex(normal(3, 2), buffer=0)
