"""The model beyond its context: RoPE is scaled when it is built, and its prompt's attention is exact and lean."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from attention import Softmax
from attention.reference import dense
from benchmarks import real_keys

torch = pytest.importorskip("torch", reason="the model runs in torch")
transformers = pytest.importorskip("transformers", reason="the model is transformers'")
tokenizers = pytest.importorskip("tokenizers", reason="its tokenizer is one of theirs")
smollm = pytest.importorskip("benchmarks.smollm", reason="the model's own packages")
tiny_llama = pytest.importorskip("tests.tiny_llama")
CONTEXT = tiny_llama.CONTEXT


@pytest.mark.parametrize("factor", [1.5, 4.0])
def test_beyond_its_context_a_model_is_built_with_scaled_rotations(factor: float) -> None:
    plain = tiny_llama.tiny_model().model.rotary_emb
    longer = tiny_llama.tiny_model(int(factor * CONTEXT)).model.rotary_emb
    turns = plain.inv_freq * CONTEXT / (2 * math.pi)  # of each pair of axes within the context
    slower = plain.inv_freq / longer.inv_freq
    assert (turns >= 32).any() and (turns < 1).any()
    torch.testing.assert_close(slower[turns >= 32], torch.ones(int((turns >= 32).sum())))
    torch.testing.assert_close(slower[turns < 1], torch.full((int((turns < 1).sum()),), factor))
    assert (slower.diff() >= -1e-6).all() and (slower[(turns < 20) & (turns > 1)] > 1.01).all()
    assert (plain.attention_scaling, longer.attention_scaling) == (1, pytest.approx(1 + 0.1 * math.log(factor)))


def test_within_its_context_a_model_stays_as_it_is() -> None:
    config = tiny_llama.tiny_config()
    assert smollm.stretched(config, CONTEXT) is config
    longer = smollm.stretched(config, CONTEXT + 1)
    assert (config.rope_parameters["rope_type"], config.max_position_embeddings) == ("default", CONTEXT)
    assert (longer.rope_parameters["rope_theta"], longer.max_position_embeddings) == (tiny_llama.THETA, CONTEXT + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompt_attention_is_exact(dtype: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = (6, 70, 16), (2, 70, 16), (2, 70, 16)
    q, k, v = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes)
    wide = [part.double().numpy() for part in (q, k, v)]
    exact, _ = dense(*wide, Softmax(), 0.3, causal=True)
    error = np.abs(smollm.causal_attention(q, k, v, 0.3).double().numpy() - exact).max()
    assert error < (1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompt_attention_on_a_gpu_holds_no_square(dtype: str) -> None:
    n = 32768
    shapes = (9, n, 64), (3, n, 64), (3, n, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for shape in shapes)
    torch.cuda.reset_peak_memory_stats()
    output = smollm.causal_attention(q, k, v, 0.125)
    assert torch.cuda.max_memory_allocated() < n * n
    K, V = (rows.double().repeat_interleave(3, dim=0) for rows in (k, v))
    last = torch.softmax(0.125 * q[:, -1:].double() @ K.mT, dim=-1) @ V
    assert (output[:, -1:] - last).norm() / last.norm() < (1e-4 if dtype == "float32" else 1e-2)


@pytest.mark.slow
def test_the_model_itself_is_stretched() -> None:
    missing = real_keys.missing("this test")
    if missing:
        pytest.skip(missing)
    model, tokenizer = smollm.load_model(4 * real_keys.demo.CONTEXT, dtype=torch.bfloat16)
    rotary = model.model.rotary_emb
    assert (rotary.rope_type, rotary.inv_freq.dtype, model.dtype) == ("yarn", torch.float32, torch.bfloat16)
    assert rotary.attention_scaling == pytest.approx(1 + 0.1 * math.log(4))
    assert (model.config.num_hidden_layers, model.config.max_position_embeddings) == (real_keys.LAYERS, 32768)
    assert float(rotary.inv_freq[-1]) == pytest.approx(1e5 ** (-62 / 64) / 4)
    assert len(smollm.essay_tokens(tokenizer, 131072)) == 131072


def test_another_model_is_read_where_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that transformers can read: its model, its tokenizer, its layers; longer prompts stretch its RoPE."""
    words = {"[UNK]": 0} | {f"w{i}": i for i in range(1, tiny_llama.VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]")), unk_token="[UNK]"
    )
    model = tiny_llama.tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setenv("HSR_MODEL", str(tmp_path))
    found, reader = smollm.load_model()
    ids = torch.arange(9)[None]
    assert torch.equal(found(ids).logits, model(ids).logits)
    assert reader.backend_tokenizer.encode("w7", add_special_tokens=False).ids == [7]
    assert smollm.layer_count() == tiny_llama.LAYERS
    longer, _ = smollm.load_model(4 * CONTEXT)
    assert longer.config.rope_parameters["factor"] == 4
