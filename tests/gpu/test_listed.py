"""Attention over lists that blocks of rows share, on the GPU or interpreted (float16: bfloat16 is wrong there)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention.key_lists import ARRAYS, KEYS, KeyLists, check, edges, plain, row_blocks  # noqa: E402
from attention.listed_reference import listed as definition  # noqa: E402
from gpu import hopper  # noqa: E402
from gpu import listed as module  # noqa: E402
from hsr.errors import ArgumentError  # noqa: E402
from tests.gpu.interpreted import HERE, normal, poisoned_allocations, pytestmark  # noqa: E402, F401
from tests.prompts import some_lists  # noqa: E402

pytestmark = [*pytestmark, pytest.mark.usefixtures("poisoned_allocations")]
GPU = pytest.mark.gpu
BF16 = pytest.param(torch.bfloat16, marks=GPU)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ONLY = {kind: {other: other == kind for other in ("token", "block", "mean")} for kind in ("token", "block", "mean", "")}


def inputs(B, g, G, m, n, d, dtype=torch.float16, seed=0):
    q, k, v = normal(B, g * G, m, d, seed=seed), normal(B, g, n, d, seed=seed + 1), normal(B, g, n, d, seed=seed + 2)
    return q.to(dtype), k.to(dtype), (v + 0.5).to(dtype)


def some(heads, m, n, seed=0, weighted=True, **kinds):
    """Lists of the kinds that are not False, all three by default, on the device."""
    lists = some_lists(np.random.default_rng(seed), (heads, m, n), 0.4)
    for kind, ids in (("block", "blocks"), ("mean", "means")):
        if not kinds.get(kind, True):
            lists = dataclasses.replace(lists, **{f"{kind}_offsets": None, ids: None})
    if not kinds.get("token", True):
        lists = dataclasses.replace(lists, token_offsets=np.zeros_like(lists.token_offsets), tokens=lists.tokens[:0])
    if not weighted or not kinds.get("token", True):
        lists = dataclasses.replace(lists, log_weights=None)
    check(lists, heads, m, n)
    return here(lists)


def here(lists):
    arrays = {name: getattr(lists, name) for name in ARRAYS}
    return KeyLists(
        **{name: None if part is None else torch.from_numpy(part).to(HERE) for name, part in arrays.items()}
    )


def lines(heads, m, n, tokens=None, blocks=None):
    """Lists of the same tokens or blocks, functions of the line's edge, for every head."""
    first = np.tile(edges(m, n), heads)
    parts = []
    for kind in (tokens, blocks):
        ids = [np.asarray(kind(edge), np.int32) if kind else np.empty(0, np.int32) for edge in first]
        parts += [np.cumsum([0, *(len(part) for part in ids)], dtype=np.int64), np.concatenate(ids)]
    return here(KeyLists(parts[0], parts[1], None, *(parts[2:] if blocks else (None, None))))


def numpy(x):
    return x.double().cpu().numpy()


def wanted(q, k, v, lists, scale=0.125):
    """What the definition says: output (B, h, m, d) and log-sum-exp (B, h, m), both float64."""
    lists, per = plain(lists), q.shape[1] * row_blocks(q.shape[2])
    outputs, sums = [], []
    for b in range(len(q)):
        own = {name: getattr(lists, name) for name in ARRAYS if name.endswith("offsets")}
        ids = {name: getattr(lists, name) for name in ARRAYS if not name.endswith("offsets")}
        cut = {name: part[b * per : (b + 1) * per + 1] for name, part in own.items() if part is not None}
        for name, of in (("tokens", "token"), ("log_weights", "token"), ("blocks", "block"), ("means", "mean")):
            if ids[name] is not None:
                ids[name] = ids[name][cut[f"{of}_offsets"][0] :]
        cut = {name: part - part[0] for name, part in cut.items()}
        part = KeyLists(**(ids | cut))
        output, lse = definition(numpy(q[b]), numpy(k[b]), numpy(v[b]), part, scale)
        outputs.append(output)
        sums.append(lse)
    return np.stack(outputs), np.stack(sums)


def assert_close(found, true, dtype=torch.float16):
    output, lse = numpy(found[0]), numpy(found[1])
    tolerance = TOLERANCE[dtype]
    assert np.isfinite(output).all()
    apart = np.linalg.norm(output - true[0], axis=-1)
    assert (apart <= tolerance * np.linalg.norm(true[0], axis=-1) + tolerance).all(), apart.max()
    assert (np.abs(lse - true[1]) <= tolerance).all(), np.abs(lse - true[1]).max()


