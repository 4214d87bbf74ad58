"""How long prefill takes on this GPU, dense and sampled: rates measured in the process, once for a kind of call."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from attention.key_lists import ROWS, bands, edges, ends, least_density, row_blocks
from gpu import listed

LENGTHS, HEADS, GROUPS = (2048, 16384), 32, 8  # of the prompts that are timed
DENSITY = 0.25
TAKES = 5


class Line(NamedTuple):
    """Seconds of a call, and more for every unit of work."""

    call: float
    unit: float

    def at(self, work: float) -> float:
        """Seconds of so much work."""
        return self.call + self.unit * work


class Rates(NamedTuple):
    """By pairs: of rows and keys below the diagonal, of blocks and keys with codes, of rows and keys attended to."""

    dense: Line
    select: Line  # and all that is done once a call
    attend: Line

    def sampled(self, density: float, heads: int, m: int, n: int) -> float:
        """Seconds of a sampled call."""
        return self.select.at(heads * int(edges(m, n).sum())) + self._listed(density, heads, m, n)

    def _listed(self, density: float, heads: int, m: int, n: int) -> float:
        """Seconds of attending to lists, whoever made them."""
        pairs = max(density * int(ends(m, n).sum()), int(bands(m, n).sum()))
        return self.attend.at(heads * ROWS * pairs)

    def dense_is_faster(self, density: float, heads: int, m: int, n: int) -> bool:
        """Whether `gpu.prompt.dense` is expected to take no longer; of rows after a prefix it lists every key."""
        dense = self.dense.at(heads * n * n / 2) if m == n else self._listed(1.0, heads, m, n)
        return dense <= self.sampled(density, heads, m, n)

    def density_for(self, seconds: float, heads: int, m: int, n: int) -> float:
        """The density of a call that takes about so long; what is least, if none does."""
        seen = int(ends(m, n).sum())
        left = seconds - self.select.at(heads * int(edges(m, n).sum())) - self.attend.call
        least = least_density(m, n) + row_blocks(m) / seen
        return float(np.clip(left / (self.attend.unit * heads * ROWS * seen), min(least, 1.0), 1.0))


@functools.cache
def rates(device: torch.device, dtype: torch.dtype, d: int, rows: int, causal_selection: bool = False) -> Rates:
    """Of a width, a dtype, and lists by so many representatives."""
    from attention.block_sampled import BlockSampled
    from gpu import prompt

    random = torch.Generator(device).manual_seed(0)
    policy, scale = BlockSampled(density=DENSITY, rows=rows, causal_selection=causal_selection), d**-0.5
    taken: list[list[float]] = []
    for n in LENGTHS:
        q, k, v = (
            torch.randn(1, heads, n, d, device=device, dtype=dtype, generator=random)
            for heads in (HEADS, GROUPS, GROUPS)
        )
        lists = prompt.lists_of(policy, DENSITY, (q, k, v), scale)
        dense = _best(lambda: prompt.result_of(prompt.dense((q, k, v), scale), q, n, False), device)  # noqa: B023 - called at once
        sampled = _best(lambda: prompt.result_of(prompt.drawn(policy, DENSITY, (q, k, v), scale), q, n, True), device)  # noqa: B023
        attend = _best(lambda: listed.attend(q, k, v, lists, scale), device)  # noqa: B023
        taken.append([dense, max(sampled - attend, 0.0), attend])
    seen = [int(ends(n, n).sum()) for n in LENGTHS]
    work = [
        [HEADS * n * n / 2 for n in LENGTHS],
        [float(HEADS * int(edges(n, n).sum())) for n in LENGTHS],
        [HEADS * ROWS * DENSITY * pairs for pairs in seen],
    ]
    return Rates(*(_line(units, [times[i] for times in taken]) for i, units in enumerate(work)))


def _line(work: list[float], seconds: list[float]) -> Line:
    """Through two points; the shorter call's time is all per call where the longer takes less."""
    unit = max((seconds[1] - seconds[0]) / (work[1] - work[0]), 1e-16)
    return Line(max(seconds[0] - unit * work[0], 0.0), unit)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls, those of the host included, after one that may have to compile."""
    call()
    taken = []
    for _ in range(TAKES):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return min(taken)
