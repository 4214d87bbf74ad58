"""Random small models of five families: the same tokens as with "sdpa" wherever policies keep every key."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from attention import BlockSampled, Certified, Dense, ReLUPower, Sampled, TopR
from attention.integrations import dense_rows, layer, masks, trial
from attention.integrations.transformers import NAME, HSRCache, attention, register
from attention.selectors import Quest, StreamingLLM
from hsr.errors import ArgumentError
from tests.tiny_llama import tiny_model

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


@pytest.mark.parametrize("keeping", EVERY_KEY)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_left_padding_equal_sdpa_where_every_key_is_kept(family: str, keeping: str) -> None:
    model, inputs = model_of(FAMILIES[family]), prompts()
    wanted = generate(model, "sdpa", None, inputs)
    found = generate(model, NAME, lambda: HSRCache(model.config, **EVERY_KEY[keeping]), inputs)
    alike(found, wanted, exactly=keeping == "dense")


@pytest.mark.parametrize("keeping", EVERY_KEY)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_beams_samples_and_drafts_equal_sdpa(options: dict[str, Any], keeping: str) -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts()
    if "prompt_lookup_num_tokens" in options:  # drafts serve one sequence; repeats make some of them right
        inputs = {name: rows[:1].repeat(1, 2) for name, rows in inputs.items()}
    runs = []
    for name, cache in (("sdpa", None), (NAME, lambda: HSRCache(model.config, **EVERY_KEY[keeping]))):
        torch.manual_seed(3)
        runs.append(generate(model, name, cache, inputs, **options))
    alike(runs[1], runs[0], exactly=keeping == "dense")


def test_below_the_bound_everything_is_sdpa_to_the_bit() -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts()
    wanted = generate(model, "sdpa", None, inputs)
    cache: Any = None

    def made() -> HSRCache:
        nonlocal cache
        cache = HSRCache(model.config, decode=TopR(2), prefill=TopR(2), dense_below=65)
        return cache

    found = generate(model, NAME, made, inputs)
    for step, (logits, expected) in enumerate(zip(found.logits, wanted.logits, strict=True)):
        assert torch.equal(logits, expected) == (step < 5), step
    assert cache.report().steps == 3 and 0 < cache.report().share < 0.05  # tokens 65, 66 and 67


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


@pytest.mark.parametrize("keeping", EVERY_KEY)
@pytest.mark.parametrize("sizes", [[60], [20, 40], [1, 30, 1, 28], [30, 5, 25], [40, *[1] * 20]], ids=str)
def test_passes_of_any_size_give_the_same_logits(sizes: list[int], keeping: str) -> None:
    model, inputs = model_of(FAMILIES["gemma3"]), prompts()
    ids = inputs["input_ids"][:1]
    model.set_attn_implementation("sdpa")
    wanted = passes(model, DynamicCache(config=model.config), ids, sizes)
    model.set_attn_implementation(NAME)
    found = passes(model, HSRCache(model.config, **EVERY_KEY[keeping]), ids, sizes)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", [TopR(3), Sampled(budget=8), Quest(budget=32), Certified(0.3)], ids=repr)
def test_a_prefix_is_used_again_and_a_crop_is_forgotten(policy: Any) -> None:
    """Passes after `deepcopy`, `crop` or `reset` are those of a cache that saw nothing else."""
    model, ids = model_of(FAMILIES["llama"]), prompts(150)["input_ids"][:1]
    model.set_attn_implementation(NAME)

    def fresh() -> HSRCache:
        return HSRCache(model.config, decode=policy, dense_below=0)

    def two(cache: Any) -> torch.Tensor:
        return passes(model, cache, ids[:, 120:], [1, 1])

    wanted_cache = fresh()
    passes(model, wanted_cache, ids, [120])
    wanted = two(copy.deepcopy(wanted_cache))
    assert torch.equal(two(wanted_cache), wanted)

    wanted_cache.crop(-2)
    torch.testing.assert_close(two(wanted_cache), wanted, rtol=1e-4, atol=1e-4)
    wanted_cache.reset()
    assert wanted_cache.get_seq_length() == 0
    passes(model, wanted_cache, ids, [120])
    assert torch.equal(two(wanted_cache), wanted)


def test_a_cache_never_moves_what_it_holds_but_to_double_it() -> None:
    model, ids = model_of(FAMILIES["llama"]), prompts(150)["input_ids"][:1]
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config, decode=TopR(3), dense_below=0)
    places = set()
    for size in [100, *[1] * 50]:
        passes(model, cache, ids[:, :size], [size])
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 2


def test_the_report_counts_what_steps_read() -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts(60, padding=20)
    cache: Any = None

    def made() -> HSRCache:
        nonlocal cache
        cache = HSRCache(model.config, decode=TopR(10), dense_layers=[1], dense_below=0)
        return cache

    generate(model, NAME, made, inputs, max_new_tokens=4)
    reading = cache.report()
    steps, layers, heads = 3, 2, 4
    seen = sum(61 + step + 41 + step for step in range(steps))
    assert (reading.steps, reading.keys, reading.reported) == (
        steps, seen * heads * layers, 10 * 2 * heads * layers * steps,
    )  # fmt: skip
    assert reading.share == reading.reported / reading.keys
    first, dense, last = reading.certificates
    assert dense is None and first.kind == last.kind == "deterministic"
    assert first.dropped_mass.shape == (2, 4, 1) and (first.dropped_mass > 0).all()


def test_layers_have_policies_and_seeds_of_their_own() -> None:
    model = model_of(FAMILIES["llama"])
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config, decode=[None, Sampled(budget=4, seed=7), TopR(5)], prefill=StreamingLLM(4, 32))
    served = [one._policies[:2] for one in cache.layers]
    assert [policy for policy, _ in served] == [None, Sampled(budget=4, seed=8), TopR(5)]
    assert {policy for _, policy in served} == {StreamingLLM(4, 32)}


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.booleans(), st.integers(1, 3))
def test_dense_attention_in_blocks_of_rows_is_that_with_a_whole_mask(
    m: int, held: int, windowed: bool, batch: int
) -> None:
    """Whatever fits: rows of padding alone excepted."""
    generator = torch.Generator().manual_seed(m + 41 * held)
    n, window = m + held, 7 if windowed else None
    lefts = tuple(int(x) for x in torch.randint(0, n, (batch,), generator=generator))
    q, k, v = (torch.randn(batch, heads, rows, 8, generator=generator) for heads, rows in ((4, m), (2, n), (2, n)))
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    rows, keys = torch.arange(held, n)[:, None], torch.arange(n)
    whole = (keys <= rows) & (keys > rows - (window or n)) & (keys >= torch.tensor(lefts)[:, None, None])
    wanted = dense_rows.dense(module, q, k, v, whole[:, None], masks.Seen(lefts))
    before, dense_rows.EXPLICIT = dense_rows.EXPLICIT, 60
    try:
        found = dense_rows.dense(module, q, k, v, torch.ones(batch, n, dtype=torch.bool), masks.Seen(lefts), window)
    finally:
        dense_rows.EXPLICIT = before
    for b, left in enumerate(lefts):
        first = max(left - held, 0)
        torch.testing.assert_close(found[b, first:], wanted[b, first:])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_masks_too_large_to_make_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of(FAMILIES[family]), prompts()
    wanted = generate(model, "sdpa", None, inputs)
    monkeypatch.setattr(masks, "EXPLICIT", 100)
    monkeypatch.setattr(dense_rows, "EXPLICIT", 500)
    for options in EVERY_KEY.values():
        alike(generate(model, NAME, lambda options=options: HSRCache(model.config, **options), inputs), wanted)


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
    assert tried == [45, 90, 180][:2] or tried == [45, 90]
    passes(model, cache, ids, [100])
    passes(model, cache, ids, [1])
    assert tried == [45, 90, 221] and cache.report().steps == 1


def test_trials_time_both_sides() -> None:
    model, ids = model_of(FAMILIES["llama"]), prompts(40)["input_ids"][:1]
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config, decode=TopR(3), dense_below=0)
    passes(model, cache, ids, [30, 1])
    one = cache.layers[0]
    q = torch.randn(1, 4, 1, 32)
    assert trial.steps_faster(one.steps, q, one.keys, one.values) in (True, False)
    trials = trial.PromptTrials()
    assert not trials.faster(TopR(3), q, one.keys, one.values)  # too short to try
    many = torch.randn(1, 2, 1024, 32)
    rows = many.repeat(1, 2, 1, 1)
    assert trials.faster(Dense(), rows, many, many) == trials.faster(Dense(), rows, many, many)
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
        ({"decode": BlockSampled(density=0.5)}, "policy must choose keys row by row"),
        ({"decode": TopR}, "policy must be"),
        ({"prefill": Quest(budget=32)}, "prefill must be a policy of attention.prefill"),
        ({"prefill": ReLUPower(1)}, "prefill must be a policy of attention.prefill"),
        ({"decode": [TopR(3)]}, "decode must be a policy, or one for each of 3 layers; got 1"),
        ({"dense_layers": (3,)}, "dense_layers"),
        ({"dense_below": -1}, "dense_below"),
    ):
        with pytest.raises(ArgumentError, match=what):
            HSRCache(model.config, **options)


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


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_options_that_change_the_scores_are_refused(option: str) -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts()
    model.set_attn_implementation(NAME)
    with pytest.raises(ArgumentError, match=f"{option} must be left out"), torch.no_grad():
        model(**inputs, past_key_values=HSRCache(model.config), **{option: 30.0})


def test_soft_caps_and_other_layers_are_refused() -> None:
    capped = transformers.Gemma2Config(**SIZES, sliding_window=WINDOW, attn_implementation=NAME)
    with pytest.raises(ArgumentError, match="soft-cap"):
        HSRCache(capped)
    chunked = transformers.LlamaConfig(**SIZES, layer_types=["chunked_attention"] * 3, attn_implementation=NAME)
    chunked.attention_chunk_size = 8
    with pytest.raises(ArgumentError, match="chunked_attention at 0"):
        HSRCache(chunked)


def test_a_step_that_nobody_attended_to_is_told() -> None:
    one = layer.HSRLayer(TopR(3), None, 0, trial.PromptTrials())
    one.update(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    with pytest.raises(ArgumentError, match="batch 1; got 2"):
        one.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    with pytest.raises(ArgumentError, match="tokens_to_remove"):
        one.crop(-6)
    assert one.get_seq_length() == 5 and one.keys.shape == (1, 2, 5, 8)


def test_compiled_models_generate_the_same() -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts(20, 0)
    ids = inputs["input_ids"][:1]
    model.set_attn_implementation(NAME)
    eager = passes(model, HSRCache(model.config, decode=TopR(4), dense_below=0), ids, [12, 1, 1])
    compiled = torch.compile(model, backend="eager")
    found = passes(compiled, HSRCache(model.config, decode=TopR(4), dense_below=0), ids, [12, 1, 1])
    torch.testing.assert_close(found, eager)


def test_sampled_steps_are_near() -> None:
    """The model's own sizes of error: with eps = 0.02 logits move by little, and not by nothing."""
    model, ids = tiny_model(), torch.randint(1, 97, (1, 200), generator=torch.Generator().manual_seed(2))
    model.set_attn_implementation("sdpa")
    wanted = passes(model, DynamicCache(config=model.config), ids, [180, *[1] * 20])[:, 180:]
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config, decode=Sampled(eps=0.1, sinks=1, recent=8), dense_below=0)
    found = passes(model, cache, ids, [180, *[1] * 20])[:, 180:]
    off = float((found - wanted).norm() / wanted.norm())
    assert 1e-5 < off < 0.2 and cache.report().share < 0.95
    assert np.isfinite(cache.report().certificates[0].output_error).all()


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


