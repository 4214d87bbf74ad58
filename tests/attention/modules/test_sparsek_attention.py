"""SparseK attention: the dense form against the reference, steps and half-spaces against the dense form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.modules import SparseKAttention, SparseKCache, reference
from hsr import ArgumentError
from tests.attention.modules.training import trained


def layer(seed: int, dtype: torch.dtype = torch.float64, **changes: Any) -> SparseKAttention:
    torch.manual_seed(seed)
    settings = {"width": 12, "heads": 4, "k": 3, "window": 2, "key_heads": 2, "dtype": dtype} | changes
    return SparseKAttention(**settings)


def projected(module: SparseKAttention, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """One sequence x (T, width) -> q (h, T, d), k, v (g, T, d), u (g, T), by numpy from the weights."""
    weights = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
    q, k, v = (
        (x @ weights[f"{name}.weight"].T).reshape(len(x), -1, module.head_width).transpose(1, 0, 2)
        for name in ("query", "key", "value")
    )
    return q, k, v, weights["score.weight"] @ x.T + module.slope * np.arange(len(x))


def expected(module: SparseKAttention, x: np.ndarray) -> tuple[np.ndarray, list[list[list[int]]]]:
    output, kept = reference.sparsek_attention(*projected(module, x), module.k, module.window)
    mixed = output.transpose(1, 0, 2).reshape(len(x), -1)
    return mixed @ module.out.weight.detach().double().numpy().T, kept


SHAPES = st.fixed_dictionaries(
    {
        "k": st.integers(1, 6),
        "window": st.integers(0, 5),
        "key_heads": st.sampled_from((1, 2, 4, None)),
        "slope": st.sampled_from((0.0, 0.3)),
    }
)


@settings(max_examples=20)
@given(st.integers(0, 10**6), SHAPES, st.integers(1, 20), st.sampled_from((0.3, 1.0, 8.0)))
def test_the_dense_form_is_the_definition(seed: int, changes: dict[str, Any], length: int, size: float) -> None:
    module = layer(seed, **changes)
    x = size * torch.randn(2, length, 12, dtype=torch.float64)
    output = module(x).detach().numpy()
    for b in range(2):
        assert np.allclose(output[b], expected(module, x[b].numpy())[0], rtol=1e-9, atol=1e-10)


@settings(max_examples=8)
@given(st.integers(0, 10**6), SHAPES, st.integers(2, 18), st.data())
def test_steps_give_the_dense_rows_from_constant_memory(
    seed: int, changes: dict[str, Any], length: int, data: st.DataObject
) -> None:
    module = layer(seed, **changes)
    x = 3 * torch.randn(2, length, 12, dtype=torch.float64)
    start = data.draw(st.integers(1, length - 1))
    with torch.no_grad():
        whole = module(x)
        output, cache = module.prompt(x[:, :start])
        assert torch.equal(output, module(x[:, :start])) and torch.allclose(output, whole[:, :start], atol=1e-12)
        for t in range(start, length):
            before = [x.clone() for x in (*cache.far, *cache.near, cache.scores)]
            found, following = module.step(x[:, t], cache)
            assert torch.allclose(found, whole[:, t], rtol=1e-9, atol=1e-10)
            assert all(map(torch.equal, before, (*cache.far, *cache.near, cache.scores)))
            assert following.far.k.shape[2] <= module.k and following.near.k.shape[2] <= module.window
            cache = following
    assert cache.left + cache.near.k.shape[2] == length
    for b in range(2):
        _, k, _, u = projected(module, x[b].numpy())
        kept = expected(module, x[b].numpy())[1]
        for head in range(len(k)):
            wanted = kept[head][length - 1]
            assert np.allclose(cache.far.k[b, head], k[head, wanted]) and np.allclose(
                cache.far.u[b, head], u[head, wanted]
            )


def test_the_cache_of_a_prompt_is_that_of_its_steps() -> None:
    module = layer(3, slope=0.05)
    x = torch.randn(3, 40, 12, dtype=torch.float64)
    with torch.no_grad():
        _, cache = module.prompt(x[:, :1])
        for t in range(1, 40):
            _, cache = module.step(x[:, t], cache)
        _, direct = module.prompt(x)
    assert cache.left == direct.left
    for mine, other in ((cache.far, direct.far), (cache.near, direct.near)):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, other, strict=True))
    assert torch.allclose(cache.scores.sort().values, direct.scores.sort().values)


def test_a_key_that_leaves_never_returns_and_gates_are_not_in_the_cache() -> None:
    module = layer(4, window=1)
    x = 2 * torch.randn(1, 60, 12, dtype=torch.float64)
    kept = expected(module, x[0].numpy())[1]
    for head in kept:
        for t in range(1, 60):
            assert set(head[t]) <= set(head[t - 1]) | {t - 1}
    with torch.no_grad():
        _, k, _, _ = projected(module, x[0].numpy())
        _, cache = module.prompt(x)
        assert np.allclose(cache.far.k[0, 0], k[0, kept[0][59]])  # as projected, whatever their gates


def test_few_keys_are_plain_causal_attention() -> None:
    module = layer(5, k=7, window=3, key_heads=4)
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    q, k, v = (f(x).unflatten(2, (4, 3)).transpose(1, 2) for f in (module.query, module.key, module.value))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(module(x), module.out(plain.transpose(1, 2).flatten(2)))


def test_later_tokens_change_nothing_and_sequences_are_alone() -> None:
    module = layer(6)
    x = torch.randn(2, 25, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 15:] = 9
    changed[1] = -4
    assert torch.allclose(module(x)[0, :15], module(changed)[0, :15], rtol=0, atol=1e-13)


def test_equal_scores_keep_the_older_keys() -> None:
    module = layer(7, window=0)
    torch.nn.init.zeros_(module.score.weight)
    x = torch.randn(1, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x)
        output, cache = module.prompt(x[:, :3])
        for t in range(3, 12):
            output, cache = module.step(x[:, t], cache)
            assert torch.allclose(output, whole[:, t])
        keys = module.key(x[:, :3]).unflatten(2, (2, 3)).transpose(1, 2)
        assert torch.equal(cache.far.k, keys) and cache.scores.shape[2] == 12  # all within 1: tau needs them all
        direct = module.prompt(x)[1]
        assert torch.equal(direct.far.k, keys)


def test_a_slope_bounds_the_scores_that_are_held() -> None:
    module = layer(8, slope=0.5)
    x = torch.randn(1, 150, 12, dtype=torch.float64)
    with torch.no_grad():
        assert module.prompt(x)[1].scores.shape[2] < 30


def test_float32() -> None:
    module = layer(9, torch.float32)
    x = torch.randn(2, 30, 12)
    with torch.no_grad():
        whole = module(x)
        _, cache = module.prompt(x[:, :29])
        last, _ = module.step(x[:, 29], cache)
    assert last.dtype == torch.float32 and torch.allclose(last, whole[:, 29], atol=1e-5)
    assert np.allclose(whole[0].numpy(), expected(module, x[0].double().numpy())[0], atol=1e-4)


def test_gradients_are_exact_away_from_kinks() -> None:
    module = layer(10, width=4, heads=2, key_heads=1, k=2, window=1, slope=0.1)
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)


def test_wrong_arguments_are_named() -> None:
    module = layer(0)
    x = torch.zeros(2, 5, 12, dtype=torch.float64)
    cache = module.prompt(x)[1]
    assert isinstance(cache, SparseKCache)
    for call, message in [
        (lambda: SparseKAttention(12, 5, 1, 1), "width must be a multiple of heads, 5; got 12"),
        (lambda: SparseKAttention(12, 4, 1, 1, key_heads=3), "heads must be a multiple of key_heads, 3; got 4"),
        (lambda: SparseKAttention(12, 4, 0, 1), "k must be at least 1; got 0"),
        (lambda: SparseKAttention(12, 4, 1, -1), "window must be at least 0; got -1"),
        (lambda: SparseKAttention(12, 4, 1, 1, slope=-1.0), r"slope must be in \[0.0, inf\); got -1.0"),
        (lambda: module(x.float()), r"x must be \(B, T, 12\) of float64; got \(2, 5, 12\) of float32"),
        (lambda: module(x[..., :3]), r"x must be \(B, T, 12\) of float64; got \(2, 5, 3\) of float64"),
        (lambda: module(x[:, :0]), r"x must be \(B, T, 12\) of float64; got \(2, 0, 12\)"),
        (lambda: module(x[0]), r"x must be \(B, T, 12\) of float64; got \(5, 12\)"),
        (lambda: module(x.numpy()), r"x must be a tensor \(B, T, 12\) of float64; got ndarray"),
        (lambda: module(x + torch.nan), "x must be finite; got nan"),
        (lambda: module(x + 1.7e308), "the score of x must be finite; got -?inf"),
        (lambda: module.step(x[:, 0] + torch.inf, cache), "x must be finite; got inf"),
        (lambda: module.step(x[:1, 0], cache), r"x must be \(2, 12\) of float64; got \(1, 12\)"),
        (lambda: module.prompt(x.to("meta")), "x must be on the CPU; got device meta"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()


@pytest.mark.slow
def test_it_learns_which_tokens_to_keep() -> None:
    """A marked token is shown early, among many; the last one asks for it, far outside the window."""
    torch.manual_seed(0)
    kinds, length = 4, 16
    embed = torch.nn.Embedding(2 * kinds + 1, 16)
    module = SparseKAttention(16, 2, k=2, window=2)
    read = torch.nn.Linear(16, kinds)

    def loss() -> torch.Tensor:
        tokens = torch.randint(kinds, (32, length))
        wanted, place = torch.randint(kinds, (32,)), torch.randint(length - 6, (32,))
        tokens[torch.arange(32), place] = kinds + wanted  # the marked one
        tokens[:, -1] = 2 * kinds
        x = embed(tokens)
        return torch.nn.functional.cross_entropy(read((x + module(x))[:, -1]), wanted)

    first, last = trained(torch.nn.ModuleList([embed, module, read]), loss, steps=60, rate=1e-2)
    assert first > 1.3 and last < 0.05
