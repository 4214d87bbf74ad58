"""Algorithm 2 of arXiv 2410.10165: report a half-space of cached keys, attend to those alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from attention.engine import Plan, Stepwise, fold, is_stepwise
from attention.policies import Policy
from attention.result import Result
from attention.sampled import Sampled
from attention.values import Values
from attention.weights import ReLUPower, Softmax
from hsr import HSRIndex, checks
from hsr.backend import choose
from hsr.errors import ArgumentError


def decode(
    q: Any,
    index: Any,
    values: Any,
    *,
    weight: Softmax | ReLUPower = Softmax(),  # noqa: B008 - frozen
    policy: Policy | Sampled | Stepwise | None = None,
    scale: float | None = None,
) -> Result:
    """Attention of new queries over every living key of the index.

    Args:
        q: (h, m, d) or (B, h, m, d), in the index's dtype; head i reads key-value head i // (h / g).
        index: an `HSRIndex` over keys (g, n, d); for a batch over (B g, n, d), the batch folded into the heads.  For a
            decode selector the keys themselves, (g, n, d) or (B, g, n, d), on a CPU or a GPU.
        values: (g, n, dv) or (B, g, n, dv), one per id of the index, deleted or not; or `Values` made of (B g, n, dv),
            which saves a pass over them.
        weight: Softmax() or ReLUPower(alpha, b).
        policy: for Softmax, which keys to keep: Dense(), TopR(r), Certified(eps) or Sampled(eps).
            None means Certified(0.01). ReLUPower takes none: its half-space is exact (Theorem 4.1).
            Or a decode selector of `attention.selectors`, one row a head; what it knows of the keys is made anew in
            every call, which a `DecodeSession` saves.
        scale: of the scores, positive; None means 1 / sqrt(d).

    Returns:
        Result: output (h, m, dv) or (B, h, m, dv) with log-sum-exp, certificate and counters.

    Raises:
        ArgumentError: shapes, dtypes or heads that do not fit, NaN or infinity, a policy for ReLUPower.
    """
    plan = Plan(weight, policy, scale)
    if is_stepwise(policy):
        if isinstance(index, HSRIndex):
            raise ArgumentError(f"index must be the keys, (g, n, d) or (B, g, n, d), for {policy!r}; got an HSRIndex")
        session = choose("session", "selected", device=checks.device(index), plan=plan)
        found: Result = session(index, values, plan).attend(q)
        return found
    if not isinstance(index, HSRIndex):
        raise ArgumentError(f"index must be an HSRIndex unless a decode selector chooses; got {type(index).__name__}")
    folded = fold("q", q)
    kept = values if isinstance(values, Values) else Values(fold("values", values))
    limits = np.full(folded.shape[:2], index.n, np.int64)
    return plan.attend(folded, index, kept, limits).shaped(q.shape[:-1], q)
