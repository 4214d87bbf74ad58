"""`attention.audit_bounds` on the GPU: errors of sampled rows and what they say of all, without waiting for the host.

A launch for the errors, one whose programs each make a bound of a head or a head's share of the overall bounds, one
that adds those up; then a copy to the host, which waits only when an estimate is read.  Everything is float64.  The
definitions are those of `attention.finite_population`, and so is their slack, which is above the rounding of either.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from attention.audit_bounds import QUANTITIES, Estimate, Made, estimate, estimates
from attention.finite_population import CANDIDATES, LOG_PRIOR, PRICES, SHARES, SLACK
from gpu.tensors import sent, where_it_lies

WARPS = 8  # of a program that makes bounds
TILE = 2048  # numbers of outputs that a program compares
TABLE = {"SHARES": len(SHARES), "MANY": len(PRICES), "PRICED": 8}  # prices looked at side by side
BOUNDS = TABLE | {"CANDIDATES": CANDIDATES, "ROUNDS": CANDIDATES.bit_length(), "SPAN": 512}
BOUNDS |= {"DRAWS": 16, "CHUNK": 64}  # draws multiplied before a logarithm is taken; those looked at side by side
OVERALL = TABLE | {"STRATA": 32}  # heads looked at side by side


@triton.jit(do_not_specialize=["l_h", "drawn"])
def errors(
    OUTPUT, LSE, ROWS, EXACT, EXACT_LSE, TOLERANCE, VALUES, o_h, o_m, l_h, drawn, D: tl.constexpr, TILE: tl.constexpr
):
    """Grid (tiles of drawn rows, H): OUTPUT (H, m, D), LSE (H, m) by strides, of which ROWS (H, drawn) int32 are drawn.

    EXACT (H, drawn, D), EXACT_LSE (H, drawn) float32, TOLERANCE (1,) float64 -> VALUES (3, H, drawn) float64: errors of
    sums and of outputs, and whether the latter exceeds the tolerance.
    """
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    ok = i < drawn
    d = tl.arange(0, D)
    row = tl.load(ROWS + head * drawn + i, mask=ok, other=0).to(tl.int64)
    lse = tl.load(LSE + head * l_h + row, mask=ok, other=0.0).to(tl.float64)
    true = tl.load(EXACT_LSE + head * drawn + i, mask=ok, other=0.0).to(tl.float64)
    dropped = tl.abs(tl.exp(lse - true) - 1)
    dropped = tl.where(lse == true, 0.0, tl.where(dropped < 1, dropped, 1.0))  # not a number is wrong
    output = tl.load(OUTPUT + head * o_h + row[:, None] * o_m + d[None, :], mask=ok[:, None], other=0.0).to(tl.float64)
    exact = tl.load(EXACT + (head * drawn + i)[:, None] * D + d[None, :], mask=ok[:, None], other=0.0).to(tl.float64)
    off = tl.sqrt(tl.sum((output - exact) * (output - exact), 1))
    size = tl.sqrt(tl.sum(exact * exact, 1))
    error = tl.where(off == 0, 0.0, tl.where(off < size, off / size, 1.0))
    at = VALUES + head * drawn + i
    all = tl.num_programs(1).to(tl.int64) * drawn
    tl.store(at, dropped, mask=ok)
    tl.store(at + all, error, mask=ok)
    tl.store(at + 2 * all, tl.where(error > tl.load(TOLERANCE), 1.0, 0.0).to(tl.float64), mask=ok)


@triton.jit
def _sum(X, count, CHUNK: tl.constexpr):
    """Of count doubles."""
    total = tl.zeros((CHUNK,), tl.float64)
    for first in tl.range(0, count, CHUNK):
        i = first + tl.arange(0, CHUNK)
        total += tl.load(X + i, mask=i < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _mean(at, sum, drawn, population, CANDIDATES: tl.constexpr):
    """The candidate with a number, of a sample with a sum."""
    share = at.to(tl.float64) / CANDIDATES
    return (sum + (population - drawn) * (share * share)) / population


@triton.jit
def _best(
    X, PRICES, BEST, share, sum, drawn, population, CANDIDATES: tl.constexpr, SPAN: tl.constexpr, DRAWS: tl.constexpr,
    MANY: tl.constexpr, PRICED: tl.constexpr,
):  # fmt: skip
    """``max_m (m - price log K(m))`` of a sample X (drawn,), for a share and MANY PRICES -> BEST (MANY,)."""
    c = tl.arange(0, SPAN)
    mean = _mean(tl.minimum(c, CANDIDATES - 1), sum, drawn, population, CANDIDATES)
    after = _mean(tl.minimum(c + 1, CANDIDATES), sum, drawn, population, CANDIDATES)
    owed = (1 - mean) * population
    past = share * 0
    log = tl.zeros((SPAN,), tl.float64)
    for first in tl.range(0, drawn, DRAWS):
        won = tl.full((SPAN,), 1, tl.float64)
        fair = tl.full((SPAN,), 1, tl.float64)  # the odds' denominators; none is nearly 0 below the last candidate
        for k in tl.static_range(DRAWS):
            i = first + k
            y = 1 - tl.load(X + i, mask=i < drawn, other=1.0)
            left = tl.where(i < drawn, owed - past, 1.0)
            won *= (1 - share) * left + share * tl.where(i < drawn, y * (population - i), 1.0)
            fair *= left
            past += y
        log += tl.log(won / fair)
    for first in tl.static_range(0, MANY, PRICED):
        p = first + tl.arange(0, PRICED)
        price = tl.load(PRICES + p)
        value = after[:, None] - price[None, :] * log[:, None]
        tl.store(BEST + p, tl.max(tl.where(c[:, None] < CANDIDATES, value, -float("inf")), 0))


@triton.jit
def _upper_mean(
    X, PRIOR, level, sum, drawn, population, CANDIDATES: tl.constexpr, ROUNDS: tl.constexpr, SHARES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The first candidate at which the mixture of bets ever has a log capital of at least level, else the last."""
    n = tl.arange(0, SHARES)
    share = (n + 1).to(tl.float64) / SHARES
    low = 0
    high = CANDIDATES
    for _ in tl.range(0, ROUNDS):
        middle = (low + high) // 2
        owed = (1 - _mean(middle, sum, drawn, population, CANDIDATES)) * population
        begin = tl.load(PRIOR + n)  # (SHARES,)
        past = level * 0
        top = -float("inf") + past
        for first in tl.range(0, drawn, CHUNK):
            i = first + tl.arange(0, CHUNK)
            y = tl.where(i < drawn, 1 - tl.load(X + i, mask=i < drawn, other=1.0), 0.0)
            left = owed - (past + tl.cumsum(y, 0) - y)
            odds = tl.where(i < drawn, y * (population - i) / tl.where(left > 1e-300, left, 1e-300), 1.0)
            bets = tl.log((1 - share)[:, None] + share[:, None] * odds[None, :])
            paths = begin[:, None] + tl.cumsum(bets, 1)  # (SHARES, CHUNK); draws beyond the last change nothing
            most = tl.max(paths, 0)
            top = tl.maximum(top, tl.max(most + tl.log(tl.sum(tl.exp(paths - most[None, :]), 0)), 0))
            begin += tl.sum(bets, 1)
            past += tl.sum(y, 0)
        refuted = (top >= level) | (low == high)
        low = tl.where(refuted, low, middle + 1)
        high = tl.where(refuted, tl.minimum(middle, high), high)
    return _mean(low, sum, drawn, population, CANDIDATES)


