"""Prompts in the transformers integration: each sequence by its own length, chunks by trials of their own shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from attention import BlockSampled, Dense, TopR
from attention.head_clusters import HeadClusters
from attention.integrations import dense_rows, layer, masks, trial
from attention.integrations.transformers import NAME, HSRCache
from attention.key_lists import least_density
from attention.selectors.share_prefill import PivotalPatterns, SharePrefill
from attention.with_tail import WithTail
from tests.small_models import FAMILIES, model_of, passes, prompts

POLICY = BlockSampled(density=0.5)
ROWS, PADDING = 500, 300  # the second sequence has 200 tokens, which that density cannot serve


@pytest.mark.parametrize("sizes", [[ROWS], [440, 60]], ids=str)
def test_a_short_sequence_of_a_long_batch_is_that_of_sdpa_to_the_bit(sizes: list[int]) -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts(ROWS, PADDING)
    ids, kept = inputs.values()
    model.set_attn_implementation("sdpa")
    wanted = passes(model, DynamicCache(config=model.config), ids, sizes, attention_mask=kept)
    model.set_attn_implementation(NAME)
    cache = HSRCache(model.config, prefill=POLICY, dense_below=300)
    found = passes(model, cache, ids, sizes, attention_mask=kept)
    assert torch.equal(found[1, PADDING:], wanted[1, PADDING:])
    assert not torch.allclose(found[0], wanted[0]), "the long one is sparse"
    alone = passes(model, HSRCache(model.config, prefill=POLICY, dense_below=300), ids[:1], sizes)
    torch.testing.assert_close(found[:1], alone, rtol=1e-4, atol=1e-4)


def test_a_sequence_beyond_the_bound_that_its_policy_cannot_serve_raises() -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts(ROWS, PADDING)
    ids, kept = inputs.values()
    model.set_attn_implementation(NAME)
    with pytest.raises(layer.ArgumentError, match="density must be above"):
        passes(model, HSRCache(model.config, prefill=POLICY, dense_below=0), ids, [ROWS], attention_mask=kept)


def test_trials_judge_each_sequence_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts(ROWS, PADDING)
    ids, kept = inputs.values()
    model.set_attn_implementation(NAME)
    monkeypatch.setattr(trial, "PROMPT", 256)
    monkeypatch.setattr(trial, "_faster", lambda *call: True)
    policy = BlockSampled(density=0.7)
    trials = passes(model, HSRCache(model.config, prefill=policy), ids, [ROWS], attention_mask=kept)
    number = passes(model, HSRCache(model.config, prefill=policy, dense_below=300), ids, [ROWS], attention_mask=kept)
    assert torch.equal(trials, number)


class Clocked:
    """In place of the clock: what was timed, and what it gave."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []

    def __call__(self, call: Any, device: torch.device) -> float:
        found = call()
        self.outputs.append(found if isinstance(found, torch.Tensor) else found.output.transpose(0, 1)[None])
        return 1.0


