"""Thresholds of a causal selection, block after block: `attention.listed_reference.paced` on the GPU.

All that does not depend on what earlier blocks spent is made for every block at once; `pace` has a comparison and a
reduction left for each.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attention.key_lists import KEYS, ROWS
from attention.listed_reference import CODES, RESERVED, ROUNDING, STEPS, STRIDE, UNITS
from hsr.lifted_numba import BITS

LEVELS = tl.constexpr(CODES)
AHEAD = 4  # blocks whose rows are on their way


@triton.jit
def pace(OWN, EXPECTED, PLACES, budget, lines, LATER: tl.constexpr):
    """Grid (heads,): OWN (heads, lines, LEVELS) int32, what a block would spend by each threshold, falling.

    EXPECTED (heads, lines, LEVELS) float64, with what is then expected of later ones -> PLACES (heads, lines) int32,
    of the first thresholds that fit what is left of the budget.  One warp, LATER blocks are loaded ahead.
    """
    head = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LEVELS)
    left = budget.to(tl.float64)
    for line in tl.range(0, lines, num_stages=LATER):
        at = (head * lines + line) * LEVELS + c
        own = tl.load(OWN + at)
        expected = tl.load(EXPECTED + at)
        fits = expected <= left
        left -= tl.max(tl.where(fits, own, 0), 0).to(tl.float64)  # alone in the way of the next block
        tl.store(PLACES + head * lines + line, tl.sum(tl.where(fits, 0, 1), 0))


def chances(histograms: torch.Tensor, kept: float, shift: int) -> torch.Tensor:
    """histograms (heads, T, 256) int32, a head's budget of keys and n - m -> chances (heads, T, 256) int32.

    Keys before a block are fewer than 2^23.  Nothing waits for the device.
    """
    heads, T, _ = histograms.shape
    device = histograms.device
    block, c = torch.arange(T, device=device), torch.arange(CODES, device=device)
    edge, later = (shift + ROWS * block) // KEYS * KEYS, (T - 1 - block).double()
    budget = math.floor(UNITS * kept)
    least = budget // (RESERVED * max(sum(shift + ROWS * i >= KEYS for i in range(T)), 1))
    powers = torch.exp2((c[:, None] - STRIDE * c).clamp(max=0).double() / STEPS)  # (codes, thresholds)
    own = (histograms.double() @ powers).mul_(UNITS).sub_(ROUNDING).ceil_()
    expected = (own * edge[:, None]).cumsum(1)
    expected *= ((1 - 1 / RESERVED) * later / edge.cumsum(0).clamp(min=1))[:, None]
    expected += own
    expected += (later * least)[:, None]
    expected.masked_fill_(own <= least, -math.inf)
    expected[..., -1] = -math.inf
    places = torch.empty(heads, T, dtype=torch.int32, device=device)
    pace[(heads,)](own.to(torch.int32), expected, places, budget, T, LATER=AHEAD, num_warps=1)
    off = (STRIDE * places[..., None] - c).clamp(min=0).double()
    return torch.exp2(BITS - off / STEPS).round_().clamp_(min=1).to(torch.int32)
