"""The method ``tree``: boxes over boxes over small runs of keys.  Right for small d, where a box bounds a score well.

Layout.  Keys are divided by a power of two (the unit domain of `hsr.scaling`) and copied, as float32, in the order in
which a kd-tree meets them.  A *leaf* is LEAF consecutive keys of that order, stored one coordinate after the other, so
that a query scores a leaf with vector instructions; the last leaf is padded.  FAN consecutive leaves form a *group*,
FAN consecutive groups form a group of the next level, and so on up to a single group.  A node is thus a level and a
number: node j of level l covers the leaves ``j * FAN**l .. (j + 1) * FAN**l - 1``, its children are the nodes
``j * FAN .. j * FAN + FAN - 1`` of level l - 1, and no pointer is stored.  A group holds the bounds of its FAN nodes
side by side, again one coordinate after the other, so that one loop bounds all of them.

Bounds.  For a node with corners lo, hi, every score lies between ``sum_j min(q_j lo_j, q_j hi_j)`` and
``sum_j max(q_j lo_j, q_j hi_j)`` (the page score of Quest): a node whose upper bound misses the threshold is skipped,
one whose lower bound reaches it is reported whole, its keys untested.  This is the pruning of Corollary 3.1 part 1 of
arXiv 2410.10165 in practice.  A second bound uses norms: let c be a centre, h > 0 the distance from c to the half-space
and p the half-space's point nearest to c.  A key k of the half-space has ``|k - p|^2 <= |k - c|^2 - h^2``, so a node
whose largest ``|k - c|^2`` is less than h^2 plus the squared distance from p to its box is skipped.  Splits treat
``NORM * |k - c|`` as one more coordinate, because the keys of a half-space far from c are few only where norms differ
little within a node.

Rounding.  Corners are pushed outward, and the largest ``|k - c|^2`` upward, by more than the rounding of keys, queries
and float32 sums can contribute (`_slack`); so is the float32 score that a key of a leaf must reach.  Keys that reach it
are decided by the exact test of `hsr.exact`.  It reads the float32 copy where that copy is lossless (float32 keys, as a
rule) and the caller's keys otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import get_num_threads, njit, prange

from hsr.exact import UNDERFLOW, reaches, score, widest_band
from hsr.report import Hits
from hsr.rows import packed, scratch
from hsr.scaling import exponent, unit

LEAF = 64  # keys per leaf
FAN = 16  # nodes per group: one AVX-512 register of float32
NORM = 2.0  # weight of the norm among the split coordinates; measured on Gaussian and clustered keys
SAMPLE = 1024  # keys whose median is the centre
CHUNKS = 16  # parts of one query, where queries are fewer than threads
CHUNK = 128  # leaves at least in each; fewer are not worth a thread
TINY = 2.0**-122  # more than roundings to zero contribute per coordinate, even where subnormals are flushed
SCALED = 1000  # a power of two up to here can multiply a lossless copy back

SKIP, OPEN, WHOLE = 0, 1, 2


@njit(cache=True)
def _slack(d):
    """Relative rounding of a float32 inner product of width d, keys and query rounded first; over twice the need."""
    return (d + 8) * 2.0**-23


@njit(cache=True)
def _select(values, rows, start, stop, middle):
    """Order values[start:stop], and rows alike, so that nothing before ``middle`` exceeds anything from it on."""
    first, last = start, stop - 1
    while first < last:
        a, b, c = values[first], values[(first + last) >> 1], values[last]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = first, last
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                rows[i], rows[j] = rows[j], rows[i]
                i += 1
                j -= 1
        if middle <= j:
            last = j
        elif middle >= i:
            first = i
        else:
            return


@njit(cache=True)
def _widest(features, rows, start, stop):
    """The feature that spreads most over rows[start:stop]."""
    d = features.shape[1]
    low, high = np.full(d, np.inf, np.float32), np.full(d, -np.inf, np.float32)
    for j in range(start, stop):
        row = rows[j]
        for i in range(d):
            low[i] = min(low[i], features[row, i])
            high[i] = max(high[i], features[row, i])
    return np.argmax(high - low)


@njit(parallel=True, cache=True)
def _order(features, rows):
    """Put rows (n,) int32 into the kd-tree order of features (n, f) float32, every split at a multiple of LEAF."""
    n = len(features)
    values = np.empty(n, np.float32)
    span = LEAF
    while span < n:
        span *= 2
    while span > LEAF:
        half = span // 2
        for block in prange((n + span - 1) // span):
            start = block * span
            stop, middle = min(start + span, n), start + half
            if middle < stop:
                axis = _widest(features, rows, start, stop)
                for j in range(start, stop):
                    values[j] = features[rows[j], axis]
                _select(values, rows, start, stop, middle)
        span = half


@njit(parallel=True, cache=True)
def _fill(copies, rows, centre, leaves, bounds, reach):
    """Leaves (count, d, LEAF) of copies (n, d), bounds (count, 2d + 1) as in `_grouped`, reach (count,)."""
    n, d = copies.shape
    for leaf in prange(len(leaves)):
        size = min(LEAF, n - leaf * LEAF)
        squares, far = np.zeros(LEAF), np.zeros(LEAF)
        for i in range(d):
            low, high = np.float32(np.inf), np.float32(-np.inf)
            for c in range(size):
                value = copies[rows[leaf * LEAF + c], i]
                leaves[leaf, i, c] = value
                low, high = min(low, value), max(high, value)
                squares[c] += np.float64(value) ** 2
                far[c] += (np.float64(value) - centre[i]) ** 2
            bounds[leaf, i], bounds[leaf, d + i] = low, high
        bounds[leaf, 2 * d] = far[:size].max()
        reach[leaf] = math.sqrt(squares[:size].max())


def _grouped(bounds: np.ndarray) -> np.ndarray:
    """Bounds (nodes, 2d + 1): lo, hi, largest |k - c|^2 -> (groups, 2d + 1, FAN), the last node repeated to fill."""
    padded = np.pad(bounds, ((0, -len(bounds) % FAN), (0, 0)), mode="edge")
    return padded.reshape(-1, FAN, bounds.shape[1]).transpose(0, 2, 1)


@njit(fastmath={"contract"}, cache=True)
def _judge(groups, group, query, point, cuts, bounds, verdict):
    """Judge the FAN nodes of a group: query, point (d,) float32 -> verdict (FAN,) int8; bounds (3, FAN) is scratch."""
    d, (low, sure, cap) = len(query), cuts
    bounds[:] = 0.0  # upper, lower, squared distance from the point
    for i in range(d):
        q, p = query[i], point[i]
        for c in range(FAN):
            lo, hi = groups[group, i, c], groups[group, d + i, c]
            a, b = q * lo, q * hi
            bounds[0, c] += max(a, b)
            bounds[1, c] += min(a, b)
            beyond = max(max(lo - p, p - hi), np.float32(0.0))
            bounds[2, c] += beyond * beyond
    for c in range(FAN):
        near = (bounds[0, c] >= low) & (bounds[2, c] + cap <= groups[group, 2 * d, c])
        verdict[c] = np.int8(near) + np.int8(near & (bounds[1, c] >= sure))


@njit(fastmath={"contract"}, cache=True)
def _filter(leaves, leaf, query, low, totals):
    """The float32 scores of a leaf's keys: query (d,) float32 -> totals (LEAF,) float32, how many reach ``low``."""
    d = len(query)
    for c in range(LEAF):
        totals[c] = 0.0
    i = 0
    while i + 4 <= d:  # four coordinates per pass over totals
        q0, q1, q2, q3 = query[i], query[i + 1], query[i + 2], query[i + 3]
        for c in range(LEAF):
            totals[c] += (q0 * leaves[leaf, i, c] + q1 * leaves[leaf, i + 1, c]) + (
                q2 * leaves[leaf, i + 2, c] + q3 * leaves[leaf, i + 3, c]
            )
        i += 4
    while i < d:
        q0 = query[i]
        for c in range(LEAF):
            totals[c] += q0 * leaves[leaf, i, c]
        i += 1
    near = 0
    for c in range(LEAF):
        near += totals[c] >= low
    return near