@pytest.mark.parametrize(
    ("rows", "keys", "tried"),
    [
        (2000, 2000, (2048, 2048)),
        (300, 5000, (256, 4096)),
        (17, 1030, (16, 1024)),
        (1030, 1030, (1024, 1024)),
    ],
)
def test_a_chunk_is_judged_as_rows_over_its_prefix(
    rows: int, keys: int, tried: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides give the same rows: where every key is kept, those of causal attention to the lower right."""
    clock = Clocked()
    monkeypatch.setattr(trial, "seconds", clock)
    trials = trial.PromptTrials()
    q, k, v = torch.randn(2, 4, rows, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 16)
    trials.faster(Dense(), q, k, v)
    sparse, dense = clock.outputs
    assert sparse.shape == (1, tried[0], 4, 16) and next(iter(trials._faster))[-1] == tried
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    trials.faster(Dense(), q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])
    assert len(clock.outputs) == 2, "remembered"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1 << 20), st.integers(1, 1 << 22))
def test_trials_have_shapes_like_what_they_judge(m: int, n: int) -> None:
    m = min(m, n)
    rows, keys = trial._tried(m, n)
    assert 1 <= rows <= keys and rows * keys <= trial.PAIRS
    assert rows & (rows - 1) == keys & (keys - 1) == 0
    if m * n <= trial.PAIRS // 2:
        assert max(rows / m, m / rows, keys / n, n / keys) < 1.4143
    elif rows > 1:
        assert 0.49 < (rows / keys) / (m / n) < 2.01 and rows * keys > trial.PAIRS // 16


def test_a_density_that_the_trial_could_not_be_run_at_is_dense() -> None:
    """Of 1,400 keys the bands hold less than that density, of 1,024, as it would be tried, they hold more."""
    rows = torch.randn(1, 1, 1400, 8)
    policy = BlockSampled(density=0.2)
    assert least_density(1400, 1400) < 0.2 < least_density(1024, 1024)
    assert not trial.PromptTrials().faster(policy, rows, rows, rows)


def test_on_a_gpu_chunks_alone_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole prompts its launches find out themselves."""
    monkeypatch.setattr(trial, "_faster", lambda *call: False)

    def rows(m: int) -> Any:
        return SimpleNamespace(shape=(1, 4, m, 64), device=torch.device("cuda"), dtype=torch.float16)

    trials, policy = trial.PromptTrials(), BlockSampled(density=0.5)
    assert trials.faster(policy, rows(1500), rows(1500), rows(1500))
    assert not trials.faster(policy, rows(17), rows(1500), rows(1500))


def shared(tail: bool) -> list[Any]:
    """A policy for each layer, whose heads share their blocks across layers; and what they share through."""
    clusters, patterns = HeadClusters(((0, 0, 1, 1),) * 3), PivotalPatterns()
    made = [SharePrefill(clusters, min_budget=128).at(number, patterns) for number in range(3)]
    return [WithTail(one, sampled=16) for one in made] if tail else made


@pytest.mark.parametrize("tail", [False, True])
def test_trials_leave_what_layers_share_alone(tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(FAMILIES["llama"]), prompts(ROWS)["input_ids"][:1]
    model.set_attn_implementation(NAME)
    monkeypatch.setattr(trial, "PROMPT", 256)
    monkeypatch.setattr(trial, "seconds", lambda call, device: (call(), 1.0 if "policy" in call.keywords else 2.0)[1])
    wanted = passes(model, HSRCache(model.config, prefill=shared(tail), dense_below=0), ids, [ROWS])
    assert torch.equal(passes(model, HSRCache(model.config, prefill=shared(tail)), ids, [ROWS]), wanted)


def test_layers_that_share_serve_no_padded_batch() -> None:
    """Its sequences are prompts of their own, and would be taken for one."""
    model, inputs = model_of(FAMILIES["llama"]), prompts(300, 20)
    ids, kept = (torch.cat([rows, rows[1:]]) for rows in inputs.values())
    model.set_attn_implementation(NAME)
    with pytest.raises(layer.ArgumentError, match="prefill must share nothing between layers in a batch with padding"):
        passes(model, HSRCache(model.config, prefill=shared(False), dense_below=0), ids, [300], attention_mask=kept)
    alone = [SharePrefill(HeadClusters(((0, 0, 1, 1),) * 3), layer=number, min_budget=128) for number in range(3)]
    found = passes(model, HSRCache(model.config, prefill=alone, dense_below=0), ids, [300], attention_mask=kept)
    assert torch.equal(found[1, 20:], found[2, 20:])


@pytest.mark.parametrize("windowed", [False, True])
def test_dense_blocks_of_rows_repeat_no_keys(windowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    attend = dense_rows.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((k, v, mask))
        return attend(q, k, v, mask, **options)

    monkeypatch.setattr(dense_rows, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(dense_rows, "EXPLICIT", 600)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 3
    q, k, v = torch.randn(2, 6, 50, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 4)
    kept = torch.ones(2, 50, dtype=torch.bool)
    kept[1, :9] = False
    found = dense_rows.dense(module, q, k, v, kept, masks.Seen((0, 9)), 7 if windowed else None, scaling=0.4)
    assert found.shape == (2, 50, 6, 4) and found.is_contiguous()
    assert len(seen) > 10 and max(mask.numel() for *_, mask in seen) <= 600
    for keys, values, _ in seen:
        assert keys.shape[1] == values.shape[1] == 2
        assert keys.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        assert values.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


def test_top_keys_of_padded_chunks_are_those_of_whole_prompts() -> None:
    model, inputs = model_of(FAMILIES["llama"]), prompts(90, 40)
    ids, kept = inputs.values()
    model.set_attn_implementation(NAME)
    policy = {"prefill": TopR(5), "dense_below": 0}
    wanted = passes(model, HSRCache(model.config, **policy), ids, [90], attention_mask=kept)
    found = passes(model, HSRCache(model.config, **policy), ids, [20, 30, 40], attention_mask=kept)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1, 40:], wanted[1, 40:], rtol=1e-3, atol=1e-3)
