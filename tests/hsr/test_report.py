"""Every method of the dispatch table reports what the reference does, for every dtype."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsr import ArgumentError, HSRIndex, Report, methods
from hsr.reference import report as reference_report
from tests.assertions import assert_reports
from tests.strategies import DTYPES, cases, served


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", methods("build"))
@settings(max_examples=2000 if settings.default.max_examples > 200 else 200)  # nightly, and in CI
@given(data=st.data())
def test_reports_what_brute_force_reports(method: str, dtype: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtype, method))
    n, m = len(case.plain_keys), len(case.plain_queries)
    index = HSRIndex(case.keys, method)
    report = index.query(case.queries, case.thresholds)
    assert_reports(report, case.plain_queries, case.plain_keys, case.thresholds, np.full(m, n))
    assert np.array_equal(index.count(case.queries, case.thresholds), report.counts)
    prefix = np.array(data.draw(st.lists(st.integers(0, n), min_size=m, max_size=m)))
    report = index.query(case.queries, case.thresholds, prefix=prefix)
    assert_reports(report, case.plain_queries, case.plain_keys, case.thresholds, prefix)


@pytest.mark.parametrize("method", methods("build"))
@pytest.mark.parametrize("fault", ["dropped", "stranger", "repeat", "score"])
def test_the_assertion_rejects_a_planted_fault(method: str, fault: str) -> None:
    rng = np.random.default_rng(3)
    d = served(method, 5)
    keys, queries = rng.standard_normal((200, d)), rng.standard_normal((1, d))
    threshold = np.quantile(queries @ keys.T, 0.9, axis=1)
    good = HSRIndex(keys, method).query(queries, threshold)
    limits = np.array([200])
    assert_reports(good, queries, keys, threshold, limits)
    outside = np.setdiff1d(np.arange(200), good.indices)[0]
    indices, scores = good.indices.copy(), good.scores.copy()
    if fault == "dropped":
        indices, scores = indices[1:], scores[1:]
    elif fault == "stranger":
        indices[0] = outside
        scores[0] = queries[0] @ keys[outside]
    elif fault == "repeat":
        indices[0], scores[0] = indices[1], scores[1]
    else:
        scores[0] += 1e-9
    bad = Report(
        np.array([0, len(indices)]), indices, scores, good.shape, good.n, good.scanned, good.visited, good.method
    )
    with pytest.raises(AssertionError):
        assert_reports(bad, queries, keys, threshold, limits)


def test_reference_on_a_case_one_can_read() -> None:
    keys = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]])
    offsets, indices, scores = reference_report(np.array([[1.0, 0.0], [0.0, 2.0]]), keys, np.array([1.0, 2.0]))
    assert offsets.tolist() == [0, 2, 4]
    assert indices.tolist() == [0, 3, 1, 3]
    assert scores.tolist() == [1.0, 1.0, 2.0, 2.0]


def test_reference_compares_scores_beyond_float64() -> None:
    keys = np.array([[1e300], [-1e300], [1e10]])
    _, indices, scores = reference_report(np.array([[1e300]]), keys, np.array([1e308]))
    assert indices.tolist() == [0, 2]
    assert scores[0] == np.inf


@pytest.mark.parametrize("method", methods("build"))
def test_underflow_in_a_shrunk_query_loses_no_key(method: str) -> None:
    keys = np.array([[0.0, 1e300], [0.0, -1e300]])
    report = HSRIndex(keys, method).query(np.array([[1e308, 1e-300]]), 1.0)
    assert 0 in report.indices


@pytest.mark.parametrize("method", methods("build"))
def test_a_subnormal_query_over_huge_keys_keeps_its_rounding_band(method: str) -> None:
    rng = np.random.default_rng(0)
    d = served(method, 20)
    keys, queries = rng.standard_normal((1, d)) * 1e305, rng.standard_normal((1, d)) * 1e-320
    scores = queries @ keys.T
    assert HSRIndex(keys, method).count(queries, scores[:, 0])[0] == 1
    assert HSRIndex(keys, method).count(queries, np.sum(queries[0] * keys[0])[None])[0] == 1


def test_report_rows_and_scipy_form() -> None:
    rng = np.random.default_rng(0)
    keys, queries = rng.standard_normal((2, 50, 4)), rng.standard_normal((4, 3, 4))
    report = HSRIndex(keys, "brute").query(queries, 0.5)
    matrix = report.to_scipy()
    assert matrix.shape == (12, 50)
    assert report.counts.shape == (4, 3)
    scores = np.einsum("hmd,hNd->hmN", queries, np.repeat(keys, 2, axis=0))
    assert np.allclose(matrix.toarray().reshape(4, 3, 50), np.where(scores >= 0.5, scores, 0.0))
    indices, row_scores = report.row(3, 1)
    assert set(indices) == set(np.flatnonzero(scores[3, 1] >= 0.5))
    assert np.allclose(row_scores, scores[3, 1, indices])
    matrix.data[:] = 0  # a copy: the report keeps its scores
    assert report.scores.any()


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"method must be one of reference, brute, tree, layers, sketch; got 'kd'"):
        HSRIndex(np.ones((3, 2)), "kd")
