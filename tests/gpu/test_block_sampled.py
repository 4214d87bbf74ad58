"""Drawing the keys that blocks of rows share, stage by stage, on the GPU or interpreted (float16 there)."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from scipy.stats import norm  # noqa: E402

from attention import chances, listed_reference  # noqa: E402
from attention.key_lists import KEYS, ROWS, budget, check, edges, ends, plain, representatives, row_blocks  # noqa: E402
from gpu import block_sampled, hopper  # noqa: E402
from gpu.block_sampled import TILE, _Drawn, _Plan, key_lists  # noqa: E402
from gpu.sampled import seed_word  # noqa: E402
from hsr.errors import ArgumentError  # noqa: E402
from tests.gpu.interpreted import HERE, normal, poisoned_allocations, pytestmark  # noqa: E402, F401

pytestmark = [*pytestmark, pytest.mark.usefixtures("poisoned_allocations")]
GPU = pytest.mark.gpu
BF16 = pytest.param(torch.bfloat16, marks=GPU)
ALARM = 1e-4  # false alarms of the statistical test, all its comparisons together
PROMPTS = [  # B, g, G, m, n, representative rows, causal selection
    (1, 1, 2, 300, 300, 8, False),
    (2, 2, 2, 140, 425, 4, False),
    (1, 1, 1, 300, 431, 16, True),
    (1, 2, 1, 129, 1301, 8, True),
    (1, 1, 1, 1, 300, 2, False),
    (1, 1, 1, 260, 390, 1, False),
    (1, 1, 3, 700, 700, 2, False),
    (1, 2, 3, 500, 900, 1, False),
    (1, 1, 2, 300, 700, 1, True),
    pytest.param(1, 1, 4, 9000, 9100, 1, False, marks=GPU),
]


def inputs(B, g, G, m, n, d=64, dtype=torch.float16, dv=None, seed=0):
    """Keys with a spectrum, values of uneven lengths, a first key that many rows attend to."""
    spectrum = (torch.arange(1, d + 1) ** -0.5 * math.sqrt(d) / 3).to(HERE)
    q, k = normal(B, g * G, m, d, seed=seed), normal(B, g, n, d, seed=seed + 1) * spectrum
    q[..., 0] += 2
    k[:, :, 0, 0] += 8
    v = normal(B, g, n, dv or d, seed=seed + 2) * normal(B, g, n, 1, seed=seed + 3).exp() + 0.5
    return tuple(part.to(dtype) for part in (q, k, v))


def numpy(x):
    return x.double().cpu().numpy()


class Watched(_Plan):
    """A plan that keeps what its stages hand on."""

    def _code(self, queries, sums, shares, codes, first):
        self.queries, self.sums, self.shares = queries, sums, shares
        super()._code(queries, sums, shares, codes, first)


def stages(q, k, v, rows, causal, density=0.8, seed=0):
    """The plan and the draw of all heads at once."""
    (B, h, m, d), n = q.shape, k.shape[2]
    plan = Watched(q, k, v, rows, causal, d**-0.5, row_blocks(m), int(edges(m, n)[-1]))
    return plan, plan.drawn(0, B * h, np.full(B * h, budget(density, m, n)), seed_word(seed))


def histograms(codes, m, n):
    """Of the eligible keys' codes: (heads, T, 256)."""
    codes, first = codes.cpu().numpy(), edges(m, n)
    return np.array(
        [[np.bincount(line[:edge], minlength=256) for line, edge in zip(h, first, strict=True)] for h in codes]
    )


