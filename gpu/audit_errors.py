"""Errors of a result's rows against exact attention, on the GPU; for `gpu.audited`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu.exact_rows import Parts, joined


@triton.jit(do_not_specialize=["l_h", "tiles", "rows"], do_not_specialize_on_alignment=["TOLERANCE"])
def errors(
    PARTS, SUMS, PLAN, OUTPUT, LSE, TOLERANCE, VALUES, o_h, o_m, l_h, tiles, rows, G: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Grid (rows, sources): one row of a source's G heads, whose exact attention is joined as `gpu.exact_rows` does.

    OUTPUT (H, m, D), LSE (H, m) by strides, TOLERANCE (1,) float64 -> VALUES (3, H, rows / G) float64, at the row's
    slot: errors of its sum of weights and of its output, and 1 where the latter exceeds the tolerance.
    """
    source = tl.program_id(1).to(tl.int64)
    sources = tl.num_programs(1)
    row, slot, exact, true = joined(PARTS, SUMS, PLAN, tl.program_id(0), source, sources, tiles, rows, D, M, JOINED)
    head = slot // (rows // G)
    d = tl.arange(0, D)
    exact = exact.to(tl.float64)
    output = tl.load(OUTPUT + head * o_h + row.to(tl.int64) * o_m + d).to(tl.float64)
    lse = tl.load(LSE + head * l_h + row).to(tl.float64)
    true = true.to(tl.float64)
    dropped = tl.abs(tl.exp(lse - true) - 1)
    dropped = tl.where(lse == true, 0.0, tl.where(dropped < 1, dropped, 1.0))  # not a number is wrong
    off = tl.sqrt(tl.sum((output - exact) * (output - exact), 0))
    size = tl.sqrt(tl.sum(exact * exact, 0))
    error = tl.where(off == 0, 0.0, tl.where(off < size, off / size, 1.0))
    all = sources.to(tl.int64) * rows
    tl.store(VALUES + slot, dropped)
    tl.store(VALUES + all + slot, error)
    tl.store(VALUES + 2 * all + slot, tl.where(error > tl.load(TOLERANCE), 1.0, 0.0).to(tl.float64))


def measure(
    parts: Parts, output: torch.Tensor, lse: torch.Tensor, tolerance: torch.Tensor, values: torch.Tensor
) -> None:
    """See `attention.audit_bounds.sums_error` and `relative_error`: of the rows whose exact attention is in parts.

    Args:
        parts: of s rows in each of H heads.
        output: (H, m, d), rows contiguous.
        lse: (H, m), heads contiguous.
        tolerance: float64, the first number counts.
        values: (3 H s or more,) float64, what is found: of sums, of outputs, and 1 where the latter exceeds it.
    """
    R, S = parts.grid
    errors[parts.grid](
        parts.outputs, parts.sums, parts.plan, output, lse, tolerance, values, *output.stride()[:2], lse.stride(0),
        parts.tiles, R, G=len(output) // S, num_warps=4, **parts.shape,
    )  # fmt: skip
