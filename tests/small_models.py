"""Random small models of five families, and passes through them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from attention import BlockSampled, Certified, Dense, TopR
from attention.integrations.transformers import register

register()

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
WINDOW = 24
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "mistral, full": transformers.MistralConfig(**SIZES, sliding_window=None),
    "gemma": transformers.GemmaConfig(**SIZES | {"head_dim": 256, "num_key_value_heads": 1}),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES | {"head_dim": 256},
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip
EVERY_KEY: dict[str, dict[str, Any]] = {
    "dense": {},
    "certified": {"decode": Certified(0.0), "dense_below": 0},
    "top": {"decode": TopR(1000), "prefill": TopR(1000), "dense_below": 0, "dense_layers": (0,)},
    "blocks": {"decode": Dense(), "prefill": BlockSampled(density=1.0), "dense_below": 0},
}


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def prompts(rows: int = 60, padding: int = 17) -> dict[str, torch.Tensor]:
    """Two prompts; the second begins with padding."""
    ids = torch.randint(1, 97, (2, rows), generator=torch.Generator().manual_seed(1))
    kept = torch.ones_like(ids)
    kept[1, :padding] = ids[1, :padding] = 0
    return {"input_ids": ids, "attention_mask": kept}


def generate(model: Any, implementation: str, cache: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    model.set_attn_implementation(implementation)
    cache = cache() if callable(cache) else cache
    options = {"max_new_tokens": 8, "do_sample": False} | options
    return model.generate(
        **inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options
    )  # fmt: skip


def alike(found: Any, wanted: Any, exactly: bool = False) -> None:
    assert found.sequences.tolist() == wanted.sequences.tolist()
    for logits, expected in zip(found.logits, wanted.logits, strict=True):
        if exactly:
            assert torch.equal(logits, expected)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def passes(model: Any, cache: Any, ids: torch.Tensor, sizes: list[int], **options: Any) -> torch.Tensor:
    """Logits (B, n, vocabulary) of passes over so many tokens each."""
    parts, first = [], 0
    for size in sizes:
        last = first + size
        kept = {name: mask[:, :last] for name, mask in options.items()}
        parts.append(model(input_ids=ids[:, first:last], past_key_values=cache, **kept).logits)
        first = last
    return torch.cat(parts, 1)
