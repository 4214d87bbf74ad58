"""What a decode selector is: a policy of `attention.DecodeSession` that makes a list of keys for every step.

A new one is one file in `attention/selectors/`: a frozen dataclass of settings with ``begin`` and ``examples``, and the
state that ``begin`` makes.  Nothing else is edited.  The batch is folded into the heads: H = B h query heads,
G = B g key-value heads of n tokens each; query head x reads key-value head ``x G // H``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Self

import torch

from attention.token_lists import TokenLists


class Attended(NamedTuple):
    """A step that has been attended to."""

    q: torch.Tensor  # (H, d)
    k: torch.Tensor  # (G, n, d)
    v: torch.Tensor  # (G, n, dv)
    output: torch.Tensor  # (H, dv)
    lse: torch.Tensor  # (H,)


class Bounds(NamedTuple):
    """What is known of a step's error, each (H,) float64 and at the confidence stated; see `attention.Certificate`."""

    dropped_mass: torch.Tensor
    output_error: torch.Tensor  # what rounds the output to its dtype left aside
    lse_error: torch.Tensor
    confidence: float


class Steps(ABC):
    """What a selector knows of a cache that grows.

    It runs where the tensors are and never waits for them in ``append`` and ``choose``; work that a host's counter
    starts, such as clustering anew, may.
    """

    @abstractmethod
    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Learn of new tokens: k (G, n, d), v (G, n, dv), all of the cache, of which the state knows the first ones."""

    @abstractmethod
    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> TokenLists:
        """q (H, d), k (G, n, d), v (G, n, dv), all that was appended -> H lists, or G that groups share."""

    def bounds(self, seen: Attended) -> Bounds | None:
        """Of the step that was chosen last; None where nothing is known, as of all that choose without drawing."""
        return None


class DecodeSelector(ABC):
    """Chooses the keys of every decode step: a policy of `attention.DecodeSession` and `attention.decode`.

    It serves softmax with one query a head and step, and claims nothing of its error.
    """

    steps: ClassVar[bool] = True

    @abstractmethod
    def begin(
        self, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, scale: float, batch: int = 1
    ) -> Steps:
        """The state for a cache.

        Args:
            k: (G, n, d), n >= 1.
            v: (G, n, dv).
            queries: (H, m, d), the prompt's last ones, for those that calibrate; None where none are known.
            scale: of the scores.
            batch: sequences that are folded into the heads, for those whose heads vote together.
        """

    @abstractmethod
    def bytes_read(self, n: int, d: int, itemsize: int, group: int = 1) -> float:
        """Bytes read in a step to choose, for a group's heads, among a key-value head's n keys, without attention's."""

    @classmethod
    @abstractmethod
    def examples(cls) -> tuple[Self, ...]:
        """Settings that mean something for a few thousand tokens or less: what tests and benchmarks run."""
