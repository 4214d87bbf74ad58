"""How wrong is it really?  Exact attention on a random sample of rows bounds the mean error over all of them.

A certificate holds for every row and assumes the worst of the dropped values; an audit looks at a few rows, trusts
nothing that the audited code says of itself, and serves selectors that have no certificate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attention.audit_bounds import Estimate, Estimates
from attention.audit_rows import Kept, Prompt, prompt_of
from attention.engine import is_policy, is_shared
from attention.policies import Certified, Dense
from attention.prefill import prefill
from attention.result import Result
from attention.weights import ReLUPower, Softmax
from hsr import Report, checks
from hsr.errors import ArgumentError

GIVEN = (Result, Kept, Report)  # selections that are answers already; any other is a policy


@dataclass(frozen=True)
class Audit:
    """Upper confidence bounds on what a selection does wrong, from exact attention on sampled rows.

    With probability at least ``confidence`` over the draw of rows, the three overall bounds hold together; and with at
    least that probability all bounds of single heads do (Bonferroni, over quantities and heads).  One sample of s rows
    that shows no error at all still allows about ``ln(1 / delta) / s`` in a head; the overall bound has all heads' rows
    to go by, but a mean over heads says little of the worst one.

    Attributes:
        confidence: of the bounds.
        tolerance: what ``exceeding`` compares the relative error with.
        population: rows of each head, m.
        rows: (..., h, s) int64; the rows that were drawn, in the order of drawing.
        found: the estimates; on a GPU, where they are made without waiting for it, fetched when one is first read.
        dropped: ``|W' - W| / W`` and at most 1, W the exact sum of weights and W' the attended one.  Of plain kept keys
            this is the dropped mass, tau in Theorem 4.3 of arXiv 2410.10165; of importance weights, which drop keys and
            make up for them, the error of the estimated sum; either way ``|exp(lse - exact lse) - 1|``.
        error: ``||output - exact||_2 / ||exact||_2`` and at most 1: a mean of unbounded errors cannot be bounded by a
            sample.  A row that is exactly zero has error 0 or 1.
        exceeding: 1 where that error exceeds the tolerance: their means are shares of rows, and bound the share that
            was cut off at 1 too.
        audited: the policy or selection that this is about.
        result: what ``escalate=True`` settled on, for all rows; None without it, or where keys given as `Kept` passed.
        earlier: the audits that did not pass before it.
    """

    confidence: float
    tolerance: float
    population: int
    rows: np.ndarray
    found: Estimates
    audited: Any
    result: Result | None = None
    earlier: tuple[Audit, ...] = ()

    @property
    def dropped(self) -> Estimate:
        """Of sums of weights."""
        return self.found.dropped

    @property
    def error(self) -> Estimate:
        """Of outputs."""
        return self.found.error

    @property
    def exceeding(self) -> Estimate:
        """Of outputs' errors above the tolerance."""
        return self.found.exceeding

    def passes(
        self, *, max_dropped: float | None = None, max_error: float | None = None, max_exceeding: float | None = None
    ) -> bool:
        """Whether every overall bound that a limit is given for is at most that limit.

        Raises:
            ArgumentError: no limit, or one that is not a number of at least 0.
        """
        limits = _limits({"dropped": max_dropped, "error": max_error, "exceeding": max_exceeding})
        return _within(self, limits)


