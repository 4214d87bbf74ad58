"""A growing cache that one attends to step by step."""

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
from hsr.backend import choose, preferred
from hsr.errors import ArgumentError


class DecodeSession:
    """Keys and values of one attention layer: `append` new tokens, `attend` with new queries.

    Args:
        k: (g, n, d) or (B, g, n, d), n >= 1; on a GPU for what a row ``session`` of the table serves: see
            `gpu.session`, `gpu.relu`, `attention.selected_session`.
        v: (g, n, dv) or (B, g, n, dv).
        weight, policy, scale: as for `attention.decode`.
        method: index method, a name of the dispatch table or "auto"; for a decode selector, a method of ``chosen``.
        queries: (h, m, d) or (B, h, m, d) like those to come, for instance the prompt's: `Sampled` codes keys for them,
            and some of the selectors calibrate by them.

    Raises:
        ArgumentError: shapes or dtypes that do not fit, NaN or infinity, a policy for ReLUPower.
    """

    def __init__(
        self,
        k: Any,
        v: Any,
        *,
        weight: Softmax | ReLUPower = Softmax(),  # noqa: B008 - frozen
        policy: Policy | Sampled | Stepwise | None = None,
        scale: float | None = None,
        method: str = "auto",
        queries: Any = None,
    ) -> None:
        self._plan = Plan(weight, policy, scale)
        device = checks.device(k)
        self._far: Any = None  # serves everything where keys and values lie on a GPU, or a selector chooses
        if is_stepwise(policy):
            self._far = choose("session", "selected", device=device, plan=self._plan)(k, v, self._plan, queries, method)
            return
        if device != "cpu":
            if method != "auto":
                raise ArgumentError(f"method must be 'auto' on {device}, where the table chooses; got {method!r}")
            self._far = preferred("session", device=device, plan=self._plan)(k, v, self._plan)
            return
        keys, values = fold("k", k), Values(fold("v", v))
        self._leading = tuple(k.shape[:-2])
        if tuple(v.shape[:-1]) != tuple(k.shape[:-1]) or values.dtype != str(k.dtype).removeprefix("torch."):
            raise ArgumentError(
                f"v must be {(*k.shape[:-1], 'dv')} of {k.dtype} to match k; got {tuple(v.shape)} of {v.dtype}"
            )
        self._index, self._values = self._plan.index(keys, method), values
        if queries is not None:
            self._plan.calibrate(fold("queries", queries), self._index, values)

    @property
    def index(self) -> HSRIndex:
        """The index over the keys, batch folded into the heads; on a GPU, and of a decode selector, there is none."""
        return self._index

    @property
    def gpu(self) -> Any:
        """What serves CUDA tensors and decode selectors, see `attention.selected_session`; None without an index."""
        return self._far

    @property
    def n(self) -> int:
        """Number of tokens ever added; a token's id is its position among them, whatever is evicted."""
        return self._index.n if self._far is None else self._far.n

    @property
    def alive(self) -> int:
        """Number of tokens that were not evicted."""
        return self._index.alive if self._far is None else self._far.alive

    def append(self, k: Any, v: Any) -> None:
        """Add tokens: k (g, t, d), v (g, t, dv), or with a leading B; if either is refused, neither is added.

        Raises:
            ArgumentError: shapes or dtypes that do not match the cache, NaN or infinity.
        """
        if self._far is not None:
            self._far.append(k, v)
            return
        keys, values = fold("k", k), self._values.checked(fold("v", v))
        if tuple(k.shape[:-2]) != self._leading or tuple(v.shape[:-1]) != tuple(k.shape[:-1]):
            raise ArgumentError(f"k and v must be {(*self._leading, 't')} wide; got {tuple(k.shape)}, {tuple(v.shape)}")
        self._index.append(keys)
        self._values.append(values)

    def evict(self, ids: Any) -> None:
        """Forget tokens, in every head and batch: later calls attend as if they had never been there.

        Their values stay in memory, for ids are positions among the values; keys and structures are given back as in
        `HSRIndex.delete`.

        Args:
            ids: (t,) whole numbers in 0..n-1, each once; nothing changes if it is refused.

        Raises:
            ArgumentError: not whole numbers, out of range, repeated, or evicted before.
        """
        (self._index.delete if self._far is None else self._far.evict)(ids)

    def attend(self, q: Any) -> Result:
        """Attention of q (h, m, d) or (B, h, m, d) over every token not evicted; see `attention.decode`."""
        if self._far is not None:
            return self._far.attend(q)
        folded = fold("q", q)
        if len(q.shape) != len(self._leading) + 2 or tuple(q.shape[:-3]) != self._leading[:-1]:
            raise ArgumentError(f"q must have the cache's batch {self._leading[:-1]}; got shape {tuple(q.shape)}")
        limits = np.full(folded.shape[:2], self.n, np.int64)
        return self._plan.attend(folded, self._index, self._values, limits).shaped(q.shape[:-1], q)