@triton.jit
def _log_cdf(hits, total, drawn, population, CHUNK: tl.constexpr):
    """See `attention.hypergeometric_numba.log_cdf`."""
    log = tl.zeros((CHUNK,), tl.float64)
    for first in tl.range(0, drawn, CHUNK):
        j = first + tl.arange(0, CHUNK)
        hit = (total - j) * ((drawn - j) * 1.0) / ((population - j) * (j + 1.0))
        miss = (population - total - j) / tl.maximum(population - hits - j, 1.0)
        log += tl.log(tl.where(j < hits, hit, 1.0) * tl.where(j < drawn - hits, miss, 1.0))
    carry = tl.sum(log, 0) * 0
    terms = carry + 1
    for first in tl.range(0, hits.to(tl.int32), CHUNK):
        i = hits - (first + tl.arange(0, CHUNK))
        ratio = i * (population - total - drawn + i) / ((total - i + 1) * (drawn - i + 1.0))
        steps = tl.log(tl.where((i > 0) & (ratio > 0), ratio, 0.0))
        terms += tl.sum(tl.exp(carry + tl.cumsum(steps, 0)), 0)
        carry += tl.sum(steps, 0)
    return tl.sum(log, 0) + tl.log(terms)


@triton.jit
def _upper_share(level, hits, drawn, population, rounds, CHUNK: tl.constexpr):
    """The largest share at which at most ``hits`` hits are likelier than level, a logarithm."""
    low = hits
    high = population - drawn + hits + 1
    for _ in tl.range(0, rounds):
        middle = tl.floor((low + high) / 2)
        refuted = (_log_cdf(hits, middle, drawn, population, CHUNK) <= level) | (low == high)
        low = tl.where(refuted, low, middle + 1)
        high = tl.where(refuted, tl.minimum(middle, high), high)
    return tl.maximum(low - 1, hits) / population


