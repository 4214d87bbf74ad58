"""`sparse_sdpa` on a GPU: prompts and steps that a model makes there, beside torch's own kernels."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from attention import BlockSampled, DecodeSession, Dense, Sampled, SkipSoftmax, TopR, prefill  # noqa: E402
from attention.integrations.sdpa import sparse_sdpa  # noqa: E402
from attention.selectors import Quest, StreamingLLM, TopOracle  # noqa: E402
from tests.gpu.interpreted import normal  # noqa: E402

pytestmark = pytest.mark.gpu
N = 3000


def heads(d, n=N, h=8, g=2):
    """Of a projection of all heads at once: (B, n, h, d) in memory."""
    return [normal(2, n, each, d, seed=each + d + i).bfloat16().transpose(1, 2) for i, each in enumerate((h, g, g))]


def off(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("policy", [Dense(), SkipSoftmax(0.0), BlockSampled(density=1.0), StreamingLLM(4, 1 << 20)])
def test_policies_that_keep_every_key_give_what_torch_gives(d, policy):
    q, k, v = heads(d)
    plain = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sparse_sdpa(prefill=policy, strict=True) as seen:
        found = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert off(found, plain) < 1e-2
    assert (found.dtype, found.shape, found.stride()) == (plain.dtype, plain.shape, plain.stride())
    assert abs(seen.served[0].share - 1) < 1e-6


@pytest.mark.parametrize("d", [64, 128])
def test_a_sparse_prompt_is_what_prefill_computes(d):
    q, k, v = heads(d)
    policy = BlockSampled(density=0.3)
    with sparse_sdpa(prefill=policy, strict=True) as seen:
        found = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.1)
    assert torch.equal(found, prefill(q, k, v, policy=policy, scale=0.1).output)
    assert 0.25 < seen.served[0].share <= 1  # 1 where the dense kernel is known to be faster


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("policy", [TopOracle(N), Quest(N + 16)])
def test_a_step_over_every_key_is_torchs(d, policy):
    q, k, v = heads(d)
    row = q[:, :, -1:]
    plain = scaled_dot_product_attention(row, k, v, enable_gqa=True)
    with sparse_sdpa(decode=policy, strict=True) as seen:
        found = scaled_dot_product_attention(row, k, v, enable_gqa=True)
    assert off(found, plain) < 2e-2
    assert (found.dtype, found.shape) == (plain.dtype, plain.shape)
    assert len(seen.served) == 1


@pytest.mark.parametrize("d", [64, 128])
def test_a_sampled_step_is_that_of_a_new_session(d):
    q, k, v = heads(d)
    row, policy = q[:, :, -1:], Sampled(budget=600)
    with sparse_sdpa(decode=policy, strict=True) as seen:
        found = scaled_dot_product_attention(row, k, v, enable_gqa=True)
    assert off(found, DecodeSession(k, v, policy=policy).attend(row).output) < 1e-2
    assert 0 < seen.served[0].share < 1


def test_what_no_kernel_serves_is_torchs_to_the_bit_with_its_reason():
    q, k, v = heads(64)
    cases = (
        ((q, k, v), TopR(9), "serves the policies"),
        ((q.float(), k.float(), v.float()), BlockSampled(density=0.5), "float16 or"),
        ((q[..., :48], k[..., :48], v[..., :48]), BlockSampled(density=0.5), "width 64"),
        ((q, k, v.cpu()), BlockSampled(density=0.5), "one CUDA device"),
    )
    for args, policy, reason in cases:
        with sparse_sdpa(prefill=policy) as seen:
            try:
                found = scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True)
            except RuntimeError:
                assert not args[2].is_cuda
                found = None
        assert reason in seen.dense[0].reason
        assert found is None or torch.equal(found, scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True))


@torch.no_grad()
def test_under_autocast_a_layer_of_torchs_is_served():
    layer = torch.nn.TransformerEncoderLayer(512, 8, batch_first=True).eval().cuda()
    x, mask = normal(1, 2048, 512), torch.nn.Transformer.generate_square_subsequent_mask(2048, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        plain = layer.self_attn(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        with sparse_sdpa(prefill=Dense(), strict=True) as seen:
            found = layer.self_attn(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    assert len(seen.served) == 1
    assert off(found, plain) < 3e-2
