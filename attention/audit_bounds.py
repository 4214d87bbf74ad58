"""What the errors of sampled rows say of all rows: the estimates of an audit, with their bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from attention.finite_population import upper_mean_of_strata, upper_means, upper_shares

QUANTITIES = 3  # whose bounds hold together


@dataclass(frozen=True)
class Estimate:
    """A quantity in [0, 1] on the sampled rows, and what that says of all rows.

    Attributes:
        values: (..., h, s); the quantity on each sampled row.
        mean: (..., h); the sample's mean in each head.
        upper: (..., h); upper confidence bound on the mean over all rows of each head.
        overall_mean: the sample's mean.
        overall_upper: upper confidence bound on the mean over all rows of all heads.
    """

    values: np.ndarray
    mean: np.ndarray
    upper: np.ndarray
    overall_mean: float
    overall_upper: float


class Estimates(Protocol):
    """Of the three quantities of `attention.audit.Audit`; those made on a GPU are fetched when one is read."""

    @property
    def dropped(self) -> Estimate:
        """Of sums of weights."""
        ...

    @property
    def error(self) -> Estimate:
        """Of outputs."""
        ...

    @property
    def exceeding(self) -> Estimate:
        """Of outputs' errors above the tolerance."""
        ...


@dataclass(frozen=True)
class Made:
    """Estimates that are there."""

    dropped: Estimate
    error: Estimate
    exceeding: Estimate


def estimates(
    dropped: np.ndarray, error: np.ndarray, tolerance: float, m: int, delta: float, leading: tuple[int, ...]
) -> Made:
    """Of errors (H, s) of rows drawn from m in each head; all bounds of a kind together with 1 - delta.

    Heads are unfolded to their leading shape.
    """
    risk, heads = delta / QUANTITIES, len(error)
    exceeding = (error > tolerance).astype(np.float64)
    shares = upper_shares(exceeding.sum(axis=1).astype(np.int64), error.shape[1], m, risk / heads)
    uppers = *(upper_means(x, m, risk / heads) for x in (dropped, error)), shares
    return Made(
        *(
            estimate(x, upper, upper_mean_of_strata(x, m, risk), leading)
            for x, upper in zip((dropped, error, exceeding), uppers, strict=True)
        )
    )


def estimate(values: np.ndarray, upper: np.ndarray, overall: float, leading: tuple[int, ...]) -> Estimate:
    """Of values (H, s) with bounds (H,), heads unfolded."""
    mean = values.mean(axis=1)
    return Estimate(
        values.reshape(*leading, -1), mean.reshape(leading), upper.reshape(leading), float(mean.mean()), overall
    )


def sums_error(lse: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """``|W' - W| / W`` of two logarithms of sums, at most 1; an empty row is right only where the other is empty."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(lse == exact, 0.0, np.fmin(np.abs(np.expm1(lse - exact)), 1.0))


def relative_error(output: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Of rows (..., dv), at most 1."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        largest = np.maximum(np.abs(exact), np.abs(output)).max(axis=-1, keepdims=True)  # whose square may be none
        unit = np.where(np.isfinite(largest) & (largest > 0), largest, 1.0)
        size, off = np.linalg.norm(exact / unit, axis=-1), np.linalg.norm(output / unit - exact / unit, axis=-1)
        return np.where(off == 0, 0.0, np.fmin(off / size, 1.0))
