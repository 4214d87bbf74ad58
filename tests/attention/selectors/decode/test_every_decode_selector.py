"""What holds for every decode selector that lies in the folder, and for a new one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import attention.selectors
from attention import DecodeSession, decode, prefill
from attention.chosen_reference import chosen
from attention.decode_selector import DecodeSelector
from attention.selector import Selector
from attention.selectors import catalogue
from hsr.errors import ArgumentError
from tests.decode_selectors import Cache, cache, caches, listed, lists_of, nothing_read_back, sets, together

EXAMPLES = [example for selector in catalogue(DecodeSelector).values() for example in selector.examples()]
every = pytest.mark.parametrize("selector", EXAMPLES, ids=str)
TOY = """
from dataclasses import dataclass
import torch
from attention.decode_selector import DecodeSelector, Steps
from attention.token_lists import TokenLists

@dataclass(frozen=True)
class EvenTokens(DecodeSelector, Steps):
    @classmethod
    def examples(cls):
        return (cls(),)

    def begin(self, k, v, queries, scale, batch=1):
        return self

    def append(self, k, v):
        pass

    def bytes_read(self, n, d, itemsize, group=1):
        return 0.0

    def choose(self, q, k, v):
        return TokenLists.from_mask((torch.arange(k.shape[1], device=q.device) % 2 == 0).expand(len(k), -1))
