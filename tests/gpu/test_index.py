"""The index over keys on a GPU, there or under Triton's interpreter (no bfloat16: it is wrong there)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpu import half_space, index, int8_codes  # noqa: E402
from gpu.index import CudaIndex  # noqa: E402
from gpu.int8_codes import Int8Codes  # noqa: E402
from hsr import ArgumentError, HSRIndex  # noqa: E402
from tests.assertions import assert_reports  # noqa: E402
from tests.gpu.interpreted import DTYPES, HERE, normal, pytestmark  # noqa: E402, F401
from tests.strategies import cases  # noqa: E402

WIDTHS = (1, 5, 17, 40, 69)  # few, for each is a compilation on a GPU
EXAMPLES = 60  # a third of a second each under the interpreter


def tensor(array, dtype=None):
    """A copy on the device under test, with the strides of the original where it has a step."""
    found = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
    wide = torch.empty(*found.shape[:-1], 2 * found.shape[-1], dtype=dtype or found.dtype, device=HERE)
    wide[..., ::2] = found.to(wide.dtype)
    return wide[..., ::2]  # not contiguous


def plain(array):
    return array.double().cpu().numpy()


def checked(keys, queries, thresholds, limits=None, index=None):
    """Query an index over keys (n, d), assert what every report must be, and return it."""
    index = CudaIndex(keys) if index is None else index
    bounds = torch.as_tensor(thresholds, dtype=torch.float64, device=HERE).expand(len(queries))
    prefix = None if limits is None else torch.as_tensor(limits, device=HERE)
    report = index.query(queries, bounds, prefix=prefix).cpu()
    seen = np.full(len(queries), len(keys)) if limits is None else np.asarray(limits)
    assert_reports(report, plain(queries), plain(keys), bounds.cpu().numpy(), seen)
    return report


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_reports_hold_every_member_and_no_stranger(dtype, data):
    case = data.draw(cases(dtype, "brute"))
    n, m = len(case.plain_keys), len(case.plain_queries)
    limits = np.array(data.draw(st.lists(st.integers(0, n), min_size=m, max_size=m)))
    checked(tensor(case.keys), tensor(case.queries), case.thresholds, limits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d", "g", "G", "m"), [(1, 1, 1, 1), (33, 2, 3, 5), (64, 1, 9, 8), (100, 3, 1, 2), (512, 2, 2, 2)]
)
def test_reports_are_those_of_the_reference_for_grouped_heads(d, g, G, m, dtype):
    kind = getattr(torch, dtype)
    keys, queries = normal(g, 300, d, dtype=kind) + 1, normal(g * G, m, d, seed=1, dtype=kind)
    bounds = normal(g * G, m, seed=2) * d**0.5
    report = CudaIndex(keys).query(queries, bounds)
    wanted = HSRIndex(keys.double().cpu(), "reference").query(queries.double().cpu(), bounds.double().cpu())
    assert report.offsets.dtype == torch.int64
    assert report.indices.dtype == torch.int32
    assert report.scores.dtype == torch.float64
    assert {part.device.type for part in (report.offsets, report.indices, report.scores)} == {HERE}
    assert report.counts.tolist() == wanted.counts.tolist()
    for h in range(g * G):
        for i in range(m):
            ids, scores = (part.cpu().numpy() for part in report.row(h, i))
            assert np.array_equal(ids, np.sort(wanted.row(h, i)[0]))  # ascending, by the order of tiles
            exact = plain(keys[h // G])[ids] @ plain(queries[h, i])
            assert np.allclose(scores, exact, rtol=0, atol=1e-12 * d)


def test_more_rows_than_a_block_and_more_keys_than_a_span():
    keys, queries = normal(2 * half_space.SPAN + 77, 8), normal(70, 8, seed=1)
    assert checked(keys, queries, 4.0).counts.sum() > 70


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))] if HERE == "cpu" else range(40)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["outlier key", "outlier axis", "half steps", "far middle", "one key", "all scales"])
def test_no_key_is_lost_at_its_own_score(kind, seed):
    """Every key's score is a threshold: the bound must hold for each, however its code was rounded."""
    rng = np.random.default_rng(seed)
    n, m, d = 64, 2, int(rng.choice(WIDTHS))
    keys, queries = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    if kind == "outlier key":
        keys[rng.integers(n)] *= 1e6
    if kind == "outlier axis":
        keys[:, rng.integers(d)] *= 1e4
        queries[:, rng.integers(d)] *= 1e5
    if kind == "half steps":
        keys = rng.integers(-127, 127, (n, d)) + 0.5 * np.sign(rng.standard_normal(d))
        queries = np.sign(rng.standard_normal((m, d)))
    if kind == "far middle":
        keys += 1e4 * rng.standard_normal(d)
    if kind == "one key":
        keys[:] = keys[0]  # the middle is all of every score
    if kind == "all scales":
        keys *= 10.0 ** rng.integers(-44, 37, (n, 1))
        queries *= 10.0 ** rng.integers(-44, 37, (m, 1))
    keys, queries = keys.astype(np.float32), queries.astype(np.float32)
    index = CudaIndex(tensor(keys))
    for query in queries:
        scores = keys.astype(float) @ query.astype(float)
        rows = tensor(np.tile(query, (n, 1)))
        for bounds in (scores, np.nextafter(scores, np.inf), np.nextafter(scores, -np.inf)):
            checked(tensor(keys), rows, bounds, index=index)


