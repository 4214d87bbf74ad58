"""Compositional attention: the dense form against the reference, the sparse forms against the dense one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Certified, Dense, TopR
from attention.modules import Composed, CompositionalAttention, reference
from hsr import ArgumentError
from tests.attention.modules.training import trained

SHAPES = st.fixed_dictionaries(
    {
        "searches": st.sampled_from((1, 2, 4)),
        "retrievals": st.integers(1, 3),
        "search_width": st.sampled_from((None, 5)),
        "retrieval_width": st.sampled_from((None, 1, 6)),
    }
)


def layer(seed: int, dtype: torch.dtype = torch.float64, **changes: Any) -> CompositionalAttention:
    torch.manual_seed(seed)
    return CompositionalAttention(**{"width": 8, "searches": 2, "retrievals": 3, "dtype": dtype} | changes)


def expected(module: CompositionalAttention, x: np.ndarray, causal: bool) -> np.ndarray:
    """One sequence x (T, width), by numpy from the weights."""
    weights = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
    q, k, v, asked = (
        (x @ weights[f"{name}.weight"].T).reshape(len(x), count, -1).transpose(1, 0, 2)
        for name, count in [
            ("query", module.searches),
            ("key", module.searches),
            ("value", module.retrievals),
            ("retrieval_query", module.searches),
        ]
    )
    mixed = reference.compositional(q, k, v, asked, weights["retrieval_key.weight"], causal)
    return mixed.transpose(1, 0, 2).reshape(len(x), -1) @ weights["out.weight"].T


@settings(max_examples=30)
@given(st.integers(0, 10**6), SHAPES, st.integers(1, 12), st.booleans(), st.sampled_from((0.1, 1.0, 20.0)))
def test_the_dense_form_is_the_definition(
    seed: int, changes: dict[str, Any], length: int, causal: bool, size: float
) -> None:
    module = layer(seed, **changes)
    x = size * torch.randn(2, length, 8, dtype=torch.float64)
    output = module(x, causal=causal).detach().numpy()
    for b in range(2):
        assert np.allclose(output[b], expected(module, x[b].numpy(), causal), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", [Dense(), Certified(0.0)], ids=["dense", "certified"])
@pytest.mark.parametrize("causal", [False, True])
def test_exact_policies_give_the_dense_rows(policy: Dense | Certified, causal: bool) -> None:
    module = layer(1, retrieval_width=3, search_width=6)
    x = 3 * torch.randn(2, 70, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x, causal=causal)
        found = module.sparse(x, causal=causal, policy=policy)
    assert torch.allclose(found.output, whole, rtol=1e-10, atol=1e-11)
    assert found.searches.output.shape == (2, 2, 70, 12) and found.searches.certificate.dropped_mass.max() == 0
    assert (found.error < 1e-9).all()


@settings(max_examples=16)
@given(
    st.integers(0, 10**6),
    SHAPES,
    st.sampled_from((Certified(0.3), Certified(0.01), TopR(2), TopR(20))),
    st.sampled_from((0.5, 2.0, 10.0)),
)
def test_the_error_is_within_its_bound(
    seed: int, changes: dict[str, Any], policy: Certified | TopR, size: float
) -> None:
    module = layer(seed, **changes)
    x = size * torch.randn(2, 60, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x, causal=True)
        found = module.sparse(x, causal=True, policy=policy)
    off = (found.output - whole).norm(dim=-1).numpy()
    assert (off <= found.error + 1e-12 * (1 + whole.norm(dim=-1).numpy())).all()
    assert found.searches.certificate.dropped_mass.shape == (2, module.searches, 60)
    if isinstance(policy, Certified):
        assert found.searches.certificate.dropped_mass.max() <= policy.eps


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from((1e-6, 1e-3, 0.1, 1.0)), st.sampled_from((0.1, 1.0, 30.0, 1000.0)))
def test_the_bound_holds_where_an_error_turns_the_second_softmax(seed: int, size: float, sharp: float) -> None:
    off, found, first = conspired(seed, size, sharp)
    assert (off <= found.error * (1 + 1e-9) + 1e-12).all()
    assert (found.error >= first * (1 - 1e-12)).all()


def test_the_second_softmax_can_make_an_error_larger() -> None:
    off, _, first = conspired(0, 0.1, 1000.0)
    assert (off > 2 * first).any()


def conspired(seed: int, size: float, sharp: float) -> tuple[np.ndarray, Composed, np.ndarray]:
    """Searches off by ``size`` towards one retrieval: the output's error, what was found, a bound without turning."""
    module = layer(seed)
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        module.retrieval_query.weight *= sharp
        exact = module.sparse(x, policy=Dense())
        towards = module.retrieval_query(x).unflatten(2, (2, -1)).transpose(1, 2) @ module.retrieval_key.weight
        push = torch.stack([-towards, towards, 0 * towards], dim=3).flatten(3)  # of R = 3
        push *= size / push.norm(dim=-1, keepdim=True)
        certificate = replace(exact.searches.certificate, output_error=np.full((1, 2, 12), size))
        pushed = replace(exact.searches, output=exact.searches.output + push, certificate=certificate)
        found = module.composed(x, pushed)
        norm = float(torch.linalg.matrix_norm(module.out.weight, 2))
    return (found.output - exact.output).norm(dim=-1).numpy(), found, norm * size * np.full((1, 12), np.sqrt(2))