"""


@every
@settings(max_examples=20)
@given(made=caches())
def test_lists_are_sound_whatever_the_keys_and_however_they_came(selector: DecodeSelector, made: Cache) -> None:
    before = [x.clone() for x in made]
    n = made.k.shape[1]
    for begin in {1, n // 3 + 1, n}:
        lists = lists_of(selector, made, begin)
        assert (lists.attended() > 0).all(), "a query was shown nothing"
    assert all(torch.equal(x, y) for x, y in zip(made, before, strict=True))


@every
def test_sessions_attend_to_the_lists(selector: DecodeSelector) -> None:
    q, k, v = made = cache(1, 300)
    found = DecodeSession(k, v, policy=selector).attend(q[:, None])
    lists = lists_of(selector, made)
    output, lse = chosen(q, k, v, lists, made.scale)
    assert np.allclose(found.output[:, 0], output, atol=1e-5) and np.allclose(found.lse[:, 0], lse)
    assert np.array_equal(found.counters.reported[:, 0], lists.attended().repeat_interleave(4 // len(lists.tokens)))
    assert np.allclose(decode(q[:, None], k, v, policy=selector).output, found.output)


@every
def test_the_only_key_is_attended_to(selector: DecodeSelector) -> None:
    q, k, v = cache(2, 1)
    found = DecodeSession(k, v, policy=selector).attend(q[:, None])
    assert np.allclose(found.output[:, 0], v[:, 0].repeat_interleave(2, 0), atol=1e-6)


@every
def test_a_cache_that_grows_step_by_step(selector: DecodeSelector) -> None:
    made = cache(3, 90)
    state = selector.begin(made.k[:, :20], made.v[:, :20], None, made.scale)
    for n in range(21, 91):
        state.append(made.k[:, :n], made.v[:, :n])
        lists = state.choose(made.q, made.k[:, :n], made.v[:, :n])
        assert all(max(line, default=0) < n for line in sets(lists, 4))


@every
def test_heads_that_ask_alike_are_shown_alike(selector: DecodeSelector) -> None:
    alone = cache(4, 400, group=1)
    grouped = alone._replace(q=alone.q.repeat_interleave(3, 0))
    for found, wanted in zip(listed(selector, grouped)[::3], listed(selector, alone), strict=True):
        assert found == wanted
    assert listed(selector, grouped)[::3] == listed(selector, grouped)[2::3]


@every
def test_a_batch_is_as_its_sequences_alone(selector: DecodeSelector) -> None:
    first, second = cache(5, 350), cache(6, 350)
    both = listed(selector, together(first, second), batch=2)
    assert both == listed(selector, first) + listed(selector, second)
    q, k, v = (torch.stack(pair) for pair in zip(first, second, strict=True))
    found = DecodeSession(k, v, policy=selector).attend(q[:, :, None])
    alone = DecodeSession(k[1], v[1], policy=selector).attend(q[1, :, None])
    assert np.allclose(found.output[1], alone.output, atol=1e-6)


@every
def test_tensors_need_not_be_contiguous(selector: DecodeSelector) -> None:
    made = cache(7, 200)
    wanted = listed(selector, made)
    q = made.q.repeat(1, 2)[:, :16]
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in made[1:])
    assert not q.is_contiguous() and not k.is_contiguous()
    assert listed(selector, Cache(q, k, v)) == wanted


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_served(selector: DecodeSelector, dtype: torch.dtype) -> None:
    made = Cache(*(x.to(dtype) for x in cache(8, 300)))
    assert all(listed(selector, made, begin=290))
    found = DecodeSession(made.k, made.v, policy=selector, queries=made.q[:, None]).attend(made.q[:, None])
    assert torch.isfinite(found.output).all() and found.output.dtype == dtype


@every
def test_nothing_is_read_back(selector: DecodeSelector) -> None:
    made = cache(9, 300)
    state = selector.begin(made.k[:, :200], made.v[:, :200], made.q[:, None].repeat(1, 5, 1), made.scale)
    with nothing_read_back():
        for n in (201, 202, 300):
            state.append(made.k[:, :n], made.v[:, :n])
            state.choose(made.q, made.k[:, :n], made.v[:, :n])


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x[0] > 0),
        lambda x: torch.where(x > 0),
        lambda x: x.repeat_interleave((x > 0).int()),
        lambda x: x.cpu(),
        lambda x: float(x[0]),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_the_watch_sees_what_waits(read: object) -> None:
    with pytest.raises(AssertionError, match="wait"), nothing_read_back():
        read(torch.randn(5))  # type: ignore[operator]


@every
def test_settings_are_frozen_and_bytes_are_counted(selector: DecodeSelector) -> None:
    assert dataclasses.is_dataclass(selector) and hash(selector) == hash(dataclasses.replace(selector))
    assert 0 <= selector.bytes_read(4096, 128, 2) <= 4096 * 128 * 2 * 2
    assert type(selector).__name__ in catalogue(DecodeSelector)
    assert "Raises:" in str(type(selector).__doc__)


def test_prompts_are_refused() -> None:
    q, k, v = (x.numpy() for x in cache(10, 40))
    with pytest.raises(ArgumentError, match="it serves decode, step by step"):
        prefill(q[:, None], k, v, policy=EXAMPLES[0])


def test_kinds_of_selectors_do_not_mix() -> None:
    prompts, steps = catalogue(), catalogue(DecodeSelector)
    assert not set(prompts) & set(steps) and all(issubclass(found, Selector) for found in prompts.values())
    assert attention.selectors.TopOracle is steps["TopOracle"]


def test_a_new_selector_is_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "even_tokens.py").write_text(TOY)
    monkeypatch.setattr(attention.selectors, "__path__", [*attention.selectors.__path__, str(tmp_path)])
    toy = attention.selectors.EvenTokens()
    assert "EvenTokens" in catalogue(DecodeSelector) and "EvenTokens" not in catalogue()
    q, k, v = cache(11, 9)
    assert listed(toy, Cache(q, k, v)) == [{0, 2, 4, 6, 8}] * 4
    session = DecodeSession(k, v, policy=toy)
    session.append(k[:, :2], v[:, :2])
    found, every_other = session.attend(q[:, None]), torch.cat([k, k[:, :2]], 1)[:, ::2]
    values = torch.cat([v, v[:, :2]], 1)[:, ::2]
    weights = (q.view(2, 2, -1) @ every_other.mT / 4).softmax(2) @ values
    assert np.allclose(found.output[:, 0], weights.flatten(0, 1), atol=1e-5)
