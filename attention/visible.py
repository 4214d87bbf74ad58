"""What a call asks of an index."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hsr import HSRIndex
from hsr.roster import Held


@dataclass(frozen=True)
class Visible:
    """Queries that face an index: each sees the living keys with ids below its limit."""

    index: HSRIndex
    q: Any  # (h, m, d), in the index's dtype
    queries: np.ndarray  # (h, m, d) float64, the same
    limits: np.ndarray  # (h, m) int64
    scale: float

    @cached_property
    def held(self) -> Held:
        """The keys to sample, and how many living ones each query sees."""
        return self.index.held(self.limits)

    @cached_property
    def score_error(self) -> np.ndarray:
        """Bound (h, m) on the float64 rounding of any scaled score."""
        with np.errstate(over="ignore"):
            magnitude = np.abs(self.queries).sum(axis=-1) * self.index.largest * self.scale
        return (self.index.d + 4) * 2.0**-52 * magnitude