@njit(cache=True)
def _aim(unit_query, threshold, centre, query, point):
    """Fill query, point (d,) float32 from the unit query (d,) float64 -> norm, threshold kept finite, cap.

    Nodes are judged with the half-space's distance h from the centre as ``cap``, a little under h^2.
    """
    d = len(unit_query)
    threshold = min(max(threshold, -2.0 * d - 2.0), 2.0 * d + 2.0)  # no unit score exceeds d in magnitude
    square, distance = 0.0, threshold
    for i in range(d):
        square += unit_query[i] ** 2
        distance -= unit_query[i] * centre[i]
    norm, slack = math.sqrt(square), _slack(d)
    distance -= slack * norm * math.sqrt(d)  # of the unit half-space, times norm
    step = max(distance, 0.0) / square if square > 0.0 else 0.0
    size = 0.0
    for i in range(d):
        aim = centre[i] + step * unit_query[i]
        query[i], point[i] = unit_query[i], aim
        size += aim * aim
    cap = (step * norm) ** 2 - 2.0 * slack * (2.0 * math.sqrt(d) + math.sqrt(size)) ** 2
    return norm, threshold, cap


@njit(cache=True)
def _descend(groups, starts, count, query, point, cuts, found):
    """List the leaves to scan, and (as ~leaf) those to report whole: found (count,) int32 -> how many, nodes judged."""
    bounds, verdict = np.empty((3, FAN), np.float32), np.empty(FAN, np.int8)
    levels = len(starts) - 1
    stack = np.empty((levels * FAN, 2), np.int32)  # level, group within the level
    stack[0, 0], stack[0, 1] = levels - 1, 0
    top, listed, visited = 1, 0, 0
    while top > 0:
        top -= 1
        level, group = stack[top, 0], stack[top, 1]
        span = FAN**level  # leaves per node
        nodes = min(FAN, (count + span - 1) // span - group * FAN)
        _judge(groups, starts[level] + group, query, point, cuts, bounds, verdict)
        visited += nodes
        for c in range(nodes):
            node = group * FAN + c
            if level == 0:
                found[listed] = ~node if verdict[c] == WHOLE else node
                listed += verdict[c] != SKIP
            elif verdict[c] == OPEN:
                stack[top, 0], stack[top, 1] = level - 1, node
                top += 1
            elif verdict[c] == WHOLE:
                for leaf in range(node * span, min((node + 1) * span, count)):
                    found[listed] = ~leaf
                    listed += 1
    return listed, visited


@njit(fastmath={"contract"}, cache=True)
def _sum(leaves, leaf, exact, sums):
    """The float64 scores of a lossless leaf's keys: exact (d,) float64 -> sums (LEAF,) float64."""
    for c in range(LEAF):
        sums[c] = 0.0
    for i in range(len(exact)):
        q = exact[i]
        for c in range(LEAF):
            sums[c] += q * np.float64(leaves[leaf, i, c])


@njit(cache=True)
def _in_band(leaves, leaf, c, keys, row, exact, total, threshold, widest):
    """The exact test of a key whose score misses the threshold."""
    if not total + widest >= threshold:
        return False
    if len(keys):
        return reaches(exact, keys, row, total, threshold, widest)
    copy = leaves[leaf, :, c].astype(np.float64).reshape(1, -1)
    return reaches(exact, copy, 0, total, threshold, widest)


@njit(cache=True)
def _settle(leaves, leaf, rows, keys, exact, totals, sums, low, asked, indices, scores, found):
    """Append a leaf's members to indices, scores (w,); asked is (threshold, widest band, limit) -> new number found."""
    threshold, widest, limit = asked
    first, collect = leaf * LEAF, len(indices) > 0
    size = min(LEAF, len(rows) - first)
    if len(keys):
        for c in range(size):
            if totals[c] >= low:
                sums[c] = score(exact, keys, rows[first + c])
    else:
        _sum(leaves, leaf, exact, sums)
    for c in range(size):
        row, total, near = rows[first + c], sums[c], totals[c] >= low
        member = near & (total >= threshold)
        if near & (total < threshold):
            member = _in_band(leaves, leaf, c, keys, row, exact, total, threshold, widest)
        if collect:
            indices[found], scores[found] = row, total  # the next key overwrites all but a member
        found += member & (row < limit)
    return found


@njit(cache=True)
def _take(leaves, leaf, rows, keys, exact, limit, sums, indices, scores, found):
    """Append all of a leaf's keys to indices, scores (w,), untested -> the new number found."""
    first, collect = leaf * LEAF, len(indices) > 0
    size = min(LEAF, len(rows) - first)
    if limit == len(rows) and not collect:
        return found + size
    if collect and not len(keys):
        _sum(leaves, leaf, exact, sums)
    for c in range(size):
        row = rows[first + c]
        if collect:
            indices[found], scores[found] = row, score(exact, keys, row) if len(keys) else sums[c]
        found += row < limit
    return found


@njit(parallel=True, cache=True)
def _report(tree, keys, queries, thresholds, unit_queries, unit_thresholds, widest, limits, threads, collect):
    """Search for all queries; keys (n, d) float64, or (0, d) where leaves are lossless and queries scaled to match.

    Returns counts (m, chunks), scratch rows (m * chunks, width) of indices and scores, scanned (m,), visited (m,).
    """
    rows, leaves, reach, groups, starts, centre = tree
    m, d = queries.shape
    n, count = len(rows), len(leaves)
    listed, lists = np.empty(m, np.int64), np.empty((m, count), np.int32)
    aims, points = np.empty((m, d), np.float32), np.empty((m, d), np.float32)
    lows, norms, visited = np.empty(m), np.empty(m), np.empty(m, np.int64)
    for i in prange(m):
        norms[i], threshold, cap = _aim(unit_queries[i], unit_thresholds[i], centre, aims[i], points[i])
        margin = 2.0**-22 * abs(threshold) + (d + 1) * TINY
        lows[i] = threshold - margin
        cuts = np.float32(lows[i]), np.float32(threshold + margin), np.float32(cap)
        listed[i], visited[i] = _descend(groups, starts, count, aims[i], points[i], cuts, lists[i])
    longest = max(listed) if m > 0 else 0
    chunks, least = (CHUNKS, CHUNK) if m < threads and longest > 2 * CHUNK else (1, 0)
    counts, scanned = np.empty((m, chunks), np.int64), np.empty((m, chunks), np.int64)
    width = min(n, max(least, (longest + chunks - 1) // chunks) * LEAF) if collect else 0
    wide_indices, wide_scores = scratch(m * chunks, width)
    for task in prange(m * chunks):
        i, chunk = task // chunks, task % chunks
        part = max(least, (listed[i] + chunks - 1) // chunks)
        totals, sums = np.empty(LEAF, np.float32), np.empty(LEAF)
        query, exact, list_, indices, scores = aims[i], queries[i], lists[i], wide_indices[task], wide_scores[task]
        asked = thresholds[i], widest[i], limits[i]
        found = tested = 0
        for place in range(chunk * part, min((chunk + 1) * part, listed[i])):
            leaf = list_[place]
            if leaf < 0:
                found = _take(leaves, ~leaf, rows, keys, exact, limits[i], sums, indices, scores, found)
            else:
                low = np.float32(lows[i] - _slack(d) * norms[i] * reach[leaf])
                if _filter(leaves, leaf, query, low, totals) > 0:
                    found = _settle(leaves, leaf, rows, keys, exact, totals, sums, low, asked, indices, scores, found)
                tested += min(LEAF, n - leaf * LEAF)
        counts[i, chunk], scanned[i, chunk] = found, tested
    return counts, wide_indices, wide_scores, scanned.sum(axis=1), visited


@dataclass(frozen=True)
class Tree:
    """Keys in kd-tree order with the bounds of every node; see the module's text."""

    exponent: int  # unit keys are keys times 2**-exponent
    largest: float  # largest magnitude of any key entry
    lossless: bool  # whether the copies in ``leaves`` times 2**exponent are the keys
    rows: np.ndarray  # (n,) int32, the key at each place of the tree's order
    leaves: np.ndarray  # (count, d, LEAF) float32, unit keys
    reach: np.ndarray  # (count,) float32, largest norm of a leaf's unit keys
    groups: np.ndarray  # (groups, 2 d + 1, FAN) float32: lo, hi, largest |k - c|^2
    starts: np.ndarray  # (levels + 1,) int64, first group of each level, leaves' groups first
    centre: np.ndarray  # (d,) float64, c in the unit domain

    def report(
        self, keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray, limits: np.ndarray, collect: bool
    ) -> Hits:
        """See `hsr.structure.Structure`."""
        counts, wide_indices, wide_scores, scanned, visited = _report(
            (self.rows, self.leaves, self.reach, self.groups, self.starts, self.centre),
            np.empty((0, keys.shape[1])) if self.lossless else keys.astype(np.float64, copy=False),
            queries * 2.0**self.exponent if self.lossless else queries,
            thresholds,
            *unit(queries, thresholds - (keys.shape[1] + 1) * UNDERFLOW, self.exponent),  # float64 may score 0 below 0
            widest_band(queries, self.largest),
            limits,
            get_num_threads(),
            collect,
        )
        starts = np.arange(counts.size) * wide_indices.shape[1]
        return Hits(*packed(counts, starts, wide_indices.ravel(), wide_scores.ravel()), scanned, visited)


def build(keys: np.ndarray) -> Tree:
    """See `hsr.structure.Build`."""
    n, d = keys.shape
    power = int(exponent(keys))
    copies = np.ldexp(keys, -power).astype(np.float32)
    lossless = abs(power) < SCALED and bool((np.ldexp(copies.astype(np.float64), power) == keys).all())
    centre = np.median(copies[:: max(1, n // SAMPLE)], axis=0).astype(np.float64)
    distance = np.linalg.norm(copies - centre.astype(np.float32), axis=1)
    rows = np.arange(n, dtype=np.int32)
    _order(np.column_stack([copies, np.float32(NORM) * distance]), rows)
    count = -(-n // LEAF)
    leaves, reach = np.zeros((count, d, LEAF), np.float32), np.empty(count, np.float32)
    bounds = np.empty((count, 2 * d + 1), np.float32)
    _fill(copies, rows, centre, leaves, bounds, reach)
    levels = [_grouped(bounds)]
    while len(levels[-1]) > 1:
        below = levels[-1]
        levels.append(_grouped(np.hstack([below[:, :d].min(axis=2), below[:, d:].max(axis=2)])))
    groups = np.ascontiguousarray(np.concatenate(levels))
    outward = np.float32(_slack(d)) * np.abs(groups)
    groups[:, :d] -= outward[:, :d]
    groups[:, d:] += outward[:, d:]
    starts = np.cumsum([0] + [len(level) for level in levels])
    return Tree(power, float(np.abs(keys).max()), lossless, rows, leaves, reach, groups, starts, centre)
