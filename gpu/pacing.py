"""Thresholds of a causal selection, block after block: `attention.listed_reference.paced` on the GPU.

Their sums are float64 and whole numbers of units times keys, so the same in any order while they stay below 2^53:
thresholds are the definition's bit for bit up to the 131,072 tokens that tests go to; far beyond, where `torch.cumsum`
may round in another order than the definition, one may differ.

All that does not depend on what earlier blocks spent is made for every block at once, before and after `pace`, which
has a comparison and a reduction left for each.
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
AHEAD = 8  # blocks whose rows are on their way: a step is shorter than the way from memory


@triton.jit(do_not_specialize=["budget"])
def pace(OWN, EXPECTED, LEFT, budget, lines, LATER: tl.constexpr):
    """Grid (heads,): OWN (heads, lines, LEVELS) int32, what a block would spend by each threshold, falling.

    EXPECTED (heads, lines, LEVELS) float64, with what is then expected of later ones -> LEFT (heads, lines) float64,
    of the budget as a block begins; it takes the first threshold that fits.  One warp, LATER blocks are loaded ahead.
    """
    head = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LEVELS)
    left = budget.to(tl.float64)
    for line in tl.range(0, lines, num_stages=LATER):
        at = (head * lines + line) * LEVELS + c
        own = tl.load(OWN + at)
        expected = tl.load(EXPECTED + at)
        tl.store(LEFT + head * lines + line, left)
        left -= tl.max(tl.where(expected <= left, own, 0), 0).to(tl.float64)


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
    left = torch.empty(heads, T, dtype=torch.float64, device=device)
    pace[(heads,)](own.to(torch.int32), expected, left, budget, T, LATER=AHEAD, num_warps=1)
    places = (expected > left[..., None]).sum(2, keepdim=True)
    off = (STRIDE * places - c).clamp(min=0).double()
    return torch.exp2(BITS - off / STEPS).round_().clamp_(min=1).to(torch.int32)
