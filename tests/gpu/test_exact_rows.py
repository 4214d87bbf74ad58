"""Exact attention of chosen rows, on the GPU or interpreted (float16: bfloat16 is wrong there)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention.reference import dense  # noqa: E402
from attention.weights import Softmax  # noqa: E402
from gpu import exact_rows as module  # noqa: E402
from tests.gpu.interpreted import (  # noqa: E402
    normal,
    poisoned_allocations,  # noqa: F401
    pytestmark,
    waiting_is_an_error,
)

pytestmark = [*pytestmark, pytest.mark.usefixtures("poisoned_allocations")]
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def inputs(B, g, G, m, n, d, dtype=torch.float16):
    return tuple(normal(B, h, size, d, seed=i).to(dtype) for i, (h, size) in enumerate(((g * G, m), (g, n), (g, n))))


def numpy(x):
    return x.double().cpu().numpy()


def assert_exact(q, k, v, rows, scale=0.125):
    """Against the definition, in float64."""
    output, lse = module.exact_rows(q, k, v, rows, scale)
    assert output.dtype == lse.dtype == torch.float32
    at = rows.reshape(*q.shape[:2], -1)
    assert output.shape == (*at.shape, q.shape[3]) and lse.shape == at.shape
    for b in range(len(q)):
        true, sums = dense(numpy(q[b]), numpy(k[b]), numpy(v[b]), Softmax(), scale, causal=True)[:2]
        true, sums = np.take_along_axis(true, at[b, ..., None], 1), np.take_along_axis(sums, at[b], 1)
        off = np.linalg.norm(numpy(output[b]) - true, axis=-1)
        assert (off <= TOLERANCE[q.dtype] * np.linalg.norm(true, axis=-1) + 1e-7).all()
        assert np.abs(numpy(lse[b]) - sums).max() < TOLERANCE[q.dtype]


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize(("d", "B", "g", "G"), [(64, 1, 1, 3), (128, 2, 2, 2), (256, 1, 2, 1)])
def test_rows_of_any_order_and_rows_drawn_twice(d, B, g, G, dtype):
    q, k, v = inputs(B, g, G, 190, 1210, d, dtype)
    rows = np.random.default_rng(d).integers(0, 190, (B * g * G, 70))
    assert_exact(q, k, v, rows, d**-0.5)


@pytest.mark.parametrize(("m", "n", "s"), [(1, 1, 1), (1, 700, 1), (5, 5, 5), (300, 300, 300), (129, 1000, 129)])
def test_one_row_and_all_rows(m, n, s):
    q, k, v = inputs(1, 2, 2, m, n, 64)
    assert_exact(q, k, v, np.stack([np.random.default_rng(i).permutation(m)[:s] for i in range(4)]))


def test_more_pieces_than_are_joined_at_once(monkeypatch):
    monkeypatch.setattr(module, "SHORTEST", 16)
    monkeypatch.setattr(module, "WAVES", 50)
    q, k, v = inputs(1, 1, 2, 90, 2500, 128)
    rows = np.random.default_rng(0).integers(0, 90, (2, 40))
    assert len(module.plan(rows.reshape(1, -1), 2410, 128, 64, 200).pieces) > 2 * module.JOINED
    assert_exact(q, k, v, rows, 128**-0.5)


def test_keys_after_the_last_row_are_not_read():
    q, k, v = inputs(1, 1, 1, 600, 600, 64)
    rows = np.array([[3, 299, 150]])
    before = module.exact_rows(q, k, v, rows, 0.125)
    k[:, :, 300:], v[:, :, 300:] = torch.nan, torch.nan
    for found, wanted in zip(module.exact_rows(q, k, v, rows, 0.125), before, strict=True):
        assert torch.equal(found, wanted)


def test_equal_scores_and_large_ones():
    q, k, v = inputs(1, 1, 2, 400, 400, 64)
    rows = np.random.default_rng(0).integers(0, 400, (2, 40))
    assert_exact(q, torch.ones_like(k), v, rows)
    assert_exact(60 * q, k, v, rows)
    assert_exact(q, k, torch.zeros_like(v), rows)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_rows_that_see_what_is_no_number_have_none(wrong):
    """Were a piece of keys left out for it, what is measured against these rows would look right."""
    q, k, v = normal(1, 1, 600, 64), normal(1, 1, 600, 64, seed=1), normal(1, 1, 600, 64, seed=2)
    q, k, v = (part.half() for part in (q, k, v))
    q[..., 0], k[0, 0, 300, 0] = 1, wrong
    rows = np.array([[5, 299, 300, 599]])
    output, lse = module.exact_rows(q, k, v, rows, 0.125)
    assert torch.isfinite(output[0, 0, :2]).all() and torch.isfinite(lse[0, 0, :2]).all()
    assert torch.isnan(output[0, 0, 2:]).all() and torch.isnan(lse[0, 0, 2:]).all()


def test_other_strides():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(2, 2, 2, 60, 300, 64))
    assert_exact(q, k, v, np.random.default_rng(0).integers(0, 60, (8, 9)))


@settings(max_examples=200)
@given(
    data=st.data(),
    sources=st.integers(1, 4),
    many=st.integers(1, 90),
    before=st.sampled_from([0, 1, 63, 5000, 200_000]),
    height=st.sampled_from([16, 64]),
    wanted=st.integers(1, 300),
)
def test_pieces_cover_what_each_tile_sees_once(data, sources, many, before, height, wanted):
    """Every slot is in one tile; pieces of a tile meet end to end from the first key to the last that a row sees."""
    rows = np.array(data.draw(st.lists(st.integers(0, 999), min_size=sources * many, max_size=sources * many)))
    rows = rows.reshape(sources, many)
    plan = module.plan(rows, before, height, 32, wanted)
    assert (np.sort(plan.slots, axis=1) == np.arange(many)).all()
    assert np.array_equal(np.take_along_axis(rows, plan.slots, 1), plan.positions)
    tiles = -(-many // height)
    assert (np.diff(plan.positions, axis=1) >= 0).all() and len(plan.starts) == sources * tiles + 1
    assert plan.starts[0] == 0 and plan.starts[-1] == len(plan.pieces)
    assert len(plan.pieces) <= (wanted if 2 * sources * tiles <= wanted else wanted + sources * tiles)
    for tile in range(sources * tiles):
        source, inner = divmod(tile, tiles)
        own = plan.pieces[plan.starts[tile] : plan.starts[tile + 1]]
        last = plan.positions[source, inner * height : (inner + 1) * height].max()
        assert (own[:, 0] == tile).all()
        own = own[own[:, 1] < own[:, 2]]
        assert own[0, 1] == 0 and own[-1, 2] == last + before + 1
        assert np.array_equal(own[1:, 1], own[:-1, 2])
        assert np.ptp(own[:-1, 2] - own[:-1, 1]) == 0 if len(own) > 1 else True


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128, 256])
def test_nothing_waits_for_the_gpu(d):
    q, k, v = inputs(1, 2, 4, 2000, 3000, d, torch.bfloat16)
    rows = np.random.default_rng(0).integers(0, 2000, (8, 64))
    module.exact_rows(q, k, v, rows, d**-0.5)
    with waiting_is_an_error():
        module.exact_rows(q, k, v, rows, d**-0.5)
    assert_exact(q, k, v, rows, d**-0.5)
