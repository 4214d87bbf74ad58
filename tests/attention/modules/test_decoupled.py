"""Search by narrow keys: sessions and the two tables against the reference, ragged histories, full attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.modules import DecoupledAttention, DecoupledSession, decode_by_index, reference
from attention.reference import dense
from attention.weights import Softmax
from hsr import ArgumentError, HSRIndex
from tests.attention.modules.training import trained


def layer(seed: int, dtype: torch.dtype = torch.float64, **changes: Any) -> DecoupledAttention:
    torch.manual_seed(seed)
    given = {"items": 40, "attention_width": 3, "representation_width": 6, "r": 4, "dtype": dtype} | changes
    return DecoupledAttention(**given)


@settings(max_examples=30)
@given(st.data())
def test_a_session_is_the_definition(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    batch, n, m = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 80)), data.draw(st.integers(0, 3))
    width, wide, r = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 30))
    size = data.draw(st.sampled_from((0.1, 1.0, 10.0)))
    keys, values, q = (rng.standard_normal(s) for s in ((batch, n, width), (batch, n, wide), (batch, m, width)))
    q *= size
    lengths = rng.integers(0, n + 1, batch)
    result = DecoupledSession(keys, values, r, lengths=lengths).attend(q)
    assert result.output.shape == (batch, m, wide)
    for b, seen in enumerate(lengths):
        assert np.allclose(result.output[b], reference.decoupled(q[b], keys[b, :seen], values[b, :seen], r))
        assert (result.counters.reported[b] == min(r, seen)).all() and (result.empty[b] == (seen == 0)).all()
        if seen:
            whole = dense(q[b : b + 1], keys[b : b + 1, :seen], values[b : b + 1, :seen], Softmax(), width**-0.5)[0]
            off = np.linalg.norm(result.output[b] - whole[0], axis=-1)
            assert (off <= result.certificate.output_error[b] + 1e-12).all()


def test_an_empty_history_is_zero_not_uniform() -> None:
    values = np.full((2, 5, 3), 7.0)
    result = DecoupledSession(np.ones((2, 5, 2)), values, 3, lengths=[0, 2]).attend(np.ones((2, 1, 2)))
    assert (result.output[0] == 0).all() and result.empty.tolist() == [[True], [False]]
    assert np.allclose(result.output[1], 7) and np.isneginf(result.lse[0, 0])
    module = layer(0)
    history, targets = torch.randint(40, (2, 9)), torch.randint(40, (2, 3))
    features = module(history, targets, torch.tensor([0, 9]))
    assert (features[0, :, 6:] == 0).all() and (features[1, :, 6:12] != 0).any()
    assert torch.equal(features[..., :6], module.representation(targets))
    (gradient,) = torch.autograd.grad(features[0].sum(), module.attention.weight)
    assert (gradient == 0).all()  # and no NaN


def test_a_growing_session_is_one_made_whole() -> None:
    rng = np.random.default_rng(1)
    keys, values, q = (rng.standard_normal(s).astype(np.float32) for s in ((2, 600, 4), (2, 600, 16), (2, 3, 4)))
    session = DecoupledSession(keys[:, :500], values[:, :500], 20)
    session.append(keys[:, 500:], values[:, 500:])
    whole = DecoupledSession(keys, values, 20)
    assert np.allclose(session.attend(q).output, whole.attend(q).output, atol=1e-6)
    assert session.lengths.tolist() == [600, 600] and session.index.n == 600


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9), st.data())
def test_the_dense_form_is_the_definition_and_the_search(seed: int, n: int, r: int, data: st.DataObject) -> None:
    module = layer(seed, r=r)
    history = torch.stack([torch.randperm(40)[:n] for _ in range(3)])  # ties between different items are unlikely
    targets, lengths = torch.randint(40, (3, 2)), torch.randint(n + 1, (3,))
    with torch.no_grad():
        features = module(history, targets, lengths)
        attention, represent = module.attention.weight.numpy(), module.representation.weight.numpy()
    for b in range(3):
        seen, wanted = history[b, : lengths[b]].numpy(), targets[b].numpy()
        pooled = reference.decoupled(attention[wanted], attention[seen], represent[seen], r)
        target = represent[wanted]
        assert np.allclose(features[b].numpy(), np.concatenate([target, pooled, target * pooled], axis=1))
    found = module.search(module.session(history, lengths), targets)
    assert torch.allclose(found, features, rtol=1e-9, atol=1e-11) and not found.requires_grad


def test_padding_and_order_change_nothing() -> None:
    module = layer(2)
    history, targets, lengths = torch.randperm(40)[:12][None], torch.randint(40, (1, 3)), torch.tensor([8])
    before = module(history, targets, lengths)
    changed = torch.cat([history[:, :8].flip(1), torch.randint(40, (1, 4))], dim=1)
    assert torch.allclose(module(changed, targets, lengths), before)
    turned = module(history, targets.flip(1), lengths)
    assert torch.allclose(turned, before.flip(1))


def test_gradients_are_exact() -> None:
    module = layer(3, items=6, r=3)
    history, targets, lengths = (
        torch.tensor([[0, 1, 2, 3, 4], [5, 4, 0, 0, 0]]),
        torch.tensor([[5], [1]]),
        torch.tensor([5, 2]),
    )

    def run(attention: torch.Tensor, represent: torch.Tensor) -> torch.Tensor:
        weights = {"attention.weight": attention, "representation.weight": represent}
        return torch.func.functional_call(module, weights, (history, targets, lengths))

    tables = [x.detach().requires_grad_() for x in (module.attention.weight, module.representation.weight)]
    assert torch.autograd.gradcheck(run, tables)


@settings(max_examples=20)
@given(st.data())
def test_full_attention_over_what_narrow_keys_choose(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    g, group, m = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    n, narrow, d = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 5)), data.draw(st.integers(6, 12))
    index_k, k, v = (rng.standard_normal((g, n, w)) for w in (narrow, d, 7))
    index_q, q = (3 * rng.standard_normal((g * group, m, w)) for w in (narrow, d))
    r = data.draw(st.integers(1, n))
    result = decode_by_index(index_q, HSRIndex(index_k), q, k, v, r)
    assert np.allclose(result.output, reference.decode_by_index(index_q, index_k, q, k, v, r))
    assert (result.counters.reported == r).all() and result.certificate.kind == "none"
    if r == n:
        output, lse = dense(q, k, v, Softmax(), d**-0.5)
        assert np.allclose(result.output, output) and np.allclose(result.lse, lse)


def test_batches_fold_into_heads_and_tensors_come_back() -> None:
    torch.manual_seed(0)
    index_k, k, v = (torch.randn(2, 2, 300, w) for w in (8, 64, 48))
    index_q, q = (torch.randn(2, 4, 1, w) for w in (8, 64))
    before = [x.clone() for x in (index_q, q, k, v)]
    result = decode_by_index(index_q, HSRIndex(index_k.flatten(0, 1)), q, k, v, 32, scale=0.3)
    assert result.output.shape == (2, 4, 1, 48) and result.output.dtype == torch.float32
    assert all(map(torch.equal, before, (index_q, q, k, v)))
    for b in range(2):
        arrays = [x[b].double().numpy() for x in (index_q, index_k, q * 0.3 * 8, k, v)]
        assert np.allclose(result.output[b], reference.decode_by_index(*arrays, 32), atol=1e-5)


def test_wrong_arguments_are_named() -> None:
    rng = np.random.default_rng(0)
    keys, values, q = (rng.standard_normal(s) for s in ((2, 9, 3), (2, 9, 5), (2, 1, 3)))
    session, ragged = DecoupledSession(keys, values, 4), DecoupledSession(keys, values, 4, lengths=[9, 3])
    module, history, targets = layer(0), torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
    lengths, index = torch.tensor([9, 0]), HSRIndex(keys)
    full: dict[str, Any] = {
        "index_q": rng.random((4, 1, 3)),
        "index": index,
        "q": rng.random((4, 1, 6)),
        "k": rng.random((2, 9, 6)),
        "v": values,
        "r": 3,
    }
    dead = HSRIndex(keys)
    dead.delete([0])

    def by_index(**changes: Any) -> None:
        decode_by_index(**full | changes)

    by_index()
    for call, message in [
        (lambda: DecoupledSession(keys, values, 0), "r must be at least 1; got 0"),
        (lambda: DecoupledSession(keys[0], values, 1), "index_keys must have 3 axes; got shape"),
        (lambda: DecoupledSession(keys[:, :0], values[:, :0], 1), "index_keys must have no axis of 0"),
        (
            lambda: DecoupledSession(keys, values[:, 1:], 1),
            r"values must be \(2, 9, dv\) of float64 to match index_keys",
        ),
        (lambda: DecoupledSession(keys, values.astype(np.float32), 1), r"got \(2, 9, 5\) of float32"),
        (lambda: DecoupledSession(keys * np.nan, values, 1), "index_keys must be finite; got nan"),
        (lambda: DecoupledSession(keys, values, 1, lengths=[10, 0]), r"lengths must lie in 0\.\.9; got 0\.\.10"),
        (lambda: DecoupledSession(keys, values, 1, lengths=[1.5, 0]), "lengths must be whole numbers; got float64"),
        (lambda: session.attend(q[:1]), r"index_q must be \(2, m, 3\); got shape \(1, 1, 3\)"),
        (lambda: session.attend(q[..., :2]), r"index_q must be \(2, m, 3\); got shape \(2, 1, 2\)"),
        (lambda: session.append(keys, values[:, 1:]), r"values must be \(2, 9, 'dv'\) to match index_keys"),
        (lambda: session.append(keys[..., :2], values), r"keys must be \(2, t, 3\) to match the index"),
        (lambda: ragged.append(keys, values), r"lengths must all be 9 to append; got \[9, 3\]"),
        (lambda: layer(0, items=0), "items must be at least 1; got 0"),
        (
            lambda: module(history.float(), targets, lengths),
            r"history must be \(B, n\) of int64; got \(2, 9\) of float32",
        ),
        (lambda: module(history + 40, targets, lengths), r"history must lie in 0\.\.39; got 40\.\.40"),
        (lambda: module(history, targets[:1], lengths), r"targets must be \(2, n\) of int64; got \(1, 1\)"),
        (lambda: module(history, targets - 1, lengths), r"targets must lie in 0\.\.39; got -1\.\.-1"),
        (lambda: module(history, targets, lengths[:1]), r"lengths must be \(2\) of int64; got \(1,\)"),
        (lambda: module(history, targets, lengths + 1), r"lengths must lie in 0\.\.9; got 1\.\.10"),
        (lambda: module.session(history.to("meta"), lengths), "history must be on the CPU; got device meta"),
        (lambda: by_index(k=full["k"][:1]), "k and v must have 2 heads of 9 keys, as the index"),
        (
            lambda: by_index(v=values.astype(np.float32)),
            "q, k and v must have one dtype; got float64, float64, float32",
        ),
        (lambda: by_index(q=full["q"][..., :5]), "q must be 6 wide"),
        (lambda: by_index(index_q=rng.random((2, 1, 3))), "one for each index_q"),
        (lambda: by_index(q=full["q"][None], index_q=rng.random((1, 4, 1, 3))), "of the batch of k"),
        (lambda: by_index(index=dead), "index must hold every key; got one with 1 of 9 deleted"),
        (lambda: by_index(r=10), r"r must lie in 1\.\.9; got 10\.\.10"),
        (lambda: by_index(scale=0.0), "scale must be in"),
        (lambda: by_index(q=full["q"] * 1e200, k=full["k"] * 1e200), "q and k must have scores within float64"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()
    assert session.index.n == 9 and np.array_equal(session.lengths, [9, 9])


@pytest.mark.slow
def test_it_learns_to_attend_to_the_targets_kind() -> None:
    """Items have a hidden kind; a click is whether the last bit of the history's item of the target's kind is set."""
    torch.manual_seed(0)
    kinds, items = 5, 20  # item i is of kind i % 5 and has the bit i // 5 % 2
    module = DecoupledAttention(items, attention_width=4, representation_width=8, r=4)
    read = torch.nn.Linear(24, 1)

    def loss() -> torch.Tensor:
        history = torch.stack([torch.randperm(kinds) + kinds * torch.randint(4, (kinds,)) for _ in range(64)])
        targets = torch.randint(items, (64, 1))
        same = history % kinds == targets % kinds
        clicks = (history // kinds % 2)[same].float()
        given = read(module(history, targets, torch.full((64,), kinds)))[:, 0, 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(given, clicks)

    first, last = trained(torch.nn.ModuleList([module, read]), loss, steps=300, rate=3e-2)
    assert first > 0.5 and last < 0.1
