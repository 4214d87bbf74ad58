"""Calls of torch's scaled_dot_product_attention inside `sparse_sdpa`: some are served, all others are torch's."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402
from torch.nn.attention.bias import causal_lower_right, causal_upper_left  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from attention import BlockSampled, Certified, DecodeSession, Dense, SkipSoftmax, TopR, prefill  # noqa: E402
from attention.integrations.sdpa import HEADS, sparse_sdpa  # noqa: E402
from attention.selectors import Quest, StreamingLLM, TopOracle  # noqa: E402
from hsr.errors import ArgumentError  # noqa: E402

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PROMPTS = (Dense(), TopR(400), Certified(0.0), BlockSampled(density=1.0), SkipSoftmax(0.0))
STEPS = (Dense(), TopR(400), Certified(0.0), TopOracle(400))
SHAPES = ((), (3,), (2, 3), (2, 1, 3), (1, 2, 2, 3))  # before rows and width


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def three(*shape, **kind):
    return [normal(*shape, seed=seed, **kind) for seed in range(3)]


@st.composite
def calls(draw):
    """Arguments of a call that a policy can serve, and the number of rows."""
    lead = draw(st.sampled_from(SHAPES))
    group = draw(st.integers(1, 3)) if lead else 1
    d, dv = draw(st.sampled_from([(4, 4), (16, 16), (64, 64), (5, 3)]))
    n = draw(st.sampled_from([1, 2, 17, 128, 150]))
    kind = draw(st.sampled_from(["causal", "step", "lower", "upper"]))
    m = {"step": 1, "lower": draw(st.integers(1, n))}.get(kind, n)
    dtype, seed = draw(st.sampled_from(list(CLOSE))), draw(st.integers(0, 1 << 20))
    few = (*lead[:-1], lead[-1]) if lead else ()
    many = (*lead[:-1], lead[-1] * group) if lead else ()
    q, k, v = (
        normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate([(*many, m, d), (*few, n, d), (*few, n, dv)])
    )
    if draw(st.booleans()) and len(lead) > 1:  # as a model has them that projects all heads at once
        q, k, v = (x.transpose(-2, -3).contiguous().transpose(-2, -3) for x in (q, k, v))
    named = {"scale": draw(st.sampled_from([None, 0.3])), "enable_gqa": group > 1}
    if kind in ("lower", "upper"):
        return (q, k, v, {"lower": causal_lower_right, "upper": causal_upper_left}[kind](m, n)), named
    return (q, k, v, None, 0.0, kind == "causal"), named


@settings(max_examples=60)
@given(calls(), st.sampled_from(PROMPTS), st.sampled_from(STEPS))
def test_policies_that_keep_every_key_give_what_torch_gives(call, prompt, step):
    args, named = call
    before = [x.clone() for x in args[:3]]
    plain = scaled_dot_product_attention(*args, **named)
    with sparse_sdpa(prefill=prompt, decode=step, dense_below=0, strict=True) as seen:
        found = scaled_dot_product_attention(*args, **named)
    assert len(seen.served) == 1
    assert found.dtype == plain.dtype
    assert found.shape == plain.shape
    assert found.stride() == plain.stride() or args[0].shape[-2] == 1
    assert (found - plain).abs().max() <= CLOSE[plain.dtype] * max(1, plain.abs().max())
    assert all(torch.equal(x, y) for x, y in zip(before, args, strict=False))


CAUSAL = {"is_causal": True}
DENSE = {
    "short": (lambda: (three(2, 63, 8), CAUSAL), "key has 63 rows, fewer than dense_below=64"),
    "full": (lambda: (three(2, 64, 8), {}), "is_causal must be True"),
    "cross": (lambda: ([normal(2, 65, 8), *three(2, 64, 8)[1:]], CAUSAL), "aligned top left; got 65"),
    "continued": (lambda: ([normal(2, 63, 8), *three(2, 64, 8)[1:]], CAUSAL), "query must have 64 rows"),
    "first key": (lambda: ([normal(2, 1, 8), *three(2, 64, 8)[1:]], CAUSAL), "query must have 64 rows"),
    "mask": (
        lambda: ([*three(2, 64, 8), torch.ones(64, 64, dtype=torch.bool).tril()], {}),
        r"attn_mask must be None, .*Tensor \(64, 64\)",
    ),
    "float mask": (lambda: ([*three(2, 64, 8), normal(64, 64)], {}), "attn_mask must be None"),
    "masked step": (lambda: ([normal(2, 1, 8), *three(2, 64, 8)[1:], torch.ones(1, 64) > 0], {}), "attn_mask must"),
    "upper left": (
        lambda: ([normal(2, 30, 8), *three(2, 64, 8)[1:], causal_upper_left(30, 64)], {}),
        "attn_mask must be causal to the lower right",
    ),
    "dropout": (lambda: (three(2, 64, 8), CAUSAL | {"dropout_p": 0.1}), "dropout_p must be 0; got 0.1"),
    "gradients": (lambda: ([x.requires_grad_() for x in three(2, 64, 8)], CAUSAL), "must need no gradients"),
    "one gradient": (lambda: ([*three(2, 64, 8)[:2], normal(2, 64, 8).requires_grad_()], CAUSAL), "no gradients"),
    "broadcast batch": (lambda: ([normal(3, 2, 64, 8), *three(1, 2, 64, 8)[1:]], CAUSAL), "without broadcasting"),
    "broadcast heads": (lambda: ([normal(3, 2, 64, 8), *three(3, 1, 64, 8)[1:]], CAUSAL), "without broadcasting"),
    "value heads": (
        lambda: ([normal(1, 4, 64, 8), normal(1, 2, 64, 8), normal(1, 1, 64, 8)], CAUSAL | {"enable_gqa": True}),
        "without broadcasting",
    ),
    "empty batch": (lambda: (three(0, 2, 64, 8), CAUSAL), "not be empty"),
    "empty width": (lambda: ([*three(2, 64, 0)[:2], normal(2, 64, 8)], CAUSAL), "not be empty"),
    "scale": (lambda: (three(2, 64, 8), CAUSAL | {"scale": -1.0}), r"TopR\(r=5\) refuses: scale must be in"),
    "not finite": (lambda: ([torch.full((2, 64, 8), torch.inf), *three(2, 64, 8)[1:]], CAUSAL), "q must be finite"),
    "device": (lambda: ([x.to("meta") for x in three(2, 64, 8)], CAUSAL), "must be on the CPU or one CUDA device"),
}


@pytest.mark.parametrize("case", DENSE)
def test_what_no_policy_serves_is_torch_bit_for_bit_with_its_reason(case):
    made, reason = DENSE[case]
    args, named = made()
    torch.manual_seed(0)
    plain = scaled_dot_product_attention(*args, **named)
    torch.manual_seed(0)
    with sparse_sdpa(prefill=TopR(5), decode=TopR(5), dense_below=64) as seen:
        found = scaled_dot_product_attention(*args, **named)
    assert not seen.served
    (left,) = seen.dense
    assert left.policy is None
    assert left.share == 1
    assert left.query == tuple(args[0].shape)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(left.reason)
    assert found.stride() == plain.stride()
    assert found.requires_grad == plain.requires_grad
    assert found.is_meta or torch.equal(found.nan_to_num(7), plain.nan_to_num(7))
    with sparse_sdpa(prefill=TopR(5), decode=TopR(5), dense_below=64, strict=True) as seen:
        if case == "short":  # which was asked for
            scaled_dot_product_attention(*args, **named)
        else:
            with pytest.raises(ArgumentError, match=reason):
                scaled_dot_product_attention(*args, **named)
    assert len(seen.dense) == (case == "short")


def test_what_torch_refuses_it_refuses_inside():
    q, k, v = three(2, 64, 8)
    with sparse_sdpa(prefill=TopR(5), dense_below=0, strict=True) as seen:
        for args, named in (((q, k), {}), ((q, k, None), {}), ((q, k, v), {"mask": None})):
            with pytest.raises(TypeError):
                scaled_dot_product_attention(*args, **named)
    with sparse_sdpa(prefill=TopR(5), dense_below=0), pytest.raises(RuntimeError):
        scaled_dot_product_attention(q, k[..., :5], v, is_causal=True)
    with sparse_sdpa(prefill=TopR(5), dense_below=0), pytest.raises(RuntimeError):
        scaled_dot_product_attention(q, k.double(), v, is_causal=True)
    assert not seen.dense


def test_a_served_call_is_what_the_library_computes_and_counts():
    q, k, v = normal(2, 6, 90, 16), normal(2, 3, 90, 16, seed=1), normal(2, 3, 90, 16, seed=2)
    named = {"enable_gqa": True, "scale": 0.5}
    with sparse_sdpa(prefill=TopR(7), decode=TopOracle(9), dense_below=0) as seen:
        prompt = functional.scaled_dot_product_attention(q, k, value=v, is_causal=True, **named)
        step = functional.scaled_dot_product_attention(q[:, :, -1:], k, v, **named)
    expected = prefill(q, k, v, policy=TopR(7), scale=0.5)
    assert torch.equal(prompt, expected.output)
    assert torch.equal(step, DecodeSession(k, v, policy=TopOracle(9), scale=0.5).attend(q[:, :, -1:]).output)
    first, second = seen.served
    assert (first.number, first.policy, first.query, first.key) == (0, TopR(7), (2, 6, 90, 16), (2, 3, 90, 16))
    assert first.share == expected.counters.reported.sum() / (12 * 90 * 91 / 2)
    assert second.share == 9 / 90
    assert (first.reason, second.number) == ("", 1)


def test_policies_may_depend_on_the_number_of_the_call():
    q, k, v = three(2, 64, 8)
    rules = {"prefill": lambda number: None if number == 0 else TopR(number), "decode": lambda number: TopR(9)}
    with sparse_sdpa(**rules, dense_below=0, strict=True) as seen:
        for _ in range(3):
            scaled_dot_product_attention(q, k, v, is_causal=True)
        scaled_dot_product_attention(q[:, :1], k, v)
    assert [(call.number, call.reason) for call in seen.dense] == [(0, "prefill is None")]
    assert [(call.number, call.policy) for call in seen.served] == [(1, TopR(1)), (2, TopR(2)), (3, TopR(9))]
    with (
        sparse_sdpa(prefill=lambda number: Quest(16), dense_below=0),
        pytest.raises(ArgumentError, match=r"^prefill must"),
    ):
        scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    "named, reason",
    [
        ({"prefill": Quest(16)}, "prefill must be a policy of attention.prefill, None or a function; got Quest"),
        ({"decode": BlockSampled(density=0.5)}, "decode must be a policy of attention.DecodeSession"),
        ({"decode": StreamingLLM()}, "decode must be"),
        ({"prefill": TopR}, "prefill must be .*class"),
        ({"prefill": "topr"}, "prefill must be .*'topr'"),
        ({"dense_below": -1}, "dense_below must be at least 0"),
        ({"dense_below": 1.5}, "dense_below must be a whole number"),
        ({"strict": 1}, "strict must be True or False"),
    ],
)
def test_arguments_are_checked_when_the_context_is_made(named, reason):
    with pytest.raises(ArgumentError, match=reason):
        sparse_sdpa(**named)


def test_the_innermost_context_alone_serves_and_one_may_be_entered_again():
    q, k, v = three(2, 64, 8)

    def once():
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    outer = sparse_sdpa(prefill=TopR(3), dense_below=0)
    with outer as far:
        first = once()
        with sparse_sdpa(prefill=TopR(9), dense_below=0) as near, torch.no_grad():
            assert not torch.equal(once(), first)
        with sparse_sdpa(dense_below=0) as nothing:
            dense = once()
        with outer as again:
            assert torch.equal(once(), first)
        assert torch.equal(once(), first)
    assert torch.equal(once(), dense)
    assert again is far
    assert [len(x.served) for x in (far, near, nothing)] == [3, 1, 0]
    assert [len(x.dense) for x in (far, near, nothing)] == [0, 0, 1]


def test_an_exception_leaves_torch_as_it_was():
    q, k, v = three(2, 64, 8)
    plain = scaled_dot_product_attention(q, k, v, is_causal=True)
    broken = SimpleNamespace(select=lambda visible: 1 / 0)
    for context in (sparse_sdpa(prefill=broken, dense_below=0), sparse_sdpa(prefill=TopR(3), dense_below=0)):
        with pytest.raises(ZeroDivisionError), context:
            scaled_dot_product_attention(q, k, v, is_causal=True)
            raise ZeroDivisionError
    assert torch.equal(scaled_dot_product_attention(q, k, v, is_causal=True), plain)
    with sparse_sdpa(prefill=TopR(3), dense_below=0) as seen:
        scaled_dot_product_attention(q, k, v, is_causal=True)
    assert len(seen.served) == 1


def test_a_policy_may_use_the_function_itself():
    class Careful(TopR):
        def select(self, visible):
            scaled_dot_product_attention(*three(2, 64, 8), is_causal=True)
            return super().select(visible)

    with sparse_sdpa(prefill=TopR(1), dense_below=0) as far, sparse_sdpa(prefill=Careful(3), dense_below=0) as near:
        scaled_dot_product_attention(*three(2, 64, 8), is_causal=True)
    assert (len(near.served), len(near.dense), len(far.served), len(far.dense)) == (1, 0, 0, 0)


def test_other_threads_are_left_alone():
    args = three(2, 64, 8)
    found = []

    def call():
        found.append(scaled_dot_product_attention(*args, is_causal=True))

    plain = scaled_dot_product_attention(*args, is_causal=True)
    with sparse_sdpa(prefill=TopR(3), dense_below=0) as seen:
        other = threading.Thread(target=call)
        other.start()
        other.join()
        call()
    assert torch.equal(found[0], plain)
    assert not torch.equal(found[1], plain)
    assert len(seen.served) == 1


@pytest.mark.parametrize("device_dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_outside(device_dtype):
    q, k, v = three(2, 64, 8)
    for args in ((q, k, v), (q, k.to(device_dtype), v), (q.double(), k.double(), v.double())):
        with torch.autocast("cpu", device_dtype):
            plain = scaled_dot_product_attention(*args, is_causal=True)
            with sparse_sdpa(prefill=StreamingLLM(), dense_below=0, strict=True):
                found = scaled_dot_product_attention(*args, is_causal=True)
        assert found.dtype == plain.dtype
        assert (found - plain).abs().max() <= 2 * CLOSE[plain.dtype]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*nested tensors:UserWarning")
def test_transforms_and_traces_are_dense():
    q = normal(2, 64, 8)

    def own(x):
        return scaled_dot_product_attention(x, x, x, is_causal=True)

    with sparse_sdpa(prefill=TopR(3), dense_below=0) as seen:
        assert torch.allclose(torch.func.vmap(own)(q), own(q.clone().requires_grad_()))
        traced = torch.jit.trace(own, q, check_trace=False)
        graph = torch.fx.experimental.proxy_tensor.make_fx(own)(q)
        with torch.autograd.forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            own(torch.autograd.forward_ad.make_dual(q, q))
    assert not seen.served
    assert [next(w for w in ("plain", "gradients", "traced", "tangent") if w in x.reason) for x in seen.dense] == [
        "plain", "gradients", "traced", "traced", "tangent",
    ]  # fmt: skip
    assert torch.allclose(traced(q + 1), own(q + 1))
    assert torch.allclose(graph(q + 1), own(q + 1))
    nested = torch.nested.nested_tensor([normal(2, 5, 8), normal(2, 7, 8)])
    with sparse_sdpa(prefill=TopR(3), dense_below=0) as seen:
        scaled_dot_product_attention(nested, nested, nested)
    assert (seen.dense[0].query, "plain" in seen.dense[0].reason) == ((), True)


def encoder(**kind):
    torch.manual_seed(0)
    return torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **kind).eval()


def test_torchs_own_layers_are_served():
    layer, x = encoder(), normal(2, 96, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(96)
    with torch.no_grad():
        plain = layer(x, src_mask=mask, is_causal=True)
        with sparse_sdpa(prefill=Dense(), dense_below=0, strict=True) as seen:
            found = layer(x, src_mask=mask, is_causal=True)
            single = layer.self_attn(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        assert torch.allclose(found, plain, atol=1e-5)
        assert torch.allclose(single, layer.self_attn(x, x, x, attn_mask=mask)[0], atol=1e-5)
        assert [call.query for call in seen.served] == [(2, 4, 96, 8)] * 2
        with sparse_sdpa(prefill=TopR(4), dense_below=0) as far, sparse_sdpa(prefill=TopR(3), dense_below=0) as seen:
            assert not torch.allclose(layer(x, src_mask=mask, is_causal=True), plain, atol=1e-2)
            layer(x, src_mask=mask)
            layer(x)
        assert (len(far.served), len(far.dense), len(seen.served), len(seen.dense)) == (0, 0, 1, 2)
    with sparse_sdpa(prefill=TopR(4), dense_below=0) as seen:  # which trains as it does outside
        layer(x, src_mask=mask, is_causal=True).sum().backward()
    assert "gradients" in seen.dense[0].reason
    assert all(weight.grad is not None for weight in layer.parameters())


def test_the_body_of_multi_head_attention_names_what_is_put_in_its_place():
    assert {"has_torch_function", "scaled_dot_product_attention"} <= set(HEADS.__code__.co_names)
    assert HEADS.__kwdefaults__ is None


def test_compiled_modules_are_served_inside_and_dense_again_outside():
    def own(x):
        return scaled_dot_product_attention(x + 1, x, x, is_causal=True) * 2

    x, compiled = normal(2, 64, 8), torch.compile(own, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        for r in (3, 9):
            with sparse_sdpa(prefill=TopR(r), dense_below=0) as seen:
                assert torch.equal(compiled(x), own(x))
            assert len(seen.served) == 2
        assert torch.equal(compiled(x), plain)
        layer, rows = encoder(), normal(1, 64, 32)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(64)
        whole = torch.compile(layer, backend="eager")
        with sparse_sdpa(prefill=TopR(3), dense_below=0) as far, sparse_sdpa(prefill=TopR(3), dense_below=0) as seen:
            whole(rows, src_mask=mask, is_causal=True)
        assert not far.dense
        assert [call.reason[:40] for call in seen.dense] == [
            "query of _transformer_encoder_layer_fwd cannot be known"[:40]
        ]
        unbroken = torch.compile(lambda x: scaled_dot_product_attention(x, x, x), backend="eager", fullgraph=True)
        with sparse_sdpa(prefill=TopR(3), dense_below=0), pytest.raises(RuntimeError, match="Skip"):
            unbroken(x)


class Block(torch.nn.Module):
    """A hand-written GPT block, whose view of the output needs torch's order of axes in memory."""

    def __init__(self, width=48, heads=6):
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x, cache):
        B, t, width = x.shape
        q, k, v = (
            part.view(B, t, self.heads, width // self.heads).transpose(1, 2) for part in self.qkv(x).split(width, 2)
        )
        cache.append((k, v))
        k, v = (torch.cat(parts, 2) for parts in zip(*cache, strict=True))
        rows = functional.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
        return x + self.out(rows.transpose(1, 2).view(B, t, width))


@torch.no_grad()
def test_a_hand_written_model_reads_a_prompt_and_goes_on():
    block, x, step = Block(), normal(2, 80, 48), normal(2, 1, 48, seed=1)
    plain = [block(x, cache := []), block(step, cache)]
    for prompt, later in (
        (BlockSampled(density=1.0), Quest(512)),
        (Certified(0.0), Certified(0.0)),
    ):
        with sparse_sdpa(prefill=prompt, decode=later, dense_below=0, strict=True) as seen:
            found = [block(x, cache := []), block(step, cache)]
        assert [call.policy for call in seen.served] == [prompt, later]
        for one, other in zip(found, plain, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
