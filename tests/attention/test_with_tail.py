"""One name wraps selectors of both kinds."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from attention.list_tail import ListTail
from attention.selectors import PowerAttention, Quest
from attention.step_tail import StepTail
from attention.with_tail import WithTail
from hsr.errors import ArgumentError


def test_the_selector_says_which_tail_it_gets() -> None:
    assert WithTail(PowerAttention(), sampled=9, seed=3) == ListTail(PowerAttention(), sampled=9, seed=3)
    assert WithTail(Quest(64), means=True) == StepTail(Quest(64), means=True)


def test_what_is_no_selector_is_refused() -> None:
    for wrong in ("Quest", None, ListTail):
        with pytest.raises(ArgumentError, match=r"selector must be one of attention\.selectors; got"):
            WithTail(wrong, sampled=9)
