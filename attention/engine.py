"""The one path that decode, prefill and sessions share: select, attend, certify."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

import numpy as np

from attention import coded
from attention.coded import Coded
from attention.policies import Certified, Policy, Selection
from attention.result import Counters, Result, certify
from attention.sampled import Sampled
from attention.values import Values
from attention.visible import Visible
from attention.weights import ReLUPower, Softmax
from hsr import HSRIndex, checks
from hsr.backend import choose
from hsr.errors import ArgumentError


@runtime_checkable
class Stepwise(Protocol):
    """A policy that lists keys for one decode step at a time: see `attention.decode_selector`."""

    steps: ClassVar[bool]

    def begin(self, k: Any, v: Any, queries: Any, scale: float, batch: int = 1) -> Any:
        """The state for a cache."""
        ...


@dataclass(frozen=True)
class Plan:
    """How to attend: validated once, used for every call.

    Args:
        weight: Softmax() or ReLUPower(alpha, b).
        policy: for Softmax, None means Certified(0.01); ReLUPower takes none.
        scale: positive, or None for 1 / sqrt(d).
        method: row of the dispatch table for ``attend``.

    Raises:
        ArgumentError: a weight, policy or scale that cannot be used.
    """

    weight: Softmax | ReLUPower
    policy: Policy | Sampled | Stepwise | None
    scale: float | None
    method: str = "numba"

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Softmax | ReLUPower):
            raise ArgumentError(f"weight must be Softmax() or ReLUPower(alpha, b); got {self.weight!r}")
        if isinstance(self.weight, ReLUPower) and self.policy is not None:
            raise ArgumentError(f"policy must be None for ReLUPower, whose half-space is exact; got {self.policy!r}")
        if is_shared(self.policy):
            raise ArgumentError(
                f"policy must choose keys row by row, which {self.policy!r} does not: it serves prefill"
            )
        if self.policy is not None and not is_policy(self.policy):
            raise ArgumentError(
                "policy must be Dense(), TopR(r), Certified(eps) or Sampled(eps), or a decode selector of "
                f"attention.selectors; got {self.policy!r}"
            )
        if self.scale is not None:
            checks.real("scale", self.scale, np.nextafter(0, 1), np.inf)

    def index(self, keys: Any, method: str) -> HSRIndex:
        """The index over keys (g, n, d); for "auto" the policy may have a method of its own."""
        return HSRIndex(keys, getattr(self.policy, "method", method) if method == "auto" else method)

    def calibrate(self, queries: Any, index: HSRIndex, values: Values) -> None:
        """Let the policy know queries (h, m, d) like those to come, if it can use them."""
        known = _checked(queries, index).astype(np.float64)
        if is_coded(self.policy):
            keys = index.keys.reshape(index.heads, -1, index.d)
            self.policy.codes(keys, values, known.reshape(index.heads, -1, *known.shape[1:]), self._scale(index))

    def _scale(self, index: HSRIndex) -> float:
        return 1 / math.sqrt(index.d) if self.scale is None else float(self.scale)

    def attend(self, q: Any, index: HSRIndex, values: Values, limits: np.ndarray) -> Result:
        """q (h, m, d), index over (g, n, d), values of (g, n, dv), limits (h, m) -> Result (h, m), output float64."""
        if is_stepwise(self.policy):
            raise ArgumentError(
                f"policy must choose keys for many rows, which {self.policy!r} does not: it serves decode, step by step"
            )
        if values.array.shape[:2] != (index.heads, index.n) or values.dtype != index.dtype:
            raise ArgumentError(
                f"v must be ({index.heads}, {index.n}, dv) of {index.dtype} to match keys; "
                f"got {values.array.shape} of {values.dtype}"
            )
        scale = self._scale(index)
        queries = _checked(q, index).astype(np.float64)
        visible = Visible(index, q, queries, limits, scale)
        error = visible.score_error
        if not np.isfinite(error).all():
            raise ArgumentError("q and k must have scores within float64; got products that overflow it")
        if is_coded(self.policy):
            return coded.attend(self.policy, visible, values)
        report, log_dropped, kind = self._select(visible)
        run = choose("attend", self.method)
        output, lse, slope = run(
            report.offsets, report.indices, report.scores, values.array, error.ravel(), self.weight, scale
        )
        output = output.reshape(*limits.shape, output.shape[1])
        lse, slope = lse.reshape(limits.shape), slope.reshape(limits.shape)
        certificate = certify(
            output, lse, slope, log_dropped, error, report.counts, values, index.dtype, self.weight, kind
        )
        counters = Counters(report.scanned.reshape(limits.shape), report.visited.reshape(limits.shape), report.counts)
        return Result(output, lse, np.isneginf(lse), certificate, counters, index.alive)

    def _select(self, visible: Visible) -> Selection:
        if isinstance(self.weight, ReLUPower):
            half_space = self.weight.half_space(visible.scale)
            report = visible.index.query(visible.q, half_space, prefix=visible.limits)
            return Selection(report, np.full(visible.limits.shape, -np.inf), "exact")
        policy = self.policy or Certified()
        assert not isinstance(policy, Sampled | Stepwise)
        return policy.select(visible)


def is_policy(candidate: Any) -> bool:
    """Whether softmax attention can choose its keys by it."""
    return is_coded(candidate) or is_shared(candidate) or is_stepwise(candidate) or _says(candidate, "select")


def is_coded(candidate: Any) -> TypeGuard[Coded]:
    """Whether it chooses keys by their codes."""
    return _says(candidate, "coded")


def is_shared(candidate: Any) -> bool:
    """Whether it chooses keys for blocks of a prompt's rows together."""
    return _says(candidate, "shared")