def heads(q, k):
    """Every query head with its keys: (query head over all sequences, q (m, d), k (n, d)), float64."""
    B, h, g = *q.shape[:2], k.shape[1]
    for head in range(B * h):
        yield head, numpy(q[head // h, head % h]), numpy(k[head // h, head % h * g // h])


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize(("n", "dv"), [(90, 64), (300, 32), (512, 128)])
def test_values_and_mean_keys_are_pooled(n, dv, dtype):
    q, k, v = inputs(2, 2, 1, 10, n, dtype=dtype, dv=dv)
    v[1, 1] = v[1, 1, :1]  # all alike
    v[0, 1, 7] = v[0, 1, :KEYS].float().mean(0).to(dtype)
    plan = _Plan(q, k, v, 8, False, 0.125, 1, 0)
    for head in range(4):
        found, wanted = plan._far[head, :n].cpu().numpy(), listed_reference.value_codes(numpy(v[head // 2, head % 2]))
        apart = np.abs(found.astype(int) - wanted)
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.01
        means = listed_reference.pooled(numpy(k[head // 2, head % 2]))
        assert (
            np.abs(numpy(plan._means[head]) - means) <= (1e-3 if dtype == torch.float16 else 8e-3) * (1 + np.abs(means))
        ).all()
    assert (plan._far[3, :n] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize(("B", "g", "G", "m", "n", "rows", "causal"), PROMPTS)
def test_representatives_sums_shares_and_codes_are_their_definitions(B, g, G, m, n, rows, causal, dtype):
    q, k, v = inputs(B, g, G, m, n, dtype=dtype)
    plan, drawn = stages(q, k, v, rows, causal)
    seen, first, scale = n - m + representatives(m, rows, causal) + 1, edges(m, n), q.shape[3] ** -0.5
    far, means = plan._far.cpu().numpy(), numpy(plan._means)  # rounded to the keys' dtype
    off = []
    for head, queries, keys in heads(q, k):
        source = head // G
        asked, exact = numpy(plan.queries[head]), listed_reference.asked(queries, rows, causal)
        assert (np.abs(asked - exact) <= torch.finfo(dtype).eps * np.abs(exact) + 1e-7).all()
        rounded = (
            np.abs(means[source] - listed_reference.pooled(keys)).max(initial=0) * np.abs(asked).sum(-1).max() * scale
        )
        slack = 1e-3 if dtype == torch.float16 else 1e-3 + rounded
        for block, edge in enumerate(first):
            logs = listed_reference.log_sums(asked[block], keys, edge, seen[block], scale)
            assert np.abs(numpy(plan.sums[head, block]) * math.log(2) - logs).max() <= slack
            of_means = math.log(KEYS) + scale * asked[block] @ listed_reference.pooled(keys[:edge]).T
            share = np.exp(np.minimum(of_means - logs[:, None], 0)).mean(0) / KEYS
            found = np.sqrt(numpy(plan.shares[head, : edge // KEYS, block]))
            assert (np.abs(found - share) <= (2 * slack + rounded) * share + 1e-18).all()
            wanted = listed_reference.codes(asked[block], keys, far[source, :n], edge, seen[block], scale)
            off.append(np.abs(drawn.codes[head, block, :edge].cpu().numpy().astype(int) - wanted))
    off = np.concatenate(off)
    assert off.size == B * g * G * first.sum()
    assert off.max() <= 1
    assert (off > 0).mean() < (0.02 if HERE == "cpu" else 0.2)  # powers are rough on tensor cores, by up to 3 %


@pytest.mark.parametrize(("shift", "T"), [(5, 3), (1100, 2), (0, 1)])
def test_histograms_are_exact(shift, T):
    m, n = T * ROWS - 3, T * ROWS - 3 + shift
    room = max(int(edges(m, n)[-1]), KEYS)
    codes = torch.randint(0, 256, (3, T, room), generator=torch.Generator().manual_seed(shift)).to(torch.uint8).to(HERE)
    codes[0] = 7  # one bin takes all
    counts = torch.empty(3, T, 256, dtype=torch.int32, device=HERE)
    totals = torch.full((3, 256), 2**40, dtype=torch.int64, device=HERE)
    wanted = histograms(codes, m, n)
    block_sampled.count[(T, 3)](codes, counts, totals, shift, T, room, ROWS=ROWS, KEYS=KEYS, TILE=TILE, num_warps=4)
    assert np.array_equal(counts.cpu().numpy(), wanted)
    assert np.array_equal(totals.cpu().numpy(), 2**40 + wanted.sum(1))
    if HERE == "cuda" and hopper.present():
        counts.fill_(-1)
        hopper.count(codes, counts, totals, shift)
        assert np.array_equal(counts.cpu().numpy(), wanted)
        assert np.array_equal(totals.cpu().numpy(), 2**40 + 2 * wanted.sum(1))


@pytest.mark.parametrize("density", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("causal", [False, True])
def test_chances_starts_and_lengths_are_their_definitions(causal, density):
    m, n, seed = 390, 900, 2**40 + 5
    q, k, v = inputs(1, 1, 3, m, n, seed=1)
    _, drawn = stages(q, k, v, 8, causal, density, seed)
    found, counted = drawn.chances.cpu().numpy().astype(np.int64), histograms(drawn.codes, m, n)
    starts = chances.starts(seed, 3, row_blocks(m))
    assert np.array_equal(drawn.starts.cpu().numpy(), starts)
    assert starts[2, 1] == listed_reference.start(seed, 2, 1)
    for head in range(3):
        tables = chances.head_thresholds(counted[head], density, m, n, causal)
        wanted = chances.chances(tables if causal else tables[:1])
        # `threshold`'s powers of two are off by up to 2^-22 of themselves on a GPU; paced chances are the definition's
        rough = 0 if HERE == "cpu" or causal else wanted >> 21
        assert found[head].shape == wanted.shape
        assert (np.abs(found[head] - wanted) <= (0 if causal else 2 + rough)).all()
        own = np.broadcast_to(found[head], (row_blocks(m), 256))
        lengths = chances.lengths(counted[head], own, starts[head])
        assert np.array_equal(drawn.lengths[head].cpu().numpy(), lengths)


def some_draw(shift, T, heads, tables, seed=0):
    """Codes, chances and starts of nothing in particular."""
    rng = np.random.default_rng(seed)
    room = int(edges(T * ROWS, T * ROWS + shift)[-1])
    codes = rng.integers(0, 256, (heads, T, room), dtype=np.uint8)
    table = np.clip(2.0 ** rng.uniform(8, 25, (heads, tables, 256)), 1, 2**24).astype(np.int32)
    table[..., 3] = 1
    starts = rng.integers(0, 2**24, (heads, T), dtype=np.int32)
    first = edges(T * ROWS, T * ROWS + shift)
    wanted = [
        listed_reference.draw(codes[head, line, : first[line]], table[head, line % tables], int(starts[head, line]))
        for head in range(heads)
        for line in range(T)
    ]
    lengths = torch.tensor([len(tokens) for tokens, _ in wanted]).reshape(heads, T).to(HERE)
    parts = (torch.from_numpy(part).to(HERE) for part in (codes, table, starts))
    return _Drawn(*parts, lengths, shift), wanted


@pytest.mark.parametrize(("shift", "T", "tables"), [(0, 3, 1), (700, 3, 3), (2300, 1, 1), (131, 2, 2)])
def test_keys_are_drawn_as_codes_and_chances_say(shift, T, tables):
    drawn, wanted = some_draw(shift, T, 2, tables)
    offsets = torch.nn.functional.pad(drawn.lengths.flatten().cumsum(0), (1, 0))
    room = torch.full((2, int(offsets[-1]) + 10), -7.0, device=HERE)
    tokens, weights = room[0].to(torch.int32), room[1]
    kept = int(offsets[-1]) - 4  # too few for the last: what does not fit is left out
    drawn.into(offsets, tokens[:kept], weights[:kept])
    assert (tokens[kept:] == -7).all() and (weights[kept:] == -7).all()
    every, logs = (np.concatenate(parts) for parts in zip(*wanted, strict=True))
    assert np.array_equal(tokens[:kept].cpu().numpy(), every[:kept])
    assert np.abs(weights[:kept].cpu().numpy() - logs[:kept]).max() <= 1e-5


def drawn_lists(q, k, v, density=0.8, rows=8, causal=False, seed=0):
    scale = q.shape[3] ** -0.5
    return key_lists(q, k, v, density=density, rows=rows, causal_selection=causal, seed=seed, scale=scale)


def by_line(lists):
    """Tokens and log weights of every line."""
    lists = plain(lists)
    return [
        (lists.tokens[a:b].tolist(), lists.log_weights[a:b].tolist())
        for a, b in zip(lists.token_offsets, lists.token_offsets[1:], strict=False)
    ]


@pytest.mark.parametrize(("B", "g", "G", "m", "n", "rows", "causal"), PROMPTS)
def test_lists_are_in_order_and_as_dense_as_asked(B, g, G, m, n, rows, causal):
    q, k, v = inputs(B, g, G, m, n, seed=2)
    density = 0.85
    lists = drawn_lists(q, k, v, density, rows, causal, seed=3)
    check(lists, B * g * G, m, n)
    per = row_blocks(m)
    listed = np.diff(plain(lists).token_offsets[::per])
    assert (listed > 0).all()
    if causal:  # never more, and less by a part of what the last of these few blocks has
        assert (listed <= budget(density, m, n) + per).all()
        assert (listed > 0.88 * budget(density, m, n)).all()
    else:
        assert (np.abs(listed - budget(density, m, n)) <= per).all()
        assert (np.abs(numpy(lists.densities(m, n)) - density) <= per / ends(m, n).sum()).all()


@pytest.mark.parametrize("causal", [False, True])
def test_density_one_lists_every_key_with_its_own_weight(causal):
    q, k, v = inputs(1, 1, 2, 300, 431)
    found = by_line(drawn_lists(q, k, v, 1.0, causal=causal))
    assert [tokens for tokens, _ in found] == [list(range(edge)) for edge in edges(300, 431)] * 2
    assert all(weight == 0 for _, weights in found for weight in weights)


def test_prompts_without_eligible_keys_and_densities_below_the_bands():
    q, k, v = inputs(1, 1, 1, 100, 100)
    lists = drawn_lists(q, k, v, 0.1)
    check(lists, 1, 100, 100)
    assert lists.token_offsets.tolist() == [0, 0]
    with pytest.raises(ArgumentError, match="density must be above"):
        drawn_lists(*inputs(1, 1, 1, 300, 300), 0.1)


def test_seeds_change_the_draw_and_repeat_it():
    q, k, v = inputs(1, 1, 2, 200, 500)
    one, again, other = (by_line(drawn_lists(q, k, v, seed=seed)) for seed in (5, 5, 6))
    assert one == again
    assert all(line[0] != changed[0] for line, changed in zip(one, other, strict=True))
    assert one[0][0] != one[2][0]  # heads draw apart


@pytest.mark.parametrize("rows", [4, 16])
def test_a_causal_selection_knows_nothing_of_what_comes(rows):
    m, n, row = 500, 700, 2 * ROWS
    q, k, v = inputs(1, 1, 2, m, n, seed=4)
    before = by_line(drawn_lists(q, k, v, 0.7, rows, causal=True))
    q, k, v = (part.clone() for part in (q, k, v))
    q[:, :, row + 1 :] *= -3
    k[:, :, n - m + row + 1 :] += 5
    v[:, :, n - m + row + 1 :] *= 50
    after = by_line(drawn_lists(q, k, v, 0.7, rows, causal=True))
    for head in range(2):
        lines = slice(4 * head, 4 * head + 3)  # blocks whose first row is the 256th or before
        assert before[lines] == after[lines]
        assert before[4 * head + 3] != after[4 * head + 3]


@pytest.mark.parametrize(("at_once", "causal"), [(1, False), (3, True)])
def test_heads_in_turns_are_drawn_as_all_at_once(at_once, causal, monkeypatch):
    q, k, v = inputs(2, 1, 2, 140, 425, seed=5)
    wanted = by_line(drawn_lists(q, k, v, causal=causal))
    monkeypatch.setattr(block_sampled, "BYTES", at_once * 2 * int(edges(140, 425)[-1]) + 1)
    assert by_line(drawn_lists(q, k, v, causal=causal)) == wanted


def test_sums_over_the_lists_are_unbiased():
    """Heads alike but for their draws; a false alarm once in 10,000 runs, where means are normal."""
    many, m, n, d = (40 if HERE == "cpu" else 4096), 64, 700, 64
    q, k, v = inputs(1, 1, 1, m, n, seed=6)
    lists = drawn_lists(q.expand(1, many, m, d), k, v, density=0.3, rows=4, seed=8)
    edge = int(edges(m, n)[0])
    scores = numpy(q[0, 0, [5, 40]]) @ numpy(k[0, 0, :edge]).T * d**-0.5  # of rows that speak for none
    sizes = np.exp(scores)[:, None] * np.vstack([np.ones(edge), numpy(v[0, 0, :edge, :8]).T])  # (2, 9, edge)
    found = np.array([(sizes[..., t] * np.exp(w)).sum(-1) for t, w in by_line(lists)])  # (many, 2, 9)
    apart = (found.mean(0) - sizes.sum(-1)) / (found.std(0, ddof=1) / math.sqrt(many))
    assert np.abs(apart).max() <= norm.isf(ALARM / 2 / apart.size)
    assert (found.std(0) > 1e-3 * np.abs(sizes).sum(-1)).all()  # it did sample
    assert all(len(tokens) < 0.35 * edge for tokens, _ in by_line(lists))


def without_cuda(monkeypatch):
    monkeypatch.setattr(hopper, "present", lambda: False)


@GPU
@pytest.mark.parametrize(
    ("rows", "d", "causal", "dtype"),
    [
        (1, 64, True, torch.float16),
        (1, 128, False, torch.bfloat16),
        (2, 64, False, torch.bfloat16),
        (4, 128, True, torch.float16),
        (8, 64, True, torch.bfloat16),
        (8, 128, False, torch.bfloat16),
        (16, 64, False, torch.float16),
        (16, 128, True, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    ("B", "g", "G", "m", "n"), [(2, 2, 2, 2500, 2500), (1, 4, 1, 300, 9001), (1, 1, 7, 5000, 7777), (2, 1, 4, 130, 700)]
)
def test_cuda_codes_are_those_of_triton(B, g, G, m, n, rows, d, causal, dtype, monkeypatch):
    q, k, v = inputs(B, g, G, m, n, d, dtype)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    assert hopper.serves(q, k, k) or torch.cuda.get_device_capability() != (9, 0)
    _, one = stages(q, k, v, rows, causal)
    without_cuda(monkeypatch)
    _, other = stages(q, k, v, rows, causal)
    codes = [
        torch.cat([drawn.codes[:, line, :edge].flatten() for line, edge in enumerate(edges(m, n))]).int()
        for drawn in (one, other)
    ]
    off = (codes[0] - codes[1]).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.15  # by powers, which are rough by up to 3 %
    assert torch.equal(one.starts, other.starts)


@GPU
@pytest.mark.parametrize(("shift", "T", "tables"), [(0, 40, 1), (70_001, 9, 9), (5, 130, 130), (300, 1, 1)])
def test_cuda_draws_are_those_of_triton(shift, T, tables, monkeypatch):
    drawn, wanted = some_draw(shift, T, 3, tables, seed=1)
    offsets = torch.nn.functional.pad(drawn.lengths.flatten().cumsum(0), (1, 0))
    found = []
    for cuda in (True, False):
        if not cuda:
            without_cuda(monkeypatch)
        tokens = torch.full((int(offsets[-1]),), -1, dtype=torch.int32, device=HERE)
        weights = torch.full((int(offsets[-1]),), torch.nan, device=HERE)
        drawn.into(offsets, tokens, weights)
        found.append((tokens, weights))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).abs().max() <= 1e-5
    assert np.array_equal(found[0][0].cpu().numpy(), np.concatenate([tokens for tokens, _ in wanted]))


@GPU
@pytest.mark.parametrize("causal", [False, True])
def test_long_prompts_are_listed_in_order(causal):
    q, k, v = inputs(1, 2, 4, 20_000, 30_000, 128, torch.bfloat16)
    lists = drawn_lists(q, k, v, 0.1, causal=causal)
    check(lists, 8, 20_000, 30_000)
    again = drawn_lists(q, k, v, 0.1, causal=causal)
    used = int(lists.token_offsets[-1])
    assert torch.equal(lists.tokens[:used], again.tokens[:used])
    off = lists.densities(20_000, 30_000) - 0.1
    assert off.max() < 1e-4 and off.min() > (-1e-3 if causal else -1e-4)
