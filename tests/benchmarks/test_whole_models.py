"""Dense baselines of whole models and ours have the same programs beside the attention."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from attention import Sampled  # noqa: E402
from attention.integrations.transformers import NAME, HSRCache  # noqa: E402

TINY = {
    "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100,
    "num_hidden_layers": 2,
}  # fmt: skip


def strided(*strides):
    """A kernel whose output (1, h, 1, d) has these strides."""

    def step(q, k, v):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True).contiguous().as_strided(q.shape, strides)

    return step


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_kernels_and_sizes_share_what_is_compiled_beside_them(monkeypatch):
    from benchmarks import whole_models as whole  # torch's compiler warns as it is imported

    steps = {"a": strided(64, 16, 16, 1), "b": strided(1, 16, 16, 1), "c": strided(64, 16, 64, 1)}
    monkeypatch.setattr(whole, "HERE", "cpu")
    monkeypatch.setattr(whole, "STEPS", steps)
    for name in ("_before", "_after"):
        raw = getattr(whole, name)._torchdynamo_orig_callable
        monkeypatch.setattr(whole, name, torch.compile(raw, backend="aot_eager"))
    whole.registered()
    for width in (64, 96):
        model = whole.Shape("tiny", TINY | {"hidden_size": width}, (), 0).model()
        ids = whole.random_tokens(model, 9)
        dense = whole.DenseCache(2, [(torch.zeros(1, 2, 9, 16, dtype=whole.DTYPE),) * 2 for _ in range(2)])
        model.set_attn_implementation(whole.DENSE)
        for name in steps:
            monkeypatch.setattr(whole.DenseKernels, "step", name)
            whole.forward(model, dense, ids[:, -1:], 8)
        model.set_attn_implementation(NAME)
        cache = HSRCache(model.config, decode=Sampled(budget=4.0), dense_below=0)
        model(input_ids=ids[:, :-1], past_key_values=cache)
        model(input_ids=ids[:, -1:], past_key_values=cache)
        assert whole.compiled_parts() == whole.PARTS
