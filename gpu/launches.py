"""A decode step in four launches of Triton: prepare, scan, gather, merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton

from gpu import gather, prepare, scan
from gpu.codes import INTERPRETED

if TYPE_CHECKING:
    from gpu.sampled import SampledCache


@dataclass(frozen=True)
class Tuning:
    """Shapes of the launches; the defaults were measured on an H200."""

    scan_keys: int = 128
    scan_tiles: int = 1
    scan_warps: int = 1
    scan_stages: int = 3
    prepare_warps: int = 4
    gather_keys: int = 64
    gather_warps: int = 4
    gather_stages: int = 1
    resident: int = 4  # gathering programs per multiprocessor
    overlap: bool = True  # of a kernel's start with its predecessor's end
    single: bool = True  # one launch, where it has a form


MEASURED = Tuning()


def overlap(tuning: Tuning) -> dict[str, bool]:
    """Settings of a launch whose start may overlap its predecessor's end."""
    return {"PDL": tuning.overlap and not INTERPRETED} | ({} if INTERPRETED else {"launch_pdl": tuning.overlap})


def launches(
    c: SampledCache, q: torch.Tensor, output: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
) -> Iterator[Callable[[], object]]:
    """As `SampledCache.launches`."""
    heads, shape, tune, draws, held = c.batch * c.groups, c.planes, c.tuning, c.draws, c.tokens
    both = overlap(tune)
    asm, grow = not INTERPRETED, int(k is not None)
    new_k, new_v = (q, q) if k is None or v is None else (k, v)
    yield lambda: prepare.prepare[(heads, 1 + grow)](
        q, c._query_map, c.means, c.spreads, c.found, c.trim, c.rho, c.budget, c.counts,
        c.queries, c.sigma, c.tau, *q.stride()[:2], draws.sinks, draws.recent, new_k, new_v, *c._cache,
        *c._maps, c.codes, c.lengths, *new_k.stride()[:2], *new_v.stride()[:2], *held.strides, held.most,
        held.room, c.groups, c.scale, c.per, c.padded, c.width, shape.columns, shape.row,
        shape.count, held.page, grow, asm,
        num_warps=max(tune.prepare_warps, shape.columns * c.width // 2048), **both,
    )  # fmt: skip
    yield lambda: scan.scan[(triton.cdiv(held.room, tune.scan_keys * tune.scan_tiles), heads)](
        c.queries, c.sigma, c.tau, c.codes.view(torch.int8), c.lengths, c.seeds, c.drawn,
        c.counts, c.found, held.room, c.cap, draws.sinks, draws.recent, c.crowd, shape.columns,
        shape.row, shape.count, shape.nibbles, c.padded, tune.scan_keys, tune.scan_tiles, tune.scan_stages,
        draws.systematic, draws.redraw, grow, asm,
        num_warps=max(tune.scan_warps, scan_warps(shape.columns)), **both,
    )  # fmt: skip
    yield lambda: gather.gather[(c.splits, heads)](
        q, *c._cache, c.drawn, c.counts, c.lengths, c.parts, c.sums, *q.stride()[:2],
        *held.strides, held.most, held.room, c.cap, draws.sinks, draws.recent, c.floor, c.scale,
        c.groups, c.per, max(4, triton.next_power_of_2(c.per)), c.width,
        min(tune.gather_keys, 64 * 128 // c.width), tune.gather_stages, held.page, grow, asm,
        num_warps=tune.gather_warps, **both,
    )  # fmt: skip
    yield lambda: gather.merge[(heads, c.per)](
        c.parts, c.sums, c.counts, c.lengths, c.status, output, c.lse, *output.stride()[:2],
        held.room, c.cap, draws.sinks, draws.recent, c.floor, c.crowd, c.groups, c.splits, c.per,
        c.width, triton.next_power_of_2(c.splits), grow, num_warps=4, **both,
    )  # fmt: skip


def scan_warps(columns: int) -> int:
    """Warps that hold a tile of 128 keys of so many bytes in their registers."""
    return max(1, columns // 32) if columns > 64 else 1
