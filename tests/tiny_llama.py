"""A Llama of a few thousand random weights, for what runs on a language model."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from benchmarks import smollm

CONTEXT, THETA, LAYERS = 256, 10_000.0, 3
HEADS, KEY_HEADS, WIDTH = 6, 2, 32
VOCABULARY = 97


def tiny_config() -> Any:
    """Its configuration, RoPE unscaled."""
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=WIDTH,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        initializer_range=0.3,
    )


def tiny_model(tokens: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Arguments as `benchmarks.smollm.load_model` has them; every call gives the same weights."""
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(smollm.stretched(tiny_config(), tokens)).eval().to(device)
    for weights in model.parameters():  # and not the frequencies, as in loading
        weights.data = weights.data.to(dtype)
    return model
