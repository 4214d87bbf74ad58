"""Codes of a few bytes: the integer loops, the layouts, and the squared errors that are promised."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsr import reference
from hsr.coded_scan import WIDTHS, plain_sums, vnni_sums
from hsr.coder import DISTORTION, Coder, Layout, best_layout, fit
from hsr.int8_scan import HAS_VNNI

LOOPS = [plain_sums, pytest.param(vnni_sums, marks=pytest.mark.skipif(not HAS_VNNI, reason="no AVX512-VNNI here"))]
SEEDS = st.integers(0, 2**32 - 1)


def decoded(coder: Coder, codes: np.ndarray, n: int) -> np.ndarray:
    """Codes -> the coordinates (g, n, d) that they stand for, zero on axes that are dropped."""
    g, d = coder.mean.shape
    used = min(d, len(coder.layout.bits))
    y = np.zeros((g, n, d))
    unpacked = reference.unpacked(codes, coder.layout.words)[:, :n, :used].astype(np.float64)
    y[..., :used] = coder.steps[:, None, :used] * (unpacked - coder.middle[:used])
    return y


def scores(coder: Coder, codes: np.ndarray, queries: np.ndarray, n: int) -> np.ndarray:
    """Products (g, m, n) by the codes, of queries that are not rounded."""
    around = np.einsum("gmd,gd->gm", queries, coder.mean)[..., None]
    return around + (queries @ coder.query_map) @ decoded(coder, codes, n).swapaxes(1, 2)


@pytest.mark.parametrize("sums_of", LOOPS)
@given(seed=SEEDS, words=st.tuples(*[st.integers(0, 3)] * 4), extreme=st.booleans())
def test_every_loop_computes_the_stated_sums(sums_of, seed: int, words: tuple[int, ...], extreme: bool) -> None:
    rng = np.random.default_rng(seed)
    planes = sum(count * 8 // width for count, width in zip(words, WIDTHS, strict=True))
    codes = rng.integers(0, 256, (3, sum(words), 64, 4)).astype(np.uint8)
    tiles = rng.integers(-127, 128, (2, 4, planes, 4)).astype(np.int8)
    if extreme:
        codes[:], tiles[:] = 255, rng.choice([-127, 127], tiles.shape)
    block, tile = rng.integers(3), rng.integers(2)
    found = np.empty((4, 64), np.int32)
    sums_of(codes, block, tiles, tile, np.array(words), found)
    wanted = np.zeros((1, 1, 4, 64))
    if planes:
        wanted = reference.estimate(
            codes[None, block : block + 1], words, tiles[None, tile : tile + 1], np.ones((1, 1, 4))
        )
    assert np.array_equal(found, wanted[0, 0])


@pytest.mark.parametrize("size", [4, 8, 12, 20])
@pytest.mark.parametrize("d", [1, 5, 16, 33])
def test_no_layout_is_better(d: int, size: int) -> None:
    rng = np.random.default_rng(d)
    variances = np.sort(np.exp(3 * rng.standard_normal(d)))[::-1]

    def loss(layout: Layout) -> float:
        bits = layout.bits[:d]
        kept = sum(DISTORTION[int(width)] * variance for width, variance in zip(bits, variances, strict=False))
        return kept + variances[len(bits) :].sum()

    found = best_layout(variances, size)
    assert found.bytes_per_key == size
    words = range(size // 4 + 1)
    others = [Layout(counts) for counts in itertools.product(words, repeat=4) if 4 * sum(counts) == size]
    assert loss(found) <= min(map(loss, others)) * (1 + 1e-12)


@given(
    seed=SEEDS,
    n=st.integers(1, 200),
    d=st.integers(1, 24),
    size=st.sampled_from([4, 8, 16, 24]),
    kind=st.sampled_from(["gaussian", "equal", "zero", "few", "one axis"]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_errors_are_those_of_what_the_codes_stand_for(
    seed: int, n: int, d: int, size: int, kind: str, dtype: type
) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((2, n, d)) * np.geomspace(1, 0.05, d) + rng.standard_normal(d)
    keys = {
        "gaussian": keys,
        "equal": np.broadcast_to(keys[:, :1], keys.shape),
        "zero": np.zeros_like(keys),
        "few": np.round(keys),
        "one axis": keys * (np.arange(d) == 0),
    }[kind].astype(dtype)
    queries = 3 * rng.standard_normal((2, 7, d))
    coder = fit(keys, size, queries)
    codes, error = coder.encode(keys)
    assert codes.shape == (2, -(-n // 64), size // 4, 64, 4)
    exact = (keys - coder.mean[:, None]) @ coder.key_map
    lost = ((exact - decoded(coder, codes, n)) ** 2).sum(axis=2)
    small = 1e-5 if dtype is np.float32 else 1e-12
    assert np.allclose(error, lost, rtol=2e3 * small, atol=small * (exact**2).max(initial=1.0))
    assert np.allclose(error.mean(axis=1), coder.error, rtol=0.05, atol=10 * small * (exact**2).max(initial=1.0))
    assert (reference.unpacked(codes, coder.layout.words)[:, n:] == 0).all(), "padding is zero"
    assert (reference.unpacked(codes, coder.layout.words)[:, :, d:] == 0).all(), "axes that do not exist are zero"


def test_the_error_is_that_of_scores_in_their_own_unit() -> None:
    """Over the queries of the fit, whatever their size: many of them, so that they make up nearly all of M."""
    rng = np.random.default_rng(0)
    d, mixing = 12, rng.standard_normal((12, 12))
    keys = rng.standard_normal((1, 600, d)) * np.geomspace(3, 0.1, d)
    for size in (0.01, 1.0, 50.0):
        queries = size * rng.standard_normal((1, 2000, d)) @ mixing
        coder = fit(keys, 8, queries)
        codes, _ = coder.encode(keys)
        off = scores(coder, codes, queries, 600) - queries @ keys.swapaxes(1, 2)
        assert (off**2).mean() == pytest.approx(coder.error[0], rel=0.02)


def test_a_fit_to_queries_errs_less_on_them() -> None:
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((1, 800, 32))
    queries = rng.standard_normal((1, 400, 32)) * np.geomspace(10, 0.1, 32)
    errors = []
    for known in (queries[:, :200], None):
        coder = fit(keys, 8, known)
        off = scores(coder, coder.encode(keys)[0], queries[:, 200:], 800) - queries[:, 200:] @ keys.swapaxes(1, 2)
        errors.append((off**2).mean())
    assert errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize("known", [True, False])
def test_products_come_back_where_bytes_are_plenty(known: bool) -> None:
    rng = np.random.default_rng(2)
    keys, queries = rng.standard_normal((2, 300, 10)) + 2, rng.standard_normal((2, 6, 10))
    coder = fit(keys, 12, queries if known else None)
    assert coder.layout.words == (3, 0, 0, 0)
    codes, _ = coder.encode(keys)
    coded = coder.prepare(queries)
    tiles = coded.tiles.reshape(2, -1, *coded.tiles.shape[2:])
    exact = queries @ keys.swapaxes(1, 2)
    assert np.abs(scores(coder, codes, queries, 300) - exact).max() < 0.02 * exact.std()
    slopes = np.zeros((2, 1, 8))
    slopes[:, 0, :6] = coded.sigma
    found = reference.estimate(codes, coder.layout.words, tiles, slopes)[:, 0, :6, :300] + coded.base[..., None]
    assert np.abs(found - exact).max() < 0.06 * exact.std()  # queries are rounded to int8, too


def test_keys_coded_in_pieces_have_the_codes_of_all_at_once() -> None:
    keys = np.random.default_rng(3).standard_normal((2, 256, 9)).astype(np.float32)
    coder = fit(keys, 8)
    codes, error = coder.encode(keys)
    for first, last in [(0, 64), (64, 192), (192, 256)]:
        part, lost = coder.encode(keys[:, first:last])
        assert np.array_equal(part, codes[:, first // 64 : last // 64])
        assert np.allclose(lost, error[:, first:last], rtol=1e-4)
