"""A whole prompt end to end, causal, as many rows as keys: `attention.prefill`, and numpy over every visible key."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from attention import ReLUPower, Result, Softmax, prefill
from benchmarks.attending import DENSE, RULE, Attention, dense_work, policy, sparse_work, tolerance
from benchmarks.dense_attention import Weight, attended
from benchmarks.gate import require_rows
from benchmarks.key_laws import directions, gaussian
from benchmarks.ledger import RULES, Costs

JUDGED = 8  # rows of a prompt that are compared with float64


class Prompt(NamedTuple):
    """Rows (n, d), keys (n, d) and values (n, d) float32 of one head, and a weight for them all."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    weight: Weight

    def dense(self) -> np.ndarray:
        """Every row over all keys it sees."""
        return attended(*self)

    def sparse(self, method: str) -> Result:
        """Algorithm 3 of the paper."""
        q, k, v = (rows[None] for rows in (self.q, self.k, self.v))
        return prefill(q, k, v, weight=self.weight, policy=policy(self.weight), method=method)

    def exact(self, i: int, method: str) -> np.ndarray:
        """Row i in float64 (d,), over all keys it sees or, for the top-r of softmax, over those of largest score."""
        q, k, v = (rows.astype(np.float64) for rows in (self.q[i : i + 1], self.k[: i + 1], self.v[: i + 1]))
        if isinstance(self.weight, Softmax) and method != DENSE:
            best = np.argsort(-(k @ q[0]))[: RULES[RULE].keys(i + 1)]
            k, v = k[best], v[best]
        return attended(q, k, v, self.weight)[0]


def prompt(rng: np.random.Generator, n: int, d: int, name: str) -> Prompt:
    """Gaussian keys and values, rows of norm sqrt(d): scores are N(0, 1), so a quantile fires n^(4/5) keys of n."""
    made: dict[str, Callable[[], Weight]] = {
        "relu": lambda: ReLUPower(1, float(norm.isf(n**-0.2))),
        "softmax": Softmax,
    }
    return Prompt(directions(rng, n, d), gaussian(rng, n, d), gaussian(rng, n, d), made[name]())


def prefilled(method: str, prompts: Sequence[Prompt]) -> Costs:
    """Sums over the rows of each prompt; each is timed once, as it is long, and counts only if its rows are right."""
    attention = _dense(prompts) if method == DENSE else _sparse(prompts, method)
    costs = []
    for i, asked in enumerate(prompts):
        start = time.perf_counter()
        raw = attention.ask(i)
        seconds = time.perf_counter() - start
        work = attention.read(raw)
        judged = np.linspace(0, len(asked.q) - 1, JUDGED).astype(np.int64)
        wanted = np.array([asked.exact(row, method) for row in judged])
        require_rows(f"{method} on a prompt", work.outputs[judged], wanted, tolerance(asked.v))
        costs.append((seconds, work.visited.sum(), work.scanned.sum(), work.reported.sum()))
    return Costs(*map(np.array, zip(*costs, strict=True)))


def _sparse(prompts: Sequence[Prompt], method: str) -> Attention:
    return Attention(lambda i: prompts[i].sparse(method), sparse_work)


def _dense(prompts: Sequence[Prompt]) -> Attention:
    return Attention(lambda i: prompts[i].dense(), partial(dense_work, keys=1 + np.arange(len(prompts[0].q))))
