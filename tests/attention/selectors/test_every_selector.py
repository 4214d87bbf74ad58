"""What holds for whatever lies in the folder of selectors, and for a new one."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import attention.selectors
from attention import Dense, audit, decode, prefill
from attention.key_lists import check, plain, row_blocks
from attention.listed_reference import listed
from attention.selector import Selector
from attention.selectors import catalogue
from hsr.errors import ArgumentError
from tests.prompts import Prompt, prompts
from tests.selectors import Line, gaussian, lines, lists_of

EXAMPLES = [example for selector in catalogue().values() for example in selector.examples()]
every = pytest.mark.parametrize("selector", EXAMPLES, ids=str)
TOY = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from attention.block_maps import distances, key_lists
from attention.selector import Selector

@dataclass(frozen=True)
class EveryOther(Selector):
    causal: ClassVar[bool] = True
    phase: int = 0

    @classmethod
    def examples(cls):
        return (cls(),)

    def lists(self, q, k, scale):
        m, n = q.shape[1], k.shape[1]
        far = distances(m, n, q.device)
        return key_lists((far % 2 == self.phase).expand(len(q), -1, -1), m, n)
"""


@every
@settings(max_examples=25)
@given(prompt=prompts())
def test_lists_are_sound_whatever_the_prompt(selector: Selector, prompt: Prompt) -> None:
    before = [x.copy() for x in prompt]
    lists_of(selector, prompt)
    assert all(np.array_equal(x, y) for x, y in zip(prompt, before, strict=True))


@every
def test_prefill_attends_to_the_lists(selector: Selector) -> None:
    prompt = gaussian(5, 421, 552)
    result = prefill(*prompt, policy=selector)
    output, lse = listed(*prompt, plain(lists_of(selector, prompt)), prompt.scale)
    assert np.allclose(result.output, output) and np.allclose(result.lse, lse)
    assert result.certificate.kind == "none" and (result.densities <= 1).all()


@every
def test_a_group_is_as_if_each_head_had_its_own_keys(selector: Selector) -> None:
    prompt = gaussian(6, 650, 1100, group=3)
    expanded = prompt._replace(k=np.repeat(prompt.k, 3, axis=0), v=np.repeat(prompt.v, 3, axis=0))
    assert lines(selector, prompt) == lines(selector, expanded)


@every
def test_a_batch_is_as_its_sequences_alone(selector: Selector) -> None:
    first, second = gaussian(7, 300, 700), gaussian(8, 300, 700)
    both = Prompt(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))
    assert lines(selector, both) == lines(selector, first) + lines(selector, second)
    together = prefill(*(np.stack(pair) for pair in zip(first, second, strict=True)), policy=selector)
    assert np.array_equal(together.output[1], prefill(*second, policy=selector).output)


@every
def test_a_choice_sees_later_tokens_only_where_it_says_so(selector: Selector) -> None:
    changes = [early_lines_differ(selector, m, n, turn) for m, n, turn in ((700, 700, 256), (650, 1100, 384))]
    assert not any(changes) if selector.causal else any(changes)


def early_lines_differ(selector: Selector, m: int, n: int, turn: int) -> bool:
    """Whether lists of rows before ``turn`` become others when every token from there on does."""
    prompt = gaussian(9, m, n)
    other = Prompt(*(x.copy() for x in prompt))
    other.q[:, turn:] += 5
    other.k[:, n - m + turn :] *= -3
    found, changed = lines(selector, prompt), lines(selector, other)
    early = [line for line in range(len(found)) if line % row_blocks(m) < turn // 128]
    return any(found[line] != changed[line] for line in early)


@every
def test_nothing_is_read_back_and_nothing_leaves_the_device(selector: Selector) -> None:
    """Tensors of the device meta have shapes alone: whatever looks at an entry, or is made elsewhere, raises."""
    q, k = torch.empty(4, 300, 16, device="meta"), torch.empty(2, 431, 16, device="meta")
    made = [x for x in vars(selector.lists(q, k, 0.25)).values() if isinstance(x, torch.Tensor)]
    assert made and all(x.device.type == "meta" for x in made)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_served(selector: Selector, dtype: torch.dtype) -> None:
    prompt = gaussian(10, 300, 431)
    q, k, v = (torch.from_numpy(x).to(dtype) for x in prompt)
    check(selector.lists(q, k, prompt.scale), *prompt.shape)
    assert torch.isfinite(prefill(q, k, v, policy=selector).output).all()


def test_arrays_that_cannot_be_written_are_served() -> None:
    prompt = gaussian(11, 300, 431)
    wanted = prefill(*prompt, policy=EXAMPLES[0]).output
    for x in prompt:
        x.flags.writeable = False
    assert np.allclose(prefill(*prompt, policy=EXAMPLES[0]).output, wanted)


def test_audits_serve_selectors_and_decode_refuses_them() -> None:
    q, k, v = gaussian(12, 300, 431)
    assert 0 <= audit(q, k, v, EXAMPLES[0], rows=8).error.overall_mean <= 1
    with pytest.raises(ArgumentError, match="it serves prefill"):
        decode(q[:, -1:], k, v, policy=EXAMPLES[0])
    with pytest.raises(ArgumentError, match="causal must be True"):
        prefill(q, k, v, policy=EXAMPLES[0], causal=False)


@every
def test_tighter_settings_attend_to_more_and_end(selector: Selector) -> None:
    """Of sixteen thousand keys, so that there is something to tighten; attended to over fewer."""
    prompt, ladder = gaussian(14, 300, 600), [selector]
    while (following := ladder[-1].tighter(1 << 14)) is not None:
        ladder.append(following)
    densities = [float(lists_of(rung, prompt).densities(300, 600).mean()) for rung in ladder]
    assert 2 <= len(ladder) < 20 and all(type(rung) is type(selector) for rung in ladder)
    assert densities == sorted(densities)


@every
def test_an_audit_goes_on_from_a_selector_until_nothing_is_dropped(selector: Selector) -> None:
    prompt = gaussian(15, 300, 700)
    found = audit(*prompt, selector, rows=4, escalate=True, max_error=0.0)
    tried = [attempt.audited for attempt in (*found.earlier, found)]
    assert tried[0] == selector and tried[-1] == Dense()
    assert all(tighter == looser.tighter(700) for looser, tighter in itertools.pairwise(tried[:-1]))


def test_a_new_selector_is_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "every_other.py").write_text(TOY)
    monkeypatch.setattr(attention.selectors, "__path__", [*attention.selectors.__path__, str(tmp_path)])
    toy = attention.selectors.EveryOther()
    assert "EveryOther" in catalogue()
    assert lines(toy, gaussian(13, 640, 640, g=1, group=1))[4] == Line(set(), {0, 2}, set())
    assert prefill(*gaussian(13, 640, 640), policy=toy).densities.max() < 1


def test_a_selector_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        attention.selectors.NoSuchThing  # noqa: B018
