"""What every layer asks of a forward pass, and the note by which attention finds the layer."""

from __future__ import annotations

from typing import Any

import torch

from attention.integrations.masks import note
from hsr.errors import ArgumentError


def once(q: torch.Tensor, rows: int) -> None:
    """ArgumentError unless q has a row for each token of the last update; 0 after it was attended to."""
    if q.shape[2] != rows:
        raise ArgumentError(f"query must have {rows} rows, one a new token; got {q.shape[2]}")


def no_gradient(*parts: torch.Tensor) -> None:
    """ArgumentError where one of them needs a gradient, which attention over a cache does not give."""
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        raise ArgumentError('"hsr" attention must need no gradient: call the model within torch.no_grad()')


def noted_rows(k: torch.Tensor, v: torch.Tensor, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What an update returns: views, so that only these very objects carry the note."""
    return note(k, layer), note(v, layer)
