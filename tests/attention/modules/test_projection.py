"""SparseK against its definition: optimality, symmetry, gradients, causal prefixes, and the same by half-spaces."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.modules import causal_sparsek, reference, sparsek, sparsek_by_index
from hsr import ArgumentError, HSRIndex

KINDS = ("gaussian", "lattice", "steps", "narrow", "wide", "huge", "tiny", "repeated", "offset")


class Problem(NamedTuple):
    z: np.ndarray  # (m,)
    k: int


def scores(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    x = rng.standard_normal(shape)
    return {
        "gaussian": x,
        "lattice": np.round(x),  # entries just at 0 and 1, ties
        "steps": np.round(4 * x) / 4,
        "narrow": 1e-9 * x,
        "wide": 10.0 ** rng.integers(-6, 7, shape) * x,
        "huge": 1e37 * x,
        "tiny": 1e-42 * x,
        "repeated": x[..., :1] + np.zeros(shape),
        "offset": x + 1e6,
    }[kind]


@st.composite
def problems(draw: st.DrawFn, dtype: type = np.float64) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m = draw(st.one_of(st.integers(1, 6), st.integers(7, 60)))
    z = scores(rng, (m,), draw(st.sampled_from(KINDS))).astype(dtype)
    return Problem(z, draw(st.one_of(st.integers(0, m), st.sampled_from((0, 1, m)))))


def assert_optimal(p: np.ndarray, z: np.ndarray, k: int) -> None:
    """KKT, up to the rounding of z - p: feasible, and what could rise is no shorter than what could fall."""
    assert ((p >= 0) & (p <= 1)).all() and abs(p.sum() - k) <= 4e-16 * len(z) ** 2
    room = 8 * np.finfo(float).eps * (1 + np.abs(np.sort(z)[len(z) - max(k, 1)]))
    assert (z - p)[p < 1].max(initial=-np.inf) <= (z - p)[p > 0].min(initial=np.inf) + room


@settings(max_examples=120)
@given(problems())
def test_it_is_the_projection(problem: Problem) -> None:
    z, k = problem
    p = sparsek(torch.from_numpy(z), k).numpy()
    assert_optimal(p, z, k)
    gap = 1e-14 * (1 + np.abs(z).max() if np.abs(z).max() < 1e7 else np.inf)  # bisection cannot place tau closer
    assert np.abs(p - reference.sparsek(z, k)).max() <= gap


@settings(max_examples=40)
@given(problems(np.float32))
def test_float32_is_the_rounded_projection(problem: Problem) -> None:
    z, k = problem
    p = sparsek(torch.from_numpy(z), k)
    assert p.dtype == torch.float32
    exact = sparsek(torch.from_numpy(z.astype(np.float64)), k)
    assert torch.equal(p, exact.float())


@settings(max_examples=40)
@given(problems(), st.integers(0, 2**32 - 1))
def test_it_is_symmetric_and_ignores_a_shift(problem: Problem, seed: int) -> None:
    z, k = torch.from_numpy(problem.z), problem.k
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(z)))
    assert torch.equal(sparsek(z[order], k), sparsek(z, k)[order])
    near = torch.from_numpy(np.round(problem.z.clip(-1e3, 1e3) * 1024) / 1024)  # exact beside a shift of 4
    assert torch.allclose(sparsek(near + 4, k), sparsek(near, k), rtol=0, atol=1e-14)


@settings(max_examples=40)
@given(problems(), st.integers(0, 2**32 - 1), st.sampled_from((1e-9, 1e-2, 1.0)))
def test_it_moves_no_further_than_its_argument(problem: Problem, seed: int, size: float) -> None:
    z = torch.from_numpy(problem.z.clip(-1e6, 1e6))
    other = z + size * torch.from_numpy(np.random.default_rng(seed).standard_normal(len(z)))
    moved = (sparsek(other, problem.k) - sparsek(z, problem.k)).norm()
    assert moved <= (other - z).norm() * (1 + 1e-9) + 1e-9 * 1e-6


@settings(max_examples=20)
@given(problems(), st.integers(0, 2**32 - 1))
def test_no_other_feasible_point_is_nearer(problem: Problem, seed: int) -> None:
    z, k = problem.z.clip(-1e3, 1e3), problem.k
    p = sparsek(torch.from_numpy(z), k).numpy()
    rng = np.random.default_rng(seed)
    for _ in range(8):
        other = reference.sparsek(rng.standard_normal(len(z)) * rng.choice((0.1, 1.0, 10.0)), k)
        assert ((p - z) ** 2).sum() <= ((other - z) ** 2).sum() * (1 + 1e-12) + 1e-12


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_rows_of_a_batch_are_alone(seed: int, turned: bool) -> None:
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.standard_normal((4, 3, 9)))
    z = z.transpose(0, 2) if turned else z[:, ::2, ::2]  # (9, 3, 4) or (4, 2, 5), neither contiguous
    k = torch.from_numpy(rng.integers(0, z.shape[-1] + 1, z.shape[:-1]))
    before = z.clone()
    p = sparsek(z, k)
    assert torch.equal(z, before)
    for place in np.ndindex(*z.shape[:-1]):
        assert torch.equal(p[place], sparsek(z[place].contiguous(), int(k[place])))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 2), (1,), (1, 1)])
def test_small_and_empty_shapes(shape: tuple[int, ...]) -> None:
    z = torch.full(shape, 7.0, requires_grad=True)
    for k in (0, 1):
        p = sparsek(z, k)
        assert p.shape == z.shape and bool(((p.sum(-1) - k).abs() < 1e-6).all())
        (gradient,) = torch.autograd.grad(p.sum(), z)
        assert torch.equal(gradient, torch.zeros(shape))


def test_ends_ties_and_extremes() -> None:
    assert sparsek(torch.tensor([5.0, 5.0, 5.0, 1.0]), 2).tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0])
    assert sparsek(torch.tensor([3.0e38, -3.0e38, 3.0e38]), 1).tolist() == [0.5, 0.0, 0.5]
    assert sparsek(torch.tensor([1.7e308, -1.7e308], dtype=torch.float64), 1).tolist() == [1.0, 0.0]
    assert sparsek(torch.tensor([0.0, 1.0, 2.0]), 0).tolist() == [0.0] * 3
    assert sparsek(torch.tensor([0.0, 1.0, 2.0]), 3).tolist() == [1.0] * 3
    assert sparsek(torch.tensor([1.0, 0.0, 0.0]), 1).tolist() == [1.0, 0.0, 0.0]  # a kink: tau is 0 just so
    above = torch.tensor([1.0, np.nextafter(0, 1), 0.0], dtype=torch.float64)
    assert sparsek(above, 1).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("k", [1, 3])
def test_gradients_are_exact_away_from_kinks(k: int) -> None:
    torch.manual_seed(k)
    z = torch.randn(2, 6, dtype=torch.float64)
    p = sparsek(z, k)
    tau = (z - p)[(p > 0) & (p < 1)]
    assert tau.numel() and (p * (1 - p))[(p > 0) & (p < 1)].min() > 1e-3  # inside, so that a step meets no kink
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sparsek(x, k), z)
    assert torch.autograd.gradgradcheck(lambda x: sparsek(x, k), z)
    assert torch.autograd.gradcheck(lambda x: causal_sparsek(x, k, delay=1), z)


@settings(max_examples=50)
@given(problems(), st.integers(0, 2**32 - 1))
def test_the_gradient_is_that_of_the_formula(problem: Problem, seed: int) -> None:
    z = torch.from_numpy(problem.z).requires_grad_()
    p = sparsek(z, problem.k)
    g = np.random.default_rng(seed).standard_normal(len(problem.z))
    (found,) = torch.autograd.grad(p, z, torch.from_numpy(g))
    inside = ((p > 0) & (p < 1)).numpy()
    wanted = np.where(inside, g - (g[inside].mean() if inside.any() else 0), 0)
    assert np.allclose(found.numpy(), wanted, rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(0, 4), st.sampled_from(KINDS[:4]))
def test_a_causal_row_is_the_projection_of_its_prefix(seed: int, k: int, delay: int, kind: str) -> None:
    u = scores(np.random.default_rng(seed), (2, 8), kind)
    p = causal_sparsek(torch.from_numpy(u), k, delay=delay).numpy()
    assert p.shape == (2, 8, 8)
    for head in range(2):
        before = -np.inf
        for t in range(8):
            far = max(0, t + 1 - delay)
            assert (p[head, t, far:] == 0).all()
            if far:
                assert np.allclose(p[head, t, :far], reference.sparsek(u[head, :far], min(k, far)), rtol=0, atol=1e-13)
            if far > k > 0:  # tau never falls: what was dropped stays dropped
                tau = (u[head, :far] - p[head, t, :far])[p[head, t, :far] > 0].max()
                assert tau >= before - 1e-12
                before = tau


@pytest.mark.parametrize("method", ["reference", "tree", "sketch"])
@settings(max_examples=12)
@given(data=st.data())
def test_half_spaces_find_the_same_gates(method: str, data: Any) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    d, g, n = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 200))
    x, w = rng.standard_normal((g, n, d)), data.draw(st.sampled_from((0.1, 1.0, 5.0))) * rng.standard_normal((g, 3, d))
    if data.draw(st.booleans()):
        x, w = np.round(x), np.round(w)
    k, prefix = data.draw(st.integers(1, n)), rng.integers(0, n + 1, (g, 3))
    found = sparsek_by_index(HSRIndex(x, method=method), w, k, prefix=prefix)
    assert found.offsets[-1] == len(found.indices) == len(found.gates) and (found.gates > 0).all()
    for row, (head, i) in enumerate(np.ndindex(g, 3)):
        seen = int(prefix[head, i])
        part = slice(found.offsets[row], found.offsets[row + 1])
        gates = np.zeros(n)
        gates[found.indices[part]] = found.gates[part]
        u = x[head, :seen] @ w[head, i]
        wanted = reference.sparsek(u, min(k, seen)) if seen else np.zeros(0)
        assert np.allclose(gates[:seen], wanted, rtol=0, atol=1e-11) and not gates[seen:].any()
        if seen > k:  # the kept set is the half-space above tau
            assert np.allclose(np.clip(u - found.tau[head, i], 0, 1), wanted, rtol=0, atol=1e-11)


def test_half_spaces_read_few_keys_on_the_line() -> None:
    x = np.random.default_rng(0).standard_normal((20_000, 2))
    index = HSRIndex(x, method="tree")
    best = index.topk(np.array([[3.0, 1.0]]), 50)
    near = index.query(np.array([[3.0, 1.0]]), best.scores[-1] - 1)
    assert len(sparsek_by_index(index, np.array([[3.0, 1.0]]), 50).indices) <= near.counts[0] < 500
    assert near.scanned[0] + near.visited[0] < 5_000


def test_wrong_arguments_are_named() -> None:
    z = torch.zeros(2, 3)
    for wrong, k, message in [
        (z.half(), 1, "z must be a float32 or float64 tensor; got torch.float16"),
        (np.zeros(3), 1, "z must be a float32 or float64 tensor; got float64"),
        (torch.zeros(()), 0, r"z must have at least one entry on its last axis; got shape \(\)"),
        (torch.zeros(2, 0), 0, r"z must have at least one entry on its last axis; got shape \(2, 0\)"),
        (torch.tensor([0.0, torch.nan]), 1, "z must be finite; got nan"),
        (torch.tensor([0.0, torch.inf]), 1, "z must be finite; got inf"),
        (z, 4, r"k must be in 0\.\.3; got 4"),
        (z, -1, r"k must be in 0\.\.3; got -1"),
        (z, 1.5, "k must be a whole number; got 1.5"),
        (z, torch.tensor([1, 4]), r"k must lie in 0\.\.3; got 1\.\.4"),
        (z, torch.tensor([1]), r"k must be a whole number or int64 of shape \(2,\) to match z; got \(1,\)"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            sparsek(wrong, k)
    for name, k, delay in [("k", -1, 0), ("delay", 1, -1), ("k", True, 0)]:
        with pytest.raises(ArgumentError, match=f"^{name} must be"):
            causal_sparsek(z, k, delay=delay)
    with pytest.raises(ArgumentError, match=r"k must be in 1\.\.3; got 0"):
        sparsek_by_index(HSRIndex(np.zeros((3, 2))), np.zeros((1, 2)), 0)
