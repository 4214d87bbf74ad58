"""HSR attention in Hugging Face transformers: the attention implementation "hsr" and the cache that serves it.

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="hsr")
    model.generate(**inputs, past_key_values=HSRCache(model.config, decode=Sampled(eps=0.02)))

Layers with full attention are served by policies, those with a sliding window densely.  An `HSRCache` holds each
layer's keys and values in memory that doubles, so that no step copies them, beside what its policies know of them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from attention.engine import Plan, is_policy, is_stepwise
from attention.integrations import masks
from attention.integrations.layer import HSRLayer
from attention.integrations.passes import no_gradient
from attention.integrations.steps import Fused
from attention.integrations.trial import PromptTrials
from attention.integrations.window_layer import WindowLayer
from attention.policies import Policy
from attention.result import Certificate
from attention.sampled import Sampled
from attention.weights import Softmax
from hsr import checks
from hsr.errors import ArgumentError

NAME = "hsr"
REFUSED = (
    "position_bias",
    "softcap",
    "s_aux",
    "sinks",
    "block_indices",
    "indices",
    "cache",
    "output_attentions",
    "head_mask",
)  # they change what is computed
SEEDS = 2**63  # of a policy


def register() -> None:
    """Add the attention implementation "hsr" and its mask function to transformers; again is no harm."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, masks.mask)


