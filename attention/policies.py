"""Which keys a softmax row attends to, and how much weight that can have dropped.

A policy has one method, ``select``: it asks the index for half-spaces and returns their keys with an upper bound on the
logarithm of the dropped weight.  One that is ``coded`` chooses keys by their codes instead (`attention.coded`).  ReLU
attention needs none: its half-space is exact.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from attention import sampled_numba
from attention.coded import Asked, Attended, by_head
from attention.probe_numba import lse_floor
from attention.result import Certificate, certify
from attention.values import Values
from attention.visible import Visible
from attention.weights import Softmax
from hsr import Report, checks
from hsr.bounded import Bounded, Listing
from hsr.errors import ArgumentError


class Selection(NamedTuple):
    """Reported keys, and a bound on ``ln sum exp(s_j)`` over the visible keys that are not among them."""

    report: Report
    log_dropped: np.ndarray  # (h, m); -inf where nothing was dropped
    kind: str  # of the certificate: "exact" or "deterministic"


class Policy(Protocol):
    """Chooses the keys of softmax attention.

    One that has an attribute ``method`` names the index method that "auto" then means for it.
    """

    def select(self, visible: Visible) -> Selection:
        """Report keys for every query, with a bound on what was left out."""
        ...


@dataclass(frozen=True)
class Dense:
    """Every visible key: the exact output, and the baseline."""

    method: ClassVar[str] = "brute"  # no structure helps

    def select(self, visible: Visible) -> Selection:
        """Report the half-space at -inf."""
        report = visible.index.query(visible.q, -math.inf, prefix=visible.limits)
        return Selection(report, np.full(visible.limits.shape, -np.inf), "exact")

    def tighter(self, n: int) -> Policy | None:
        """Nothing is."""
        return None


@dataclass(frozen=True)
class TopR:
    """The index-set softmax over the r keys of largest score (Theorem 4.2 of arXiv 2410.10165).

    Every dropped key scores at most the smallest kept one, so the dropped weight is at most ``(n - r) exp(s_r)``;
    Theorem 4.3 turns that into an output error.  The bound is honest and often loose: `Certified` chooses by it
    instead.

    Args:
        r: at least 1; None means ``ceil(n ** 0.8)`` of the n visible keys.

    Raises:
        ArgumentError: r is not a whole number of at least 1.
    """

    r: int | None = None

    def __post_init__(self) -> None:
        if self.r is not None:
            checks.whole("r", self.r, 1)

    def select(self, visible: Visible) -> Selection:
        """Report the top r, or all visible keys where there are fewer."""
        limits, living = visible.limits, visible.held.living
        wanted = np.ceil(living**0.8 - 1e-9).astype(np.int64) if self.r is None else np.full(limits.shape, self.r)
        wanted = np.clip(wanted, 1, visible.index.n)
        report = visible.index.topk(visible.q, wanted, prefix=limits)
        last = np.maximum(report.offsets[1:] - 1, 0).reshape(limits.shape)
        smallest = report.scores[last] if report.scores.size else np.zeros(limits.shape)
        return Selection(report, _log_tail(visible, report, visible.scale * smallest), "deterministic")

    def tighter(self, n: int) -> Policy | None:
        """Four times as many of n keys; None where that is all of them."""
        r = 4 * (math.ceil(n**0.8 - 1e-9) if self.r is None else self.r)
        return TopR(r) if r < n else None


@dataclass(frozen=True)
class Certified:
    """Every key that could matter: the dropped softmax mass is at most eps, whatever the distribution.

    The half-space lies at ``T = LSE0 + ln(eps / n)`` with LSE0 the log-sum-exp of a few keys scored first: at most n
    keys lie below it, each of weight below ``exp(T)``, so they hold at most ``eps exp(LSE0) <= eps sum_j exp(s_j)``.

    With ``bytes_per_key`` the rule is sharper, and the index unused: codes bound every score from both sides, and the
    keys left out are as many of the least as have bounds that sum to eps of what all must weigh (see `hsr.bounded`).

    Args:
        eps: bound on the dropped mass, in [0, 1); 0 keeps every key.
        sinks, recent: how many first and last keys are scored first; they change the cost, not the guarantee.
        spread: without codes, how many evenly spaced keys more.
        bytes_per_key: None, or the size of a code, a multiple of 4, at least 4: at best 8 bits an axis.
        delta: with codes, 0 for a bound that always holds; else the grids are shifted at random, bounds are narrower
            and hold for each query with probability 1 - delta, over shifts that keys and queries do not depend on.
            Worth it for 2 to 6 bits an axis.
        seed: of the shifts, 0 .. 2**63 - 1.

    Raises:
        ArgumentError: a value out of range.
    """

    eps: float = 0.01
    sinks: int = 4
    recent: int = 64
    spread: int = 192
    bytes_per_key: int | None = None
    delta: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.real("eps", self.eps, 0.0, 1.0)
        for name in ("sinks", "recent", "spread"):
            checks.whole(name, getattr(self, name), 0)
        if self.bytes_per_key is not None and checks.whole("bytes_per_key", self.bytes_per_key, 4) % 4:
            raise ArgumentError(f"bytes_per_key must be a multiple of 4; got {self.bytes_per_key}")
        if checks.real("delta", self.delta, 0.0, 1.0) and self.bytes_per_key is None:
            raise ArgumentError(f"delta must be 0 without bytes_per_key; got {self.delta}")
        checks.whole("seed", self.seed, 0, 2**63 - 1)

    @property
    def coded(self) -> bool:
        """Whether codes choose the keys."""
        return self.bytes_per_key is not None

    @property
    def method(self) -> str:
        """Index method that "auto" means: codes need no structure."""
        return "brute" if self.coded else "auto"

    def codes(self, keys: np.ndarray, values: Values, queries: np.ndarray, scale: float) -> Bounded:
        """The bounded codes of keys (g, n, d)."""
        assert self.bytes_per_key is not None
        return values.bounded(keys, queries, self.bytes_per_key, self.delta, self.seed)

    def lift(self, values: Values) -> np.ndarray:
        """Nothing: keys matter by their weight alone."""
        return np.broadcast_to(np.zeros(1), values.store.shape[:2])

    def choose(self, codes: Bounded, asked: Asked) -> Listing:
        """Every key of the spans that could matter."""
        return codes.select(asked.queries, asked.spans, asked.known, asked.scale, self.eps)

    def certificate(self, attended: Attended, error: np.ndarray, values: Values, dtype: str) -> Certificate:
        """From the bound on what was left out."""
        output, lse, _, reported, listing = attended
        return certify(
            output,
            lse,
            np.zeros(lse.shape),
            by_head(listing.log_dropped),
            error + sampled_numba.ROUNDING / 2,
            reported,
            values,
            dtype,
            Softmax(),
            "probability" if self.delta else "deterministic",
            1 - self.delta,
        )

    def select(self, visible: Visible) -> Selection:
        """Report the half-space at T."""
        living, scale = visible.held.living, visible.scale
        floor = lse_floor(visible.held, visible.queries, scale, self.sinks, self.recent, self.spread)
        with np.errstate(divide="ignore"):
            threshold = floor - visible.score_error + np.log(self.eps / np.maximum(living, 1))
        report = visible.index.query(visible.q, threshold / scale, prefix=visible.limits)
        return Selection(report, _log_tail(visible, report, threshold), "deterministic")

    def tighter(self, n: int) -> Policy | None:
        """A quarter of eps; None below 1e-6, where little is left to drop."""
        return dataclasses.replace(self, eps=self.eps / 4) if self.eps > 4e-6 else None


def _log_tail(visible: Visible, report: Report, highest: np.ndarray) -> np.ndarray:
    """ln of (visible keys not reported) exp(highest scaled score any of them can have)."""
    with np.errstate(divide="ignore"):
        return np.log(visible.held.living - report.counts) + (highest + 2 * visible.score_error)
