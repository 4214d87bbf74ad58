"""Sampled attention: a lifted half-space draws the keys, exact scores weigh them, their spread bounds the error."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numba import get_num_threads
from scipy.special import gammaincinv, ndtri

from attention import sampled_numba
from attention.result import ROUNDING, SMALLEST, UNIT, Certificate, Counters, Result, joined
from attention.values import Values
from hsr import HSRIndex, checks
from hsr.coded_scan import KEYS
from hsr.errors import ArgumentError
from hsr.lifted import LARGEST
from hsr.lifted_numba import CHUNK, generators

if TYPE_CHECKING:
    from attention.policies import Visible

DRAWS = ("systematic", "independent")
TASKS = 64  # into which attending to drawn keys is cut, however many threads there are: sums are always the same
ESTIMATES = 1 << 26  # most estimated scores held at once
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
            keys are sampled.
        seed: of the generator, 0 .. 2**63 - 1.  Give layers different seeds, so that their errors are independent.
        redraw: draw afresh for every number of visible keys; else the same u_j serve all steps.
        draw: "systematic" or "independent".
        confidence: of the certificate's bounds, in (0, 1).

    Raises:
        ArgumentError: both or neither of eps and budget, or a value out of range.

    Source: threshold sampling (Duffield, Lund & Thorup 2007) as half-space reporting one dimension up.
    """

    method: ClassVar[str] = "brute"  # its codes are its own

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

    def calibrate(self, index: HSRIndex, values: Values, queries: np.ndarray, scale: float) -> None:
        """Code the keys for queries (h, m, d) float64 like those to come; else the first ones attended with serve."""
        grouped = queries.reshape(index.heads, -1, *queries.shape[1:])
        values.lifted(index.keys.reshape(index.heads, index.n, index.d), grouped, scale, self.bytes_per_key)

    def attend(self, visible: Visible, values: Values) -> Result:
        """Sample and attend: Result (h, m), output float64."""
        h, m, d = visible.queries.shape
        g = visible.index.heads
        if visible.index.alive < visible.index.n:
            gone = visible.index.n - visible.index.alive
            raise ArgumentError(f"Sampled needs an index from which nothing was deleted; got one that lost {gone} keys")
        error = visible.score_error()
        if error.max(initial=0.0) > LARGEST * ROUNDING["float64"]:
            raise ArgumentError(f"q and k must have scaled scores below {LARGEST:.0e} for Sampled; got larger ones")
        step = max(1, ESTIMATES // (h * visible.index.n))
        rows = visible.queries.reshape(g, h // g, m, d).transpose(0, 2, 1, 3)  # (g, m, G, d)
        limits = visible.limits.reshape(g, h // g, m)
        assert (limits == limits[:, :1]).all(), "the heads of a group see the same keys"
        blocks = [slice(first, first + step) for first in range(0, max(m, 1), step)]
        found = [self._attend(visible, values, rows[:, block], limits[:, 0, block]) for block in blocks]
        results = []
        for block, (output, lse, moments, counters) in zip(blocks, found, strict=True):
            certificate = self._certify(output, lse, moments, error[:, block], values, visible.index.dtype)
            results.append(Result(output, lse, np.isneginf(lse), certificate, counters, visible.index.n))
        return joined(results)

    def _attend(
        self, visible: Visible, values: Values, queries: np.ndarray, limits: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Counters]:
        """queries (g, rows, G, d) float64, limits (g, rows) -> output (h, rows, dv), lse, moments (h, rows, 5).

        The moments are those of `sampled_numba.merge`, and what estimates let expect of the first two of them.
        """
        index, scale = visible.index, visible.scale
        g, rows, heads, _ = queries.shape
        limits = np.ascontiguousarray(limits)
        keys = visible.held.keys
        lifted = values.lifted(keys[:, : index.n], queries, scale, self.bytes_per_key)
        spans = coded_spans(limits, self.sinks, self.recent, lifted.n)
        parts = 1 + min(-(-TASKS // max(g * rows, 1)), -(-lifted.n // CHUNK))
        width = values.array.shape[2]
        sums = np.empty((g, rows, parts, heads, sampled_numba.SUMS))
        vectors, known = np.empty((g, rows, parts, heads, 2, width)), np.empty((g, rows, heads))
        near, units = np.ascontiguousarray(queries), values.unit
        centre = (values.centre * units[:, None]).astype(units.dtype)
        cache = keys, values.store, centre, units
        sampled_numba.attend_certain(*cache, values.lift, near, scale, spans, limits, sums, vectors, known)
        draw = lifted.draw(
            queries,
            spans,
            known,
            eps=self.eps,
            budget=self.budget,
            generators=generators(self.seed, limits if self.redraw else np.zeros_like(limits)),
            systematic=self.draw == "systematic",
        )
        drawn = draw.ids, draw.pis, draw.counts
        sampled_numba.attend_drawn(*cache, near, scale, *drawn, get_num_threads(), sums, vectors)
        output, lse = np.empty((g, rows, heads, width)), np.empty((g, rows, heads))
        moments = np.empty((g, rows, heads, 5))
        sampled_numba.merge(sums, vectors, centre, units, draw.variance, output, lse, moments)
        with np.errstate(divide="ignore"):
            expected = np.log(draw.variance[..., :1]) + 2 * (draw.thresholds - lse)
        moments[..., 3] = np.exp(expected - 2 * np.log(values.distance)[:, None, None])
        moments[..., 4] = np.exp(expected)
        sampled = spans[..., 1] - spans[..., 0]
        read = draw.counts.sum(axis=2) + limits - sampled
        scanned, visited = (np.repeat(count, heads, axis=0) for count in (read, sampled))
        by_head = [part.swapaxes(1, 2).reshape(g * heads, rows, *part.shape[3:]) for part in (output, lse, moments)]
        return by_head[0], by_head[1], by_head[2], Counters(scanned, visited, scanned)

    def _certify(
        self, output: np.ndarray, lse: np.ndarray, moments: np.ndarray, error: np.ndarray, values: Values, dtype: str
    ) -> Certificate:
        """output (h, rows, dv), moments (h, rows, 5), score rounding (h, rows) -> bounds at the stated confidence.

        The squared error of the output is a sum over the values' principal directions: a chi-squared variable of about
        ``values.directions`` degrees of freedom, fewer where few draws carry it.  What the draws say of its mean counts
        by their number, what the estimates let expect counts as PRIOR draws: no draw at all does not mean no error.
        """
        repeat = len(output) // len(values.radius)
        directions, centre, radius = (
            np.repeat(part, repeat, axis=0) for part in (values.directions, values.centre, values.radius)
        )
        draws = moments[..., 2]
        variance, square = (draws * moments[..., i] + PRIOR * moments[..., i + 3] for i in (0, 1))
        freedom = 1 / (1 / directions[:, None] + TAIL / (2 * (draws + PRIOR)))
        spread = np.sqrt(square / (draws + PRIOR) * gammaincinv(freedom / 2, self.confidence) * 2 / freedom)
        reach = np.sqrt(((output - centre[:, None]) ** 2).sum(axis=2)) + radius[:, None]
        size = np.sqrt((output**2).sum(axis=2))
        moved = np.minimum(np.expm1(2 * (error + sampled_numba.ROUNDING)), 1.0)
        casting = ROUNDING[dtype] * size * (1 + 1e-6) + SMALLEST[dtype] * np.sqrt(output.shape[2])
        summing = 16 * UNIT * (np.sqrt((centre**2).sum(axis=1)) + radius)[:, None]
        bound = spread + moved * reach + summing + casting
        left = size - bound
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(bound == 0, 0.0, np.where(left > 0, bound / left, np.inf))
        doubt = ndtri((1 + self.confidence) / 2) * np.sqrt(variance / (draws + PRIOR))
        lse_error = doubt + error + sampled_numba.ROUNDING
        return Certificate("statistical", np.full(lse.shape, np.nan), bound, ratio, lse_error, self.confidence)


def coded_spans(limits: np.ndarray, sinks: int, recent: int, coded: int) -> np.ndarray:
    """limits (g, rows) -> first and last + 1 (g, rows, 2) of the keys left to codes: whole blocks, none if no more."""
    stop = np.minimum((limits - recent) // KEYS * KEYS, coded)
    return np.where((stop > sinks)[..., None], np.stack([np.full_like(stop, sinks), stop], axis=2), 0)
