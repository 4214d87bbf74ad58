"""Deleted keys are gone, ids stay, and the cost is bounded: every method against a dictionary of the living."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hsr import ArgumentError, HSRIndex, Report, methods
from tests.strategies import served

METHODS = methods("build")


def lattice(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Small whole numbers: products are exact and thresholds at whole numbers meet many ties."""
    return rng.integers(-3, 4, shape).astype(np.float32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Oracle:
    """All keys ever added (g, n, d) in float64, and which live."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys, self.alive = keys.astype(np.float64), np.ones(keys.shape[1], bool)

    def append(self, keys: np.ndarray) -> None:
        self.keys = np.concatenate([self.keys, keys], axis=1)
        self.alive = np.append(self.alive, np.ones(keys.shape[1], bool))

    def scores(self, head: int, query: np.ndarray, prefix: int) -> tuple[np.ndarray, np.ndarray]:
        """The living ids below prefix, and the scores of their keys."""
        ids = np.flatnonzero(self.alive[:prefix])
        return ids, self.keys[head, ids] @ query.astype(np.float64)


def assert_same(report: Report, i: int, ids: np.ndarray, scores: np.ndarray) -> None:
    found, found_scores = report.row(*np.unravel_index(i, report.shape))
    order = np.argsort(found)
    assert np.array_equal(found[order], ids)
    assert np.array_equal(found_scores[order], scores)


class Dynamic(RuleBasedStateMachine):
    """Any order of appends, deletions, saves and queries agrees with the oracle."""

    @initialize(
        seed=st.integers(0, 1000), method=st.sampled_from(METHODS), buffer=st.integers(1, 40), heads=st.integers(1, 2)
    )
    def begin(self, seed: int, method: str, buffer: int, heads: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.heads, self.d = heads, served(method, 3)
        keys = lattice(self.rng, heads, self.rng.integers(1, 30), self.d)
        self.oracle = Oracle(keys)
        self.index = HSRIndex(self.shaped(keys), method, buffer=buffer)

    def shaped(self, array: np.ndarray) -> np.ndarray:
        return array if self.heads > 1 else array[0]

    @rule(count=st.integers(0, 60))
    def append(self, count: int) -> None:
        keys = lattice(self.rng, self.heads, count, self.d)
        self.index.append(self.shaped(keys))
        self.oracle.append(keys)

    @rule(share=st.sampled_from((0.0, 0.05, 0.2, 0.6, 1.0)), oldest=st.booleans())
    def delete(self, share: float, oldest: bool) -> None:
        living = np.flatnonzero(self.oracle.alive)
        ids = self.rng.permutation(living)[: int(np.ceil(share * len(living)))]
        ids = living[: len(ids)] if oldest else ids
        self.index.delete(ids)
        self.oracle.alive[ids] = False

    @precondition(lambda self: not self.oracle.alive.all())
    @rule(valid=st.booleans())
    def delete_again_is_refused(self, valid: bool) -> None:
        gone, living = np.flatnonzero(~self.oracle.alive), np.flatnonzero(self.oracle.alive)
        ids = np.append(living[: int(valid)], self.rng.choice(gone))
        with pytest.raises(ArgumentError, match=f"ids must be those of living keys; got {ids[-1]}"):
            self.index.delete(ids)

    @rule()
    def come_back_from_a_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.index.save(Path(folder) / "keys.hsr")
            loaded = HSRIndex.load(Path(folder) / "keys.hsr")
        assert loaded.explain() == self.index.explain()
        self.index = loaded

    @precondition(lambda self: hasattr(self, "index"))
    @invariant()
    def everything_agrees(self) -> None:
        n = len(self.oracle.alive)
        assert (self.index.n, self.index.alive) == (n, self.oracle.alive.sum())
        assert np.array_equal(self.index.ids, np.flatnonzero(self.oracle.alive))
        living = self.oracle.keys[:, self.oracle.alive]
        assert np.array_equal(self.index.keys, self.shaped(living))
        assert self.index.largest >= np.abs(living).max(initial=0.0)
        explained = self.index.explain()
        assert explained["alive"] == self.index.alive
        assert 2 * explained["dead"] < max(1, explained["alive"] + explained["dead"]), (
            "half of the stored keys are dead"
        )
        shape = (2 * self.heads, 2) if self.heads > 1 else (2,)
        queries = lattice(self.rng, *shape, self.d)
        thresholds = self.rng.integers(-6, 10, shape).astype(np.float64)
        prefix = self.rng.integers(0, n + 1, shape)
        r = self.rng.integers(1, n + 1, shape)
        for limits in (prefix, None):
            self.answers_agree(queries, thresholds, limits, r)

    def answers_agree(
        self, queries: np.ndarray, thresholds: np.ndarray, prefix: np.ndarray | None, r: np.ndarray
    ) -> None:
        report = self.index.query(queries, thresholds, prefix=prefix)
        best = self.index.topk(queries, r, prefix=prefix)
        assert report.n == best.n == self.index.n
        assert np.array_equal(self.index.count(queries, thresholds, prefix=prefix), report.counts)
        limits = np.full(thresholds.shape, self.index.n) if prefix is None else prefix
        for i, place in enumerate(np.ndindex(thresholds.shape)):
            head = place[0] // 2 if self.heads > 1 else 0
            ids, scores = self.oracle.scores(head, queries[place], limits[place])
            inside = scores >= thresholds[place]
            assert_same(report, i, ids[inside], scores[inside])
            found, found_scores = best.row(*place)
            assert np.array_equal(found_scores, np.sort(scores)[::-1][: r[place]])
            assert np.isin(found, ids).all()
            assert len(np.unique(found)) == len(found)


TestDynamic = Dynamic.TestCase
TestDynamic.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def state(index: HSRIndex) -> tuple[Any, ...]:
    report = index.query(normal(3, index.d, seed=9), 0.3)
    return index.explain(), index.ids.tolist(), report.indices.tolist(), report.scores.tolist(), index.keys.tolist()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([20], r"ids must lie in 0..19; got 20..20"),
        ([3, -1], r"ids must lie in 0..19; got -1..3"),
        ([2**64], "ids must be whole numbers; got object"),
        (np.array([2**63], np.uint64), "ids must lie in 0..19; got 9223372036854775808"),
        ([1.0], "ids must be whole numbers; got float64"),
        ([True], "ids must be whole numbers; got bool"),
        (["1"], "ids must be whole numbers; got <U1"),
        ([4, 5, 4], "ids must name each key once; got 4 more than once"),
        ([7, 6], "ids must be those of living keys; got 6, which was deleted before"),
        (7, r"ids must be a sequence of whole numbers; got shape \(\)"),
        (None, "ids must be a sequence of whole numbers"),
        ([[7]], r"ids must be a sequence of whole numbers; got shape \(1, 1\)"),
        ([[7], [8, 9]], "ids must be a sequence of whole numbers; got list"),
        (torch.ones(1, dtype=torch.int64, device="meta"), "ids must be a sequence of whole numbers; got Tensor"),
    ],
)
@pytest.mark.parametrize("rebuilt", [False, True])
def test_bad_ids_are_refused_and_nothing_changes(ids: Any, message: str, rebuilt: bool) -> None:
    index = HSRIndex(normal(20, 4), "tree")
    index.delete([6, *range(10, 19)] if rebuilt else [6])
    before = state(index)
    assert before[0]["dead"] == (0 if rebuilt else 1)
    with pytest.raises(ArgumentError, match=message):
        index.delete(ids)
    assert state(index) == before


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, np.uint8)])
def test_any_sequence_of_whole_numbers_will_do(form: Any) -> None:
    index = HSRIndex(normal(20, 4), "brute")
    index.delete(form([3, 1, 19]))
    index.delete([])
    index.delete(range(4, 6))
    assert index.ids.tolist() == [0, 2, *range(6, 19)]


@pytest.mark.parametrize("method", METHODS)
def test_everything_deleted_and_then_appended(method: str) -> None:
    keys = normal(100, served(method, 4))
    index = HSRIndex(keys, method, buffer=8)
    index.delete(range(100))
    for _ in range(2):
        assert (index.n, index.alive, index.keys.shape) == (100, 0, (0, keys.shape[1]))
        assert (index.query(keys[:3], -np.inf).counts == 0).all()
        assert (index.topk(keys[:3], 5).counts == 0).all()
        assert (index.count(keys[:3], -np.inf, prefix=7) == 0).all()
        index.delete([])
    index.append(keys[:9])
    assert sorted(index.query(keys[:1], -np.inf).row(0)[0]) == list(range(100, 109))
    assert (index.topk(keys[:3], 50).counts == 9).all()


@pytest.mark.parametrize("method", METHODS)
def test_an_index_with_dead_keys_grows_after_it_was_loaded(method: str, tmp_path: Path) -> None:
    keys = normal(100, served(method, 4))
    index = HSRIndex(keys[:60], method, buffer=8)
    index.delete(range(10))
    index.save(tmp_path / "keys.hsr")
    loaded = HSRIndex.load(tmp_path / "keys.hsr")
    loaded.append(keys[60:75])
    assert loaded.explain()["dead"] == 10
    assert sorted(loaded.query(keys[:1], -np.inf).row(0)[0]) == loaded.ids.tolist() == list(range(10, 75))


def test_a_rebuild_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    index = HSRIndex(normal(200, 4), "tree", buffer=16)
    index.delete(range(0, 60))
    before = state(index)

    def full(keys: np.ndarray) -> None:
        raise MemoryError

    build = index._build
    monkeypatch.setattr(index, "_build", full)
    for change in (lambda: index.delete(range(60, 150)), lambda: index.append(normal(400, 4))):
        with pytest.raises(MemoryError):
            change()
        assert state(index) == before
    monkeypatch.setattr(index, "_build", build)
    index.delete(range(60, 150))
    assert index.alive == 50


def test_keys_handed_out_before_do_not_change() -> None:
    keys = normal(50, 4)
    index = HSRIndex(keys, "tree", buffer=4)
    views = [index.keys]
    for ids in (range(3), range(3, 40)):
        index.delete(ids)
        views.append(index.keys)
        index.append(normal(3, 4, seed=1))
    assert np.array_equal(views[0], keys)
    assert np.array_equal(views[1], keys[3:])
    assert np.array_equal(views[2][:10], keys[40:])
    assert not any(view.flags.writeable for view in views)


def test_dead_keys_go_with_a_segment_that_is_built_anyway() -> None:
    index = HSRIndex(normal(64, 4), "tree", buffer=16)
    index.delete(range(20))
    assert (index.explain()["dead"], index.explain()["segments"]) == (20, [(0, 64)])
    index.append(normal(40, 4))  # of lower rank than the first segment
    assert (index.explain()["dead"], index.explain()["segments"]) == (20, [(0, 64), (64, 104)])
    index.append(normal(40, 4))
    assert (index.explain()["dead"], index.explain()["segments"]) == (0, [(0, 124)])
    assert index.ids.tolist() == list(range(20, 144))


def test_topk_of_an_index_whose_best_keys_are_dead_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The half-space is placed from living keys: placed from all, it would miss and be widened to every key."""
    keys, query = normal(20_000, 4), normal(1, 4, seed=1)
    index = HSRIndex(keys, "brute")
    order = np.argsort(-(keys @ query[0]))
    index.delete(order[:9000])
    asked = []
    ask = index._query
    monkeypatch.setattr(index, "_query", lambda *call, **options: asked.append(call) or ask(*call, **options))
    report = index.topk(query, 20)
    assert np.array_equal(report.row(0)[0], order[9000:9020])
    assert len(asked) == 1


def mixed(index: HSRIndex, oracle: Oracle, operations: int, rng: np.random.Generator, most: int) -> int:
    """Batches of insertions, deletions and queries until there were so many; returns how many queries were asked."""
    done = asked = 0
    while done < operations:
        size = int(rng.integers(1, most))
        kind = rng.choice(3, p=(0.42, 0.38, 0.2))
        living = np.flatnonzero(oracle.alive)
        if kind == 0:
            keys = rng.integers(-2000, 2001, (1, size, index.d)).astype(np.float32)
            index.append(keys[0])
            oracle.append(keys)
        elif kind == 1:
            size = min(size, len(living))
            ids = rng.choice(living, size, replace=False) if rng.random() < 0.5 else living[:size]
            index.delete(ids)
            oracle.alive[ids] = False
        else:
            size = min(size, 16)
            queries = lattice(rng, size, index.d)
            scores = queries.astype(np.float64) @ oracle.keys[0, living].T  # (size, alive), exact
            rank = min(int(rng.integers(1, 400)), len(living))
            thresholds = -np.partition(-scores, rank - 1, axis=1)[:, rank - 1] if rank else np.zeros(size)
            report = index.query(queries, thresholds)
            for i in range(size):
                inside = scores[i] >= thresholds[i]
                assert_same(report, i, living[inside], scores[i, inside])
            asked += size
        done += size
    return asked


CASES = [(method, d) for method in ("tree", "layers", "brute") for d in (2, 4) if served(method, d) == d]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "d"), CASES)
def test_a_million_operations(method: str, d: int) -> None:
    rng = np.random.default_rng(d)
    first = lattice(rng, 1, 10_000, d)
    index, oracle = HSRIndex(first[0], method, buffer=2048), Oracle(first)
    assert mixed(index, oracle, 1_000_000, rng, 2000) > 1000
    assert (index.n, index.alive) == (len(oracle.alive), oracle.alive.sum())


@pytest.mark.parametrize(("method", "d"), CASES)
def test_thousands_of_operations(method: str, d: int) -> None:
    rng = np.random.default_rng(d)
    first = lattice(rng, 1, 500, d)
    mixed(HSRIndex(first[0], method, buffer=64), Oracle(first), 5000, rng, 100)
