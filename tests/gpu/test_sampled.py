"""The four launches of a sampled decode step, on the GPU or interpreted (float16: bfloat16 is wrong there)."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import DecodeSession, Sampled  # noqa: E402
from gpu import planes  # noqa: E402
from gpu.launches import Tuning  # noqa: E402
from gpu.sampled import Draws  # noqa: E402
from gpu.sampled import SampledCache as Cache  # noqa: E402
from hsr.backend import choose  # noqa: E402
from hsr.errors import ArgumentError, BackendUnavailable  # noqa: E402
from hsr.lifted_numba import generators, number  # noqa: E402
from tests.gpu.interpreted import HERE, normal, pytestmark  # noqa: E402, F401

SampledCache = functools.partial(Cache, tuning=Tuning(single=False))
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
ALL = 1e7  # a budget beyond all keys
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


def inputs(B, g, G, n, d, dtype=torch.float16, seed=0):
    random = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, d + 1) ** -0.5 * math.sqrt(d) / 3
    k = torch.randn(B, g, n, d, generator=random) * spectrum + torch.randn(1, g, 1, d, generator=random)
    v = torch.randn(B, g, n, d, generator=random) + 0.5
    q = torch.randn(B, g * G, d, generator=random)
    return tuple(part.to(dtype).to(HERE) for part in (k, v, q))


def exact(q, k, v):
    B, g, _, d = k.shape
    scores = torch.einsum("bgid,bgnd->bgin", q.double().reshape(B, g, -1, d), k.double()) * d**-0.5
    output = torch.einsum("bgin,bgnd->bgid", scores.softmax(-1), v.double())
    return output.reshape(B, -1, d), scores.logsumexp(-1).reshape(B, -1)


def poisoned(cache):
    cache.parts.fill_(torch.nan)
    cache.sums.fill_(torch.nan)
    cache.drawn.fill_(-1)
    cache.lse.fill_(torch.nan)


def attend(cache, q):
    output = torch.full_like(q, torch.nan)
    poisoned(cache)
    cache.attend(q, output)
    return output


def assert_exact(output, lse, wanted, dtype):
    tolerance = TOLERANCE[dtype]
    assert ((output.double() - wanted[0]).norm(dim=-1) <= tolerance * wanted[0].norm(dim=-1) + 1e-4).all()
    assert ((lse.double() - wanted[1]).abs() <= tolerance).all()


def assert_unbiased(cache, q, wanted, times):
    """Means over so many draws lie within five deviations of the exact sums, which the draws do miss."""
    totals, vectors = [], []
    for seed in range(times):
        cache.seeds += 7919 * (seed + 1)
        output = attend(cache, q)
        weight = (cache.lse.double() - wanted[1]).exp()
        totals.append(weight)
        vectors.append(weight[..., None] * output.double())
        assert (cache.status == 0).all()
    for found, true in ((torch.stack(totals), torch.ones_like(wanted[1])), (torch.stack(vectors), wanted[0])):
        deviation = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - true).abs() < 5 * deviation + 1e-3).all()
    assert torch.stack(totals).std(0).max() > 1e-3  # it did sample


def columns(cache):
    """Codes by plane and column: (heads, P, room, R) int64."""
    codes = torch.nn.functional.pad(cache.codes, (0, cache.planes.columns - cache.planes.row)).cpu().long()
    shifts = torch.tensor(planes.SHIFTS[: cache.planes.count])[:, None, None]
    return (codes[:, None] >> shifts) & torch.from_numpy(cache.planes.top)[:, None].long()


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize(
    ("B", "g", "G", "d", "n", "row", "systematic"),
    [
        (2, 1, 3, 64, 333, 24, True),
        (1, 2, 4, 128, 257, 32, False),
        (1, 1, 16, 64, 190, 64, True),
        (1, 1, 1, 256, 130, 128, True),
    ],
)
def test_a_budget_beyond_all_keys_is_exact_attention(B, g, G, d, n, row, systematic, dtype):
    k, v, q = inputs(B, g, G, n, d, dtype)
    lengths = np.maximum(n - 37 * np.arange(B), 1)
    cache = SampledCache(k, v, g * G, Draws(ALL, row, systematic=systematic), d**-0.5, lengths=lengths)
    output = attend(cache, q)
    for b, length in enumerate(lengths):
        wanted = exact(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        assert_exact(output[b : b + 1], cache.lse[b : b + 1], wanted, dtype)


@pytest.mark.parametrize("n", [1, 3, 63, 64, 68, 127, 128])
def test_short_caches_are_attended_to_whole(n):
    k, v, q = inputs(1, 1, 2, n, 64, seed=n)
    cache = SampledCache(k, v, 2, Draws(8.0), 0.125)
    output = attend(cache, q)
    if n <= 68:
        assert_exact(output, cache.lse, exact(q, k, v), torch.float16)
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("row", [24, 32])
def test_codes_are_those_of_the_coder(row):
    k, v, _ = inputs(1, 2, 2, 256, 64)
    cache = SampledCache(k, v, 4, Draws(32.0, row), 0.125)
    fit, scale = cache.planes, 0.125
    centre, floor = (part.cpu().double() for part in cache._maps[2:4])
    far = (v[0].cpu().double() - centre[:, None]).norm(dim=2)
    lift = torch.maximum(far, floor[:, None]).log() / scale
    lifted = torch.cat([k[0].cpu().double(), lift[..., None]], 2) - torch.from_numpy(fit.mean)[:, None].double()
    z = torch.einsum("gnd,gpdr->gpnr", lifted, torch.from_numpy(fit.key_map).double())
    wanted = torch.clamp(z.floor() + torch.from_numpy(fit.half)[:, None], min=0)
    wanted = torch.minimum(wanted, torch.from_numpy(fit.top)[:, None].double()).long()
    off = (columns(cache)[:, :, :256] - wanted).abs()
    assert off.max() <= 1
    assert (off > 0).double().mean() < (1e-3 if HERE == "cpu" else 2e-2)  # TF32 on the GPU: rounding at a step's edge


@pytest.mark.parametrize(
    ("systematic", "d", "row"), [(True, 64, 32), (False, 64, 24), (True, 128, 64), (True, 256, 128)]
)
def test_the_scan_draws_what_its_scores_say(systematic, d, row):
    n, draws = 448, Draws(48.0, row, seed=7, systematic=systematic)
    k, v, q = inputs(1, 2, 3, n, d, seed=1)
    cache = SampledCache(k, v, 6, draws, d**-0.5)
    attend(cache, q)
    start, stop = draws.sinks, (n - draws.recent) // 64 * 64
    sums = torch.einsum("gphr,gpnr->ghn", cache.queries.cpu().long(), columns(cache))
    odds = sums.double() * cache.sigma.cpu()[..., None].double() - cache.tau.cpu()[..., None].double()
    chance = torch.clamp(torch.exp2(odds.amax(1).clamp(max=0)) * 2**24, min=1).long()
    chance[:, :start], chance[:, stop:] = 0, 0
    keys = generators(7, np.full((2, 1), n))[:, 0]
    for head in range(2):
        if systematic:
            u = torch.tensor([number(keys[head], block) for block in range(cache.room // 64)])
            after = chance[head].reshape(-1, 64).cumsum(1) + u[:, None]
            drawn = ((after >> 24) > ((after - chance[head].reshape(-1, 64)) >> 24)).flatten()
        else:
            u = torch.tensor([number(keys[head], j) for j in range(cache.room)])
            drawn = u < chance[head]
        count = int(cache.counts[head, 0])
        entries = cache.drawn[head, :count].cpu()
        found = entries & 0x7FFFFFFF
        assert len(found.unique()) == count
        assert len(set(found.tolist()) ^ set(drawn.nonzero().flatten().tolist())) <= 2  # rounding of a chance
        assert ((entries >> 32) - chance[head][found]).abs().max() <= 64


@pytest.mark.parametrize("systematic", [True, False])
def test_sums_are_unbiased_whatever_the_thresholds(systematic):
    k, v, q = inputs(1, 2, 2, 700, 64, seed=2)
    cache = SampledCache(k, v, 4, Draws(40.0, systematic=systematic), 0.125)
    assert_unbiased(cache, q, exact(q, k, v), 24)


def test_thresholds_settle_at_the_budget():
    k, v, q = inputs(1, 1, 4, 3000, 64, seed=3)
    budget = 100.0
    cache = SampledCache(k, v, 4, Draws(budget, 32), 0.125)
    cache.trim.fill_(-1.0)  # too many at first
    attend(cache, q)
    first = cache.found[0, :4].float().mean() / 16
    for _ in range(8):
        attend(cache, q)
    settled = cache.found[0, :4].float() / 16
    assert first > 1.5 * budget
    assert (settled.mean() - budget).abs() < 0.25 * budget
    assert budget <= 1.25 * cache.counts[0, 0] <= 1.25 * 4 * budget * 1.25


def test_budgets_are_kept_where_the_first_keys_score_unlike_the_later_ones():
    """Codes tell the mean of all keys, far above that of the first: thresholds have deviations to go, and settle."""
    budget, few = 16.0, 256
    k, v, _ = inputs(1, 1, 2, 1024, 64, seed=6)
    k[:, :, few:, 0] += 6
    queries = 2 * normal(45, 1, 2, 64, seed=7, dtype=torch.float16)
    queries[..., 0] += 8
    cache = SampledCache(k, v, 2, Draws(budget), 0.125)
    found = []
    for n, q in enumerate(queries, few - len(queries)):
        cache.lengths.fill_(n)
        attend(cache, q)
        found.append(cache.found[0, :2].float().mean() / 16)
    settled = torch.stack(found[15:]) / budget
    assert 0.75 < settled.mean() < 1.5
    assert settled.max() < 4


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.3])
def test_budgets_are_kept_where_all_keys_are_nearly_alike(spread):
    """And a query that tells them apart afterwards finds the threshold where it was."""
    k, v, q = inputs(1, 1, 2, 1500, 64, seed=8)
    k = (k[:, :, :1] + spread * (k - k[:, :, :1])).to(torch.float16)
    cache = SampledCache(k, v, 2, Draws(25.0), 0.125)
    for _ in range(6):
        attend(cache, q)
        assert (cache.found[0, :2].float() / 16 / 25 - 1).abs().max() < 0.6
    attend(cache, 8 * q)
    assert 0.2 * 25 < cache.found[0, :2].float().max() / 16 < 5 * 25


@pytest.mark.parametrize(("trim", "column"), [(-8.0, 1), (8.0, 2)])
def test_a_list_that_cannot_be_trusted_is_replaced_by_all_keys_and_counted(trim, column):
    k, v, q = inputs(1, 2, 2, 1500, 64, seed=4)
    cache = SampledCache(k, v, 4, Draws(24.0), 0.125)
    cache.trim.fill_(trim)
    cache.rho.fill_(-8.0 if trim < 0 else 12.0)
    cache.cap, cache.crowd = (64, 63) if trim < 0 else (cache.cap, cache.crowd)
    output = attend(cache, q)
    assert_exact(output, cache.lse, exact(q, k, v), torch.float16)
    assert (cache.status[:, column] == 1).all() and (cache.attended(1500) == 1500).all()
    assert trim > 0 or cache.drawn.flatten()[2 * cache.cap :].eq(-1).all()  # nothing was written beyond the lists' end


def test_appended_tokens_are_coded_in_place_and_a_full_cache_refuses():
    k, v, q = inputs(2, 1, 2, 200, 64, seed=5)
    whole = SampledCache(k, v, 4 // 2, Draws(32.0), 0.125, room=200)
    cache = SampledCache(k[:, :, :120], v[:, :, :120], 2, Draws(32.0), 0.125, room=192, lengths=[120, 90])
    cache._maps, cache.planes = whole._maps, whole.planes
    cache.codes.fill_(255)
    output = torch.empty_like(q)
    for t in range(120, 200):
        one = k[:, :, t].contiguous(), v[:, :, t].contiguous()
        cache.append(*one) if t % 2 else cache.step(q, *one, output)
    assert cache.lengths.tolist() == [192, 170]
    assert cache.status[:, 3].tolist() == [8, 0]
    assert (cache.keys[0, :, 120:192] == k[0, :, 120:192]).all()
    assert (cache.keys[1, :, 90:170] == k[1, :, 120:200]).all()
    assert (cache.codes[0, 64:128] == whole.codes[0, 64:128]).double().mean() > 0.999
    assert (cache.codes[0, :64] == 255).all()  # blocks that filled before are left alone
    cache.budget.fill_(ALL)  # every key of the cache counts, once
    output = attend(cache, q)
    for b, length in enumerate((192, 170)):
        wanted = exact(q[b : b + 1], cache.keys[b : b + 1, :, :length], cache.values[b : b + 1, :, :length])
        assert_exact(output[b : b + 1], cache.lse[b : b + 1], wanted, torch.float16)


@pytest.mark.parametrize("kept", [127, 128, 150])
def test_a_shortened_cache_is_one_that_never_grew(kept):
    """Whatever was coded of the tokens that are gone, blocks are coded anew before they are drawn from."""
    k, v, q = inputs(1, 2, 2, 200, 64, seed=6)
    others = inputs(1, 2, 2, 200, 64, seed=7)[:2]
    found, wanted = (SampledCache(k[:, :, :150], v[:, :, :150], 4, Draws(32.0), 0.125, room=256) for _ in range(2))

    def extend(cache, rows, first, last):
        for t in range(first, last):
            cache.append(*(part[:, :, t].contiguous() for part in rows))

    extend(found, others, 150, 195)
    found.shorten(195 - kept)
    assert found.lengths.tolist() == [kept, kept] and torch.isfinite(attend(found, q)).all()
    extend(found, (k, v), kept, 200)
    extend(wanted, (k, v), 150, 200)
    assert (found.lengths == wanted.lengths).all() and (found.keys[:, :, :200] == wanted.keys[:, :, :200]).all()
    assert (found.codes[:, :192] == wanted.codes[:, :192]).all() and (found.drift() == wanted.drift()).all()
    found.budget.fill_(ALL)
    assert_exact(attend(found, q), found.lse, exact(q, k, v), torch.float16)


def test_a_step_is_an_append_and_an_attend():
    k, v, q = inputs(1, 2, 2, 260, 64, seed=6)
    first, second = (SampledCache(k[:, :, :255], v[:, :, :255], 4, Draws(32.0), 0.125, room=320) for _ in range(2))
    one, other = torch.empty_like(q), torch.empty_like(q)
    for t in range(255, 260):
        token = k[:, :, t].contiguous(), v[:, :, t].contiguous()
        first.step(q, *token, one)
        second.append(*token)
        second.attend(q, other)
        assert (first.lengths == second.lengths).all()
        assert (first.codes == second.codes).all()
        assert (one.float() - other.float()).abs().max() < 2e-3  # lists may come in another order


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": 48}, "width"),
        ({"row": 20}, "bytes_per_key"),
        ({"recent": 32}, "recent"),
        ({"heads": 3}, "multiple"),
        ({"heads": 34}, "at most 16"),
        ({"dtype": torch.float32}, "float16 or bfloat16"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(change, message):
    k = torch.zeros(1, 2, 70, change.get("d", 64), dtype=change.get("dtype", torch.float16), device=HERE)
    draws = Draws(8.0, change.get("row", 32), recent=change.get("recent", 64))
    with pytest.raises(ArgumentError, match=message):
        SampledCache(k, k, change.get("heads", 4), draws, 0.125)


def test_the_table_refuses_other_devices_and_policies():
    plan = DecodeSession(np.zeros((1, 2, 4), np.float32), np.zeros((1, 2, 4), np.float32))._plan
    with pytest.raises(BackendUnavailable, match="runs on cuda"):
        choose("session", "cuda", device="cpu", plan=plan)
    with pytest.raises(BackendUnavailable, match="Sampled"):
        choose("session", "cuda", device="cuda", plan=plan)


@pytest.mark.gpu
def test_a_session_on_the_gpu_appends_attends_and_replays():
    k, v, q = inputs(1, 2, 4, 4000, 128, torch.bfloat16)
    session = DecodeSession(k, v, policy=Sampled(budget=2000.0))
    for t in range(3):
        session.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        found = session.attend(q[:, :, None])
    keys, values = torch.cat([k, k[:, :, :3]], 2), torch.cat([v, v[:, :, :3]], 2)
    wanted, lse = exact(q, keys, values)
    assert session.n == 4003
    assert ((found.output[:, :, 0].double() - wanted).norm(dim=-1) < 0.1 * wanted.norm(dim=-1)).all()
    assert (found.lse[..., 0].double() - lse).abs().max() < 0.1
    session.gpu.reserve(5000)
    cache = session.gpu.cache
    output = torch.empty_like(q)
    token = k[:, :, 0].contiguous(), v[:, :, 0].contiguous()
    cache.step(q, *token, output)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.step(q, *token, output)
    for _ in range(70):
        output.fill_(torch.nan)
        graph.replay()
    torch.cuda.synchronize()
    assert cache.lengths.eq(4003 + 1 + 70).all()
    wanted, _ = exact(q, cache.keys[:, :, :4074], cache.values[:, :, :4074])
    assert ((output.double() - wanted).norm(dim=-1) < 0.1 * wanted.norm(dim=-1)).all()
    assert (cache.status == 0).all()


@pytest.mark.parametrize("hot", [3, 8])
def test_budgets_are_kept_where_the_mass_lies_in_one_block(hot):
    """Every draw counts: were it a few blocks', the threshold would follow whether the hot one is among them."""
    k, v, q = inputs(1, 1, 2, 1700, 64, seed=7)
    k[:, :, 64 * hot : 64 * hot + 64] += 0.8 * q[:, :1, None]
    cache = SampledCache(k, v, 2, Draws(30.0), 0.125)
    counts = []
    for _ in range(16):
        attend(cache, q)
        counts.append(cache.counts[0, 0].item())
    alone = cache.found[0, :2].sum().item() / 16
    assert counts[-1] <= 1.3 * alone  # the union of what the heads draw, whose sum is counted
    assert 30 < np.mean(counts[8:]) < 70