def attend(q, k, v, lists, scale=0.125, **options):
    """The Triton kernel's answer; on a GPU the fast one's must be nearly the same."""
    found = module.attend(q, k, v, lists, scale, single=False, **options)
    if hopper.serves(q, k, v):
        other = module.attend(q, k, v, lists, scale, **options)
        tolerance = TOLERANCE[q.dtype]
        assert (other[0].float() - found[0].float()).norm(dim=-1).max() <= 4 * tolerance
        assert torch.equal(other[1].isinf(), found[1].isinf())
        seen = ~found[1].isinf()
        assert (other[1][seen] - found[1][seen]).abs().max() <= tolerance
    return found


def seen(m, n, bands=False):
    """Which keys each row sees, or of them those of its band: (m, n) bool."""
    j, position = np.arange(n), n - m + np.arange(m)[:, None]
    first = np.repeat(edges(m, n), 128)[:m, None] if bands else 0
    return (j >= first) & (j <= position)


def masked(q, k, v, keep, scale=0.125):
    """Attention to the keys (m, n) that are kept, float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = scale * q.double() @ k.transpose(2, 3)
    scores = scores.masked_fill(~torch.from_numpy(keep).to(HERE), -torch.inf)
    return numpy(scores.softmax(-1) @ v), numpy(scores.logsumexp(-1))


@pytest.mark.parametrize("kind", ["all", *ONLY])
@pytest.mark.parametrize(("m", "before"), [(1, 0), (1, 300), (127, 130), (128, 0), (129, 0), (128, 128), (300, 77)])
def test_it_is_its_definition(m, before, kind):
    q, k, v = inputs(1, 1, 2, m, m + before, 64, seed=m)
    lists = some(2, m, m + before, seed=m + before, **ONLY.get(kind, {}))
    assert (lists.blocks is None, lists.means is None) == (
        kind in ("token", "mean", ""),
        kind in ("token", "block", ""),
    )
    assert_close(attend(q, k, v, lists), wanted(q, k, v, lists))


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_widths(d, dtype):
    q, k, v = inputs(1, 1, 1, 140, 420, d, dtype)
    lists = some(1, 140, 420, seed=d)
    scale = d**-0.5
    assert_close(attend(q, k, v, lists, scale), wanted(q, k, v, lists, scale), dtype)


def test_batches_groups_of_heads_and_strides():
    q, k, v = inputs(2, 2, 3, 129, 300, 64, seed=1)
    lists = some(12, 129, 300, seed=2)
    true = wanted(q, k, v, lists)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))  # as (B, n, g, d) lies
    q = torch.nn.functional.pad(q, (0, 64))[..., :64]
    assert not k.is_contiguous() and not q.is_contiguous()
    assert_close(attend(q, k, v, lists), true)


def test_log_weights_count_and_none_are_zeros():
    q, k, v = inputs(1, 1, 1, 40, 1000, 64, seed=3)
    weighted = some(1, 40, 1000, seed=5)
    bare = dataclasses.replace(weighted, log_weights=None)
    zeros = dataclasses.replace(weighted, log_weights=torch.zeros(len(weighted.tokens), device=HERE))
    assert weighted.token_offsets[-1] > 40
    one, other = attend(q, k, v, bare), attend(q, k, v, zeros)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert (attend(q, k, v, weighted)[1] - one[1]).abs().max() > 0.1


def test_shorter_sequences_are_as_if_alone():
    m, n, sizes = 300, 500, ((300, 500), (129, 290), (7, 7), (140, 141))
    q, k, v = inputs(4, 1, 2, m, n, 64, seed=4)
    parts = [some(2, *size, seed=size[0]) for size in sizes]
    lists = {}
    for kind, arrays in (("token", ("tokens", "log_weights")), ("block", ("blocks",)), ("mean", ("means",))):
        lengths = np.zeros((4, 2, row_blocks(m)), np.int64)  # lines of rows beyond a sequence's list nothing
        for b, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            offsets = getattr(plain(part), f"{kind}_offsets")
            lengths[b, :, : row_blocks(size[0])] = np.diff(offsets).reshape(2, -1)
        lists[f"{kind}_offsets"] = np.concatenate([[0], lengths.cumsum()])
        for name in arrays:
            used = [getattr(plain(part), name)[: getattr(plain(part), f"{kind}_offsets")[-1]] for part in parts]
            lists[name] = np.concatenate(used)
    for b, (rows, keys) in enumerate(sizes):  # nothing beyond a sequence's end matters
        q[b, :, rows:], k[b, :, keys:], v[b, :, keys:] = torch.nan, torch.nan, torch.nan
    counted = tuple(torch.tensor(size, dtype=torch.int32, device=HERE) for size in zip(*sizes, strict=True))
    output, lse = attend(q, k, v, here(KeyLists(**lists)), sizes=counted)
    for b, (rows, keys) in enumerate(sizes):
        assert output[b, :, rows:].eq(0).all()
        assert lse[b, :, rows:].eq(-torch.inf).all()
        alone = q[b : b + 1, :, :rows], k[b : b + 1, :, :keys], v[b : b + 1, :, :keys]
        found = output[b : b + 1, :, :rows], lse[b : b + 1, :, :rows]
        assert_close(found, wanted(*alone, parts[b]))


def test_empty_lists_leave_the_band():
    q, k, v = inputs(1, 1, 2, 200, 450, 64, seed=6)
    assert_close(attend(q, k, v, lines(2, 200, 450)), masked(q, k, v, seen(200, 450, bands=True)))


@pytest.mark.parametrize("whole", [True, False])
def test_lists_of_everything_are_dense_attention(whole):
    q, k, v = inputs(1, 1, 2, 200, 450, 64, seed=7)
    kinds = {"blocks": lambda edge: np.arange(edge // KEYS)} if whole else {"tokens": np.arange}
    assert_close(attend(q, k, v, lines(2, 200, 450, **kinds)), masked(q, k, v, seen(200, 450)))


def test_the_order_of_tokens_is_of_no_account():
    q, k, v = inputs(1, 1, 1, 128, 700, 64, seed=8)
    order = np.random.default_rng(0).permutation(512)[:300]
    one, other = (attend(q, k, v, lines(1, 128, 700, tokens=lambda _, o=o: o)) for o in (order, np.sort(order)))
    assert (one[0].float() - other[0].float()).abs().max() <= 2e-3
    assert (one[1] - other[1]).abs().max() <= 1e-5


def test_parts_merge_by_their_log_sums():
    q, k, v = inputs(1, 1, 1, 150, 600, 64, seed=9)
    kinds = [{"tokens": np.arange}, {"tokens": lambda edge: np.arange(0, edge, 3)}, {}]
    kinds.append({"tokens": lambda edge: np.setdiff1d(np.arange(edge), np.arange(0, edge, 3))})
    (all_, lse), *parts = (attend(q, k, v, lines(1, 150, 600, **kind)) for kind in kinds)
    signed = zip(parts, (1, -1, 1), strict=True)  # the band is in both parts
    shares = [(sign * (part[1] - lse).double().exp()[..., None], part[0].double()) for part, sign in signed]
    assert (sum(share for share, _ in shares) - 1).abs().max() <= 2e-3
    assert (sum(share * output for share, output in shares) - all_.double()).abs().max() <= 5e-3


def test_keys_that_are_not_listed_are_not_read():
    q, k, v = inputs(1, 1, 2, 130, 1000, 64, seed=10)
    listed = np.random.default_rng(1).choice(np.arange(1, 128), 70, replace=False)
    lists = lines(2, 130, 1000, tokens=lambda edge: listed, blocks=lambda edge: [3])
    means = torch.full_like(lists.blocks, 4)  # one a line
    lists = dataclasses.replace(lists, mean_offsets=lists.block_offsets, means=means)
    true = wanted(q, k, v, lists)
    keep = np.isin(np.arange(1000), listed) | (np.arange(1000) // KEYS == 3) | (np.arange(1000) // KEYS == 4)
    keep |= np.arange(1000) >= edges(130, 1000)[0]
    k[:, :, ~keep], v[:, :, ~keep] = torch.nan, torch.nan
    assert not keep[0]
    assert_close(attend(q, k, v, lists), true)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 2, 129)}, "q, k and v must be"),
        ({"k": (1, 2, 200, 128)}, "q, k and v must be"),
        ({"v": (1, 2, 201, 64)}, "q, k and v must be"),
        ({"q": (2, 2, 129, 64)}, "q, k and v must be"),
        ({"dtype": torch.float32}, "all float16 or all bfloat16"),
        ({"width": 96}, "width 64, 128, 256"),
        ({"q": (1, 2, 201, 64)}, "1 to 200 rows"),
        ({"q": (1, 2, 0, 64)}, "1 to 200 rows"),
        ({"q": (1, 3, 129, 64)}, "multiples of 2"),
        ({"turned": True}, "contiguous rows"),
        ({"lists": (2, 128, 200)}, "must have 4 lines"),
    ],
)
def test_what_the_kernels_have_no_form_for_is_refused(change, message):
    width, dtype = change.get("width", 64), change.get("dtype", torch.float16)
    shapes = {"q": (1, 2, 129, width), "k": (1, 2, 200, width), "v": (1, 2, 200, width)} | change
    q, k, v = (torch.zeros(shapes[name], dtype=dtype, device=HERE) for name in "qkv")
    if "turned" in change:
        v = torch.zeros(1, 2, width, 200, dtype=dtype, device=HERE).transpose(2, 3)
    with pytest.raises(ArgumentError, match=message):
        module.attend(q, k, v, lines(*change.get("lists", (2, 129, 200))), 0.125)


def uneven(heads, m, n, seed=0):
    """Tokens of which most lines list few, some thousands and some none, with log weights."""
    rng = np.random.default_rng(seed)
    ids = []
    for line, edge in enumerate(np.tile(edges(m, n), heads)):
        share = (0.9, 0.002, 0.0, 0.3)[line % 4]
        ids.append(rng.permutation(edge)[: int(share * edge)].astype(np.int32))
    offsets = np.cumsum([0, *(len(part) for part in ids)], dtype=np.int64)
    return here(KeyLists(offsets, np.concatenate(ids), rng.exponential(size=offsets[-1]).astype(np.float32)))


@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 128])
def test_long_and_uneven_lines(d, dtype):
    q, k, v = inputs(1, 1, 2, 130, 9001, d, dtype, seed=12)
    lists = uneven(2, 130, 9001)
    assert hopper.serves(q, k, v) or torch.cuda.get_device_capability() != (9, 0)
    assert_close(attend(q, k, v, lists, d**-0.5), wanted(q, k, v, lists, d**-0.5), dtype)


@GPU
@pytest.mark.parametrize(("d", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
@pytest.mark.parametrize("kind", ["all", *ONLY])
def test_many_programs_take_many_blocks(kind, d, dtype):
    """More blocks of rows than multiprocessors, so that a program's ring of tiles goes on from block to block."""
    q, k, v = inputs(2, 4, 4, 900, 1100, d, dtype, seed=13)
    lists = some(32, 900, 1100, seed=3, **ONLY.get(kind, {}))
    found = attend(q, k, v, lists, d**-0.5)
    per = row_blocks(900)
    for b, head in ((0, 0), (1, 15)):  # the definition is slow
        first = (16 * b + head) * per
        arrays = {name: getattr(lists, name) for name in ARRAYS}
        for of, names in (("token", ("tokens", "log_weights")), ("block", ("blocks",)), ("mean", ("means",))):
            if arrays[f"{of}_offsets"] is not None:
                offsets = arrays[f"{of}_offsets"][first : first + per + 1]
                arrays[f"{of}_offsets"] = offsets - offsets[0]
                for name in names:
                    arrays[name] = None if arrays[name] is None else arrays[name][int(offsets[0]) :]
        one = q[b : b + 1, head : head + 1], *(x[b : b + 1, head // 4 : head // 4 + 1] for x in (k, v))
        part = found[0][b : b + 1, head : head + 1], found[1][b : b + 1, head : head + 1]
        assert_close(part, wanted(*one, KeyLists(**arrays), d**-0.5), dtype)


@GPU
@pytest.mark.parametrize("single", [True, False])
def test_a_graph_replays_the_same_result(single):
    q, k, v = inputs(1, 2, 4, 1000, 2000, 128, torch.bfloat16, seed=14)
    lists = some(8, 1000, 2000, seed=4)
    first = module.attend(q, k, v, lists, 0.1, single=single)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module.attend(q, k, v, lists, 0.1, single=single)
    for _ in range(50):
        found[0].fill_(torch.nan)
        found[1].fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found[0], first[0])
        assert torch.equal(found[1], first[1])
