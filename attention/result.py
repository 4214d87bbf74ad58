"""What attention returns: output, log-sum-exp, a certificate and work counters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from attention.values import Values
from attention.weights import ReLUPower, Softmax

UNIT = 2.0**-53  # float64 rounds by at most this, relatively
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


@dataclass(frozen=True)
class Certificate:
    """What is known of the error against exact attention on the same inputs; nothing here was computed densely.

    Every array has the queries' leading shape.

    Attributes:
        kind: "exact" (nothing was dropped), "deterministic" (holds for every input), "probability" (holds with the
            stated confidence over the random shifts of the codes' grids), "statistical" (each bound holds with about
            the stated confidence over the random draw, as estimated from it) or "none" (nothing is known: every bound
            is infinite).
        dropped_mass: bound on the share of the weight that was dropped (tau in Theorem 4.3 of arXiv 2410.10165); NaN
            where what was dropped is made up for by the weights of a sample; of `attention.step_tail.StepTail`, whose
            sample tells, what was left out before the sample made up for it.
        output_error: bound on ``||output - exact||_2``.  The truncation part uses
            ``exact - output = tau (mu - output)``, mu the mean of the dropped values, inside the values' ball; the
            rest bounds the rounding, that of the output's own dtype included.
        relative_error: bound on ``||output - exact||_2 / ||exact||_2``; infinite where the bound exceeds the output.
        lse_error: bound on the distance of the log-sum-exp from the exact one.
        confidence: with which each bound holds; 1 but for statistical kinds.
    """

    kind: str
    dropped_mass: np.ndarray
    output_error: np.ndarray
    relative_error: np.ndarray
    lse_error: np.ndarray
    confidence: float = 1.0


@dataclass(frozen=True)
class Counters:
    """Work per query, int64 arrays of the queries' leading shape.

    Attributes:
        scanned: keys read at full precision to decide about them.
        visited: bounds evaluated: a tree's nodes, a sketch's key codes.
        reported: keys that half-space reporting returned and the output attended to.
    """

    scanned: np.ndarray
    visited: np.ndarray
    reported: np.ndarray


@dataclass(frozen=True)
class Result:
    """Attention over the reported keys.

    Attributes:
        output: (..., m, dv), in the type and dtype of the queries.
        lse: (..., m) float64; natural logarithm of the sum of the attended weights, -inf for an empty row.
        empty: (..., m) bool; rows without any weight (for Softmax only where no key is left), whose output is zero by
            convention: the paper leaves them undefined.
        certificate: bounds on the error.
        counters: work done.
        n: number of living keys in the cache.
    """

    output: Any
    lse: np.ndarray
    empty: np.ndarray
    certificate: Certificate
    counters: Counters
    n: int

    def shaped(self, leading: tuple[int, ...], q: Any) -> Result:
        """From leading shape (h, m) to another one, and the output from float64 to the type and dtype of ``q``."""
        result = _mapped([self], lambda parts: parts[0].reshape(leading + parts[0].shape[2:]))
        output = result.output.astype(q.dtype) if isinstance(q, np.ndarray) else q.new_tensor(result.output)
        return dataclasses.replace(result, output=output)


def joined(results: Sequence[Result]) -> Result:
    """Results of leading shape (h, m) over consecutive rows -> one."""
    if len(results) == 1:
        return results[0]
    return _mapped(results, lambda parts: np.concatenate(parts, axis=1))


def _mapped(records: Sequence[Any], change: Callable[[list[np.ndarray]], np.ndarray]) -> Any:
    """Records alike -> one, each array made by ``change`` from the records' own, in records inside them too."""
    fields = {}
    for name, value in vars(records[0]).items():
        parts = [getattr(record, name) for record in records]
        if isinstance(value, np.ndarray):
            fields[name] = change(parts)
        elif dataclasses.is_dataclass(value):
            fields[name] = _mapped(parts, change)
    return dataclasses.replace(records[0], **fields)


def relative(error: np.ndarray, size: np.ndarray) -> np.ndarray:
    """A bound on an output's error and the output's norm -> the bound relative to the exact output's norm."""
    left = size - error
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, np.where(left > 0, error / left, np.inf))


def certify(
    output: np.ndarray,
    lse: np.ndarray,
    slope: np.ndarray,
    log_dropped: np.ndarray,
    score_error: np.ndarray,
    reported: np.ndarray,
    values: Values,
    dtype: str,
    weight: Softmax | ReLUPower,
    kind: str,
    confidence: float = 1.0,
) -> Certificate:
    """output (h, m, dv), lse to reported (h, m), h a multiple of the values' heads -> certificate, arrays (h, m)."""
    repeat = len(output) // len(values.radius)
    centre, radius = np.repeat(values.centre, repeat, axis=0), np.repeat(values.radius, repeat)[:, None]
    distance = np.sqrt(((output - centre[:, None]) ** 2).sum(axis=2))
    reach = (distance + radius) * (1 + 1e-12)  # how far any mean of values can lie from the output
    size = np.sqrt((output**2).sum(axis=2))
    empty = np.isneginf(lse)
    moved = np.expm1(2 * score_error) if isinstance(weight, Softmax) else 2 * score_error * slope
    moved = np.where(empty & (reported > 0), 1.0, np.minimum(moved, 1.0))  # share of weight that rounding can move
    # where rounding can move all the weight, the exact row may be empty, and its output zero
    reach = np.where(moved >= 1.0, np.maximum(reach, size), reach)
    with np.errstate(invalid="ignore"):  # -inf - -inf: an empty row that dropped nothing
        dropped = np.where(np.isneginf(log_dropped), 0.0, expit(log_dropped - lse + 2 * score_error + 1e-12))
    farthest = np.sqrt((centre**2).sum(axis=1))[:, None] + radius
    summing = 2 * (reported + 16) * UNIT * farthest
    casting = ROUNDING[dtype] * size * (1 + 1e-6) + SMALLEST[dtype] * np.sqrt(output.shape[2])
    error = np.where(empty & (reported == 0), 0.0, (dropped + moved) * reach + summing + casting)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = -np.log1p(-dropped) - np.log1p(-moved) + 4 * UNIT * (reported + np.abs(lse))
    return Certificate(
        kind, dropped, error, relative(error, size), np.where(empty & (reported == 0), 0.0, shift), confidence
    )
