"""What the integration refuses, and what decides between sparse and dense."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from attention import BlockSampled, Dense, ReLUPower, TopR
from attention.integrations import layer, masks, trial, window_layer
from attention.integrations.transformers import NAME, HSRCache, attention
from attention.selectors import Quest
from hsr.errors import ArgumentError
from tests.small_models import EVERY_KEY, FAMILIES, SIZES, WINDOW, alike, generate, model_of, passes, prompts


def test_trials_decide_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are tried from LEAST tokens on, and again when they have doubled; then they stay sparse."""
    model, ids = model_of(FAMILIES["llama"]), prompts(150)["input_ids"][:1]
    model.set_attn_implementation(NAME)
    tried: list[int] = []

    def faster(steps: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        tried.append(k.shape[2])
        return k.shape[2] > 90

    monkeypatch.setattr(trial, "LEAST", 45)
    monkeypatch.setattr(trial, "steps_faster", faster)
    cache = HSRCache(model.config, decode=TopR(3), dense_layers=(1, 2))
    passes(model, cache, ids, [40, *[1] * 80])
    assert tried == [45, 90]
    passes(model, cache, ids, [100])
    passes(model, cache, ids, [1])
    assert tried == [45, 90, 221] and cache.report().steps == 1


def test_trials_time_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(FAMILIES["llama"]), prompts(40)["input_ids"][:1]
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config, decode=TopR(3), dense_below=0)
    passes(model, cache, ids, [30, 1])
    one = cache.layers[0]
    q = torch.randn(1, 4, 1, 32)
    for slower, verdict in ((0.0, True), (10.0, False)):
        clock = iter([slower, 1.0])  # of the steps, and then of dense ones
        monkeypatch.setattr(trial, "seconds", lambda call, device, clock=clock: (call(), next(clock))[1])
        assert trial.steps_faster(one.steps, q, one.keys, one.values) is verdict
    trials = trial.PromptTrials()
    assert not trials.faster(TopR(3), q, one.keys, one.values)  # too short to try
    many = torch.randn(1, 2, 1024, 32)
    rows = many.repeat(1, 2, 1, 1)
    clock = iter([1.0, 2.0])  # of the policy, and of dense attention; asked once
    monkeypatch.setattr(trial, "seconds", lambda call, device: (call(), next(clock))[1])
    assert trials.faster(Dense(), rows, many, many) and trials.faster(Dense(), rows, many, many)
    assert not trials.faster(BlockSampled(density=0.05), rows, many, many)  # less than its bands hold
    assert len(trials._faster) == 1


def test_what_is_not_supported_raises() -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ArgumentError, match='attn_implementation must be "hsr"'):
        HSRCache(model.config)
    model.set_attn_implementation(NAME)
    with pytest.raises(ArgumentError, match="past_key_values must be an HSRCache"):
        generate(model, NAME, None, inputs)
    with pytest.raises(ArgumentError, match="past_key_values must be an HSRCache"):
        model(**inputs, use_cache=False)
    cache = HSRCache(model.config, decode=TopR(4), dense_below=0)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ArgumentError, match="got 'sdpa'"):
        model(**inputs, past_key_values=cache)
    model.set_attn_implementation(NAME)
    for options, what in (
        ({"decode": BlockSampled(density=0.5)}, "decode: policy must choose keys row by row"),
        ({"decode": TopR}, "decode: policy must be"),
        ({"decode": "abc"}, "decode: policy must be .* got 'abc'"),
        ({"prefill": "abc"}, "prefill must be a policy of attention.prefill; got 'abc'"),
        ({"prefill": Quest(budget=32)}, "prefill must be a policy of attention.prefill"),
        ({"prefill": ReLUPower(1)}, "prefill must be a policy of attention.prefill"),
        ({"decode": [TopR(3)]}, "decode must be a policy, or one for each of 3 layers; got 1"),
        ({"dense_layers": (3,)}, "dense_layers"),
        ({"dense_layers": 1}, "dense_layers must be a collection of layers; got 1"),
        ({"dense_below": -1}, "dense_below"),
    ):
        with pytest.raises(ArgumentError, match=what):
            HSRCache(model.config, **options)


def test_a_cache_of_another_config_is_refused() -> None:
    model, ids = model_of(FAMILIES["llama"]), prompts()["input_ids"]
    model.set_attn_implementation(NAME)
    for other in (model, None, {}):
        with pytest.raises(ArgumentError, match=f"config must be a model's config; got {type(other).__name__}"):
            HSRCache(other)
    fewer = copy.deepcopy(model.config)
    fewer.num_hidden_layers, fewer._attn_implementation = 2, NAME
    with pytest.raises(ArgumentError, match="config must be the model's own: it has 2 layers; got rows of layer 2"):
        passes(model, HSRCache(fewer), ids, [60])


def test_holes_in_the_mask_are_served_densely_or_refused() -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts()
    inputs["attention_mask"][0, 30] = 0
    wanted = generate(model, "sdpa", None, inputs)
    alike(generate(model, NAME, lambda: HSRCache(model.config), inputs), wanted, exactly=True)
    for sparse in ({"decode": TopR(9)}, {"prefill": TopR(9)}):
        with pytest.raises(ArgumentError, match="attention_mask must be of left padding"):
            generate(model, NAME, lambda sparse=sparse: HSRCache(model.config, **sparse, dense_below=0), inputs)


