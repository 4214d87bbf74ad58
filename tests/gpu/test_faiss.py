"""Candidates from faiss, against float64 products; what the table refuses."""

from __future__ import annotations

import importlib.util
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
faiss = pytest.importorskip("faiss")

from gpu import ivf_faiss, knn_faiss  # noqa: E402
from gpu.faiss_gpu import MOST, Found  # noqa: E402
from gpu.kmeans_faiss import kmeans  # noqa: E402
from hsr.backend import choose, methods  # noqa: E402
from hsr.errors import ArgumentError, BackendUnavailable  # noqa: E402
from tests.tensors import DEVICES, DTYPES, GPU, clustered, plain, problems, tensors  # noqa: E402


def assert_largest(found, queries, keys, k):
    """Different keys, their true scores, and no key left out that beats one of them beyond the rounding of float32."""
    keys, queries, scores, ids = plain(keys), plain(queries), plain(found.scores), found.ids.cpu().numpy()
    keys = np.repeat(keys, len(queries) // len(keys), axis=0)
    true = np.einsum("hmd,hnd->hmn", queries, keys)
    band = 4 * (keys.shape[2] + 2) * 2.0**-23 * np.einsum("hmd,hnd->hmn", abs(queries), abs(keys)) + 1e-30
    assert scores.shape == ids.shape == (*queries.shape[:2], k)
    assert ((ids >= 0) & (ids < keys.shape[1])).all()
    assert (np.diff(np.sort(ids)) > 0).all()
    assert (np.diff(scores) <= 0).all()
    own, margin = np.take_along_axis(true, ids, 2), np.take_along_axis(band, ids, 2)
    assert (abs(scores - own) <= margin).all()
    kth = np.sort(true)[..., -k:][..., :1]
    assert (own + margin >= kth - band.max(2, keepdims=True)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates_are_the_keys_of_largest_score(device, dtype):
    @settings(max_examples=60)
    @given(problems())
    def check(problem):
        keys, queries, k = tensors(problem, device, dtype)
        found = knn_faiss.candidates(keys).search(queries, k)
        assert_largest(found, queries, keys, k)

    check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probing_every_list_scores_every_key(device, dtype):
    @settings(max_examples=30)
    @given(problems(), st.integers(1, 12))
    def check(problem, lists):
        keys, queries, k = tensors(problem, device, dtype)
        lists = min(lists, keys.shape[1])
        found = ivf_faiss.candidates(keys, nlist=lists, nprobe=lists).search(queries, k)
        assert_largest(found, queries, keys, k)

    check()


@pytest.mark.parametrize("fault", ["repeat", "stranger", "worse", "score"])
def test_the_assertion_sees_a_planted_fault(fault):
    keys, queries = clustered(200, 8, 5)[None], clustered(6, 8, 5, seed=1)[:, None]
    scores, ids = knn_faiss.candidates(keys).search(queries, 4)
    if fault == "repeat":
        scores[2, 0, 1], ids[2, 0, 1] = scores[2, 0, 0], ids[2, 0, 0]
    elif fault == "stranger":
        ids[3, 0, 3] = (ids[3, 0, 3] + 1) % 200
    elif fault == "worse":
        last = int((keys[0] @ queries[1, 0]).argmin())
        scores[1, 0, 3], ids[1, 0, 3] = keys[0, last] @ queries[1, 0], last
    else:
        scores[0, 0] += 1e-2
    with pytest.raises(AssertionError):
        assert_largest(Found(scores, ids), queries, keys, 4)


@pytest.mark.parametrize("method", methods("candidates"))
def test_keys_without_heads_give_results_without_heads(method):
    keys = clustered(50, 8, 5)
    index = choose("candidates", method, device="cpu")(keys)
    found = index.search(keys[:7], 3)
    assert found.scores.shape == found.ids.shape == (7, 3)
    assert (found.ids[:, 0].unique() < 50).all()
    assert "nothing" in index.explain()["guaranteed"]
    assert "no range search on a GPU" in index.explain()["reports"]


@pytest.mark.parametrize("device", DEVICES)
def test_recall_rises_with_the_lists_probed(device):
    keys, queries = clustered(8000, 32, 60, device=device)[None], clustered(64, 32, 60, seed=1, device=device)[None]
    index = ivf_faiss.candidates(keys, nlist=64, seed=1)
    best = knn_faiss.candidates(keys).search(queries, 20).ids
    recalls = []
    for nprobe in (1, 4, 16, 64):
        ids = index.search(queries, 20, nprobe=nprobe).ids
        recalls.append(float((ids[..., None] == best[..., None, :]).any(-1).double().mean()))
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1]
    assert recalls[-1] > 0.999


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_fixes_the_lists(device):
    keys = clustered(2000, 16, 30, device=device)
    first, again, other = (ivf_faiss.candidates(keys, nprobe=1, seed=s).search(keys[:50], 20).ids for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("device", DEVICES)
def test_lists_that_hold_fewer_keys_say_so(device):
    keys = torch.eye(10, device=device)
    found = ivf_faiss.candidates(keys, nlist=10, nprobe=1).search(keys, 4)
    missing = found.ids < 0
    assert missing.any()
    assert (found.ids[:, 0] == torch.arange(10, device=device)).all()
    assert (found.scores.isneginf() == missing).all()


@pytest.mark.parametrize("device", DEVICES)
def test_keys_are_read_in_place(device):
    keys = clustered(40, 8, 5, device=device)[None]
    before, queries = keys.clone(), keys[:, :3].clone()
    index = knn_faiss.candidates(keys)
    index.search(queries, 2)
    assert torch.equal(keys, before)
    keys[0, 39] = 100 * queries[0, 1]
    assert index.search(queries, 1).ids[0, 1, 0] == 39


def call(op, **change):
    """One call of an operation with an argument changed."""
    keys = change.pop("keys", torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)))
    if op == "kmeans":
        return kmeans(keys, change.pop("k", 3), **change)
    queries, k = change.pop("queries", torch.ones(4, 2, 8)), change.pop("k", 3)
    return (knn_faiss if op == "knn" else ivf_faiss).candidates(keys, **change).search(queries, k)


