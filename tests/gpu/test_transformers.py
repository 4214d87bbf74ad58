"""The transformers integration on a GPU: one launch a step, sessions, prompts, and a whole step captured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from attention import BlockSampled, Sampled
from attention.integrations import trial
from attention.integrations.captured import CapturedSteps
from attention.integrations.steps import Fused, Sessions
from attention.integrations.transformers import NAME, HSRCache, register
from attention.selectors import Quest
from hsr.errors import ArgumentError
from tests.gpu.interpreted import waiting_is_an_error

pytestmark = pytest.mark.gpu

register()
ALL = Sampled(budget=4096, seed=3)  # more than there are: every key


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, initializer_range=0.1, pad_token_id=0,
        eos_token_id=None, bos_token_id=None, dtype=torch.bfloat16,
    )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    return made.eval().to("cuda", torch.bfloat16)


@torch.no_grad()
def passes(model: Any, cache: Any, ids: torch.Tensor, sizes: list[int], **options: Any) -> torch.Tensor:
    parts, first = [], 0
    for size in sizes:
        kept = {name: mask[:, : first + size] for name, mask in options.items()}
        parts.append(model(input_ids=ids[:, first : first + size], past_key_values=cache, **kept).logits.float())
        first += size
    return torch.cat(parts, 1)


def tokens(batch: int, n: int) -> torch.Tensor:
    return torch.randint(1, 97, (batch, n), generator=torch.Generator().manual_seed(5)).cuda()


def near(found: torch.Tensor, wanted: torch.Tensor, error: float = 0.02) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < error


def dense(model: Any, ids: torch.Tensor, sizes: list[int], **options: Any) -> torch.Tensor:
    model.set_attn_implementation("sdpa")
    found = passes(model, DynamicCache(config=model.config), ids, sizes, **options)
    model.set_attn_implementation(NAME)
    return found


@pytest.mark.parametrize(
    "policies",
    [
        {"decode": ALL, "dense_below": 0},
        {"decode": ALL, "prefill": BlockSampled(density=1.0), "dense_below": 0},
        {"decode": Quest(budget=1024), "dense_below": 0},
        {"decode": Sampled(eps=0.02), "dense_below": 0},
        {"decode": ALL, "dense_below": 10**6},
        {"decode": ALL},
    ],
    ids=["fused", "prompt", "quest", "eps", "dense", "trials"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_passes_are_those_of_sdpa(model: Any, policies: dict[str, Any], batch: int) -> None:
    ids, sizes = tokens(batch, 740), [600, *[1] * 20, 100, 1, 5, *[1] * 14]
    wanted = dense(model, ids, sizes)
    cache = HSRCache(model.config, **policies)
    near(passes(model, cache, ids, sizes), wanted, 0.1 if "eps" in repr(policies) else 0.02)
    served = [type(layer.steps) for layer in cache.layers]
    fused = policies["decode"] is ALL
    assert served == [type(None) if policies.get("dense_below") != 0 else Fused if fused else Sessions] * 2


def test_padded_batches_have_a_session_each(model: Any) -> None:
    ids, sizes = tokens(2, 300), [260, *[1] * 40]
    kept = torch.ones_like(ids)
    kept[1, :77] = 0
    wanted = dense(model, ids, sizes, attention_mask=kept)
    cache = HSRCache(model.config, decode=ALL, dense_below=0)
    found = passes(model, cache, ids, sizes, attention_mask=kept)
    near(found[0], wanted[0])
    near(found[1, 77:], wanted[1, 77:])
    assert isinstance(cache.layers[0].steps, Sessions)


def test_beams_crops_and_copies_follow(model: Any) -> None:
    ids = tokens(1, 420)
    wanted = dense(model, ids, [400, *[1] * 20])
    cache = HSRCache(model.config, decode=ALL, dense_below=0)
    passes(model, cache, ids, [400, *[1] * 20])
    steps = [layer.steps for layer in cache.layers]
    cache.crop(-20)
    assert all(layer.steps is one and one.told == 400 for layer, one in zip(cache.layers, steps, strict=True))
    twin = copy.deepcopy(cache)
    for one in (cache, twin):
        near(passes(model, one, ids[:, 400:], [1] * 20), wanted[:, 400:])
    model.set_attn_implementation("sdpa")
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    best = model.generate(ids, **options)
    model.set_attn_implementation(NAME)
    found = model.generate(ids, past_key_values=HSRCache(model.config, decode=ALL, dense_below=0), **options)
    assert found.shape == best.shape and (found == best).float().mean() > 0.98


@pytest.mark.parametrize("batch", [1, 2])
def test_captured_steps_are_the_eager_ones(model: Any, batch: int) -> None:
    """Over more tokens than there is room for at first, so that the graph is captured twice."""
    ids, sizes = tokens(batch, 500), [300, *[1] * 200]
    policy = Sampled(budget=64, seed=9)
    wanted = passes(model, HSRCache(model.config, decode=policy, dense_below=0), ids, sizes)
    cache = HSRCache(model.config, decode=policy, dense_below=0)
    passes(model, cache, ids, [300, 1])
    steps = CapturedSteps(model, cache)
    found = torch.stack([steps(ids[:, t : t + 1]).float().clone() for t in range(301, 500)], 1)
    near(found, wanted[:, 301:], 0.01)
    assert cache.get_seq_length() == 500 and cache.layers[1].steps.cache.lengths.tolist() == [500] * 2 * batch
    with pytest.raises(ArgumentError, match="token must be"):
        steps(ids[:, :2])
    assert cache.report().keys == 500 * 4 * batch * 2 and cache.report().share < 0.9


@pytest.mark.parametrize("dense_below", [401, 10**6, "auto"])
def test_captured_steps_of_dense_layers_attend_to_every_key(model: Any, dense_below: int | str) -> None:
    """Up to dense_below, from where on a few are drawn; all of it replays, and room for 20 tokens more."""
    ids, last = tokens(2, 460), 400 if dense_below == 401 else 460
    wanted = dense(model, ids, [380, *[1] * 80])
    cache = HSRCache(model.config, decode=Sampled(budget=16, seed=2), dense_below=dense_below)
    passes(model, cache, ids, [380, 1])
    assert [layer.steps for layer in cache.layers] == [None, None]
    steps = CapturedSteps(model, cache, 400)
    found = torch.stack([steps(ids[:, t : t + 1]).float().clone() for t in range(381, 460)], 1)
    near(found[:, : last - 381], wanted[:, 381:last])
    assert isinstance(cache.layers[0].steps, Fused) and cache.get_seq_length() == 460
    report = cache.report()
    assert report.keys == 460 * 4 * 2 * 2 and (report.share == 1) == (last == 460)
    if last == 400:
        assert float((found[:, 19:] - wanted[:, 400:]).norm() / wanted[:, 400:].norm()) > 0.02
    held = cache.layers[0].steps
    cache.crop(-60)  # below the bound, where steps have been dense
    assert (cache.layers[0].steps is held) == (last == 460)
    near(steps(ids[:, 400:401]).float(), wanted[:, 400], 0.02 if last == 460 else 1.0)


def test_captured_steps_follow_a_cache_that_was_used_otherwise(model: Any) -> None:
    """An eager pass, a crop and a reset in between: places and memory are the cache's, not the graph's."""
    ids = tokens(1, 420)

    def fresh() -> HSRCache:
        cache = HSRCache(model.config, decode=ALL, dense_below=0)
        passes(model, cache, ids, [400, 1])
        return cache

    wanted = passes(model, fresh(), ids[:, 401:], [1] * 10)
    cache = fresh()
    steps = CapturedSteps(model, cache)
    found = [steps(ids[:, 401:402])[:, None].float().clone()]
    found.append(passes(model, cache, ids[:, 402:], [1]))
    found.append(steps(ids[:, 403:404])[:, None].float().clone())
    graph = steps._graph
    cache.crop(-1)
    found[-1] = passes(model, cache, ids[:, 403:], [1])
    found.append(steps(ids[:, 404:405])[:, None].float().clone())
    assert steps._graph is graph, "a crop moves no memory"
    near(torch.cat(found, 1), wanted[:, :4])
    cache.reset()
    passes(model, cache, ids, [400, 1])
    near(steps(ids[:, 401:402])[:, None].float(), wanted[:, :1])


def test_what_cannot_be_captured_is_told(model: Any) -> None:
    cache = HSRCache(model.config, decode=Quest(budget=64), dense_below=0)
    passes(model, cache, tokens(1, 101), [100, 1])
    with pytest.raises(ArgumentError, match="layer 0 has not"):
        CapturedSteps(model, cache)


def test_steps_do_not_wait_for_the_gpu(model: Any) -> None:
    ids = tokens(1, 300)
    cache = HSRCache(model.config, decode=Sampled(budget=64), dense_below=0)
    passes(model, cache, ids, [290, 1, 1])
    with waiting_is_an_error():
        passes(model, cache, ids, [1, 1])
    assert 0 < cache.report().share < 0.9


def test_trials_time_graphs(model: Any) -> None:
    ids = tokens(1, 2000)
    cache = HSRCache(model.config, decode=Sampled(budget=64))
    passes(model, cache, ids, [1500, *[1] * 4])
    one = cache.layers[0]
    assert (one.steps is None) == (one._retry == 3002)
    big = torch.randn(1, 2, 1 << 17, 64, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(1, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    steps = Fused(Sampled(budget=64), big, big, 4, 0.125, None, 0)
    assert trial.captured_seconds(lambda: steps.attend(q)) < 1e-3
