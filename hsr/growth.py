"""Appending without rebuilding everything: the logarithmic method of Bentley and Saxe.

Half-space reporting is decomposable: the answer over A and B together is the union of the answers.  New keys collect in
a buffer that is scored exactly; a full buffer becomes a segment, swallowing every trailing segment that is not larger
than what has gathered so far.  A key is therefore rebuilt O(log n) times, and a query sees every key at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hsr.structure import Structure


@dataclass(frozen=True)
class Segment:
    """A static structure over the keys ``start .. stop - 1``."""

    start: int
    stop: int
    structure: Structure


def grown(
    segments: tuple[Segment, ...], keys: np.ndarray, buffer: int, build: Callable[[np.ndarray], Structure]
) -> tuple[Segment, ...]:
    """The segments to use once ``keys`` (n, d) holds n keys: unchanged while fewer than ``buffer`` are uncovered."""
    covered = segments[-1].stop if segments else 0
    if len(keys) - covered < buffer:
        return segments
    kept = list(segments)
    start = covered
    while kept and kept[-1].stop - kept[-1].start <= len(keys) - start:
        start = kept.pop().start
    return (*kept, Segment(start, len(keys), build(keys[start:])))
