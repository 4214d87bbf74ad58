"""A policy of `attention.DecodeSession` whose steps tell which keys they attended to.

Policies choose keys by one of three methods: `attention.policies` select by an index, `attention.coded` by codes,
`attention.decode_selector` by lists.  The watched copy has that method wrapped, and is otherwise the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from attention.decode_selector import Steps
from attention.token_lists import TokenLists
from hsr.lifted_numba import CHUNK

Seen = Callable[[torch.Tensor], None]  # is told a mask (L, n) bool, for every query head or every group of them


class Watched(NamedTuple):
    """The copy, and the mask of its last step, at most one."""

    policy: Any
    masks: list[torch.Tensor]

    def take(self) -> torch.Tensor | None:
        """The mask of the step just made, None where the policy does not tell."""
        return self.masks.pop() if self.masks else None


def watched(policy: Any) -> Watched:
    """A copy that is watched."""
    masks: list[torch.Tensor] = []

    def see(mask: torch.Tensor) -> None:
        masks[:] = [mask]

    kind = type(policy)
    methods = {name: make(getattr(kind, name), see) for name, make in METHODS.items() if hasattr(kind, name)}
    copy: Any = object.__new__(type(kind.__name__, (kind,), methods))
    vars(copy).update(vars(policy))
    return Watched(copy, masks)


def _select(method: Callable[..., Any], see: Seen) -> Callable[..., Any]:
    def select(policy: Any, visible: Any) -> Any:
        chosen = method(policy, visible)
        offsets, indices = chosen.report.offsets, chosen.report.indices
        mask = np.zeros((len(offsets) - 1, visible.index.n), bool)
        mask[np.repeat(np.arange(len(mask)), np.diff(offsets)), indices] = True
        see(torch.from_numpy(mask))
        return chosen

    return select


def _choose(method: Callable[..., Any], see: Seen) -> Callable[..., Any]:
    def choose(policy: Any, codes: Any, asked: Any) -> Any:
        chosen = method(policy, codes, asked)
        place = np.arange(int(asked.limits.max()))
        first, last = asked.spans[:, 0].T[..., None]  # of a step's only row
        mask = (place < asked.limits) & ((place < first) | (place >= last))  # (g, n), the certain keys
        for head, counts in enumerate(chosen.counts[:, 0]):
            for chunk, count in enumerate(counts):
                mask[head, chosen.ids[head, 0, CHUNK * chunk : CHUNK * chunk + count]] = True
        see(torch.from_numpy(mask))
        return chosen

    return choose


def _begin(method: Callable[..., Any], see: Seen) -> Callable[..., Any]:
    def begin(policy: Any, *arguments: Any, **settings: Any) -> Steps:
        return _Steps(method(policy, *arguments, **settings), see)

    return begin


class _Steps(Steps):
    def __init__(self, steps: Steps, see: Seen) -> None:
        self._steps, self._see = steps, see

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self._steps.append(k, v)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        lists = self._steps.choose(q, k, v)
        self._see(lists.mask(k.shape[1]))
        return lists


METHODS: Mapping[str, Callable[..., Callable[..., Any]]] = {"select": _select, "choose": _choose, "begin": _begin}