@pytest.mark.parametrize("op", ["kmeans", "knn", "ivf"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": np.ones((2, 30, 8))}, "keys must be a torch tensor; got ndarray"),
        ({"keys": torch.ones(8)}, r"keys must be \(n, d\)"),
        ({"keys": torch.ones(2, 0, 8)}, "not empty"),
        ({"keys": torch.ones(2, 30, 8, dtype=torch.float64)}, r"keys must be torch\.float32.*got torch\.float64"),
        ({"keys": torch.ones(2, 8, 30).mT}, "keys must have contiguous rows"),
        ({"keys": torch.ones(2, 30, 16)[..., ::2]}, "keys must have contiguous rows"),
        ({"keys": torch.full((2, 30, 8), torch.nan)}, "keys must be finite"),
        ({"k": 0}, "k must be in 1..30; got 0"),
        ({"k": 31}, "k must be in 1..30; got 31"),
        ({"k": 2.0}, "k must be a whole number"),
    ],
)
def test_a_bad_argument_is_named(op, change, message):
    with pytest.raises(ArgumentError, match=message):
        call(op, **change)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("kmeans", {"iterations": 0}, "iterations must be"),
        ("kmeans", {"seed": -1}, "seed must be"),
        ("knn", {"queries": [[1.0]]}, "queries must be a torch tensor"),
        ("knn", {"queries": torch.ones(4, 8)}, r"queries must be \(h, m, 8\)"),
        ("knn", {"queries": torch.ones(4, 2, 9)}, r"queries must be \(h, m, 8\)"),
        ("knn", {"queries": torch.ones(3, 2, 8)}, "queries must have a positive multiple of 2 heads"),
        ("knn", {"queries": torch.ones(4, 2, 8).half()}, r"queries must be torch\.float32.*got torch\.float16"),
        ("knn", {"queries": torch.ones(4, 2, 8, device="meta")}, "on cpu to match keys; got .* on meta"),
        ("ivf", {"nlist": 31}, "nlist must be in 1..30"),
        ("ivf", {"nlist": 4, "nprobe": 5}, "nprobe must be in 1..4"),
        ("ivf", {"nlist": 4, "nprobe": 0}, "nprobe must be in 1..4"),
        ("ivf", {"seed": 2**31}, "seed must be"),
    ],
)
def test_a_bad_option_is_named(op, change, message):
    with pytest.raises(ArgumentError, match=message):
        call(op, **change)


