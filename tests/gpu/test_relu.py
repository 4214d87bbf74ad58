"""ReLU^alpha decode on the GPU, there or under Triton's interpreter (no bfloat16: it is wrong there)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attention import DecodeSession, ReLUPower, Softmax  # noqa: E402
from attention.engine import Plan  # noqa: E402
from attention.reference import dense  # noqa: E402
from gpu import relu  # noqa: E402
from gpu.relu import ReluSession  # noqa: E402
from hsr import ArgumentError, BackendUnavailable  # noqa: E402
from hsr.backend import preferred  # noqa: E402
from tests.gpu.interpreted import DTYPES, HERE, normal, pytestmark  # noqa: E402, F401


def session(k, v, alpha=1, b=0.0, scale=None):
    return ReluSession(k, v, Plan(ReLUPower(alpha, b), None, scale))


def plain(array):
    return array.double().cpu().numpy()


def assert_exact(found, q, k, v, weight, scale, keep=None):
    """Within its own certificate of the definition, for q (h, m, d), k (g, n, d), v (g, n, dv)."""
    wanted, lse = dense(plain(q), plain(k), plain(v), weight, scale, keep=keep)
    certificate = found.certificate
    assert certificate.kind == "exact"
    assert (plain(certificate.dropped_mass) == 0).all()
    off = np.linalg.norm(plain(found.output) - wanted, axis=-1)
    assert (off <= plain(certificate.output_error)).all()
    size = np.linalg.norm(wanted, axis=-1)
    finite = np.isfinite(plain(certificate.relative_error))
    assert (off <= plain(certificate.relative_error) * size)[finite].all()
    there = np.isfinite(lse) & np.isfinite(plain(found.lse))
    assert (np.abs(plain(found.lse) - lse)[there] <= plain(certificate.lse_error)[there]).all()
    assert np.isinf(plain(certificate.lse_error)[np.isfinite(lse) != np.isfinite(plain(found.lse))]).all()
    assert np.array_equal(plain(found.empty), np.isneginf(plain(found.lse)))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(data=st.data())
def test_attention_is_exact_and_certified(dtype, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    g, G, m = data.draw(st.sampled_from([(1, 1, 1), (2, 2, 1), (1, 3, 2), (2, 1, 3)]))
    n, (d, dv) = data.draw(st.integers(1, 200)), data.draw(st.sampled_from([(1, 3), (4, 1), (17, 20), (20, 40)]))
    alpha = data.draw(st.sampled_from([1, 2, 3, 7]))
    scale = data.draw(st.sampled_from([None, 1.0, 0.3, 1e-3]))
    kind = data.draw(st.sampled_from(["gaussian", "lattice", "huge values", "tiny keys"]))
    keys, queries, values = (rng.standard_normal(s) for s in ((g, n, d), (g * G, m, d), (g, n, dv)))
    if kind == "lattice":
        keys, queries = keys.round(), queries.round()
    values *= 1e4 if kind == "huge values" else 1.0
    keys *= 1e-4 if kind == "tiny keys" else 1.0
    k, q, v = (torch.from_numpy(x).to(getattr(torch, dtype)).to(HERE) for x in (keys, queries, values))
    factor = d**-0.5 if scale is None else scale
    scores = factor * np.einsum("hmd,hNd->hmN", plain(q), plain(k).repeat(G, axis=0))
    b = float(data.draw(st.sampled_from([0.0, scores.max(), np.quantile(scores, 0.9), scores.min() - 1, 1e6])))
    found = session(k, v, alpha, b, scale).attend(q)
    assert_exact(found, q, k, v, ReLUPower(alpha, b), factor)
    other = DecodeSession(k.cpu(), v.cpu(), weight=ReLUPower(alpha, b), scale=scale).attend(q.cpu())
    theirs = {name: getattr(other.certificate, name) for name in ("output_error", "lse_error", "relative_error")}
    for name, bound in theirs.items():
        finite = np.isfinite(bound)
        assert (plain(getattr(found.certificate, name))[finite] <= 4 * bound[finite] + 1e-12).all(), name
    sure = np.isfinite(theirs["lse_error"])  # elsewhere rounding decides whether a row is empty
    assert np.array_equal(found.empty.cpu().numpy()[sure], other.empty[sure])
    assert (np.abs(found.counters.reported.cpu().numpy() - other.counters.reported) <= n * (kind == "lattice")).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "g", "G", "m", "n", "d", "dv"), [(2, 2, 4, 1, 700, 64, 64), (1, 1, 2, 35, 200, 40, 130)])
def test_batches_long_lists_and_many_rows(B, g, G, m, n, d, dv, dtype, monkeypatch):
    monkeypatch.setattr(relu, "LISTS", 5000)  # several scans
    kind = getattr(torch, dtype)
    k, v, q = (
        normal(B, g, n, d, dtype=kind),
        normal(B, g, n, dv, seed=1, dtype=kind),
        normal(B, g * G, m, d, dtype=kind),
    )
    found = session(k, v, 2, 0.5).attend(q)
    assert found.output.shape == (B, g * G, m, dv)
    assert found.output.dtype == kind
    assert found.lse.shape == found.counters.reported.shape == found.certificate.output_error.shape == (B, g * G, m)
    wanted, lse = zip(
        *(dense(*map(plain, part), ReLUPower(2, 0.5), d**-0.5) for part in zip(q, k, v, strict=True)), strict=True
    )
    assert (
        np.linalg.norm(plain(found.output) - np.stack(wanted), axis=-1) <= plain(found.certificate.output_error)
    ).all()
    assert np.allclose(plain(found.lse), np.stack(lse), rtol=0, atol=1e-12)
    assert (plain(found.certificate.lse_error) < 1e-9).all()
    assert (found.counters.scanned >= found.counters.reported).all()
    assert (found.counters.visited == n).all()
    assert found.n == n


def test_an_empty_half_space_gives_zeros():
    k, v = normal(1, 100, 8), normal(1, 100, 8, seed=1)
    found = session(k, v, 1, 1e6).attend(normal(2, 3, 8, seed=2))
    assert found.empty.all()
    assert (found.output == 0).all()
    assert torch.isneginf(found.lse).all()
    for bound in (found.certificate.output_error, found.certificate.lse_error, found.certificate.relative_error):
        assert (bound == 0).all()
    assert session(k, v).attend(normal(2, 0, 8)).output.shape == (2, 0, 8)


@pytest.mark.parametrize(("alpha", "power"), [(40, 0), (9, 30), (9, -30), (1, 37), (3, -40)])
def test_weights_beyond_float64_are_brought_back(alpha, power):
    """Powers of scores overflow and underflow; their ratios do not."""
    k, q, v = normal(1, 150, 6) * 10.0 ** max(power, -38), normal(1, 2, 6, seed=1), normal(1, 150, 4, seed=2)
    q = q * (10.0**power if power > 0 else 1.0)
    found = session(k, v, alpha).attend(q)
    assert_exact(found, q, k, v, ReLUPower(alpha), 6**-0.5)
    assert torch.isfinite(found.lse).all()
    assert (found.certificate.relative_error < 1e-4).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_shows(bad):
    q = normal(1, 2, 6)
    q[0, 1, 3] = bad
    output = session(normal(1, 50, 6).abs(), normal(1, 50, 6), 1, 1e3).attend(q).output
    assert torch.isnan(output[0, 1]).all()
    assert (output[0, 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_come_and_go(dtype):
    kind = getattr(torch, dtype)
    k, v, q = (
        normal(2, 400, 16, dtype=kind),
        3 * normal(2, 400, 8, seed=1, dtype=kind),
        normal(4, 1, 16, seed=2, dtype=kind),
    )
    cache = session(k[:, :100], v[:, :100], 2, 0.2)
    for start, stop in ((100, 101), (101, 300), (300, 300), (300, 400)):
        cache.append(k[:, start:stop], v[:, start:stop])
        assert cache.n == stop
        assert_exact(cache.attend(q), q, k[:, :stop], v[:, :stop], ReLUPower(2, 0.2), 0.25)
    cache.evict(range(0, 400, 2))
    assert (cache.n, cache.alive) == (400, 200)
    keep = np.broadcast_to(np.arange(400) % 2 == 1, (4, 1, 400))
    found = cache.attend(q)
    assert_exact(found, q, k, v, ReLUPower(2, 0.2), 0.25, keep=keep)
    assert found.n == 200


def test_the_certificate_is_no_wider_than_it_must_be(monkeypatch):
    """Bounds shrunk by a planted fault are broken, so the assertion can fail."""
    k, v, q = normal(1, 300, 8).half(), normal(1, 300, 8, seed=1).half(), normal(4, 4, 8, seed=2).half()
    cache = session(k, v, 2, 0.1)
    assert_exact(cache.attend(q), q, k, v, ReLUPower(2, 0.1), 8**-0.5)
    cache._cast /= 8
    with pytest.raises(AssertionError):
        assert_exact(cache.attend(q), q, k, v, ReLUPower(2, 0.1), 8**-0.5)
    cache = session(k, v, 2, 0.1)
    cache._index.codes.slack *= 0.0
    with pytest.raises(AssertionError):
        assert_exact(cache.attend(q), q, k, v, ReLUPower(2, 0.1), 8**-0.5)


def test_bad_arguments_are_refused_and_change_nothing():
    k, v = normal(2, 10, 4), normal(2, 10, 3)
    for one, other, message in (
        (k[0], v[0], r"k must be \(g, n, d\)"),
        (k[:, :0], v[:, :0], "none of them 0"),
        (k, v[:, :5], r"v must be \(2, 10, 'dv'\) to match k"),
        (k, v.half(), "v must have the index's dtype float32; got float16"),
        (k, v / 0, "v must be finite"),
        (k / 0, v, "keys must be finite"),
        (k.double(), v.double(), "keys must have dtype"),
        (k, plain(v), "v must be a torch tensor"),
    ):
        with pytest.raises(ArgumentError, match=message):
            session(one, other)
    with pytest.raises(ArgumentError, match="scale must keep"):
        session(k, v, 1, 1.0, 1e-320)
    with pytest.raises(ArgumentError, match="scale must keep"):
        session(k, v, 1, 0.0, 1e250)
    cache = session(k, v)
    for one, other, message in (
        (normal(2, 1, 5), normal(2, 1, 3), "keys must be"),
        (normal(1, 1, 4), normal(1, 1, 3), "k must be"),
        (normal(2, 1, 4), normal(2, 1, 4), "v must have width 3"),
        (normal(2, 1, 4), normal(2, 2, 3), "to match k"),
        (normal(2, 1, 4), normal(2, 1, 3) / 0, "v must be finite"),
    ):
        with pytest.raises(ArgumentError, match=message):
            cache.append(one, other)
        assert cache.n == 10
    for q, message in (
        (normal(2, 1, 5), "q must be"),
        (normal(3, 1, 4), "positive multiple of 2 heads"),
        (normal(2, 1, 4).half(), "got torch.float16"),
        (normal(1, 2, 1, 4), "to match the cache"),
        (np.ones((2, 1, 4), "f4"), "got ndarray"),
    ):
        with pytest.raises(ArgumentError, match=message):
            cache.attend(q)
    with pytest.raises(ArgumentError, match="ids must"):
        cache.evict([10])


def test_the_table_takes_the_first_session_that_serves_and_gives_every_reason():
    relu_plan, soft = Plan(ReLUPower(2), None, None), Plan(Softmax(), None, None)
    assert preferred("session", device="cuda", plan=relu_plan) is ReluSession
    with pytest.raises(BackendUnavailable, match=r"no session serves this call: 'cuda' serves .*; 'relu' serves"):
        preferred("session", device="cuda", plan=soft)


@pytest.mark.gpu
def test_a_session_on_the_gpu_attends_and_replays():
    k, v = normal(2, 2, 5000, 128, dtype=torch.bfloat16), normal(2, 2, 5000, 128, seed=1, dtype=torch.bfloat16)
    weight = ReLUPower(2, 2.0)
    cache = DecodeSession(k, v, weight=weight)
    cache.append(k[:, :, :3], v[:, :, :3])
    cache.evict([7])
    assert (cache.n, cache.alive) == (5003, 5002)
    k, v = (torch.cat([part, part[:, :, :3]], 2) for part in (k, v))
    keep = np.broadcast_to(np.arange(5003) != 7, (16, 1, 5003))
    q = normal(2, 8, 1, 128, seed=2, dtype=torch.bfloat16)
    cache.attend(q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cache.attend(q)
    for seed in (3, 4):
        q.copy_(normal(2, 8, 1, 128, seed=seed, dtype=torch.bfloat16))
        found.output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for i in range(2):
            wanted, lse = dense(plain(q[i]), plain(k[i]), plain(v[i]), weight, 128**-0.5, keep=keep[:8])
            off = np.linalg.norm(plain(found.output[i]) - wanted, axis=-1)
            assert (off <= plain(found.certificate.output_error[i])).all()
            assert np.allclose(plain(found.lse[i]), lse, rtol=0, atol=1e-9)
