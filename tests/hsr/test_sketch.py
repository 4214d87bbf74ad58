"""The sketch's bound: it holds for codes of any quality, and it is tight enough to be worth having."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hsr import Report
from hsr.sketch_numba import build
from tests.assertions import assert_reports


def report_of(structure, keys, queries, thresholds):
    limits = np.full(len(queries), len(keys))
    hits = structure.report(keys, queries, thresholds, limits, True)
    return Report(
        hits.offsets, hits.indices, hits.scores, (len(queries),), len(keys), hits.scanned, hits.visited, "sketch"
    )


def reconstruction(structure, n: int, d: int) -> np.ndarray:
    blocks, groups = structure.codes.shape[:2]
    code = structure.codes.transpose(0, 2, 1, 3).reshape(blocks * 64, groups * 4)[:n, :d].astype(np.float64) - 128
    return structure.mean + (code * structure.steps) @ structure.axes.T


def test_residual_and_norm_bound_every_key() -> None:
    rng = np.random.default_rng(0)
    keys = (rng.standard_normal((1000, 17)) * np.linspace(5, 0.1, 17) + 3).astype(np.float32)
    keys[500] *= 1000
    structure = build(keys)
    error = np.linalg.norm(
        np.ldexp(keys.astype(np.float64), -structure.exponent) - reconstruction(structure, 1000, 17), axis=1
    )
    assert (error <= np.repeat(structure.residual, 64)[:1000]).all()
    assert structure.residual[500 // 64] > 10 * np.median(structure.residual)  # the outlier spoils its own block alone


def test_int8_reads_few_keys_in_vain() -> None:
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((20_000, 64)).astype(np.float32)
    queries = rng.standard_normal((8, 64))
    thresholds = np.quantile(queries @ keys.T.astype(np.float64), 0.99, axis=1)
    report = report_of(build(keys), keys, queries, thresholds)
    assert_reports(report, queries, keys.astype(np.float64), thresholds, np.full(8, 20_000))
    assert report.scanned.mean() < 2 * report.counts.mean()
    assert (report.visited == 20_000).all()


@pytest.mark.parametrize("damage", ["axes", "steps", "codes"])
def test_completeness_does_not_rest_on_good_codes(damage: str) -> None:
    """Any axes and steps give a complete answer, because the residual is measured; the bound itself is then loose."""
    rng = np.random.default_rng(2)
    keys = rng.standard_normal((300, 8))
    good = build(keys)
    if damage == "axes":
        changed = dataclasses.replace(good, axes=good.axes + 0.1 * rng.standard_normal((8, 8)))
    elif damage == "steps":
        changed = dataclasses.replace(good, steps=good.steps * 3)
    else:
        changed = dataclasses.replace(good, codes=rng.integers(1, 256, good.codes.shape).astype(np.uint8))
    unit_keys = np.ldexp(keys, -good.exponent)
    error = np.linalg.norm(unit_keys - reconstruction(changed, 300, 8), axis=1) * (1 + 1e-9)
    code = changed.codes.astype(np.float64) - 128
    norm = np.sqrt((code**2).sum(axis=(1, 3)).max(axis=1)) * (1 + 1e-9)
    starts = np.arange(0, 300, 64)
    changed = dataclasses.replace(changed, residual=np.maximum.reduceat(error, starts) + 1e-12, norm=norm)
    queries = rng.standard_normal((20, 8))
    thresholds = np.quantile(queries @ keys.T, 0.9, axis=1)
    report = report_of(changed, keys, queries, thresholds)
    assert_reports(report, queries, keys, thresholds, np.full(20, 300))
    assert report.scanned.sum() > report_of(good, keys, queries, thresholds).scanned.sum()


def test_a_residual_that_is_too_small_is_caught() -> None:
    """The planted fault: without its residual and norm the bound must lose keys, or the tests above show nothing."""
    rng = np.random.default_rng(3)
    keys = rng.standard_normal((2000, 16))
    good = build(keys)
    weak = dataclasses.replace(good, residual=good.residual * 0, norm=good.norm * 0, steps=good.steps * 0.95)
    queries = rng.standard_normal((50, 16))
    thresholds = np.quantile(queries @ keys.T, 0.95, axis=1)
    with pytest.raises(AssertionError, match="lost keys"):
        assert_reports(report_of(weak, keys, queries, thresholds), queries, keys, thresholds, np.full(50, 2000))


def test_adversarial_queries_meet_the_bound() -> None:
    """Queries along a key's own residual use the Cauchy-Schwarz bound to the full."""
    rng = np.random.default_rng(4)
    keys = rng.standard_normal((256, 12))
    structure = build(keys)
    residual = np.ldexp(keys, -structure.exponent) - reconstruction(structure, 256, 12)
    queries = np.concatenate([residual[:100], -residual[:100]]) * 1e6
    scores = queries @ keys.T
    thresholds = np.take_along_axis(scores, np.argsort(scores, axis=1)[:, 200:201], axis=1)[:, 0]
    report = report_of(structure, keys, queries, thresholds)
    assert_reports(report, queries, keys, thresholds, np.full(200, 256))


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_tile_and_limit_is_complete(m: int, dtype: type) -> None:
    """A lone query, tiles that are not full, several chunks, and limits within and between blocks."""
    rng = np.random.default_rng(5)
    n, d = 9001, 130  # chunks of 62 blocks, the last one short; groups that are not full
    keys = rng.standard_normal((n, d)).astype(dtype)
    structure = build(keys)
    queries = rng.standard_normal((m, d))
    thresholds = np.where(np.arange(m) % 3 == 2, -np.inf, np.quantile(queries @ keys.T, 0.98, axis=1))
    scores = queries @ keys.T.astype(np.float64)
    for limits in (rng.integers(0, n + 1, m), 64 * rng.integers(0, n // 64, m), np.full(m, n), np.zeros(m, np.int64)):
        hits = structure.report(keys, queries, thresholds, limits, True)
        for i in range(m):
            wanted = np.flatnonzero(scores[i, : limits[i]] >= thresholds[i])
            part = slice(hits.offsets[i], hits.offsets[i + 1])
            assert np.array_equal(hits.indices[part], wanted)
            np.testing.assert_allclose(hits.scores[part], scores[i, wanted], rtol=1e-9, atol=1e-9)
        counted = structure.report(keys, queries, thresholds, limits, False)
        assert np.array_equal(counted.offsets, hits.offsets)
        assert len(counted.indices) == 0


def test_products_that_underflow_reach_zero() -> None:
    """float64 scores them 0, which reaches a threshold of 0 though the exact product lies below."""
    rng = np.random.default_rng(6)
    keys = -np.abs(rng.standard_normal((200, 8)))
    queries = np.full((2, 8), 5e-324)
    limits = np.full(2, 200)
    hits = build(keys * 0.1).report(keys * 0.1, queries, np.zeros(2), limits, True)
    wanted = (queries @ (keys * 0.1).T >= 0).sum(axis=1)
    assert np.array_equal(np.diff(hits.offsets) >= wanted, [True, True])
    assert wanted[0] > 100
