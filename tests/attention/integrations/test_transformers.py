"""Random small models: the same tokens as with "sdpa" wherever policies keep every key, and what caches go through."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from attention import Certified, Sampled, TopR
from attention.integrations import dense_rows, masks
from attention.integrations.transformers import NAME, HSRCache
from attention.selectors import Quest, StreamingLLM
from tests.small_models import EVERY_KEY, FAMILIES, alike, generate, model_of, passes, prompts
from tests.tiny_llama import tiny_model


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


def test_the_report_counts_what_steps_attended_to() -> None:
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


def test_compiled_models_generate_the_same() -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts(20, 0)
    ids = inputs["input_ids"][:1]
    model.set_attn_implementation(NAME)
    eager = passes(model, HSRCache(model.config, decode=TopR(4), dense_below=0), ids, [12, 1, 1])
    compiled = torch.compile(model, backend="eager")
    found = passes(compiled, HSRCache(model.config, decode=TopR(4), dense_below=0), ids, [12, 1, 1])
    torch.testing.assert_close(found, eager)


def test_sampled_steps_are_near() -> None:
    """The model's own sizes of error: with eps = 0.1 logits move by little, and not by nothing."""
    model, ids = tiny_model(), torch.randint(1, 97, (1, 200), generator=torch.Generator().manual_seed(2))
    model.set_attn_implementation("sdpa")
    wanted = passes(model, DynamicCache(config=model.config), ids, [180, *[1] * 20])[:, 180:]
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config, decode=Sampled(eps=0.1, sinks=1, recent=8), dense_below=0)
    found = passes(model, cache, ids, [180, *[1] * 20])[:, 180:]
    off = float((found - wanted).norm() / wanted.norm())
    assert 1e-5 < off < 0.2 and cache.report().share < 0.95
    assert np.isfinite(cache.report().certificates[0].output_error).all()


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


def test_inference_mode_and_no_grad_may_take_turns() -> None:
    model, ids = model_of(FAMILIES["llama"]), prompts(80)["input_ids"][:1]
    model.set_attn_implementation(NAME)
    wanted = passes(model, HSRCache(model.config, decode=TopR(5), dense_below=0), ids, [60, 1, 1, 1])
    cache = HSRCache(model.config, decode=TopR(5), dense_below=0)
    with torch.inference_mode():
        parts = [passes(model, cache, ids, [60, 1])]
    parts.append(passes(model, cache, ids[:, 61:], [1]))
    cache.reorder_cache(torch.tensor([0]))
    with torch.inference_mode():
        parts.append(passes(model, cache, ids[:, 62:], [1]))
    assert torch.equal(torch.cat(parts, 1), wanted)
