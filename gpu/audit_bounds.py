"""`attention.audit_bounds` on the GPU: what errors of sampled rows say of all, without waiting for the host.

A launch whose programs each make a bound of a head or a head's share of the overall bounds, one that adds those up;
then a copy to the host, which waits only when an estimate is read.  Everything is float64.  The definitions are those
of `attention.finite_population`, and so is their slack, which is above the rounding of either.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl

from attention.audit_bounds import QUANTITIES, Estimate, Made, estimate, estimates
from attention.finite_population import CANDIDATES, LOG_PRIOR, PRICES, SHARES, SLACK
from gpu.tensors import where_it_lies

WARPS = 8  # of a program that makes bounds
TABLE = {"SHARES": len(SHARES), "MANY": len(PRICES)}
BOUNDS = TABLE | {"CANDIDATES": CANDIDATES, "ROUNDS": CANDIDATES.bit_length(), "SPAN": 512, "PRICED": 8}
BOUNDS |= {"DRAWS": 16, "CHUNK": 64}  # draws multiplied before a logarithm is taken; those looked at side by side
OVERALL = TABLE | {"ADDED": 32, "STRATA": 32}  # prices of a program, heads added side by side


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
    for first in tl.range(0, MANY, PRICED):
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


@triton.jit(do_not_specialize=["drawn", "rounds"])
def bounds(
    VALUES, SETTINGS, PRIOR, PRICES, BEST, drawn, rounds, CANDIDATES: tl.constexpr, ROUNDS: tl.constexpr,
    SPAN: tl.constexpr, SHARES: tl.constexpr, MANY: tl.constexpr, DRAWS: tl.constexpr, PRICED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (3 H, SHARES + 1): first the bound of a line of VALUES (3 H, drawn), which takes longest, put behind them.

    The others are BEST (3 H, SHARES, MANY).  SETTINGS (3,) float64: the population, the levels that refute a head's
    mean and its share.  PRIOR (SHARES,), PRICES (MANY,); all float64.
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
        UPPER = VALUES + tl.num_programs(0).to(tl.int64) * drawn
        if line * 3 < tl.num_programs(0) * 2:
            level = tl.load(SETTINGS + 1)
            upper = _upper_mean(x, PRIOR, level, sum, drawn, population, CANDIDATES, ROUNDS, SHARES, CHUNK)
            tl.store(UPPER + line, upper)
        else:
            tl.store(UPPER + line, _upper_share(tl.load(SETTINGS + 2), sum, drawn, population, rounds, CHUNK))


@triton.jit(do_not_specialize=["heads"], do_not_specialize_on_alignment=["LEVELS", "OVERALL"])
def overall(
    BEST, PRICES, LEVELS, OVERALL, heads, SHARES: tl.constexpr, MANY: tl.constexpr, ADDED: tl.constexpr,
    STRATA: tl.constexpr,
):  # fmt: skip
    """Grid (MANY / ADDED, SHARES, 3): least bound of some prices on the sum over heads, at LEVELS (SHARES,).

    -> OVERALL (3, SHARES, MANY / ADDED).
    """
    part = tl.program_id(1)
    quantity = tl.program_id(2)
    p = tl.program_id(0) * ADDED + tl.arange(0, ADDED)
    total = tl.load(PRICES + p) * tl.load(LEVELS + part)
    for begin in tl.range(0, heads, STRATA):
        stratum = begin + tl.arange(0, STRATA)
        line = (quantity * heads + stratum).to(tl.int64) * SHARES + part
        best = tl.load(BEST + line[:, None] * MANY + p[None, :], mask=stratum[:, None] < heads, other=0.0)
        total += tl.sum(best, 0)
    tl.store(OVERALL + (quantity * SHARES + part) * tl.num_programs(0) + tl.program_id(0), tl.min(total, 0))


class Awaited:
    """Estimates on their way from a GPU: the copy is waited for once, when one is read, printed or copied.

    Args:
        packed: float64 on the host, of `sizes`.
        ready: when it is there; None if it is.
        shape: H, s.
        population: rows of each head.
        delta: risk of all bounds of a kind.
        tolerance: of errors.
        leading: to which heads are unfolded.
    """

    def __init__(
        self, packed: torch.Tensor, ready: torch.cuda.Event | None, shape: tuple[int, int], population: int,
        delta: float, tolerance: float, leading: tuple[int, ...],
    ) -> None:  # fmt: skip
        self._packed, self._ready, self._told = packed, ready, (shape, population, delta, tolerance, leading)

    @functools.cached_property
    def _made(self) -> Made:
        if self._ready is not None:
            self._ready.synchronize()
        (heads, drawn), population, delta, tolerance, leading = self._told
        values, upper, least = np.split(self._packed.numpy(), np.cumsum(sizes(heads, drawn))[:-1])
        values = values.reshape(QUANTITIES, heads, drawn)
        if drawn == population:
            return estimates(values[0], values[1], tolerance, drawn, delta, leading)
        upper, least = upper.reshape(QUANTITIES, heads), least.reshape(QUANTITIES, -1).min(axis=1) / heads
        possible = (values.sum(axis=2).mean(axis=1) + population - drawn) / population
        overall = np.minimum(least, possible).tolist()
        found = (estimate(*each, leading) for each in zip(values, upper, overall, strict=True))
        return Made(*found)

    def __repr__(self) -> str:
        return repr(self._made)

    def __reduce__(self) -> tuple[type[Made], tuple[Estimate, ...]]:
        return Made, (self.dropped, self.error, self.exceeding)

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


def sizes(heads: int, drawn: int) -> list[int]:
    """Of what is fetched: values (3, H, s), bounds of heads (3, H), least sums over heads (3, S P)."""
    return [QUANTITIES * size for size in (heads * drawn, heads, len(SHARES) * len(PRICES) // OVERALL["ADDED"])]


def settings(heads: int, m: int, tolerance: float, delta: float) -> np.ndarray:
    """Float64: m, the levels that refute a head's mean and its share, the tolerance; those of overall bounds.

    LOG_PRIOR and PRICES follow: sent with every call, they are there on whatever stream it is.
    """
    risk = delta / QUANTITIES
    own = [m, SLACK - np.log(risk / heads), np.log(risk / heads) - SLACK, tolerance]
    return np.concatenate([own, SLACK * heads - LOG_PRIOR - np.log(risk), LOG_PRIOR, PRICES])


@where_it_lies
def awaited(
    packed: torch.Tensor, told: torch.Tensor, shape: tuple[int, int], m: int, delta: float, tolerance: float,
    leading: tuple[int, ...],
) -> Awaited:  # fmt: skip
    """See `attention.audit_bounds.estimates`.

    Args:
        packed: float64, of `sizes`, on the device; values are there, in the order of drawing, the rest is filled in.
        told: `settings`, on the device.
        shape: H, s.
        m: rows of each head.
        delta: risk of all bounds of a kind.
        tolerance: of errors.
        leading: to which heads are unfolded.
    """
    heads, drawn = shape
    if drawn < m:
        prior, prices = told[4 + len(SHARES) :], told[4 + 2 * len(SHARES) :]
        best = torch.empty(QUANTITIES * heads * len(SHARES) * len(PRICES), dtype=torch.float64, device=packed.device)
        bounds[(QUANTITIES * heads, len(SHARES) + 1)](
            packed, told, prior, prices, best, drawn, (m - drawn + 1).bit_length(), num_warps=WARPS, **BOUNDS
        )
        overall[(len(PRICES) // OVERALL["ADDED"], len(SHARES), QUANTITIES)](
            best, prices, told[4:], packed[sum(sizes(heads, drawn)[:2]) :], heads, num_warps=4, **OVERALL
        )
    ready = None
    if packed.is_cuda:
        there = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
        packed, ready = there.copy_(packed, non_blocking=True), torch.cuda.Event()
        ready.record()
    return Awaited(packed, ready, shape, m, delta, tolerance, leading)
