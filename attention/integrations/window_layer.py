"""The cache of a layer with a sliding window."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from attention.integrations.dense_rows import dense
from attention.integrations.masks import Seen
from attention.integrations.passes import no_gradient, noted_rows, once


class WindowLayer(DynamicSlidingWindowLayer):
    """A layer with sliding-window attention: transformers' cache of it, served densely."""

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As its base; the keys are noted with the layer."""
        no_gradient(key_states, value_states)
        k, v = super().update(key_states, value_states)
        self._rows = noted_rows(k.view_as(k), v.view_as(v), self)
        self._unattended = key_states.shape[2]
        return self._rows

    def reset(self) -> None:
        """Forget everything; transformers 5.17 kept zeros in its place."""
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length = False, 0

    def attend(
        self, module: torch.nn.Module, q: torch.Tensor, mask: torch.Tensor | None, seen: Seen, **options: Any
    ) -> torch.Tensor:
        """As `HSRLayer.attend`."""
        once(q, self._unattended)
        self._unattended = 0
        k, v = self._rows
        del self._rows
        return dense(module, q, k, v, mask, seen, self.sliding_window, **options)