def test_a_crop_below_the_bound_is_dense_again_and_crops_may_follow_crops() -> None:
    model, ids = model_of(FAMILIES["llama"]), prompts(90)["input_ids"][:1]
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config, decode=TopR(2), dense_below=50)
    passes(model, cache, ids, [48, *[1] * 6])
    cache.crop(-1)
    assert cache.report().steps == 5
    cache.crop(-2)  # of sessions that have lost tokens before: they are made anew
    passes(model, cache, ids[:, 51:], [1])
    cache.crop(-3)
    assert cache.report().steps == 0 and cache.get_seq_length() == 49
    cache.crop(-9)
    found = passes(model, cache, ids[:, 40:], [1, 1])
    model.set_attn_implementation("sdpa")
    wanted = passes(model, DynamicCache(config=model.config), ids, [40, 1, 1])[:, 40:]
    torch.testing.assert_close(found, wanted)


def test_a_window_is_empty_after_a_reset() -> None:
    model, ids = model_of(FAMILIES["mistral"]), prompts()["input_ids"]
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config)
    passes(model, cache, ids[:1], [50])
    cache.reset()
    assert cache.get_seq_length() == 0
    found = passes(model, cache, ids, [10, 30])
    assert torch.equal(found, passes(model, HSRCache(model.config), ids, [10, 30]))


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
