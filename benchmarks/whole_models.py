"""Whole models of random weights on the GPU, their dense baselines, and what both share beside the attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attention.integrations.transformers import NAME, register
from benchmarks.dense_prefill import KERNELS

HERE, DTYPE = "cuda", torch.bfloat16
DENSE, STATIC = "dense best", "static"
PARTS = 2  # compiled: a layer before its attention, and after
LENGTHS = tuple(1 << k for k in range(10, 20))


@dataclass(frozen=True)
class Shape:
    """A model of random weights."""

    name: str
    config: dict[str, Any]
    lengths: tuple[int, ...]
    prompts: int  # tokens of the longest prompt that is read

    def model(self) -> Any:
        """In bfloat16 on the GPU, its parts beside the attention compiled."""
        torch.manual_seed(0)
        config = LlamaConfig(**self.config, max_position_embeddings=1 << 20)
        with torch.device(HERE):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation=NAME).eval()
        compiled(model)
        return model


LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip
SMOLLM = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "vocab_size": 49152,
}  # fmt: skip
SHAPES = (
    Shape("llama-8b, 4 layers", LLAMA | {"num_hidden_layers": 4}, LENGTHS, 1 << 17),
    Shape("llama-8b", LLAMA | {"num_hidden_layers": 32}, (1024, 8192, 32768, 131072, 524288), 1 << 15),
    Shape("smollm2-135m", SMOLLM | {"num_hidden_layers": 30}, LENGTHS[::2], 1 << 16),
)
Held = Sequence[tuple[torch.Tensor, torch.Tensor]]  # keys and values of every layer


class DenseLayer(CacheLayerMixin):
    """A static cache of a fixed length: prompts fill it, a token overwrites its last place."""

    is_compileable = False
    is_sliding = False

    def __init__(self, k: torch.Tensor | None = None, v: torch.Tensor | None = None) -> None:
        super().__init__()
        self.keys, self.values = k, v

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hold a prompt, or write a token."""
        if self.keys is None or self.values is None or key_states.shape[2] > 1:
            self.keys, self.values = key_states, value_states
        else:
            self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All of it."""
        return self.get_seq_length() if query_length == 1 else query_length, 0

    def get_seq_length(self) -> int:
        """Its length, from the first prompt on."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_length(self) -> int:
        """None."""
        return -1


class DenseCache(Cache):
    """Of all layers: empty, or holding keys and values (1, g, n, d) of each."""

    def __init__(self, layers: int, held: Held = ()) -> None:
        self._layers = [DenseLayer(*rows) for rows in held] or [DenseLayer() for _ in range(layers)]
        super().__init__(layers=list(self._layers))

    def held(self) -> Held:
        """What it holds."""
        return [
            (layer.keys, layer.values) for layer in self._layers if layer.keys is not None and layer.values is not None
        ]


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn_interface import flash_attn_with_kvcache

    found = flash_attn_with_kvcache(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
    output: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return output.transpose(1, 2)


@cache
def _visible(n: int) -> torch.Tensor:
    return torch.ones(1, 1, 1, n, dtype=torch.bool, device=HERE)


def _static(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    module: Any = torch.nn.Module()
    module.num_key_value_groups = q.shape[1] // k.shape[1]
    found: torch.Tensor = sdpa_attention_forward(module, q, k, v, _visible(k.shape[2]))[0]
    return found.transpose(1, 2)


STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sdpa cudnn": lambda q, k, v: _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v),
    "sdpa flash": lambda q, k, v: _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v),
    "flash-attention 3": _flash3,
    STATIC: _static,
}


class DenseKernels:
    """The attention implementation DENSE: kernels by name, of steps and of prompts."""

    step = prompt = "sdpa cudnn"

    @classmethod
    def attention(
        cls, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """As transformers calls it."""
        if query.shape[2] == 1:
            return STEPS[cls.step](query, key, value).transpose(1, 2).contiguous(), None
        return KERNELS[cls.prompt](query, key, value)().transpose(1, 2).contiguous(), None


def registered() -> None:
    """Add both attention implementations to transformers."""
    register()
    AttentionInterface.register(DENSE, DenseKernels.attention)
    AttentionMaskInterface.register(DENSE, lambda **_: None)


def compiled(model: Any) -> None:
    """Make its layers run steps by compiled parts, and prompts as they did; other models' parts are forgotten."""
    torch.compiler.reset()  # a second size in the same function would be compiled for any size, and slower
    counters.clear()
    for layer in model.model.layers:
        layer.forward = partial(_layer, layer, layer.forward)


def _layer(layer: Any, whole: Callable[..., torch.Tensor], hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
    if hidden_states.shape[1] > 1:
        return whole(hidden_states, **options)
    q, k, v = _before(layer, hidden_states, *options["position_embeddings"])
    k, v = options["past_key_values"].update(k, v, layer.self_attn.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS[layer.self_attn.config._attn_implementation]
    attended = attend(layer.self_attn, q, k, v, options["attention_mask"], scaling=layer.self_attn.scaling)[0]
    # Strides of axes of length one are the kernel's; by other ones torch would compile, and tune, anew for each kernel.
    return _after(layer, hidden_states, attended.flatten(2))


def compiled_parts() -> int:
    """Programs that torch has compiled since `compiled`: PARTS where all attention has the same beside it."""
    return int(counters["stats"]["unique_graphs"])


@partial(torch.compile, mode="max-autotune-no-cudagraphs")
def _before(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    q, k, v = (
        project(normed).view(*hidden.shape[:2], -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q, k, v


@partial(torch.compile, mode="max-autotune-no-cudagraphs")
def _after(layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    hidden = hidden + layer.self_attn.o_proj(attended)
    found: torch.Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return found


def random_tokens(model: Any, n: int) -> torch.Tensor:
    """(1, n) random tokens."""
    return torch.randint(model.config.vocab_size, (1, n), device=HERE, generator=torch.Generator(HERE).manual_seed(n))


def dense_cache(model: Any, ids: torch.Tensor) -> DenseCache:
    """A static cache filled by a dense prompt."""
    model.set_attn_implementation(DENSE)
    cache = DenseCache(model.config.num_hidden_layers)
    model(input_ids=ids, past_key_values=cache, position_ids=places(0, ids.shape[1]), logits_to_keep=1)
    return cache


def forward(model: Any, cache: Cache, token: torch.Tensor, place: int) -> torch.Tensor:
    """Logits (1, vocabulary) of a dense step."""
    found: torch.Tensor = model(
        input_ids=token, past_key_values=cache, position_ids=places(place, place + 1)
    ).logits[:, -1]  # fmt: skip
    return found


def places(first: int, last: int) -> torch.Tensor:
    """(1, last - first)."""
    return torch.arange(first, last, device=HERE)[None]


class DenseSteps:
    """A dense step as a graph, like `CapturedSteps`."""

    def __init__(self, model: Any, cache: DenseCache, place: int) -> None:
        self._token = random_tokens(model, 1)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = forward(model, cache, self._token, place)

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """The logits (1, vocabulary)."""
        self._token.copy_(token)
        self._graph.replay()
        return self._logits