@torch.compiler.disable
def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer: query (B, h, m, d), key and value of `HSRCache` -> (B, m, h, dv), None.

    Raises:
        ArgumentError: no `HSRCache`; dropout, soft-capped scores, attention sinks, position biases, returned weights or
            attention that is not causal; keys or values that were changed after the cache returned them; gradients; a
            mask other than of left padding where attention is sparse.
    """
    layer = masks.noted(key)
    if not isinstance(layer, HSRLayer | WindowLayer) or masks.noted(value) is not layer:
        raise ArgumentError(
            f'past_key_values must be an HSRCache with "hsr" attention, whose keys and values a layer must not change; '
            f"got others, of shapes {tuple(key.shape)} and {tuple(value.shape)}"
        )
    no_gradient(query)
    given = (name for name in REFUSED if options.get(name) is not None and options[name] is not False)
    wrong = [*given, *["dropout"] * (dropout > 0)]
    if wrong:
        raise ArgumentError(f'{wrong[0]} must be left out: "hsr" attention does not support it')
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ArgumentError('is_causal must be true: "hsr" attention serves causal layers alone')
    if isinstance(layer, HSRLayer) and options.get("sliding_window") is not None:
        raise ArgumentError("sliding_window must be None in a layer that the cache takes for one with full attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.cuda.device_of(query):  # where kernels are launched
        return layer.attend(module, query, attention_mask, masks.seen(attention_mask), scaling=scale), None


@dataclass(frozen=True)
class Reading:
    """What sparse decode steps attended to.

    Attributes:
        keys: keys that there were, summed over steps, layers, sequences and query heads.
        reported: keys that were attended to; what is read to choose them, as codes are, does not count.
        steps: steps counted, of the layer that has most: all of them, but the last alone where a step is one launch on
            a GPU.
        certificates: of the last step, one for each layer, arrays (B, h, 1); None of a layer without.
    """

    keys: int
    reported: int
    steps: int
    certificates: list[Certificate | None]

    @property
    def share(self) -> float:
        """Of the keys, how many were attended to; 1 where no step was sparse."""
        return self.reported / self.keys if self.keys else 1.0


class HSRCache(Cache):
    """Keys and values of a model's layers, and what attends to them.

    Serves batches with left padding, beam search and sampling, prompts in chunks, prefixes that are used again (by
    `copy.deepcopy`, or by `crop`), and passes of up to 16 tokens over a cache row by row.  A policy with a seed gets
    another one in every layer.  On a GPU float16 and bfloat16, widths 64, 128 and 256.

    Args:
        config: of a model whose attn_implementation is "hsr".
        decode: policy of passes of one token, see `attention.DecodeSession`, or one for each layer; None is dense.
        prefill: policy of longer ones, see `attention.prefill`, or one for each layer; None is dense.
        dense_layers: layers that are always dense.
        dense_below: tokens below which attention is dense, to the bit as with "sdpa": prompts by the length of each
            sequence, steps by the longest. "auto" tries: a layer's steps, from 1,024 tokens on and again whenever they
            have doubled, are timed beside dense ones until they are faster; prompts are by trials of about as many rows
            over as many keys, but whole ones on a GPU, where `BlockSampled` knows by rates. Outputs then depend on the
            clock: give a number where they must be the same in every run, one from which the policies can serve.

    After a pass that is refused, `reset` the cache, or go on with a copy from before: some layers hold its tokens.
    `SharePrefill` layers that share `PivotalPatterns` serve one prompt, in one pass and without padding.
    Where a step is one launch, reordered beams, prompts of more than 16 tokens and crops of most tokens make all codes
    anew, and so does every doubling of the tokens.

    Raises:
        ArgumentError: a model without "hsr" attention, with layers of another kind than full or sliding-window
            attention, or soft-capped scores; policies that cannot serve; a number of policies other than of layers.
    """

    def __init__(
        self,
        config: Any,
        decode: Policy | Sampled | Sequence[Any] | Any = None,
        prefill: Any = None,
        dense_layers: Collection[int] = (),
        dense_below: int | str = "auto",
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ArgumentError(f"config must be a model's config; got {type(config).__name__}")
        self._config = config.get_text_config(decoder=True)
        self._check_attention()
        if getattr(self._config, "attn_logit_softcapping", None) is not None:
            raise ArgumentError(
                f'config must not soft-cap scores, which "hsr" attention does not support; got '
                f"attn_logit_softcapping={self._config.attn_logit_softcapping}"
            )
        if dense_below != "auto":
            checks.whole("dense_below", dense_below, 0)
        kinds = DynamicCache(config=self._config).layers
        least = None if dense_below == "auto" else int(dense_below)
        steps, prompts = _each("decode", decode, len(kinds)), _each("prefill", prefill, len(kinds))
        for name, policies, fits in (("decode", steps, _decodes), ("prefill", prompts, _prefills)):
            for policy in policies:
                if policy is not None:
                    fits(name, policy)
        if not isinstance(dense_layers, Collection):
            raise ArgumentError(f"dense_layers must be a collection of layers; got {dense_layers!r}")
        always = {checks.whole("dense_layers", layer, 0, len(kinds) - 1) for layer in dense_layers}
        trials = PromptTrials()
        layers: list[Any] = []
        for number, (kind, step, prompt) in enumerate(zip(kinds, steps, prompts, strict=True)):
            if _is_full(kind, number, self._config):
                served = [None if number in always else _seeded(policy, number) for policy in (step, prompt)]
                layers.append(HSRLayer(served[0], served[1], least, trials))
            else:
                assert isinstance(kind, DynamicSlidingWindowLayer)
                layers.append(WindowLayer(kind.sliding_window))
        super().__init__(layers=layers)

    def _check_attention(self) -> None:
        found = self._config._attn_implementation
        if found != NAME:
            raise ArgumentError(f'attn_implementation must be "{NAME}" with an HSRCache; got {found!r}')

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.update`.

        Raises:
            ArgumentError: the model's attention was changed to another than "hsr", a pass was refused half-way, or the
                model has more layers than its config said.
        """
        self._check_attention()
        if layer_idx >= len(self.layers):
            raise ArgumentError(
                f"config must be the model's own: it has {len(self.layers)} layers; got rows of layer {layer_idx}"
            )
        if layer_idx:
            before, held = (self.get_seq_length(number) for number in (layer_idx - 1, layer_idx))
            if before != held + key_states.shape[2]:
                raise ArgumentError(f"the last pass was refused at layer {layer_idx - 1}: reset the cache")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def report(self) -> Reading:
        """What sparse steps attended to since they were last made; on a GPU it waits for them.

        They are made anew after a copy, another padding, a long prompt or a crop that they cannot follow, and where a
        GPU reorders beams.
        """
        served = [layer.steps if isinstance(layer, HSRLayer) else None for layer in self.layers]
        running = [steps for steps in served if steps is not None]
        return Reading(
            sum(steps.keys for steps in running),
            sum(steps.reported() for steps in running),
            max((steps.steps for steps in running), default=0),
            [None if steps is None else steps.certificate() for steps in served],
        )

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first pass."""
        return max((layer.batch for layer in self.layers if isinstance(layer, HSRLayer)), default=0)

    def reserve(self, room: int) -> int:
        """Make room for so many tokens in every layer, whose steps must be one launch each; the room that they have.

        Raises:
            ArgumentError: a layer whose steps are not.
        """
        every = self.fused()
        for steps in every:
            steps.cache.reserve(room)
        return min(steps.cache.room for steps in every)

    def fused(self) -> list[Fused]:
        """What serves the layers by a launch a step each, dense ones too; ArgumentError where none can.

        While these are kept, steps below ``dense_below`` attend to every key in that launch, not to the bit like sdpa.
        """
        found = []
        for number, layer in enumerate(self.layers):
            fused = layer.fused() if isinstance(layer, HSRLayer) else None
            if fused is None:
                raise ArgumentError(
                    f"decode must be Sampled(budget=...) on a GPU, without padding, and begun; layer {number} has not"
                )
            found.append(fused)
        return found

    def refit(self) -> None:
        """Make the codes of layers anew that the next step is to draw by, where most tokens came after them."""
        for steps in self.fused():
            steps.refit()

    def advance(self, count: int) -> None:
        """Note tokens that replays of a CUDA graph took in, or, below zero, that its capture did not."""
        for layer in self.layers:
            if isinstance(layer, HSRLayer):
                layer.advance(count)

    def __deepcopy__(self, memo: dict[int, Any]) -> HSRCache:
        """The layers in other memory, with the same policies."""
        cache = HSRCache.__new__(HSRCache)
        vars(cache).update(vars(self))
        cache.layers = [copy.deepcopy(layer, memo) for layer in self.layers]
        return cache


def _each(name: str, policies: Any, layers: int) -> list[Any]:
    """One policy for every layer."""
    if not isinstance(policies, Sequence) or isinstance(policies, str):
        return [policies] * layers
    if len(policies) != layers:
        raise ArgumentError(f"{name} must be a policy, or one for each of {layers} layers; got {len(policies)}")
    return list(policies)


def _decodes(name: str, policy: Any) -> None:
    """ArgumentError unless the policy chooses keys row by row."""
    try:
        Plan(Softmax(), policy, None)
    except ArgumentError as fault:
        raise ArgumentError(f"{name}: {fault}") from fault


def _prefills(name: str, policy: Any) -> None:
    """ArgumentError unless the policy serves prompts."""
    if not is_policy(policy) or is_stepwise(policy):
        raise ArgumentError(f"{name} must be a policy of attention.prefill; got {policy!r}")


def _seeded(policy: Any, layer: int) -> Any:
    """The policy with a seed of this layer's, if it has one."""
    seed = getattr(policy, "seed", None)
    return policy if seed is None else dataclasses.replace(policy, seed=(seed + layer) % SEEDS)


def _is_full(kind: Any, number: int, config: Any) -> bool:
    """Whether a layer that transformers would hold in ``kind`` has full attention; else it has a sliding window."""
    named = (getattr(config, "layer_types", None) or [""] * (number + 1))[number]
    if type(kind) is DynamicLayer or (type(kind) is DynamicSlidingWindowLayer and named != "chunked_attention"):
        return type(kind) is DynamicLayer
    raise ArgumentError(
        f"config must have layers of full or sliding-window attention; got {named or type(kind).__name__} at {number}"
    )
