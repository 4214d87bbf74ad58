"""How many key blocks a selector may list if a prompt is to take a given time: rates measured once in the process."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from attention import prompt_cost
from attention.key_lists import KEYS, ROWS, bands, row_blocks

REPRESENTATIVES = 8  # rows of a block that rates of sampled prompts are measured for; those of attending are alike


def blocks_for(seconds: float, selector: Any, q: torch.Tensor, k: torch.Tensor) -> int:
    """Key blocks on the lists of each head of q (H, m, d), k (G, n, d), beside the bands; 0 where time is up before.

    The selector, whose own time counts, must be hashable; it is timed on random numbers of the same shape.
    """
    (heads, m, d), (groups, n, _) = q.shape, k.shape
    call, pair = attending(heads, m, d, q.dtype, q.device)
    left = seconds - selecting(selector, heads, groups, m, n, d, q.dtype, q.device) - call
    return max(int((left / (pair * heads * ROWS) - int(bands(m, n).sum())) / KEYS), 0)


def attending(heads: int, m: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds to attend to nothing but the bands' beginnings, and more for each pair of a row and a key."""
    if device.type == "cuda":
        from gpu import prompt_cost as far

        line = far.rates(device, dtype, d, REPRESENTATIVES).attend
        return line.call, line.unit
    rates = prompt_cost.rates(d, d, str(dtype).removeprefix("torch."), REPRESENTATIVES, "numba")
    return rates.line * heads * row_blocks(m), rates.pair


@functools.lru_cache(maxsize=64)
def selecting(
    selector: Any, heads: int, groups: int, m: int, n: int, d: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds that its lists take, after a call that sets up."""
    random = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(x, y, d, generator=random, device=device).to(dtype) for x, y in ((heads, m), (groups, n)))
    taken = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        selector.lists(q, k, d**-0.5)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - begun
    return taken