def _limits(limits: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are given, by quantity."""
    given = {name: checks.real(f"max_{name}", x, 0.0, np.inf) for name, x in limits.items() if x is not None}
    if not given:
        raise ArgumentError("max_dropped, max_error or max_exceeding must be given; got None for each")
    return given


def _within(made: Audit, limits: Mapping[str, float]) -> bool:
    return all(getattr(made, name).overall_upper <= limit for name, limit in limits.items())


def audit(
    q: Any,
    k: Any,
    v: Any,
    selection: Any = None,
    *,
    rows: int = 64,
    confidence: float = 0.95,
    tolerance: float = 0.1,
    causal: bool = True,
    weight: Softmax | ReLUPower = Softmax(),  # noqa: B008 - frozen
    scale: float | None = None,
    rng: np.random.Generator | int = 0,
    escalate: bool = False,
    max_dropped: float | None = None,
    max_error: float | None = None,
    max_exceeding: float | None = None,
) -> Audit:
    """Bound mean dropped mass and mean output error over all rows, from exact attention on a random sample of them.

    Rows are drawn without replacement, independently in each head, and attended exactly in float64; on a GPU with
    weights in the values' dtype and sums in float32, so that errors below that dtype's rounding do not show.  There
    nothing waits until an estimate is read or ``passes`` is asked.  The cost is that of ``h rows`` dense rows.

    The bounds assume nothing of the errors but their range, and hold for any number of rows.  They are bounds on means:
    a fault confined to a share p of a head's rows is met with probability ``1 - (1 - p)**rows``.  What is audited must
    not depend on the draw.

    With ``escalate=True`` the selection is run on all rows and audited, then the next tighter policy (its method
    ``tighter(n)``), and at last `Dense`, until the overall bounds are within the limits given.  Attempt i draws fresh
    rows and has confidence ``1 - (1 - confidence) / 2**i``, so that all audits hold together with the confidence asked
    for.  `Dense` ends the search whether it passes or not; ask ``passes`` of what is returned.

    Args:
        q: (h, m, d) or (B, h, m, d).
        k: (g, n, d) or (B, g, n, d), h a multiple of g.
        v: (g, n, dv) or (B, g, n, dv).
        selection: a `Result` of `decode` or `prefill`, whose output and lse are compared; a policy, which is run on the
            sampled rows, or on all rows if it codes the keys (``bytes_per_key``) or shares them (`BlockSampled`) and so
            lets rows bear on each other; a `Kept` or a `Report`, attended to as it is, keys that a row cannot see
            included; None for the policy that `prefill` takes by default.
        rows: how many rows are drawn in each head, at least 1; all, if there are fewer, and the bounds are then exact.
        confidence: in (0, 1).
        tolerance: in [0, 1), a relative error; the share of rows above it is bounded.
        causal: as for `prefill`; of a `Result` of `decode`, False.
        weight: as for `decode`.
        scale: as for `decode`.
        rng: a generator, or a seed of one.
        escalate: whether to go on to tighter selections until the audit passes.
        max_dropped: limit of `Audit.passes`, for escalate alone; it needs one of the three.
        max_error: likewise.
        max_exceeding: likewise.

    Returns:
        Audit: the bounds; of the last attempt, with its `Result` and the earlier audits, if escalate is set.

    Raises:
        ArgumentError: arguments that do not fit each other or lie outside their range; NaN or infinity.

    Source: the bounds of `attention.finite_population`, after Waudby-Smith and Ramdas (JRSS B 2024).
    """
    prompt = prompt_of(q, k, v, causal, weight, scale)
    if not (selection is None or isinstance(selection, GIVEN) or is_policy(selection)):
        raise ArgumentError(f"selection must be a Result, a Kept, a Report or a policy; got {selection!r}")
    chosen = Certified() if selection is None and isinstance(weight, Softmax) else selection
    delta = 1 - checks.real("confidence", confidence, np.nextafter(0, 1), 1.0)
    look = _Look(
        prompt,
        checks.whole("rows", rows, 1),
        checks.real("tolerance", tolerance, 0.0, 1.0),
        rng if isinstance(rng, np.random.Generator) else np.random.default_rng(checks.whole("rng", rng, 0)),
    )
    limits = {"dropped": max_dropped, "error": max_error, "exceeding": max_exceeding}
    if escalate:
        return _escalated(look, chosen, delta, _limits(limits))
    if any(limit is not None for limit in limits.values()):
        raise ArgumentError(f"max_dropped, max_error and max_exceeding must be None without escalate; got {limits}")
    # codes are fitted to all queries of a call, and blocks of rows share keys
    far = checks.device(q) != "cpu"  # where policies are served on whole prompts
    alike = getattr(chosen, "bytes_per_key", None) is None and not is_shared(chosen) and not far
    return look.at(chosen, chosen if alike else _answered(chosen, prompt), delta)


@dataclass(frozen=True)
class _Look:
    """How audits of one prompt are made."""

    prompt: Prompt
    size: int
    tolerance: float
    rng: np.random.Generator

    def at(self, selection: Any, given: Any, delta: float) -> Audit:
        """Audit of a selection, by itself or the result it gave, on freshly drawn rows with confidence 1 - delta."""
        leading, m = tuple(self.prompt.q.shape[:-2]), self.prompt.q.shape[-2]
        size = min(self.size, m)
        draws = [self.rng.choice(m, size, replace=False) for _ in range(math.prod(leading))]  # in random order
        rows = np.array(draws)  # (H, s)
        found = self.prompt.estimates(given, rows, self.tolerance, delta)
        return Audit(1 - delta, self.tolerance, m, rows.reshape(*leading, size), found, selection)


def _escalated(look: _Look, selection: Any, delta: float, limits: Mapping[str, float]) -> Audit:
    audits: list[Audit] = []
    given: Any = None
    for candidate in _ladder(selection, look.prompt):
        given = _answered(candidate, look.prompt)
        audits.append(look.at(candidate, given, delta / 2 ** (len(audits) + 1)))
        if _within(audits[-1], limits):
            break
    result = given if isinstance(given, Result) else None
    return dataclasses.replace(audits[-1], result=result, earlier=tuple(audits[:-1]))


def _ladder(selection: Any, prompt: Prompt) -> Iterator[Any]:
    """The selection, each tighter one that its policy names, and the exact one."""
    exact = Dense() if isinstance(prompt.weight, Softmax) else None
    yield selection
    tighter = selection
    while (step := getattr(tighter, "tighter", None)) and (tighter := step(prompt.n)) is not None:
        yield tighter
    if selection != exact:
        yield exact


def _answered(selection: Any, prompt: Prompt) -> Any:
    """A policy's `Result` for all rows; anything else is an answer already."""
    if isinstance(selection, GIVEN):
        return selection
    q, k, v = prompt.q, prompt.k, prompt.v
    return prefill(q, k, v, causal=prompt.causal, weight=prompt.weight, policy=selection, scale=prompt.scale)
