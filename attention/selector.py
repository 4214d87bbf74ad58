"""What a selector of a published system is: a policy of `attention.prefill` that makes lists of keys.

A new one is one file in `attention/selectors/`, a frozen dataclass with the method ``lists``; nothing else is edited.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import numpy as np
import torch

from attention.key_lists import KeyLists, plain
from attention.shared_prompt import Answer, SharedPrompt


class ListMaker(ABC):
    """Chooses the older keys of every 128 rows of a prompt; the near ones are attended to exactly (`KeyLists`).

    Like `attention.Listed` it serves causal softmax prefill alone and claims nothing of its error; `attention.audit`
    bounds it.  The same ``lists`` runs where the tensors are, on the CPU or a GPU, and never waits for it.
    """

    shared: ClassVar[bool] = True

    @abstractmethod
    def lists(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> KeyLists:
        """q (H, m, d), k (G, n, d), m <= n, bottom-right causal, H a multiple of G -> lists of H T lines, there."""

    def tighter(self, n: int) -> Self | None:
        """The next stronger setting for n keys, which `attention.audit` goes on to; None where there is none."""
        return None

    def answer(self, prompt: SharedPrompt) -> Answer:
        """Attention to the lists."""
        return prompt.attended(plain(self.lists(_tensor(prompt.q), _tensor(prompt.k), prompt.scale)))

    def visited(self, edges: np.ndarray) -> np.ndarray:
        """No code is looked at."""
        return np.zeros_like(edges)


class Selector(ListMaker):
    """The selector of a system, with settings to try it by.

    Attributes:
        causal: whether no token after a block of 128 rows has a say in what the block is shown, bit for bit at the same
            length of the prompt.  Rows of one block share their lists, so later rows of the block itself may.
    """

    causal: ClassVar[bool]

    @classmethod
    @abstractmethod
    def examples(cls) -> tuple[Self, ...]:
        """Settings that mean something for a few thousand tokens or less: what tests and benchmarks run."""


def nearer_one(share: float) -> float | None:
    """A share of attention to keep, halfway to all of it; None where less than a thousandth is left out."""
    return (1 + share) / 2 if share < 0.999 else None


def _tensor(array: np.ndarray) -> torch.Tensor:
    """The same memory; torch has no tensors that cannot be written, so that an array which cannot be is copied."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
