"""Sessions of decode selectors on the CPU: what they return, how they grow, what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from attention import DecodeSession, Dense, ReLUPower, audit, decode, prefill
from attention.chosen_reference import chosen
from attention.selectors import TopOracle
from attention.token_lists import TokenLists
from hsr import HSRIndex
from hsr.backend import named
from hsr.errors import ArgumentError, BackendUnavailable
from tests.decode_selectors import Stateless

ALL = TopOracle(10**6)


def inputs(h: int = 6, g: int = 2, n: int = 70, d: int = 8, dv: int = 5, seed: int = 0) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal(shape, np.float32) for shape in [(h, 1, d), (g, n, d), (g, n, dv)])


def test_attending_to_every_key_is_dense_attention() -> None:
    q, k, v = inputs()
    exact = decode(q, HSRIndex(k), v, policy=Dense(), scale=0.7)
    for found in (decode(q, k, v, policy=ALL, scale=0.7), DecodeSession(k, v, policy=ALL, scale=0.7).attend(q)):
        assert np.allclose(found.output, exact.output, atol=1e-6) and np.allclose(found.lse, exact.lse)
        assert found.output.dtype == np.float32 and found.output.shape == (6, 1, 5) and found.lse.shape == (6, 1)
        assert (found.counters.reported == 70).all() and found.n == 70 and not found.empty.any()
        assert found.certificate.kind == "none" and np.isinf(found.certificate.output_error).all()


def test_a_session_grows_and_is_as_if_made_at_once() -> None:
    q, k, v = inputs(n=50)
    session = DecodeSession(k[:, :1], v[:, :1], policy=TopOracle(9))
    place = 1
    for step in (0, 1, 1, 3, 20, 24):
        session.append(k[:, place : place + step], v[:, place : place + step])
        place += step
        whole = DecodeSession(k[:, :place], v[:, :place], policy=TopOracle(9)).attend(q)
        found = session.attend(q)
        assert np.allclose(found.output, whole.output, atol=1e-6) and (session.n, session.alive) == (place, place)
        assert np.array_equal(found.counters.reported, whole.counters.reported)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_batches_and_layouts(dtype: str) -> None:
    q, k, v = (torch.from_numpy(np.stack([x, 2 * x[..., ::-1]])).to(getattr(torch, dtype)) for x in inputs())
    before = [x.clone() for x in (q, k, v)]
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))  # as (B, n, g, d) lies
    session = DecodeSession(k, v, policy=TopOracle(20), queries=q)
    found = session.attend(q)
    assert found.output.dtype == q.dtype and found.output.shape == (2, 6, 1, 5) and isinstance(found.lse, np.ndarray)
    flat = [x.flatten(0, 1).double() for x in (q[:, :, 0], k, v)]
    lists = session.gpu.lists(q)
    true, lse = chosen(*flat, lists, 8**-0.5)
    error = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-6, "float64": 1e-14}[dtype]
    assert np.abs(found.output.double().numpy().reshape(true.shape) - true).max() <= 2 * error * np.abs(true).max()
    assert np.allclose(found.lse.ravel(), lse) and (found.counters.reported == 20).all()
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_arrays_that_cannot_be_written_are_served_and_never_held() -> None:
    q, k, v = inputs()
    wanted = decode(q, k, v, policy=ALL).output
    session = DecodeSession(k, v, policy=ALL)
    k[:], v[:] = 7, 7
    assert np.array_equal(session.attend(q).output, wanted)
    frozen = inputs()
    for x in frozen:
        x.flags.writeable = False
    assert np.array_equal(decode(*frozen, policy=ALL).output, wanted)


def test_a_method_asked_for_by_name_serves_or_refuses() -> None:
    q, k, v = inputs()
    found = [DecodeSession(k, v, policy=TopOracle(5), method=method).attend(q) for method in ("numba", "reference")]
    assert np.allclose(found[0].output, found[1].output) and np.allclose(found[0].lse, found[1].lse)
    with pytest.raises(BackendUnavailable, match="runs on cuda"):
        DecodeSession(k, v, policy=ALL, method="triton")
    with pytest.raises(ArgumentError, match="method must be one of numba, reference, triton; got 'tree'"):
        DecodeSession(k, v, policy=ALL, method="tree")


BAD = {
    "k must have the cache's dtype|k must have dtype": lambda q, k, v: (k.astype(np.int32), v, {}),
    "k must be finite": lambda q, k, v: (np.where(k > 2, np.nan, k), v, {}),
    "v must be finite": lambda q, k, v: (k, np.where(v > 1, np.inf, v), {}),
    r"v must be \(2, 70, 5\) to match k and the cache; got shape \(2, 69, 5\)": lambda q, k, v: (k, v[:, :-1], {}),
    "v must have the cache's dtype float32; got float64": lambda q, k, v: (k, v.astype(float), {}),
    r"k and v must have heads, tokens and widths of at least 1": lambda q, k, v: (k[:, :0], v[:, :0], {}),
    r"at least 1; got shapes \(2, 70, 8\) and \(2, 70, 0\)": lambda q, k, v: (k, v[..., :0], {}),
    r"k must be \(heads, rows, width\)": lambda q, k, v: (k[0], v[0], {}),
    "k must have keys of at most 1e[+]30": lambda q, k, v: (k * np.float32(1e31), v, {}),
    "v must have entries of at most 1e[+]30": lambda q, k, v: (k, v * np.float32(1e31), {}),
    "queries must have a positive multiple of 2 heads": lambda q, k, v: (k, v, {"queries": q[:3]}),
    "queries must have width 8": lambda q, k, v: (k, v, {"queries": q[..., :4]}),
    "scale must be in": lambda q, k, v: (k, v, {"scale": 0.0}),
    "policy must be None for ReLUPower": lambda q, k, v: (k, v, {"weight": ReLUPower(2)}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_caches_are_refused(message: str) -> None:
    k, v, options = BAD[message](*inputs())
    with pytest.raises(ArgumentError, match=message):
        DecodeSession(k, v, policy=ALL, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda q: q.repeat(2, axis=1),
            r"q must be one row a head for TopOracle.*, \(h, 1, d\); got shape \(6, 2, 8\)",
        ),
        (lambda q: q[:, :0], r"q must be one row a head"),
        (lambda q: q[:, 0], r"q must be one row a head|q must be \(heads, rows, width\)"),
        (lambda q: q[:, :, :7], "q must have width 8 to match k; got shape"),
        (lambda q: q[:5], "q must have a positive multiple of 2 heads to match keys; got 5"),
        (lambda q: q[:0], "q must have a positive multiple of 2 heads to match keys; got 0"),
        (lambda q: q[None], r"q must have the cache's batch \(\); got shape"),
        (lambda q: q.astype(np.float64), "q must have the cache's dtype float32; got float64"),
        (lambda q: q * np.nan, "q must be finite"),
        (lambda q: q * np.float32(1e32), "q and k must have scaled queries and scores of at most 1e[+]30 in float32"),
        (lambda q: [1.0], "q must be one row a head"),
    ],
)
def test_bad_queries_are_refused(change: Any, message: str) -> None:
    q, k, v = inputs()
    session = DecodeSession(k, v, policy=ALL)
    with pytest.raises(ArgumentError, match=message):
        session.attend(change(q))
    assert np.isfinite(session.attend(q).output).all()


def test_a_refused_append_changes_nothing_and_nothing_is_evicted() -> None:
    q, k, v = inputs()
    session = DecodeSession(k, v, policy=ALL)
    before = session.attend(q)
    for keys, values, message in (
        (k[:, :2], v[:, :2] * np.nan, "v must be finite"),
        (k[:, :2, :7], v[:, :2], r"k must be \(2, 't', 8\) to match the cache; got \(2, 2, 7\)"),
        (k[:1, :2], v[:1, :2], "k must be"),
        (k[:, :2], v[:, :3], "v must be"),
        (k[:, :2], v[:, :2, :4], "v must be"),
        (k[:, :2].astype(float), v[:, :2], "k must have the cache's dtype"),
        (torch.zeros(2, 2, 8, device="meta"), v[:, :2], "k must be on the CPU"),
    ):
        with pytest.raises(ArgumentError, match=message):
            session.append(keys, values)
    with pytest.raises(ArgumentError, match=r"ids must stay: TopOracle.* cannot evict; got 2 ids"):
        session.evict([0, 1])
    assert session.n == 70 and np.array_equal(session.attend(q).output, before.output)


@dataclass(frozen=True)
class Wrong(Stateless):
    """Lists of a shape or dtype that fits nothing."""

    lists: TokenLists

    def choose(self, q: Any, k: Any, v: Any) -> TokenLists:
        return self.lists


@pytest.mark.parametrize(
    ("lines", "kind", "message"),
    [(3, torch.int32, "lists must be 6 or 2 lines; got 3"), (2, torch.int64, "lists must be int32; got torch.int64")],
)
def test_lists_of_a_wrong_shape_are_told(lines: int, kind: torch.dtype, message: str) -> None:
    q, k, v = inputs()
    lists = TokenLists(torch.zeros(lines, 1, dtype=kind), torch.ones(lines, dtype=torch.int32))
    with pytest.raises(ArgumentError, match=message):
        DecodeSession(k, v, policy=Wrong(lists)).attend(q)


def test_what_serves_decode_does_not_serve_prompts_nor_the_other_way() -> None:
    q, k, v = inputs()
    with pytest.raises(ArgumentError, match=r"TopOracle.* it serves decode, step by step"):
        prefill(q, k, v, policy=ALL)
    with pytest.raises(ArgumentError, match=r"TopOracle.* it serves decode, step by step"):
        audit(q, k, v, ALL, causal=False)
    with pytest.raises(ArgumentError, match=r"index must be the keys.* got an HSRIndex"):
        decode(q, HSRIndex(k), v, policy=ALL)
    with pytest.raises(ArgumentError, match="index must be an HSRIndex unless a decode selector chooses; got ndarray"):
        decode(q, k, v, policy=Dense())
    with pytest.raises(ArgumentError, match="policy must be None for ReLUPower"):
        decode(q, k, v, policy=ALL, weight=ReLUPower(2))
    assert audit(q, k, v, decode(q, k, v, policy=ALL), causal=False).error.overall_mean < 1e-6
    plain = DecodeSession(k, v)._plan
    assert "decode selectors alone" in str(named("session", "selected").refusal("cpu", plan=plain))