def worst_case(d):
    """Keys (64, d) whose rounding errors all point along the query (1, d), so that the bound is nearly reached."""
    rng = np.random.default_rng(d)
    signs = np.sign(rng.standard_normal(d))
    keys = rng.integers(-100, 100, (64, d)) + 0.49 * signs
    keys[:, 0] = 127.0  # steps of one
    return tensor(keys.astype(np.float32)), tensor(signs[None].astype(np.float32))


@pytest.mark.parametrize("d", [17, 64, 128])
@pytest.mark.parametrize("share", [1.0, 0.9])
def test_the_bound_is_no_wider_than_it_must_be(d, share, monkeypatch):
    """With a tenth less of it, keys are lost: the test can tell a bound from a guess."""
    monkeypatch.setattr(
        int8_codes, "fitted", lambda keys: (keys.new_zeros(1, d).double(), keys.new_ones(1, d).double())
    )
    keys, query = worst_case(d)
    codes = Int8Codes(keys[None])
    codes.slack *= share
    scores = (keys.double() @ query[0].double())[None]
    found = half_space.marked(codes, query.repeat(64, 1)[None], scores, torch.full((1, 64), 64, device=HERE).int())
    pairs = torch.empty(int(found.starts[-1]), dtype=torch.int64, device=HERE)
    found.listed(pairs)
    own = set((pairs[(pairs >> 32) == (pairs & half_space.ID)] & half_space.ID).tolist())
    if share == 1:
        assert own == set(range(64))
        assert len(pairs) < 64 * 64  # and it prunes
    else:
        assert len(own) < 64


@pytest.mark.parametrize("d", [2, 40])
def test_the_rounding_of_queries_is_within_the_bound(d, monkeypatch):
    """Keys that codes hold exactly, and a query whose rounding error points along them: its share alone decides."""
    monkeypatch.setattr(
        int8_codes, "fitted", lambda keys: (keys.new_zeros(1, d).double(), keys.new_ones(1, d).double())
    )
    rng = np.random.default_rng(d)
    signs = np.sign(rng.standard_normal(d))
    query = rng.integers(-9000, 9000, d) + 0.49 * signs
    query[0] = 32258.0  # the unit is one
    keys = np.concatenate([127 * signs[None], -127 * signs[None]])
    for side in (query, -query):
        row = tensor(side[None].astype(np.float32))
        score = float(plain(row)[0] @ keys[0])
        report = checked(tensor(keys.astype(np.float32)), row, score)
        assert 0 in report.indices


