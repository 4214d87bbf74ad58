"""Sampled attention: a lifted half-space draws the keys, exact scores weigh them, their spread bounds the error."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import gammaincinv, ndtri

from attention import sampled_numba
from attention.coded import Asked, Attended, by_head
from attention.result import ROUNDING, SMALLEST, UNIT, Certificate, relative
from attention.values import Values
from hsr import checks
from hsr.errors import ArgumentError
from hsr.lifted import Draw, Lifted
from hsr.lifted_numba import generators

DRAWS = ("systematic", "independent")
PRIOR = 0.5  # draws that the variance expected from estimates counts for; measured on real heads, too
TAIL = 3.0  # kurtosis that a draw brings into the error, over the number of draws; measured on real heads


@dataclass(frozen=True)
class Sampled:
    """An unbiased sample of the keys: key j with probability ``pi_j = min(1, exp(s_hat_j + lift_j - T))``.

    s_hat_j is the score estimated from a few bytes (`hsr.coder`); lift_j is the logarithm of ``||v_j - c||``, the
    distance of the value from the values' centre, because a key whose value is typical matters little.  Drawn keys
    weigh ``exp(s_j) / pi_j`` with exact scores, so the sums of weights and of weighted values are unbiased whatever the
    estimates are worth, and their ratio nearly so.  The query heads of a group share one list (see `hsr.lifted`).

    Args:
        eps: sets T so that the root mean square error of the output is at most about ``eps`` times the mean distance
            of the attended values from c, at an expected cost of at most about ``1 / eps ** 2`` keys a head, however
            many keys there are; in (0, 1).
        budget: or else sets T so that a head draws so many keys on average, at least 1.
        bytes_per_key: size of the code: a multiple of 4, at least 4.  32 is 4 bits an axis at d = 64.
        sinks, recent: the first keys, and at least so many last ones, are attended to always; whole blocks of 64 older
            keys are sampled.  Not both 0.
        seed: of the generator, 0 .. 2**63 - 1.  Give layers different seeds, so that their errors are independent.
        redraw: draw afresh for every number of visible keys; else the same u_j serve all steps.
        draw: "systematic" or "independent".
        confidence: of the certificate's bounds, in (0, 1).

    Raises:
        ArgumentError: both or neither of eps and budget, or a value out of range.

    Source: threshold sampling (Duffield, Lund & Thorup 2007) as half-space reporting one dimension up.
    """

    method: ClassVar[str] = "brute"  # its codes are its own
    coded: ClassVar[bool] = True

    eps: float | None = None
    budget: float | None = None
    bytes_per_key: int = 32
    sinks: int = 4
    recent: int = 64
    seed: int = 0
    redraw: bool = True
    draw: str = "systematic"
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if (self.eps is None) == (self.budget is None):
            raise ArgumentError(f"Sampled needs either eps or budget; got eps={self.eps}, budget={self.budget}")
        if self.eps is not None:
            checks.real("eps", self.eps, np.nextafter(0, 1), 1.0)
        if self.budget is not None:
            checks.real("budget", self.budget, 1.0, math.inf)
        checks.whole("bytes_per_key", self.bytes_per_key, 4)
        if self.bytes_per_key % 4:
            raise ArgumentError(f"bytes_per_key must be a multiple of 4; got {self.bytes_per_key}")
        for name in ("sinks", "recent"):
            checks.whole(name, getattr(self, name), 0)
        if self.sinks + self.recent == 0:
            raise ArgumentError("sinks and recent must not both be 0, or a draw may be empty; got 0 and 0")
        checks.whole("seed", self.seed, 0, 2**63 - 1)
        if self.draw not in DRAWS:
            raise ArgumentError(f"draw must be one of {', '.join(DRAWS)}; got {self.draw!r}")
        checks.real("confidence", self.confidence, np.nextafter(0, 1), 1.0)

    def tighter(self, n: int) -> Sampled | None:
        """Four times the draws of n keys, half of eps; None where that is about all of them."""
        if self.eps is not None:
            return dataclasses.replace(self, eps=self.eps / 2) if 4 / self.eps**2 < n else None
        assert self.budget is not None
        return dataclasses.replace(self, budget=4 * self.budget) if 4 * self.budget < n else None

    def codes(self, keys: np.ndarray, values: Values, queries: np.ndarray, scale: float) -> Lifted:
        """The lifted codes of keys (g, n, d)."""
        return values.lifted(keys, queries, scale, self.bytes_per_key)

    def lift(self, values: Values) -> np.ndarray:
        """``ln ||v_j - c||``: (g, at least n)."""
        return values.lift

    def choose(self, codes: Lifted, asked: Asked) -> Draw:
        """Draw keys within the spans."""
        return codes.draw(
            asked.queries,
            asked.spans,
            asked.known,
            eps=self.eps,
            budget=self.budget,
            generators=generators(self.seed, asked.limits if self.redraw else np.zeros_like(asked.limits)),
            systematic=self.draw == "systematic",
        )

    def certificate(self, attended: Attended, error: np.ndarray, values: Values, dtype: str) -> Certificate:
        """Bounds at the stated confidence; error (h, rows) is of the rounding of scores.

        The squared error of the output is a sum over the values' principal directions: a chi-squared variable of about
        ``values.directions`` degrees of freedom, fewer where few draws carry it.  What the draws say of its mean counts
        by their number, what the estimates let expect counts as PRIOR draws: no draw at all does not mean no error.
        """
        output, lse, moments, _, draw = attended
        repeat = len(output) // len(values.radius)
        directions, centre, radius, distance = (
            np.repeat(part, repeat, axis=0)
            for part in (values.directions, values.centre, values.radius, values.distance)
        )
        with np.errstate(divide="ignore"):
            expected = by_head(np.log(draw.variance[..., :1]) + 2 * draw.thresholds) - 2 * lse  # a logarithm
        draws = moments[..., 2]
        variance = draws * moments[..., 0] + PRIOR * np.exp(expected - 2 * np.log(distance)[:, None])
        square = draws * moments[..., 1] + PRIOR * np.exp(expected)
        freedom = 1 / (1 / directions[:, None] + TAIL / (2 * (draws + PRIOR)))
        spread = np.sqrt(square / (draws + PRIOR) * gammaincinv(freedom / 2, self.confidence) * 2 / freedom)
        reach = np.sqrt(((output - centre[:, None]) ** 2).sum(axis=2)) + radius[:, None]
        size = np.sqrt((output**2).sum(axis=2))
        moved = np.minimum(np.expm1(2 * (error + sampled_numba.ROUNDING)), 1.0)
        casting = ROUNDING[dtype] * size * (1 + 1e-6) + SMALLEST[dtype] * np.sqrt(output.shape[2])
        summing = 16 * UNIT * (np.sqrt((centre**2).sum(axis=1)) + radius)[:, None]
        bound = spread + moved * reach + summing + casting
        doubt = ndtri((1 + self.confidence) / 2) * np.sqrt(variance / (draws + PRIOR))
        lse_error = doubt + error + sampled_numba.ROUNDING
        return Certificate(
            "statistical", np.full(lse.shape, np.nan), bound, relative(bound, size), lse_error, self.confidence
        )
