"""Attention on some rows of a prompt: exactly, and as a policy, result or selector has it; for `attention.audit`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np

from attention import reference
from attention.audit_bounds import Estimates, estimates, relative_error, sums_error
from attention.engine import Plan, fold, prompt_arrays
from attention.result import Result
from attention.values import Values
from attention.weights import ReLUPower, Softmax
from hsr import HSRIndex, Report, checks
from hsr.backend import preferred
from hsr.errors import ArgumentError


@dataclass(frozen=True)
class Kept:
    """The keys that a selector keeps, in CSR form, for rows (h, m) or, shared by a group of heads, (g, m), flattened.

    Args:
        offsets: (rows + 1,) whole numbers; row i keeps ``indices[offsets[i]:offsets[i + 1]]``.
        indices: (nnz,) whole numbers, key positions; a key drawn twice stands there twice.
        log_weights: None, or (nnz,) floats added to the scores: ``-ln pi_j`` for a key kept with probability pi_j.

    Raises:
        ArgumentError: dtypes, offsets or lengths that do not fit each other.
    """

    offsets: np.ndarray
    indices: np.ndarray
    log_weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("offsets", "indices"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
                raise ArgumentError(f"{name} must be a numpy array (rows,) of whole numbers; got {array!r}")
        ends = self.offsets[[0, -1]].tolist() if self.offsets.size else []
        if ends != [0, len(self.indices)] or (np.diff(self.offsets) < 0).any():
            raise ArgumentError(f"offsets must rise from 0 to {len(self.indices)}, one per index; got {self.offsets}")
        if self.log_weights is not None:
            found = checks.floats("log_weights", self.log_weights, (1,)).shape
            if found != self.indices.shape:
                raise ArgumentError(f"log_weights must have shape {self.indices.shape}, one per index; got {found}")


@dataclass(frozen=True)
class Prompt:
    """The attention that is audited: arguments as given, and folded into plain arrays."""

    q: Any
    k: Any
    v: Any
    causal: bool
    weight: Softmax | ReLUPower
    scale: float
    queries: np.ndarray  # (H, m, d), the batch folded into the heads
    keys: np.ndarray  # (G, n, d)
    values: Values  # of (G, n, dv)
    limits: np.ndarray  # (H, m); keys each row sees

    @property
    def n(self) -> int:
        """Keys."""
        return int(self.keys.shape[1])

    def estimates(self, selection: Any, rows: np.ndarray, tolerance: float, delta: float) -> Estimates:
        """What rows (H, s), in the order of drawing, say of a policy, a result or kept keys, with 1 - delta."""
        output, lse = attended(selection, self, rows)
        exact, exact_lse = self.exact(rows)
        dropped, error = sums_error(lse, exact_lse), relative_error(output, exact)
        return estimates(dropped, error, tolerance, self.q.shape[-2], delta, tuple(self.q.shape[:-2]))

    def exact(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Output (H, s, dv) and log-sum-exp (H, s) of some rows (H, s), by the definition."""
        found = [self._exact(head, chosen) for head, chosen in enumerate(rows)]
        output, lse = (np.array(part) for part in zip(*found, strict=True))
        return output, lse

    def _exact(self, head: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen = np.arange(self.n) < self.limits[head, rows, None]
        queries, keys, values = self.of(head)
        output, lse = reference.dense(queries[None, rows], keys[None], values[None], self.weight, self.scale, keep=seen)
        return output[0], lse[0]

    def of(self, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries (m, d) of one head, and the keys (n, d) and values (n, dv) that it reads."""
        source = head * len(self.keys) // len(self.queries)
        return self.queries[head], self.keys[source], self.values.array[source]


def prompt_of(q: Any, k: Any, v: Any, causal: bool, weight: Softmax | ReLUPower, scale: float | None) -> Prompt:
    """The arguments, if they fit each other; tensors on a GPU make a `gpu.audited.CudaPrompt`, which looks alike."""
    Plan(weight, None, scale)
    device = checks.device(q)
    if device != "cpu":
        made: Prompt = preferred("audited", device=device, causal=causal, weight=weight)(q, k, v, causal, weight, scale)
        return made
    queries, keys, _, limits = prompt_arrays(q, k, v, causal)
    values = Values(fold("v", v))
    factor = keys.shape[2] ** -0.5 if scale is None else float(scale)
    with np.errstate(over="ignore"):
        largest = np.abs(queries).sum(axis=2, dtype=np.float64).max() * np.abs(keys).max().astype(np.float64)
    if not np.isfinite(largest) or not np.isfinite(largest * factor):
        raise ArgumentError("q and k must have scores within float64; got products that overflow it")
    return Prompt(q, k, v, causal, weight, factor, queries, keys, values, limits)


@singledispatch
def attended(selection: Any, prompt: Prompt, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output (H, s, dv) float64 and log-sum-exp (H, s) of the sampled rows, by a policy."""
    q = fold("q", prompt.q)[np.arange(len(rows))[:, None], rows]
    limits = np.take_along_axis(prompt.limits, rows, axis=1)
    plan = Plan(prompt.weight, selection, prompt.scale)
    result = plan.attend(q, HSRIndex(fold("k", prompt.k)), prompt.values, limits).shaped(rows.shape, q)
    return checks.floats("output", result.output, (3,)).astype(np.float64), result.lse


@attended.register
def _of_result(selection: Result, prompt: Prompt, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wanted = (*prompt.q.shape[:-1], prompt.v.shape[-1])
    if tuple(selection.output.shape) != wanted or selection.lse.shape != wanted[:-1]:
        found = f"{tuple(selection.output.shape)} and {selection.lse.shape}"
        raise ArgumentError(f"selection must have output {wanted} and lse {wanted[:-1]} to match q and v; got {found}")
    output = checks.floats("selection.output", selection.output, (3, 4)).reshape(*prompt.limits.shape, -1)
    lse = selection.lse.reshape(prompt.limits.shape)
    return np.take_along_axis(output, rows[..., None], axis=1).astype(np.float64), np.take_along_axis(lse, rows, axis=1)


@attended.register
def _of_report(selection: Report, prompt: Prompt, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _of_kept(Kept(selection.offsets, selection.indices), prompt, rows)


@attended.register
def _of_kept(selection: Kept, prompt: Prompt, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    heads, m = prompt.limits.shape
    sources, n = prompt.keys.shape[:2]
    lines = len(selection.offsets) - 1
    if lines not in (heads * m, sources * m):
        raise ArgumentError(
            f"selection must have {heads * m} rows, one per query, or {sources * m}, one per key-value head and row; "
            f"got {lines}"
        )
    if selection.indices.size and not 0 <= selection.indices.min() <= selection.indices.max() < n:
        found = f"{selection.indices.min()}..{selection.indices.max()}"
        raise ArgumentError(f"selection must have indices in 0..{n - 1}; got {found}")
    if selection.log_weights is not None and not isinstance(prompt.weight, Softmax):
        raise ArgumentError(f"selection must have no log_weights unless weight is Softmax(); got {prompt.weight!r}")
    attended = [
        _kept_rows(selection, prompt, i, rows[i], (i * lines // m // heads) * m + rows[i]) for i in range(heads)
    ]
    output, lse = (np.array(x) for x in zip(*attended, strict=True))
    return output, lse


def _kept_rows(
    kept: Kept, prompt: Prompt, head: int, rows: np.ndarray, lines: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Output (s, dv) and log-sum-exp (s,) of rows (s,) of one head over the keys kept on the given lines (s,)."""
    queries, keys, values = prompt.of(head)
    parts = [slice(kept.offsets[line], kept.offsets[line + 1]) for line in lines]
    scores = [
        keys[kept.indices[part]].astype(np.float64) @ queries[row].astype(np.float64)
        for row, part in zip(rows, parts, strict=True)
    ]
    if kept.log_weights is not None:
        scores = [s + kept.log_weights[part] / prompt.scale for s, part in zip(scores, parts, strict=True)]
    offsets = np.cumsum([0] + [len(s) for s in scores])
    indices = np.concatenate([kept.indices[part] for part in parts])
    return reference.attend(
        offsets, indices, np.concatenate(scores), values[None], np.zeros(len(rows)), prompt.weight, prompt.scale
    )[:2]
