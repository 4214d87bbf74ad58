"""Key lists from maps of what is kept, in tensors of fixed sizes: nothing here waits for the device.

Row block I begins in key block ``E_I``, of which its band starts (`attention.key_lists`); earlier key blocks are
eligible.  A map is (H, T, C) bool for C = ceil(n / 128) key blocks, the band's included.  With H heads it takes about
40 H T C bytes on the way to lists, 1.4 GB for 128K tokens of 32 heads.
"""

from __future__ import annotations

import torch

from attention.key_lists import KEYS, ROWS, KeyLists, row_blocks


def key_blocks(n: int) -> int:
    """C, how many blocks n keys make, the last perhaps not whole."""
    return -(-n // KEYS)


def own_blocks(m: int, n: int, device: torch.device) -> torch.Tensor:
    """E_I, the key block in which the first row of each block lies: (T,) int64."""
    return (n - m + ROWS * torch.arange(row_blocks(m), device=device)) // KEYS


def distances(m: int, n: int, device: torch.device) -> torch.Tensor:
    """E_I - J, positive where key block J is eligible: (T, C) int64."""
    return own_blocks(m, n, device)[:, None] - torch.arange(key_blocks(n), device=device)


def diagonal_blocks(chosen: torch.Tensor, m: int) -> torch.Tensor:
    """Diagonals (H, n) bool, by distance from row to key -> every key block that they touch: (H, T, C) bool.

    Rows P .. L of a block meet keys ``128 J .. 128 J + 127`` at the distances ``P - 128 J - 127 .. L - 128 J``; one
    diagonal touches two neighbouring key blocks, unless it passes through their corners.
    """
    n = chosen.shape[1]
    first = n - m + ROWS * torch.arange(row_blocks(m), device=chosen.device)
    last = (first + ROWS - 1).clamp(max=n - 1)
    key = KEYS * torch.arange(key_blocks(n), device=chosen.device)
    near = (first[:, None] - key - KEYS + 1).clamp(min=0)
    far = (last[:, None] - key + 1).clamp(min=0)
    before = torch.nn.functional.pad(chosen.cumsum(1), (1, 0))  # (H, n + 1), chosen diagonals nearer than each
    return before[:, far] > before[:, near]


def compressed(keep: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries (H, T, w) bool to keep of ids that broadcast to them -> offsets (H T + 1,) int64, ids int32 in CSR form.

    A stable partition of all ids, so that their number is known without a look.
    """
    flat = keep.flatten()
    kept = flat.cumsum(0)  # up to each entry, itself included
    rest = kept[-1:] + torch.arange(len(flat), device=flat.device) - kept
    every = ids.to(torch.int32).expand(keep.shape).flatten()
    found = torch.empty_like(every).scatter_(0, torch.where(flat, kept - 1, rest), every)
    return torch.nn.functional.pad(keep.sum(2).flatten().cumsum(0), (1, 0)), found


def key_lists(
    keep: torch.Tensor, m: int, n: int, *, means: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> KeyLists:
    """Lists of what is eligible among key blocks (H, T, C) to keep whole, others that their means stand for, and keys.

    Means are (H, T, C) bool; columns (H, w) or (1, w) int64, keys that every row of a head is shown, no key twice.
    A key in a block that is kept or stood for is not listed beside it.
    """
    older = distances(m, n, keep.device) > 0
    ids = torch.arange(keep.shape[2], device=keep.device)
    blocks = compressed(keep & older, ids)
    pooled = (None, None) if means is None else compressed(means & older & ~keep, ids)
    if columns is None:
        tokens = torch.zeros_like(blocks[0]), blocks[1][:0]
    else:
        inside = (columns // KEYS)[:, None].expand(*keep.shape[:2], -1)
        taken = keep if means is None else keep | means
        tokens = compressed((older & ~taken).gather(2, inside), columns[:, None])
    return KeyLists(*tokens, None, *blocks, *pooled)
