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


def with_room(array: np.ndarray, used: int, wanted: int) -> np.ndarray:
    """The array (g, capacity, ...), of which the first ``used`` rows count, or a copy twice as long or longer."""
    if wanted <= array.shape[1]:
        return array
    grown = np.empty((len(array), max(wanted, 2 * array.shape[1]), *array.shape[2:]), array.dtype)
    grown[:, :used] = array[:, :used]
    return grown


def covered(segments: tuple[Segment, ...]) -> int:
    """How many keys the segments hold; those after them are in the buffer."""
    return segments[-1].stop if segments else 0


def merge_start(segments: tuple[Segment, ...], n: int, buffer: int) -> int | None:
    """Where the segment begins that is to be built once there are n keys; None while the buffer has room."""
    start = covered(segments)
    if n - start < buffer:
        return None
    for segment in reversed(segments):
        if _rank(segment.stop - segment.start, buffer) > _rank(n - start, buffer):
            break
        start = segment.start
    return start


def grown(
    segments: tuple[Segment, ...], keys: np.ndarray, buffer: int, build: Callable[[np.ndarray], Structure]
) -> tuple[Segment, ...]:
    """The segments to use once ``keys`` (n, d) holds n keys: unchanged while fewer than ``buffer`` are uncovered."""
    start = merge_start(segments, len(keys), buffer)
    if start is None:
        return segments
    kept = (segment for segment in segments if segment.stop <= start)
    return (*kept, Segment(start, len(keys), build(keys[start:])))


def _rank(size: int, buffer: int) -> int:
    return (size // buffer).bit_length()