def is_stepwise(candidate: Any) -> TypeGuard[Stepwise]:
    """Whether it chooses keys for one decode step at a time."""
    return _says(candidate, "steps")


def _says(candidate: Any, what: str) -> bool:
    """Whether a policy has a mark or method; a class of policies, which has it too, is none."""
    return not isinstance(candidate, type) and bool(getattr(candidate, what, False))


def _checked(q: Any, index: HSRIndex) -> np.ndarray:
    """q (h, m, d) as numpy, if it fits the index."""
    queries = checks.floats("q", q, (3,))
    if checks.dtype_name("q", q) != index.dtype:
        raise ArgumentError(f"q must have the keys' dtype {index.dtype}; got {q.dtype}")
    if queries.shape[2] != index.d:
        raise ArgumentError(f"q must have width {index.d} to match keys; got shape {tuple(q.shape)}")
    checks.grouped("q", len(queries), index.heads)
    return queries


def fold(name: str, array: Any) -> Any:
    """(B, heads, rows, width) -> (B heads, rows, width); three axes stay as they are, anything else is refused."""
    shape = tuple(getattr(array, "shape", ()))
    if len(shape) not in (3, 4):
        raise ArgumentError(f"{name} must be (heads, rows, width) or (B, heads, rows, width); got shape {shape}")
    return array.reshape(math.prod(shape[:-2]), *shape[-2:])


def prompt_arrays(q: Any, k: Any, v: Any, causal: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A prompt as numpy, batch folded into the heads, if its parts fit: q (H, m, d), k (G, n, d), v (G, n, dv), limits.

    Raises:
        ArgumentError: shapes, dtypes or heads that do not fit, NaN or infinity.
    """
    queries, keys, values = (checks.floats(name, fold(name, x), (3,)) for name, x in (("q", q), ("k", k), ("v", v)))
    if 0 in keys.shape or 0 in queries.shape:
        raise ArgumentError(f"q and k must have at least one row; got shapes {tuple(q.shape)} and {tuple(k.shape)}")
    if queries.shape[2] != keys.shape[2]:
        raise ArgumentError(f"q must have width {keys.shape[2]} to match k; got shape {tuple(q.shape)}")
    if tuple(v.shape[:-1]) != tuple(k.shape[:-1]):
        raise ArgumentError(f"v must be {(*k.shape[:-1], 'dv')} to match k; got {tuple(v.shape)}")
    names = [checks.dtype_name(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
    if len(set(names)) > 1:
        raise ArgumentError(f"q, k and v must have one dtype; got {', '.join(names)}")
    limits = prompt_limits(q, k, causal)
    checks.grouped("q", q.shape[-3], k.shape[-3])
    return queries, keys, values, limits


def prompt_limits(q: Any, k: Any, causal: bool) -> np.ndarray:
    """q (..., h, m, d), k (..., g, n, d) -> keys that each row sees, (h, m) int64, the batch folded into the heads."""
    m, n = q.shape[-2], k.shape[-2]
    if len(q.shape) != len(k.shape) or (len(q.shape) == 4 and q.shape[0] != k.shape[0]):
        raise ArgumentError(f"q must have the batch of k, {tuple(k.shape)}; got {tuple(q.shape)}")
    if causal and m > n:
        raise ArgumentError(f"q must have at most {n} rows, one per key, when causal; got {m}")
    seen = np.arange(n - m, n) + 1 if causal else np.full(m, n)
    return np.broadcast_to(seen, (math.prod(q.shape[:-2]), m)).astype(np.int64)
