"""The single launch of a sampled decode step (CUDA C++), which only a GPU can run, beside the four it stands for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpu import planes  # noqa: E402
from gpu.launches import Tuning  # noqa: E402
from gpu.sampled import Draws, SampledCache  # noqa: E402
from gpu.step import Step, settings, shared_bytes  # noqa: E402
from tests.gpu.test_sampled import ALL, assert_exact, assert_unbiased, attend, exact, inputs, poisoned  # noqa: E402

GPU = pytest.mark.gpu
FOUR = Tuning(single=False)
LIMIT = 232_448  # bytes of shared memory of a program on an H100


def fitted(row, d=64):
    random = np.random.default_rng(0)
    spectrum = np.arange(1, d + 1) ** -1.0  # steep: 2 bits pay on the far axes
    keys = torch.from_numpy(random.standard_normal((2, 500, d)) * spectrum)
    return planes.fitted(keys, torch.zeros(2, 500), 0.1, row, None)


@pytest.mark.parametrize("row", planes.ROWS)
def test_axes_are_the_planes_without_their_empty_columns(row):
    found = fitted(row)
    assert (found.nibbles % 16, (found.row - found.nibbles) % 8) == (0, 0)  # whole products
    numbered = np.arange(found.half.size).reshape(found.half.shape).astype(np.float32)
    kept = found.on(torch.device("cpu")).axes(torch.from_numpy(numbered)).numpy()
    assert len(kept) == 2 * found.nibbles + 4 * (found.row - found.nibbles)
    left_out = np.setdiff1d(numbered.ravel(), kept)
    assert (found.top.ravel()[left_out.astype(int)] == 0).all()
    assert len(np.unique(kept)) == len(kept)


def test_codes_fit_the_shared_memory_whatever_their_size():
    for row in planes.ROWS:
        for warps in (8, 10):
            for width, per in ((64, 7), (128, 4), (128, 8), (256, 8)):
                chosen = settings(width, per, fitted(row), warps, None, Draws(8.0), 0, LIMIT)
                used = shared_bytes(width, per, fitted(row), warps, chosen["STAGES"])
                assert chosen["STAGES"] >= 2
                assert used <= LIMIT or (width, row) == (256, 128)  # which then goes to the four launches
    wide = dataclasses.replace(fitted(96), row=96, nibbles=64)
    assert shared_bytes(256, 8, wide, 8, 3) == 232_704  # as the compiler has it


@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("systematic", [True, False])
@pytest.mark.parametrize(
    ("B", "g", "G", "d", "n", "row"),
    [
        (2, 1, 3, 64, 333, 24),
        (1, 2, 4, 128, 2570, 32),
        (1, 1, 8, 64, 190, 16),
        (1, 2, 7, 64, 900, 24),
        (1, 1, 8, 256, 1300, 64),
        (2, 2, 1, 128, 700, 48),
        (1, 1, 5, 256, 130, 128),
        (1, 1, 4, 128, 70_001, 24),
    ],
)
def test_a_budget_beyond_all_keys_is_exact_attention(B, g, G, d, n, row, systematic, dtype):
    k, v, q = inputs(B, g, G, n, d, dtype)
    lengths = np.maximum(n - 37 * np.arange(B), 1)
    cache = SampledCache(k, v, g * G, Draws(ALL, row, systematic=systematic), d**-0.5, lengths=lengths)
    assert cache.single
    output = attend(cache, q)
    for b, length in enumerate(lengths):
        wanted = exact(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        assert_exact(output[b : b + 1], cache.lse[b : b + 1], wanted, dtype)
        inside = (length - 64) // 64 * 64 - 4
        assert (cache.counts[b * g : (b + 1) * g, 0] == max(inside, 0)).all()


@GPU
@pytest.mark.parametrize(
    ("B", "g", "G", "d", "n", "row"),
    [
        (2, 2, 4, 128, 1029, 32),
        (1, 3, 3, 64, 5000, 24),
        (1, 1, 8, 256, 130, 64),
        (2, 1, 1, 64, 7, 24),
        (1, 8, 4, 128, 1, 32),
    ],
)
def test_short_contexts_are_dense_and_grow_into_sparse_ones(B, g, G, d, n, row):
    """Steps with a token each, across dense_below; lengths that differ; what draws move stays until they begin."""
    k, v, q = inputs(B, g, G, n + 6, d, torch.bfloat16)
    lengths = np.maximum(n - 3 * np.arange(B), 1)
    cache = SampledCache(k[:, :, :n], v[:, :, :n], g * G, Draws(8.0, row), d**-0.5, room=n + 6, lengths=lengths)
    assert cache.single
    cache.dense_below = n + 4
    before = cache.trim.clone(), cache.rho.clone()
    for step in range(1, 6):
        keys, values = (torch.stack([part[b, :, lengths[b] + step - 1] for b in range(B)]) for part in (k, v))
        output = torch.full_like(q, torch.nan)
        poisoned(cache)
        cache.step(q, keys, values, output)
        for b, seen in enumerate((lengths + step).tolist()):
            assert cache.lengths.view(B, g)[b].tolist() == [seen] * g
            if seen < cache.dense_below:
                wanted = exact(q[b : b + 1], k[b : b + 1, :, :seen], v[b : b + 1, :, :seen])
                assert_exact(output[b : b + 1], cache.lse[b : b + 1], wanted, torch.bfloat16)
                assert (cache.counts[b * g : (b + 1) * g, 0] == seen - cache.draws.certain(seen)).all()
        if step == 1:
            assert all((now == then).all() for now, then in zip((cache.trim, cache.rho), before, strict=True))
    assert output.isfinite().all() and (cache.status[:, 1:] == 0).all()  # the first draw may be crowded
    assert cache.faster_below >= 8
    cache.dense_below = n + 99
    wanted = exact(q[:1], k[:1, :, : lengths[0] + 5], v[:1, :, : lengths[0] + 5])
    assert_exact(attend(cache, q)[:1], cache.lse[:1], wanted, torch.bfloat16)  # the same tokens, none of them new


@GPU
@pytest.mark.parametrize("n", [1, 3, 63, 64, 68, 127, 128, 129, 200])
def test_short_caches_are_attended_to(n):
    k, v, q = inputs(1, 1, 2, n, 64, seed=n)
    cache = SampledCache(k, v, 2, Draws(8.0), 0.125)
    output = attend(cache, q)
    assert torch.isfinite(output).all()
    if n <= 68:
        assert_exact(output, cache.lse, exact(q, k, v), torch.float16)


@GPU
@pytest.mark.parametrize(("d", "G", "row", "systematic"), [(128, 4, 32, True), (64, 7, 24, True), (128, 2, 48, False)])
def test_it_draws_what_the_four_launches_draw(d, G, row, systematic):
    k, v, q = inputs(2, 2, G, 5000, d, torch.bfloat16, seed=1)
    draws = Draws(150.0, row, seed=5, systematic=systematic, listing=True)
    one = SampledCache(k, v, 2 * G, draws, d**-0.5, lengths=[5000, 3333])
    four = SampledCache(k, v, 2 * G, draws, d**-0.5, lengths=[5000, 3333], coded=one.planes, tuning=FOUR)
    assert (one.codes == four.codes).all()
    for step in range(4):
        query = torch.roll(q, step, 1)
        found, wanted = attend(one, query), attend(four, query)
        for head in range(4):
            lists = [cache.drawn[head, : int(cache.counts[head, 0])] for cache in (one, four)]
            ids = [set((part & 0x7FFFFFFF).tolist()) for part in lists]
            assert len(ids[0]) == len(lists[0])
            apart = len(ids[0] ^ ids[1])  # TF32 there rounds the queries a little differently
            assert apart <= 0.15 * len(ids[1]) + 8
        assert (one.lse - four.lse).abs().max() < 0.1
        assert (found.float() - wanted.float()).norm(dim=-1).mean() < 0.1 * wanted.float().norm(dim=-1).mean()
        four.trim.copy_(one.trim)
        four.rho.copy_(one.rho)
        four.found.copy_(one.found)


@GPU
@pytest.mark.parametrize("systematic", [True, False])
def test_sums_are_unbiased(systematic):
    """Each of some 260 numbers is a mean of 64: a false alarm at five deviations, once in 5,000 runs."""
    k, v, q = inputs(1, 2, 2, 1900, 64, seed=2)
    cache = SampledCache(k, v, 4, Draws(40.0, systematic=systematic), 0.125)
    assert_unbiased(cache, q, exact(q, k, v), 64)


@GPU
def test_thresholds_settle_and_a_starved_head_reads_every_key():
    k, v, q = inputs(1, 2, 4, 6000, 128, torch.bfloat16, seed=3)
    cache = SampledCache(k, v, 8, Draws(200.0), 128**-0.5)
    for _ in range(10):
        attend(cache, q)
    settled = cache.found[:, :4].float() / 16
    assert (settled.mean() - 200).abs() < 50
    assert (cache.status == 0).all()
    cache.trim.fill_(8.0)
    cache.rho.fill_(12.0)
    output = attend(cache, q)
    assert_exact(output, cache.lse, exact(q, k, v), torch.bfloat16)
    assert (cache.status[:, 2] == 1).all() and (cache.attended(6000) == 6000).all()
    cache.trim.fill_(-8.0)
    cache.rho.fill_(-8.0)
    output = attend(cache, q)  # far too much drawn is merely slow
    assert_exact(output, cache.lse, exact(q, k, v), torch.bfloat16)
    assert (cache.status[:, 0] == 1).all()


@GPU
@pytest.mark.parametrize("dense_below", [0, 620, 10**6])
def test_steps_grow_the_cache_its_codes_and_refuse_when_it_is_full(dense_below):
    k, v, q = inputs(2, 2, 4, 700, 128, torch.bfloat16, seed=4)
    whole = SampledCache(k, v, 8, Draws(64.0), 128**-0.5)
    cache = SampledCache(
        k[:, :, :500], v[:, :, :500], 8, Draws(64.0), 128**-0.5, room=640, lengths=[500, 400], coded=whole.planes
    )
    cache._maps, cache.dense_below = whole._maps, dense_below
    output = torch.empty_like(q)
    for t in range(500, 700):
        cache.step(q, k[:, :, t].contiguous(), v[:, :, t].contiguous(), output)
    assert cache.lengths.tolist() == [640, 640, 600, 600]
    assert cache.status[:, 3].tolist() == [60, 60, 0, 0]
    assert (cache.keys[0, :, 500:640] == k[0, :, 500:640]).all()
    assert (cache.values[1, :, 400:600] == v[1, :, 500:700]).all()
    assert (cache.codes[:2, 512:640] == whole.codes[:2, 512:640]).double().mean() > 0.98  # TF32 there, float32 here
    cache.budget.fill_(ALL)
    output = attend(cache, q)
    for b, length in enumerate((640, 600)):
        wanted = exact(q[b : b + 1], cache.keys[b : b + 1, :, :length], cache.values[b : b + 1, :, :length])
        assert_exact(output[b : b + 1], cache.lse[b : b + 1], wanted, torch.bfloat16)


@GPU
def test_a_graph_of_steps_replays_with_poisoned_outputs():
    k, v, q = inputs(1, 8, 4, 9000, 128, torch.bfloat16, seed=5)
    cache = SampledCache(k, v, 32, Draws(300.0), 128**-0.5, room=9600)
    token, output = (k[:, :, 7].contiguous(), v[:, :, 7].contiguous()), torch.empty_like(q)
    cache.step(q, *token, output)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            cache.step(q, *token, output)
    for _ in range(100):
        output.fill_(torch.nan)
        cache.lse.fill_(torch.nan)
        graph.replay()
    torch.cuda.synchronize()
    assert cache.lengths.eq(9301).all()
    wanted, lse = exact(q, cache.keys[:, :, :9301], cache.values[:, :, :9301])
    assert ((output.double() - wanted).norm(dim=-1) < 0.5 * wanted.norm(dim=-1)).all()
    assert (cache.lse - lse).abs().max() < 0.5
    assert (cache.status == 0).all()


@GPU
@pytest.mark.parametrize("page", [1, 16, 64])
def test_pages_are_read_and_written_in_place(page):
    k, v, q = inputs(2, 2, 4, 640, 128, torch.bfloat16, seed=6)
    table = torch.randperm(2 * 640 // page, device="cuda").to(torch.int32).view(2, -1)
    pools = [torch.full((2 * 640 // page, page, 2, 128), torch.nan, dtype=k.dtype, device="cuda") for _ in range(2)]
    for pool, part in zip(pools, (k, v), strict=True):
        pool[table.long()] = part.transpose(1, 2).reshape(2, 640 // page, page, 2, 128)
        pool[table[:, 600 // page + 1 :].long()] = torch.nan
    cache = SampledCache.adopted(*pools, 8, Draws(ALL), 128**-0.5, lengths=[600, 511], pages=table)
    output = torch.empty_like(q)
    cache.step(q, k[:, :, 639].contiguous(), v[:, :, 639].contiguous(), output)
    for b, length in enumerate((600, 511)):
        keys, values = (torch.cat([part[b : b + 1, :, :length], part[b : b + 1, :, 639:]], 2) for part in (k, v))
        assert_exact(output[b : b + 1], cache.lse[b : b + 1], exact(q[b : b + 1], keys, values), torch.bfloat16)
        rows = pools[0][table[b, length // page].long(), length % page]
        assert (rows == k[b, :, 639]).all()


@GPU
def test_what_it_has_no_form_for_goes_to_the_four_launches():
    k, v, q = inputs(1, 1, 16, 500, 64)
    cache = SampledCache(k, v, 16, Draws(ALL), 0.125)
    assert not Step.serves(cache)
    assert not cache.single and cache.faster_below == 0
    assert_exact(attend(cache, q), cache.lse, exact(q, k, v), torch.float16)
    assert dataclasses.replace(cache.tuning, single=False) == FOUR