@pytest.mark.parametrize("options", [{}, {"prefill": TopR(4), "dense_below": 0}], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_gradients_are_refused(family: str, options: dict[str, Any]) -> None:
    model, inputs = model_of(FAMILIES[family]), prompts()
    model.set_attn_implementation(NAME)
    with pytest.raises(ArgumentError, match="must need no gradient"):
        model(**inputs, past_key_values=HSRCache(model.config, **options))


@pytest.mark.parametrize("given", [30.0, torch.zeros(1), torch.ones(4)], ids=["number", "zero", "ones"])
@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias", "sinks", "block_indices"])
def test_options_that_change_the_scores_are_refused(option: str, given: Any) -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts()
    model.set_attn_implementation(NAME)
    with pytest.raises(ArgumentError, match=f"{option} must be left out"), torch.no_grad():
        model(**inputs, past_key_values=HSRCache(model.config), **{option: given})


def test_soft_caps_and_other_layers_are_refused() -> None:
    capped = transformers.Gemma2Config(**SIZES, sliding_window=WINDOW, attn_implementation=NAME)
    with pytest.raises(ArgumentError, match="soft-cap"):
        HSRCache(capped)
    chunked = transformers.LlamaConfig(**SIZES, layer_types=["chunked_attention"] * 3, attn_implementation=NAME)
    chunked.attention_chunk_size = 8
    with pytest.raises(ArgumentError, match="chunked_attention at 0"):
        HSRCache(chunked)


def test_batches_and_crops_that_do_not_fit_are_refused() -> None:
    one = layer.HSRLayer(TopR(3), None, 0, trial.PromptTrials())
    one.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    with pytest.raises(ArgumentError, match="batch 1; got 2"):
        one.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    with pytest.raises(ArgumentError, match="tokens_to_remove"):
        one.crop(-6)
    assert one.get_seq_length() == 5 and one.keys.shape == (1, 2, 5, 8)


def test_rows_that_a_layer_changed_or_asks_for_twice_are_refused() -> None:
    model = model_of(FAMILIES["llama"])
    model.set_attn_implementation(NAME)
    cache, module = HSRCache(model.config), model.model.layers[0].self_attn
    q = torch.randn(1, 4, 5, 32)
    k, v = cache.update(torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32), 0)
    for rows in ((k, v + 1), (k + 1, v), (k, v.clone())):
        with pytest.raises(ArgumentError, match="a layer must not change"):
            attention(module, q, *rows, None)
    with pytest.raises(ArgumentError, match="query must have 5 rows"):
        attention(module, q[:, :, 1:], k, v, None)
    attention(module, q, k, v, None)
    with pytest.raises(ArgumentError, match="query must have 0 rows"):
        attention(module, q, k, v, None)


def test_masks_that_models_change_are_made_whatever_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "EXPLICIT", 10)
    sliding = transformers.masking_utils.sliding_window_causal_mask_function(4)
    sizes: dict[str, Any] = {"batch_size": 1, "q_length": 9, "kv_length": 9, "mask_function": sliding, "local_size": 4}
    assert masks.mask(**sizes, allow_is_causal_skip=True) is None
    changed = masks.mask(**sizes, allow_is_causal_skip=False)
    assert changed is not None and changed.shape == (1, 1, 9, 9) and not masks.seen(changed).plain


def test_a_short_sequence_of_a_long_batch_decides_what_its_policy_can_serve() -> None:
    trials = trial.PromptTrials()
    rows = torch.randn(2, 2, 1200, 32)
    policy = BlockSampled(density=0.3)
    assert not trials.faster(policy, rows.repeat(1, 2, 1, 1), rows, rows, hidden=900) and not trials._faster


def test_masks_whose_note_was_lost_still_hide_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a model moves them to another device: large ones are read again, small ones refused if sparse."""
    model, inputs = model_of(FAMILIES["llama"]), prompts()
    wanted = generate(model, "sdpa", None, inputs)

    def copied(module: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = options["attention_mask"]
        return args, options | {"attention_mask": None if mask is None else mask.clone()}

    hooks = [one.self_attn.register_forward_pre_hook(copied, with_kwargs=True) for one in model.model.layers]
    alike(generate(model, NAME, lambda: HSRCache(model.config), inputs), wanted)
    with pytest.raises(ArgumentError, match="left padding"):
        generate(model, NAME, lambda: HSRCache(model.config, **EVERY_KEY["certified"]), inputs)
    monkeypatch.setattr(masks, "EXPLICIT", 100)
    for keeping in ("dense", "top"):
        alike(generate(model, NAME, lambda k=keeping: HSRCache(model.config, **EVERY_KEY[k]), inputs), wanted)
    for hook in hooks:
        hook.remove()


def test_after_a_refused_pass_the_cache_must_be_reset() -> None:
    model, ids = model_of(FAMILIES["llama"]), prompts(40)["input_ids"][:1]
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config, decode=[TopR(3), TopR(3), Quest(budget=32)], dense_below=0)
    passes(model, cache, ids, [30])
    holes = torch.ones(1, 31, dtype=torch.int64)
    holes[0, 7] = 0
    with pytest.raises(ArgumentError, match="left padding"), torch.no_grad():
        model(input_ids=ids[:, 30:31], attention_mask=holes, past_key_values=cache)
    with pytest.raises(ArgumentError, match="reset the cache"):
        passes(model, cache, ids[:, 30:], [1])
    cache.reset()
    passes(model, cache, ids, [30, 1])


def test_dtypes_that_autocast_mixes_are_refused_where_policies_serve() -> None:
    one = layer.HSRLayer(TopR(3), None, 0, trial.PromptTrials())
    rows = torch.randn(1, 2, 5, 8)
    with pytest.raises(ArgumentError, match="without autocast"):
        one.update(rows, rows.bfloat16())


def test_windows_take_one_row_a_token() -> None:
    one, rows = window_layer.WindowLayer(8), torch.randn(1, 2, 5, 8)
    one.update(rows, rows)
    with pytest.raises(ArgumentError, match="query must have 5 rows"):
        one.attend(torch.nn.Module(), rows[:, :, 1:], None, masks.Seen(), scaling=1.0)
