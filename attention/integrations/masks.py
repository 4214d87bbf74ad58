"""Which keys the rows of a forward pass see, told once by its mask and read by every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hsr.errors import ArgumentError

EXPLICIT = 1 << 26  # elements of the largest mask that is made: beyond, layers make theirs in blocks of rows


@dataclass(frozen=True)
class Seen:
    """What rows see: with ``lefts`` the keys up to their own, but the first so many of each sequence.

    Attributes:
        lefts: left padding of every sequence; None where there is none.
        plain: False where a mask says anything else than that.
    """

    lefts: tuple[int, ...] | None = None
    plain: bool = True

    def left(self, sequence: int) -> int:
        """Padding of one sequence."""
        return 0 if self.lefts is None else self.lefts[sequence]


@torch.compiler.disable
def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """The mask function of "hsr": that of "sdpa", with a note of what it says; see `noted`.

    A large causal or sliding mask is not made: None stands for it, or with padding the padding alone, (B, kv) bool.
    """
    if options.get("allow_is_bidirectional_skip", False):
        raise ArgumentError('config must have causal attention with "hsr"; got a mask that looks both ways')
    changed = options.get("use_vmap", False) or not options.get("allow_is_causal_skip", True)  # by what models add
    regular = mask_function is causal_mask_function or (local_size is not None and not changed)
    seen = Seen(*_lefts(attention_mask, kv_offset, kv_length)) if regular else Seen(None, False)
    if regular and not changed and seen.plain and batch_size * q_length * kv_length > EXPLICIT:
        if seen.lefts is None or attention_mask is None:
            return None
        return note(attention_mask[:, kv_offset : kv_offset + kv_length], seen)
    made = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **options,
    )
    return None if made is None else note(made, seen)


def _lefts(padding: torch.Tensor | None, first: int, count: int) -> tuple[tuple[int, ...] | None, bool]:
    """Padding (B, at least first + count) of keys -> their left padding, and whether there is no other."""
    if padding is None:
        return None, True
    kept = padding[:, first : first + count].bool()
    if kept.shape[1] < count:
        return None, False
    counts = (~kept).sum(1)
    lefts = tuple(counts.tolist())
    if not any(lefts):
        return None, True
    return lefts, bool((kept == (torch.arange(count, device=kept.device) >= counts[:, None])).all())


def note(tensor: torch.Tensor, what: Any) -> torch.Tensor:
    """The tensor, with a note that travels along with the object."""
    tensor.hsr = what  # type: ignore[attr-defined]
    return tensor


def noted(tensor: torch.Tensor | None) -> Any:
    """What was noted on it; None where nothing was."""
    return getattr(tensor, "hsr", None)


def seen(attention_mask: torch.Tensor | None) -> Seen:
    """What a layer's mask says; one of four axes that somebody else made, or copied, is not plain."""
    if attention_mask is None:
        return Seen()
    found = noted(attention_mask)
    if isinstance(found, Seen):
        return found
    padding = attention_mask.ndim == 2 and attention_mask.dtype == torch.bool
    return Seen(*_lefts(attention_mask, 0, attention_mask.shape[1])) if padding else Seen(None, False)