@pytest.mark.parametrize(("op", "method"), [("kmeans", "faiss"), *(("candidates", m) for m in methods("candidates"))])
def test_the_table_says_what_is_missing(op, method, monkeypatch):
    assert callable(choose(op, method, device="cpu"))
    with pytest.raises(BackendUnavailable, match="are on mps"):
        choose(op, method, device="mps")
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    with pytest.raises(BackendUnavailable, match="faiss built for GPUs"):
        choose(op, method, device="cuda")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else found(name))
    with pytest.raises(BackendUnavailable, match="needs the package faiss, which is not installed"):
        choose(op, method, device="cuda")


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_cache_is_searched_as_torch_does(dtype, device):
    keys, queries = clustered(200_000, 128, 500, device=device, dtype=dtype), clustered(64, 128, 500, seed=1)
    keys, queries = keys.view(2, 100_000, 128), queries.to(dtype).to(device).view(8, 8, 128)
    found = knn_faiss.candidates(keys).search(queries, 100)
    true = torch.einsum("gid,gnd->gin", queries.double().view(2, 32, 128), keys.double()).view(8, 8, -1)
    best = true.topk(100).values
    own = true.gather(2, found.ids)
    assert (found.ids.sort().values.diff() > 0).all()
    assert (own >= best[..., -1:] - 1e-4 * best[..., -1:].abs()).all()
    assert (found.scores.double() - own).abs().max() < 1e-4 * own.abs().max()
    assert found.ids.is_cuda
    assert found.scores.is_cuda


@pytest.mark.parametrize("device", [GPU])
def test_a_gpu_selects_at_most_2048(device):
    keys = clustered(3000, 16, 9, device=device)
    scored, inverted = knn_faiss.candidates(keys), ivf_faiss.candidates(keys, nlist=2100, nprobe=MOST)
    for index in (scored, inverted):
        assert index.search(keys[:2], MOST).ids.shape == (2, MOST)
        with pytest.raises(ArgumentError, match="k must be at most 2048"):
            index.search(keys[:2], MOST + 1)
    with pytest.raises(ArgumentError, match="nprobe must be at most 2048"):
        inverted.search(keys[:2], 1, nprobe=MOST + 1)
    with pytest.raises(ArgumentError, match=r"on cuda:0 to match keys; got .* on cpu"):
        scored.search(keys[:2].cpu(), 1)


@pytest.mark.parametrize("device", [GPU])
def test_searches_keep_to_the_current_stream(device):
    keys, queries = clustered(100_000, 64, 99, device=device), clustered(32, 64, 99, seed=1, device=device)
    late = torch.zeros_like(keys)
    scored = knn_faiss.candidates(late)
    wanted = knn_faiss.candidates(keys).search(queries, 10)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            torch.cuda._sleep(1_000_000)
        late.copy_(keys)  # done long after the host has asked
        found = scored.search(queries, 10)
        late.zero_()
    side.synchronize()
    assert torch.equal(found.ids, wanted.ids)


@pytest.mark.parametrize("device", [GPU])
def test_threads_take_turns(device):
    keys, queries = clustered(50_000, 64, 99, device=device), clustered(64, 64, 99, seed=1, device=device)
    index, found = knn_faiss.candidates(keys), {}
    wanted = index.search(queries, 50).ids
    torch.cuda.synchronize()

    def work(name):
        with torch.cuda.stream(torch.cuda.Stream()):
            ids = [index.search(queries, 50).ids for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        found[name] = all(torch.equal(one, wanted) for one in ids)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)
