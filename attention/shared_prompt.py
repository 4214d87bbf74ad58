"""A prompt whose blocks of rows share keys: its checks, its answer and the result made of it.

Policies that choose such keys have one method, ``answer``: of a `SharedPrompt` they make an `Answer`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from attention.engine import prompt_arrays
from attention.key_lists import KeyLists, counts, edges
from attention.result import Certificate, Counters, Result
from attention.weights import ReLUPower, Softmax
from hsr import checks
from hsr.backend import choose
from hsr.errors import ArgumentError

LARGEST = {"float32": 1e30, "float64": 1e150}  # of a scaled query, a score or a value: squares or sums stay finite


@dataclass(frozen=True)
class BlockResult(Result):
    """Attention over lists that blocks of rows share.

    Attributes:
        densities: (..., h) float64; the share of the keys seen by the last row of each block that was attended to,
            over all blocks of a head.
    """

    densities: np.ndarray


@dataclass
class Answer:
    """Of H heads; nothing is known of its error."""

    output: np.ndarray  # (H, m, dv)
    lse: np.ndarray  # (H, m)
    counts: np.ndarray  # (H, T), keys listed
    densities: np.ndarray  # (H,)

    def counters(self, limits: np.ndarray, visited: np.ndarray) -> Counters:
        """Of rows that see limits (H, m) keys, after visited (H, m) codes."""
        block = np.arange(limits.shape[1]) // KeyLists.rows
        reported = self.counts[:, block] + limits - edges(limits.shape[1], int(limits.max()))[block]
        return Counters(reported, visited, reported)

    def certificate(self, dtype: str) -> Certificate:
        """Of an output that is rounded to a dtype, arrays (H, m)."""
        unknown = np.full(self.lse.shape, np.inf)
        return Certificate("none", unknown, unknown, unknown, unknown)

    def result(self, limits: np.ndarray, visited: np.ndarray, q: Any, n: int) -> BlockResult:
        """In the shape, type and dtype of q (..., h, m, d); limits and visited (H, m)."""
        result = Result(
            self.output.astype(np.float64),
            self.lse,
            np.zeros(limits.shape, bool),
            self.certificate(checks.dtype_name("q", q)),
            self.counters(limits, visited),
            n,
        ).shaped(tuple(q.shape[:-1]), q)
        return BlockResult(**vars(result), densities=self.densities.reshape(tuple(q.shape[:-2])))


@dataclass(frozen=True)
class SharedPrompt:
    """What is attended to, checked, and the method that does it."""

    q: np.ndarray  # (H, m, d)
    k: np.ndarray  # (G, n, d)
    v: np.ndarray  # (G, n, dv)
    scale: float
    method: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, m, n."""
        return len(self.q), self.q.shape[1], self.k.shape[1]

    def of(self, head: int) -> SharedPrompt:
        """One head alone."""
        source = head * len(self.k) // len(self.q)
        one, read = slice(head, head + 1), slice(source, source + 1)
        return dataclasses.replace(self, q=self.q[one], k=self.k[read], v=self.v[read])

    def attended(self, lists: KeyLists) -> Answer:
        """Attention over numpy lists that are known to be sound."""
        heads, m, n = self.shape
        output, lse = choose("listed", self.method)(self.q, self.k, self.v, lists, self.scale)
        return Answer(output, lse, counts(lists).reshape(heads, -1), lists.densities(m, n))


@runtime_checkable
class Shared(Protocol):
    """A policy whose rows share keys; its attribute ``shared`` is True."""

    def answer(self, prompt: SharedPrompt) -> Answer:
        """Attention of the whole prompt."""
        ...

    def visited(self, edges: np.ndarray) -> np.ndarray:
        """Codes looked at for each block of rows with so many eligible keys: (T,) -> (T,)."""
        ...


@runtime_checkable
class Selects(Protocol):
    """A policy that makes the lists of tensors, where they are: on a GPU `gpu.prompt` serves it."""

    def lists(self, q: Any, k: Any, scale: float) -> KeyLists:
        """q (H, m, d), k (G, n, d) -> lists of H T lines."""
        ...


def attend_prompt(
    policy: Shared,
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool,
    weight: Softmax | ReLUPower,
    scale: float | None,
    method: str,
) -> BlockResult:
    """Arguments as of `attention.prefill`; method names rows of the operations that the policy chooses among.

    Raises:
        ArgumentError: as for `attention.prefill`; causal=False, a weight other than Softmax(), what the policy refuses;
            scores or values beyond 1e30 in float32 and narrower, 1e150 in float64.
    """
    if not isinstance(weight, Softmax):
        raise ArgumentError(f"weight must be Softmax() for {type(policy).__name__}; got {weight!r}")
    if not causal:
        raise ArgumentError(f"causal must be True for {type(policy).__name__}; got {causal!r}")
    queries, keys, values, limits = prompt_arrays(q, k, v, causal)
    factor = keys.shape[2] ** -0.5 if scale is None else checks.real("scale", scale, np.nextafter(0, 1), math.inf)
    _check_range(queries, keys, values, factor)
    m, n = queries.shape[1], keys.shape[1]
    prompt = SharedPrompt(queries, keys, values, factor, "numba" if method == "auto" else method)
    visited = policy.visited(edges(m, n))[np.broadcast_to(np.arange(m) // KeyLists.rows, limits.shape)]
    return policy.answer(prompt).result(limits, visited, q, n)


def _check_range(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> None:
    """Refuse what would overflow on the way."""
    largest = LARGEST[q.dtype.name]
    with np.errstate(over="ignore"):
        asked = scale * np.sqrt((q.astype(np.float64) ** 2).sum(axis=2).max())
        score = asked * np.sqrt((k.astype(np.float64) ** 2).sum(axis=2).max())
    for what, found in (("q and k", max(asked, score)), ("v", np.abs(v).max(initial=0.0))):
        if not found <= largest:
            kind = "entries" if what == "v" else "scaled queries and scores"
            raise ArgumentError(f"{what} must have {kind} of at most {largest:.0e} in {q.dtype}; got {found:.3g}")