@pytest.mark.parametrize("row", [(0.0, 0.0), (1e-45, -1e-45), (3e38, 3e38), (1e-45, 3e38)])
@pytest.mark.parametrize("bound", [-np.inf, -1e308, -1e-320, 0.0, 5e-324, 1.4e-45, 1.0, 1e77, 1e308, np.inf])
def test_extreme_queries_and_thresholds(row, bound):
    keys = tensor(np.array([[0, 0], [1e-45, 0], [1, -1], [3.4e38, 3.4e38], [-3.4e38, 3.4e38], [1e-45, -1e-45]], "f4"))
    checked(keys, tensor(np.array([row, row], "f4")), bound)


def test_keys_beyond_what_codes_can_hold_are_left_to_float64():
    keys = normal(128, 5) * 1e-30
    index = CudaIndex(keys)
    more = torch.cat([normal(3, 5, seed=1) * 1e30, normal(3, 5, seed=2) * 1e-44, normal(3, 5, seed=3) * 1e-30])
    index = CudaIndex(torch.cat([keys[:100]]))
    index.append(more)
    assert torch.isinf(index.codes.slack[0, 100:103]).all()
    held, queries = torch.cat([keys[:100], more]), normal(4, 5, seed=4)
    for bound in (0.0, 1e-31, -1e-29, 1e29):
        report = checked(held, queries, bound, index=index)
    assert set(report.indices.tolist()) <= {100, 101, 102}


@pytest.mark.parametrize("n", [0, 1])
def test_no_key_and_one(n):
    index = CudaIndex(normal(2, n, 4))
    report = index.query(normal(4, 3, 4), -np.inf)
    assert report.counts.tolist() == [[n] * 3] * 4
    assert index.count(normal(4, 3, 4), np.inf).sum() == 0
    assert index.query(normal(4, 0, 4), 0.0).counts.shape == (4, 0)
    assert index.topk(normal(4, 0, 4), 1).counts.shape == (4, 0) if n else index.alive == 0
    index.append(normal(2, 300, 4, seed=1))
    assert index.count(normal(4, 3, 4), -np.inf).unique().tolist() == [n + 300]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(data=st.data())
