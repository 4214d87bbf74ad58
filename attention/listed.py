"""Attention to lists of keys that someone else made for blocks of a prompt's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from attention.key_lists import KeyLists, check, plain
from attention.shared_prompt import Answer, SharedPrompt
from hsr.errors import ArgumentError


@dataclass(frozen=True)
class Listed:
    """The keys of given lists, and the near ones: `prefill` checks the lists and attends to them.

    Like `BlockSampled` it serves causal softmax prefill alone, and claims nothing of what is not listed.

    Args:
        lists: numpy arrays or torch tensors, see `KeyLists`; of B h T lines, the batch folded into the heads.

    Raises:
        ArgumentError: not `KeyLists`; by `prefill`, lists that do not fit the prompt or name a key twice.
    """

    shared: ClassVar[bool] = True

    lists: KeyLists

    def __post_init__(self) -> None:
        if not isinstance(self.lists, KeyLists):
            raise ArgumentError(f"lists must be KeyLists; got {type(self.lists).__name__}")

    def answer(self, prompt: SharedPrompt) -> Answer:
        """Attention to the lists, if they are sound."""
        check(self.lists, *prompt.shape)
        return prompt.attended(plain(self.lists))

    def visited(self, edges: np.ndarray) -> np.ndarray:
        """No code is looked at."""
        return np.zeros_like(edges)
