"""A policy of `attention.DecodeSession` whose steps tell which keys they attended to.

Policies choose keys by one of three methods: `attention.policies` select by an index, `attention.coded` by codes,
`attention.decode_selector` by lists.  The watched copy has that method wrapped, and is otherwise the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from attention.decode_selector import Attended, Bounds, Steps
from attention.token_lists import TokenLists
from hsr.lifted_numba import CHUNK


class Kept(NamedTuple):
    """Keys that a step attended to."""

    mask: torch.Tensor  # (L, n) bool, for every query head or every group of them
    means: torch.Tensor | None  # (L, C) bool, pseudo keys likewise


Late = Callable[[], Kept]  # what makes them, once the step is over


class Watched(NamedTuple):
    """The copy, and what its last step attended to, at most one."""

    policy: Any
    seen: list[Late]

    def take(self) -> Kept | None:
        """Of the step just made, None where the policy does not tell."""
        return self.seen.pop()() if self.seen else None


def watched(policy: Any) -> Watched:
    """A copy that is watched."""
    seen: list[Late] = []

    def see(late: Late) -> None:
        seen[:] = [late]

    kind = type(policy)
    methods = {name: make(getattr(kind, name), see) for name, make in METHODS.items() if hasattr(kind, name)}
    copy: Any = object.__new__(type(kind.__name__, (kind,), methods))
    vars(copy).update(vars(policy))
    return Watched(copy, seen)


def _select(method: Callable[..., Any], see: Callable[[Late], None]) -> Callable[..., Any]:
    def select(policy: Any, visible: Any) -> Any:
        chosen = method(policy, visible)
        see(partial(_reported, chosen.report, visible.index.n))
        return chosen

    return select


def _reported(report: Any, n: int) -> Kept:
    mask = np.zeros((len(report.offsets) - 1, n), bool)
    mask[np.repeat(np.arange(len(mask)), np.diff(report.offsets)), report.indices] = True
    return Kept(torch.from_numpy(mask), None)


def _choose(method: Callable[..., Any], see: Callable[[Late], None]) -> Callable[..., Any]:
    def choose(policy: Any, codes: Any, asked: Any) -> Any:
        chosen = method(policy, codes, asked)
        see(partial(_drawn, chosen, asked))
        return chosen

    return choose


def _drawn(chosen: Any, asked: Any) -> Kept:
    place = np.arange(int(asked.limits.max()))
    first, last = asked.spans[:, 0].T[..., None]  # of a step's only row
    mask = (place < asked.limits) & ((place < first) | (place >= last))  # (g, n), the certain keys
    for head, counts in enumerate(chosen.counts[:, 0]):
        for chunk, count in enumerate(counts):
            mask[head, chosen.ids[head, 0, CHUNK * chunk : CHUNK * chunk + count]] = True
    return Kept(torch.from_numpy(mask), None)


def _begin(method: Callable[..., Any], see: Callable[[Late], None]) -> Callable[..., Any]:
    def begin(policy: Any, *arguments: Any, **settings: Any) -> Steps:
        return _Steps(method(policy, *arguments, **settings), see)

    return begin


class _Steps(Steps):
    def __init__(self, steps: Steps, see: Callable[[Late], None]) -> None:
        self._steps, self._see = steps, see

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self._steps.append(k, v)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        lists = self._steps.choose(q, k, v)
        self._see(partial(_listed, lists, k.shape[1]))
        return lists

    def bounds(self, seen: Attended) -> Bounds | None:
        return self._steps.bounds(seen)


def _listed(lists: TokenLists, n: int) -> Kept:
    return Kept(lists.mask(n), None if lists.means is None else lists.means.log_weights > -torch.inf)


METHODS: Mapping[str, Callable[..., Callable[..., Any]]] = {"select": _select, "choose": _choose, "begin": _begin}
