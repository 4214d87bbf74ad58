"""Dense attention of a layer: what "sdpa" does, and in blocks of rows what would need too large a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attention.integrations.masks import EXPLICIT, Seen
from hsr.errors import ArgumentError

WINDOW_ROWS = 1024  # of a block where rows see a window alone


def dense(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    seen: Seen,
    window: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """q (B, h, m, d), k (B, g, n, d), v (B, g, n, dv) -> (B, m, h, dv), to the bit as "sdpa" with the same mask.

    Where that mask was too large to be made, to rounding, and without a copy of keys and values for each query head.
    """
    m, n = q.shape[2], k.shape[2]
    whole = attention_mask is None and m in (1, n) and (window is None or n < window)
    if whole or (attention_mask is not None and attention_mask.ndim == 4):
        output: torch.Tensor = sdpa_attention_forward(module, q, k, v, attention_mask, **options)[0]
        return output
    if not seen.plain:
        raise ArgumentError("attention_mask must be of left padding, (B, n); got something else")
    wide = n if window is None else min(n, window + WINDOW_ROWS)
    (h, d), g = (q.shape[1], q.shape[3]), k.shape[1]
    rows = max(EXPLICIT // (len(q) * (h // g) * wide), 1)
    if window is not None:
        rows = min(rows, WINDOW_ROWS)
    parts = []
    for first in range(0, m, rows):
        last = min(first + rows, m)
        low = 0 if window is None else max(n - m + first - window + 1, 0)
        high = n - m + last
        own = allowed(torch.arange(first, last, device=q.device) + (n - m), low, high, seen, window)
        part = slice(low, high)
        grouped = q[:, :, first:last].reshape(len(q), g, -1, d)  # rows of a group's heads: keys are not repeated
        found = scaled_dot_product_attention(
            grouped, k[:, :, part], v[:, :, part], own.repeat(1, 1, h // g, 1), scale=options.get("scaling")
        )
        parts.append(found.reshape(len(q), h, last - first, -1).transpose(1, 2))
    return torch.cat(parts, dim=1)


def allowed(places: torch.Tensor, low: int, high: int, seen: Seen, window: int | None) -> torch.Tensor:
    """Rows at ``places`` (r,) and keys low..high-1 -> (B or 1, 1, r, high - low) bool.

    A padding row sees its own key alone: it counts for nothing, but must not be empty.
    """
    keys = torch.arange(low, high, device=places.device)
    rows = places[:, None]
    allowed = keys <= rows
    if window is not None:
        allowed &= keys > rows - window
    lefts = torch.tensor([0] if seen.lefts is None else seen.lefts, device=places.device)[:, None, None]
    return ((allowed & (keys >= lefts)) | (keys == rows))[:, None]