@triton.jit(do_not_specialize=["drawn", "rounds"], do_not_specialize_on_alignment=["UPPER"])
def bounds(
    VALUES, SETTINGS, PRIOR, PRICES, BEST, UPPER, drawn, rounds, CANDIDATES: tl.constexpr, ROUNDS: tl.constexpr,
    SPAN: tl.constexpr, SHARES: tl.constexpr, MANY: tl.constexpr, DRAWS: tl.constexpr, PRICED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (3 H, SHARES + 1): of a line of VALUES (3 H, drawn) first its own bound, UPPER (3 H,), which takes longest.

    The others are BEST (3 H, SHARES, MANY).  SETTINGS (4,) float64: the population, the level that refutes a head's
    mean, that of its share, the tolerance.  PRIOR (SHARES,), PRICES (MANY,); all float64.
    """
    line = tl.program_id(0)
    part = tl.program_id(1)
    x = VALUES + line.to(tl.int64) * drawn
    population = tl.load(SETTINGS)
    sum = _sum(x, drawn, CHUNK)
    if part > 0:
        share = part.to(tl.float64) / SHARES
        best = BEST + (line.to(tl.int64) * SHARES + part - 1) * MANY
        _best(x, PRICES, best, share, sum, drawn, population, CANDIDATES, SPAN, DRAWS, MANY, PRICED)
    else:
        if line * 3 < tl.num_programs(0) * 2:
            level = tl.load(SETTINGS + 1)
            upper = _upper_mean(x, PRIOR, level, sum, drawn, population, CANDIDATES, ROUNDS, SHARES, CHUNK)
            tl.store(UPPER + line, upper)
        else:
            tl.store(UPPER + line, _upper_share(tl.load(SETTINGS + 2), sum, drawn, population, rounds, CHUNK))


@triton.jit(do_not_specialize=["heads"], do_not_specialize_on_alignment=["OVERALL"])
def overall(
    BEST, PRICES, LEVELS, OVERALL, heads, SHARES: tl.constexpr, MANY: tl.constexpr, PRICED: tl.constexpr,
    STRATA: tl.constexpr,
):  # fmt: skip
    """Grid (SHARES, 3): the least bound of a share, LEVELS (SHARES,) -> OVERALL (3, SHARES), sums over heads."""
    part = tl.program_id(0)
    quantity = tl.program_id(1)
    level = tl.load(LEVELS + part)
    least = level * 0 + float("inf")
    for first in tl.static_range(0, MANY, PRICED):
        p = first + tl.arange(0, PRICED)
        total = tl.zeros((PRICED,), tl.float64)
        for begin in tl.range(0, heads, STRATA):
            stratum = begin + tl.arange(0, STRATA)
            line = (quantity * heads + stratum).to(tl.int64) * SHARES + part
            total += tl.sum(
                tl.load(BEST + line[:, None] * MANY + p[None, :], mask=stratum[:, None] < heads, other=0.0), 0
            )
        least = tl.minimum(least, tl.min(tl.load(PRICES + p) * level + total, 0))
    tl.store(OVERALL + quantity * SHARES + part, least)


@dataclass(frozen=True)
class Awaited:
    """Estimates on their way from a GPU: the copy is waited for once, when one is read."""

    packed: torch.Tensor  # float64 on the host, of `_sizes`: values, heads' bounds, least sums of strata's means
    ready: torch.cuda.Event | None
    shape: tuple[int, int]  # H, s
    population: int
    delta: float
    tolerance: float
    leading: tuple[int, ...]

    @functools.cached_property
    def _made(self) -> Made:
        if self.ready is not None:
            self.ready.synchronize()
        heads, drawn = self.shape
        values, upper, least = np.split(self.packed.numpy(), np.cumsum(_sizes(heads, drawn))[:-1])
        values = values.reshape(QUANTITIES, heads, drawn)
        if drawn == self.population:
            return estimates(values[0], values[1], self.tolerance, drawn, self.delta, self.leading)
        upper, least = upper.reshape(QUANTITIES, heads), least.reshape(QUANTITIES, -1).min(axis=1) / heads
        possible = (values.sum(axis=2).mean(axis=1) + self.population - drawn) / self.population
        overall = np.minimum(least, possible).tolist()
        found = (estimate(*each, self.leading) for each in zip(values, upper, overall, strict=True))
        return Made(*found)

    @property
    def dropped(self) -> Estimate:
        """Of sums of weights."""
        return self._made.dropped

    @property
    def error(self) -> Estimate:
        """Of outputs."""
        return self._made.error

    @property
    def exceeding(self) -> Estimate:
        """Of outputs' errors above the tolerance."""
        return self._made.exceeding


def _sizes(heads: int, drawn: int) -> list[int]:
    """Of what is fetched: values (3, H, s), bounds of heads (3, H), least sums (3, S)."""
    return [QUANTITIES * size for size in (heads * drawn, heads, len(SHARES))]


@functools.cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    prior, prices = sent((LOG_PRIOR, PRICES), device)
    return prior, prices


@where_it_lies
def awaited(
    output: torch.Tensor,
    lse: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    rows: np.ndarray,
    tolerance: float,
    delta: float,
    leading: tuple[int, ...],
) -> Awaited:
    """See `attention.audit_bounds.estimates`: of output (H, m, dv) and lse (H, m), of which rows (H, s) were drawn.

    Rows of the output and of lse are contiguous; exact is the output (H, s, dv) and lse (H, s) of the drawn rows,
    float32 and contiguous.
    """
    (heads, drawn), m = rows.shape, output.shape[1]
    risk = delta / QUANTITIES
    settings = np.array([m, SLACK - np.log(risk / heads), np.log(risk / heads) - SLACK, tolerance])
    levels = SLACK * heads - LOG_PRIOR - np.log(risk)
    told, refuting, chosen = sent((settings, levels, rows.astype(np.int32)), output.device)
    packed = torch.empty(sum(_sizes(heads, drawn)), dtype=torch.float64, device=output.device)
    values, upper, least = packed.split(_sizes(heads, drawn))
    width = output.shape[2]
    tile = TILE // width
    errors[(triton.cdiv(drawn, tile), heads)](
        output, lse, chosen, *exact, told[3:], values, *output.stride()[:2], lse.stride(0), drawn, D=width,
        TILE=tile, num_warps=4,
    )  # fmt: skip
    if drawn < m:
        prior, prices = _constants(output.device)
        best = torch.empty(QUANTITIES * heads * len(SHARES) * len(PRICES), dtype=torch.float64, device=output.device)
        bounds[(QUANTITIES * heads, len(SHARES) + 1)](
            values, told, prior, prices, best, upper, drawn, (m - drawn + 1).bit_length(), num_warps=WARPS, **BOUNDS
        )
        overall[(len(SHARES), QUANTITIES)](best, prices, refuting, least, heads, num_warps=4, **OVERALL)
    ready = None
    if packed.is_cuda:
        there = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
        packed, ready = there.copy_(packed, non_blocking=True), torch.cuda.Event()
        ready.record()
    return Awaited(packed, ready, (heads, drawn), m, delta, tolerance, leading)
