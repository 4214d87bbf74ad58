"""The library's ways to attend, in one signature, so that a statement can be put to each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from attention import Dense, Policy, ReLUPower, Result, Softmax, decode, prefill
from attention.reference import dense
from hsr import ROWS, HSRIndex

Weight = Softmax | ReLUPower


class Attended(NamedTuple):
    """Attention of m queries over n keys, one head."""

    output: np.ndarray  # (m, dv) float64
    lse: np.ndarray  # (m,) float64, ln of the sum of weights
    reported: np.ndarray  # (m,) int64, how many keys the half-space held; -1 where no half-space was asked
    scanned: np.ndarray  # (m,) int64, how many keys were read at full precision; -1 likewise


Route = Callable[[np.ndarray, np.ndarray, np.ndarray, Weight, str], Attended]
Prefill = Callable[[np.ndarray, np.ndarray, np.ndarray, bool, Weight, Policy | None, str], Attended]


def methods_for(n: int, d: int) -> list[str]:
    """The index methods that serve n keys of width d on this machine."""
    return [row.method for row in ROWS if row.op == "build" and row.refusal("cpu", n=n, d=d) is None]


def policy_of(weight: Weight) -> Dense | None:
    """The policy that keeps every key that has weight."""
    return Dense() if isinstance(weight, Softmax) else None


def one_head(result: Result) -> Attended:
    """A result of one head without its head axis."""
    return Attended(result.output[0], result.lse[0], result.counters.reported[0], result.counters.scanned[0])


def by_reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: Weight, method: str) -> Attended:
    """`attention.reference.dense`; the method is not used."""
    output, lse = dense(q[None], k[None], v[None], weight, k.shape[1] ** -0.5)
    return Attended(output[0], lse[0], np.full(len(q), -1), np.full(len(q), -1))


def by_decode(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: Weight, method: str) -> Attended:
    """`attention.decode` over an index of the given method."""
    index = HSRIndex(k[None], method)
    return one_head(decode(q[None], index, v[None], weight=weight, policy=policy_of(weight)))


def by_prefill(q: np.ndarray, k: np.ndarray, v: np.ndarray, weight: Weight, method: str) -> Attended:
    """`attention.prefill` with an index of the given method, no key hidden."""
    return prefilled(q, k, v, False, weight, policy_of(weight), method)


def prefilled(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, weight: Weight, policy: Policy | None, method: str
) -> Attended:
    """`attention.prefill` of one head."""
    return one_head(prefill(q[None], k[None], v[None], causal=causal, weight=weight, policy=policy, method=method))


def never_causal(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, weight: Weight, policy: Policy | None, method: str
) -> Attended:
    """A fault: every row sees every key."""
    return prefilled(q, k, v, False, weight, policy, method)


def aligned_top_left(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, weight: Weight, policy: Policy | None, method: str
) -> Attended:
    """A fault: a causal row i sees the keys up to i, whatever was cached before."""
    seen = len(q) if causal else len(k)
    return prefilled(q, k[:seen], v[:seen], causal, weight, policy, method)


def one_key_ahead(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, weight: Weight, policy: Policy | None, method: str
) -> Attended:
    """A fault: a causal row sees the key after its own as well."""
    if causal:
        k, v = np.concatenate([k, k[-1:]]), np.concatenate([v, v[-1:]])
    return prefilled(q, k, v, causal, weight, policy, method)


PREFILL_FAULTS: dict[str, Prefill] = {
    "every row sees every key": never_causal,
    "causal rows aligned to the top left": aligned_top_left,
    "causal rows see one key ahead": one_key_ahead,
}
ROUTES: dict[str, Route] = {
    "attention.reference.dense": by_reference,
    "attention.decode": by_decode,
    "attention.prefill": by_prefill,
}
