"""How a score becomes a weight: the two attention functions of arXiv 2410.10165.

Scores are scaled, ``s_j = scale <q, k_j>``; outputs are ``sum_j w_j v_j / sum_j w_j``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsr import checks
from hsr.errors import ArgumentError


@dataclass(frozen=True)
class Softmax:
    """``w_j = exp(s_j)`` (Definition 1.1)."""


@dataclass(frozen=True)
class ReLUPower:
    """``w_j = max(s_j - b, 0) ** alpha`` (Definition 1.2): zero outside a half-space, so reporting loses nothing.

    Args:
        alpha: whole number, at least 1.
        b: finite; on the scale of the scores, so the half-space of raw products lies at ``b / scale``.

    Raises:
        ArgumentError: alpha is not a whole number of at least 1, or b is not finite.
    """

    alpha: int = 1
    b: float = 0.0

    def __post_init__(self) -> None:
        checks.whole("alpha", self.alpha, 1)
        checks.real("b", self.b, -math.inf, math.inf)
        if math.isinf(self.b):
            raise ArgumentError(f"b must be finite; got {self.b}")

    def half_space(self, scale: float) -> float:
        """Threshold on raw products that holds every key of positive weight, lowered by the rounding of a division."""
        offset = self.b / scale
        return offset - 4 * 2.0**-53 * abs(offset)