def test_the_bound_tightens_with_the_policy() -> None:
    module = layer(2)
    x = 3 * torch.randn(1, 200, 8, dtype=torch.float64)
    errors = [module.sparse(x, policy=Certified(eps)).error.mean() for eps in (0.1, 0.001, 1e-6)]
    assert errors[0] > 50 * errors[1] > 2500 * errors[2]


def test_a_session_decodes_the_causal_rows() -> None:
    module = layer(3, torch.float32, searches=4, retrievals=2)
    x = torch.randn(3, 40, 8)
    with torch.no_grad():
        whole = module(x, causal=True)
    session = module.session(x[:, :10], policy=Dense())
    for t in range(10, 20):
        found = session.step(x[:, t : t + 1])
        assert torch.allclose(found.output[:, 0], whole[:, t], atol=1e-5) and not found.output.requires_grad
    session.append(x[:, 20:])
    assert session.n == 40
    assert torch.allclose(session.attend(x[:, 38:]).output[:, 1], whole[:, 39], atol=1e-5)
    assert session.attend(x[:, 38:]).output.shape == (3, 2, 8) and session.n == 40


def test_each_search_runs_once_and_sparsely() -> None:
    module = layer(4)
    with torch.no_grad():
        module.query.weight *= 30  # so that attention is peaked
    x = torch.randn(1, 2000, 8, dtype=torch.float64)
    found = module.session(x[:, :1999], policy=Certified(0.01)).step(x[:, 1999:])
    with torch.no_grad():
        off = (found.output[:, 0] - module(x[:, -2000:], causal=True)[:, -1]).norm(dim=-1).numpy()
    assert found.searches.counters.reported.shape == (1, 2, 1) and found.searches.counters.reported.max() < 1000
    assert (off <= found.error[:, 0]).all()


def test_tokens_may_be_permuted_and_retrievals_relabelled() -> None:
    module = layer(5)
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    order = torch.randperm(20)
    assert torch.allclose(module(x[:, order]), module(x)[:, order])
    before = module(x)
    with torch.no_grad():
        module.value.weight.copy_(module.value.weight.reshape(3, 4, 8)[[2, 0, 1]].reshape(12, 8))
    assert torch.allclose(module(x), before)


def test_one_retrieval_is_attention_with_shared_values() -> None:
    module = layer(6, retrievals=1)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    q, k, v = module.parts(x)
    assert v.shape == (2, 2, 9, 4) and v.stride(1) == 0
    plain = (q @ k.transpose(2, 3) / 2).softmax(dim=-1) @ v
    assert torch.allclose(module(x), module.out(plain.transpose(1, 2).flatten(2)))


def test_gradients_are_exact() -> None:
    module = layer(7)
    assert torch.autograd.gradcheck(module, torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True))


def test_wrong_arguments_are_named() -> None:
    module = layer(0)
    x = torch.zeros(2, 5, 8, dtype=torch.float64)
    session = module.session(x)
    for call, message in [
        (lambda: CompositionalAttention(8, 3, 1), "width must be a multiple of searches, 3; got 8"),
        (lambda: CompositionalAttention(8, 2, 0), "retrievals must be at least 1; got 0"),
        (lambda: CompositionalAttention(8, 2, 1, search_width=0), "search_width must be at least 1; got 0"),
        (
            lambda: CompositionalAttention(8, 2, 1, retrieval_width=1.5),
            "retrieval_width must be a whole number; got 1.5",
        ),
        (lambda: module(x.float()), r"x must be \(B, T, 8\) of float64; got \(2, 5, 8\) of float32"),
        (lambda: module(x[:, :0]), r"x must be \(B, T, 8\) of float64; got \(2, 0, 8\)"),
        (lambda: module(x * torch.nan), "x must be finite; got nan"),
        (lambda: module.sparse(x.to("meta")), "x must be on the CPU; got device meta"),
        (lambda: module.session(x.to("meta")), "x must be on the CPU; got device meta"),
        (lambda: module.sparse(x, policy=3), "policy must be Dense"),
        (lambda: session.step(x), r"x must be \(2, 1, 8\) of float64; got \(2, 5, 8\)"),
        (lambda: session.step(x[:1, :1]), r"x must be \(2, 1, 8\) of float64; got \(1, 1, 8\)"),
        (lambda: session.append(x[..., :4]), r"x must be \(2, t, 8\) of float64; got \(2, 5, 4\)"),
        (lambda: session.attend(x[:1]), r"x must be \(2, m, 8\) of float64; got \(1, 5, 8\)"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()
    assert session.n == 5


@pytest.mark.slow
def test_it_learns_to_choose_what_to_retrieve() -> None:
    """Each token has a key and two values; the asking token names a key and which of its values it wants."""
    torch.manual_seed(0)
    module = CompositionalAttention(16, searches=2, retrievals=2)
    enter, read = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

    def loss() -> torch.Tensor:
        rows = torch.arange(32)
        x = torch.zeros(32, 5, 8)
        bits = torch.randint(2, (32, 4, 2))
        x[:, :4, :4] = torch.eye(4)
        x[:, :4, 4:6] = 2.0 * bits - 1
        asked, which = torch.randint(4, (32,)), torch.randint(2, (32,))
        x[rows, 4, asked] = 1
        x[rows, 4, 6 + which] = 1
        given = read(module(enter(x))[:, 4])
        return torch.nn.functional.cross_entropy(given, 2 * which + bits[rows, asked, which])

    first, last = trained(torch.nn.ModuleList([enter, module, read]), loss, steps=150, rate=2e-2)
    assert first > 1.2 and last < 0.1
