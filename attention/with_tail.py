"""What a selector leaves out, brought back: one name for prompts and for decode steps."""

from __future__ import annotations

from typing import Any

from attention.decode_selector import DecodeSelector
from attention.list_tail import ListTail
from attention.selector import ListMaker
from attention.step_tail import StepTail
from hsr.errors import ArgumentError

TAILS = {ListMaker: ListTail, DecodeSelector: StepTail}


def WithTail(selector: Any, **settings: Any) -> ListTail | StepTail:
    """The selector, and something that stands for the keys it leaves out.

    Args:
        selector: of prompts or of decode steps, see `attention.selectors`.
        **settings: ``sampled=b`` for a uniform sample of b keys, ``means=True`` for means of blocks, ``seed``; as
            `ListTail` and `StepTail` have them.

    Returns:
        ListTail | StepTail: a policy of `prefill`, or of `DecodeSession` and `decode`.

    Raises:
        ArgumentError: no selector, or settings out of range.
    """
    made = next((tail for kind, tail in TAILS.items() if isinstance(selector, kind)), None)
    if made is None:
        raise ArgumentError(f"selector must be one of attention.selectors; got {selector!r}")
    return made(selector, **settings)