def test_growth_and_deletion_in_any_order(dtype, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    d = data.draw(st.sampled_from(WIDTHS))
    kind = getattr(torch, dtype)

    def some(count):
        return torch.from_numpy(rng.integers(-3, 4, (count, d))).to(kind).to(HERE)

    keys = some(data.draw(st.integers(0, 200)))
    index, dead = CudaIndex(keys), set()
    for _ in range(data.draw(st.integers(1, 4))):
        living = sorted(set(range(len(keys))) - dead)
        if living and data.draw(st.booleans()):
            gone = data.draw(st.lists(st.sampled_from(living), unique=True, max_size=20))
            index.delete(gone)
            dead |= set(gone)
        else:
            more = some(data.draw(st.integers(0, 150)))
            index.append(more)
            keys = torch.cat([keys, more])
        living = np.array(sorted(set(range(len(keys))) - dead), np.int64)
        assert (index.n, index.alive) == (len(keys), len(living))
        assert index.ids.tolist() == living.tolist()
        assert torch.equal(index.keys, keys[index.ids])
        queries, bound = some(2), float(rng.integers(-9, 10))
        prefix = int(rng.integers(0, len(keys) + 1))
        report = index.query(queries, bound, prefix=prefix)
        scores = plain(queries) @ plain(keys).T
        for i in range(2):
            wanted = living[(scores[i, living] >= bound) & (living < prefix)]
            assert report.row(i)[0].tolist() == wanted.tolist()
        assert index.count(queries, bound, prefix=prefix).tolist() == report.counts.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_is_that_of_all_scores(dtype, monkeypatch):
    monkeypatch.setattr(index, "BLOCK", 4000)  # several blocks of keys
    kind = getattr(torch, dtype)
    keys, queries = normal(2, 900, 16, dtype=kind), normal(4, 3, 16, seed=1, dtype=kind)
    found = CudaIndex(keys)
    found.delete(range(0, 900, 3))
    r = torch.arange(1, 13, device=HERE).reshape(4, 3) * 40
    prefix = torch.arange(12, 0, -1, device=HERE).reshape(4, 3) * 75
    report = found.topk(queries, r, prefix=prefix)
    scores = np.einsum("hmd,hNd->hmN", plain(queries), plain(keys).repeat(2, axis=0))
    for h in range(4):
        for i in range(3):
            ids = np.array([j for j in range(int(prefix[h, i])) if j % 3])
            best = ids[np.argsort(-scores[h, i, ids], kind="stable")][: int(r[h, i])]
            assert np.allclose(report.row(h, i)[1].cpu(), scores[h, i, best], rtol=1e-12)
            assert set(report.row(h, i)[0].tolist()) == set(best.tolist())
    assert found.topk(queries, 900).counts.unique().tolist() == [600]


def test_a_call_gives_the_same_arrays_again_and_parts_of_it_too(monkeypatch):
    keys, queries = normal(2, 500, 24), normal(4, 9, 24, seed=1)
    found = CudaIndex(keys)
    one, other = found.query(queries, 2.0), found.query(queries, 2.0)
    monkeypatch.setattr(index, "PAIRS", 2000)  # four rows a scan
    parts = found.query(queries, 2.0)
    for name in ("offsets", "indices", "scores", "scanned", "visited"):
        assert torch.equal(getattr(one, name), getattr(other, name))
        assert torch.equal(getattr(one, name), getattr(parts, name))
    assert (one.scanned >= one.counts.flatten()).all()
    assert one.scanned.sum() < 0.5 * one.visited.sum()


def test_the_input_stays_as_it_is_and_may_change_later():
    keys, queries = tensor(normal(200, 12)), tensor(normal(3, 12, seed=1))
    before = keys.clone(), queries.clone()
    found = CudaIndex(keys)
    counts = found.count(queries, 1.0)
    assert torch.equal(keys, before[0])
    assert torch.equal(queries, before[1])
    keys.zero_()
    assert torch.equal(found.count(queries, 1.0), counts)


def test_a_report_goes_to_the_host_when_told_to():
    report = CudaIndex(normal(50, 6)).query(normal(3, 6, seed=1), 0.5)
    with pytest.raises(ArgumentError, match=r"report must be on the host, as report.cpu\(\) is"):
        report.to_scipy()
    host = report.cpu()
    assert host.cpu() is host
    assert host.to_scipy().shape == (3, 50)
    assert np.array_equal(host.counts, report.counts.cpu())


def test_explain_says_what_is_read_and_why():
    found = CudaIndex(normal(2, 300, 40, dtype=torch.float16))
    found.delete([3, 5])
    told = found.explain()
    assert told["method"] == "int8-cuda"
    assert told["keys"] == (2, 300, 40)
    assert (told["alive"], told["dead"], told["dtype"]) == (298, 2, "float16")
    assert told["index_bytes_per_key"] == 48 + 8
    assert any("faiss has no range search" in reason for reason in told["reasons"])
    assert found.largest == found.codes.keys.abs().max()
    assert repr(found).startswith("HSRIndex(heads=2, n=300, alive=298, d=40, dtype=float16, method=int8")


@pytest.mark.gpu
def test_the_public_class_hands_tensors_on_a_gpu_over():
    keys = normal(2, 5000, 128, dtype=torch.bfloat16)
    found = HSRIndex(keys)
    assert type(found) is CudaIndex
    assert isinstance(found, HSRIndex)
    queries = normal(8, 2, 128, seed=1, dtype=torch.bfloat16)
    wanted = HSRIndex(keys.cpu()).query(queries.cpu(), 20.0)
    assert found.query(queries, 20.0).counts.tolist() == wanted.counts.tolist()
    with pytest.raises(ArgumentError, match="queries must be a torch tensor on cuda"):
        found.query(queries.cpu(), 20.0)
