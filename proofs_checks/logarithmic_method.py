"""Logarithmic method: an appended key is built into a structure at most ``1 + log2(n / buffer)`` times.

Source. This library (`hsr.growth`); the method is Bentley and Saxe's. As we understand it, arXiv 2410.10165 states
amortised updates of O_d(log^2 n) for Corollary 3.1, part 1; with a build of O(n log n) this is such an update.

Hypotheses. Keys that come in runs of any lengths; a buffer of at least 1 key.

Conclusion. (i) Segments are disjoint, in order, and cover all keys but fewer than ``buffer`` at the end. (ii) A key
is built at most ``1 + log2(n / buffer)`` times, n the number of keys at the end. (iii) Segments get shorter from
first to last, so that s of them need ``s buffer + s (s - 1) / 2 <= n``. (iv) If all runs have one length, as in
decoding, there are at most ``1 + log2(n / buffer)`` segments.

Proof. A segment is first built with at least ``buffer`` keys, and swallowed only by one that has gathered at least as
many keys beyond it: each time its key is rebuilt, the segment at least doubles. A segment that stays is longer than
the one after it. With runs of one length every flush has the same f >= buffer keys, sizes are f times distinct powers
of two.

Check. Drawn runs and buffers, with a build that counts; then one key at a time up to 4096 keys. The constants are the
largest number of builds of any key and of segments, over ``1 + log2(n / buffer)``, and keys built per key appended.

What this does not show. That queries ask O(log n) structures whatever comes: runs of falling length, each at least as
long as the buffer, leave about sqrt(n) segments, and the constant for drawn runs is above 1. Wall-clock time: one
append may rebuild everything, only the sum is bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log2

import numpy as np
from hypothesis import strategies as st

from hsr.brute_numba import Brute
from hsr.growth import Segment, grown
from hsr.structure import Structure
from proofs_checks.check import OURS, Check, Extremes, for_all

Segments = tuple[Segment, ...]
Grow = Callable[[Segments, np.ndarray, int, Callable[[np.ndarray], Structure]], Segments]


def conclude(grow: Grow, examples: int) -> dict[str, float]:
    """Drawn runs, then single keys."""
    met = Extremes()
    buffers, lengths = st.integers(1, 32), st.integers(1, 40)
    drawn = st.lists(lengths, min_size=1, max_size=40)
    equal = st.builds(lambda length, count: [length] * count, lengths, st.integers(1, 60))
    for_all(st.tuples(drawn, buffers), lambda case: _conclusion(grow, case[0], case[1], met), examples)
    for_all(st.tuples(equal, buffers), lambda case: _conclusion(grow, case[0], case[1], met), examples)
    _conclusion(grow, [1] * 4096, 16, met)
    return met


def _conclusion(grow: Grow, runs: list[int], buffer: int, met: Extremes) -> None:
    numbers = np.arange(sum(runs), dtype=np.float64)[:, None]  # key i holds i
    builds = np.zeros(len(numbers), np.int64)

    def build(keys: np.ndarray) -> Structure:
        builds[keys[:, 0].astype(np.int64)] += 1
        return Brute(1.0)

    segments: Segments = ()
    n, equal = 0, len(set(runs)) == 1
    for run in runs:
        n += run
        segments = grow(segments, numbers[:n], buffer, build)
        _covered(segments, n, buffer)
        count, limit = len(segments), 1 + log2(max(n / buffer, 1))
        assert count * buffer + count * (count - 1) // 2 <= n, f"{count} segments over {n} keys, buffer {buffer}"
        assert count <= limit or not equal, f"{count} segments over {n} keys, runs of {run}, buffer {buffer}"
        met.largest(f"segments / (1 + log2(n / buffer)), {'equal' if equal else 'drawn'} runs", count / limit)
    assert builds.max() <= limit, f"a key was built {builds.max()} times, n = {n}, buffer {buffer}"
    met.largest("builds of a key / (1 + log2(n / buffer))", builds.max() / limit)
    met.largest("keys built / keys appended", builds.sum() / n)


def _covered(segments: Segments, n: int, buffer: int) -> None:
    edges = [0, *(segment.stop for segment in segments)]
    assert [segment.start for segment in segments] == edges[:-1], "segments leave gaps or overlap"
    assert all(segment.start < segment.stop for segment in segments)
    assert 0 <= n - edges[-1] < buffer, f"{n - edges[-1]} keys are in no segment, the buffer holds {buffer}"


def _rebuild_all(
    segments: Segments, keys: np.ndarray, buffer: int, build: Callable[[np.ndarray], Structure]
) -> Segments:
    covered = segments[-1].stop if segments else 0
    return segments if len(keys) - covered < buffer else (Segment(0, len(keys), build(keys)),)


def _never_merge(
    segments: Segments, keys: np.ndarray, buffer: int, build: Callable[[np.ndarray], Structure]
) -> Segments:
    covered = segments[-1].stop if segments else 0
    if len(keys) - covered < buffer:
        return segments
    return (*segments, Segment(covered, len(keys), build(keys[covered:])))


def _gap(segments: Segments, keys: np.ndarray, buffer: int, build: Callable[[np.ndarray], Structure]) -> Segments:
    found = grown(segments, keys, buffer, build)
    return (*found[:-1], Segment(found[-1].start + 1, found[-1].stop, found[-1].structure)) if found else found


CHECK = Check(
    statement="Logarithmic method: builds per appended key",
    source=OURS,
    evidence="whole numbers",
    conclude=conclude,
    operations={"hsr.growth.grown": grown},
    faults={
        "everything is rebuilt at each flush": _rebuild_all,
        "segments never merge": _never_merge,
        "a segment starts one key late": _gap,
    },
)
