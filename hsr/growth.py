"""Appending without rebuilding everything: the logarithmic method of Bentley and Saxe.

Half-space reporting is decomposable: the answer over A and B together is the union of the answers.  New keys collect in
a buffer that is scored exactly; a full buffer becomes a segment, swallowing every trailing segment whose rank, the
power of two below its size in buffers, is not above its own.  Ranks therefore fall strictly along the segments, so
there are O(log n) of them, and a key rises in rank whenever it is rebuilt, O(log n) times.  A query sees every key.
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
    while kept and _rank(kept[-1].stop - kept[-1].start, buffer) <= _rank(len(keys) - start, buffer):
        start = kept.pop().start
    return (*kept, Segment(start, len(keys), build(keys[start:])))


def _rank(size: int, buffer: int) -> int:
    return (size // buffer).bit_length()
