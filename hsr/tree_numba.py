"""The method ``tree``: boxes over boxes over small runs of keys.  Right for small d, where a box bounds a score well.

Layout (`hsr.tree_layout`).  Keys are copied in the order in which a kd-tree meets them.  A *leaf* is LEAF consecutive
keys of that order, the last one shorter.  FAN consecutive leaves form a *group*, FAN consecutive groups form a group of
the next level, and so on up to a single group.  A node is thus a level and a number: node j of level l covers the
leaves ``j * FAN**l .. (j + 1) * FAN**l - 1``, its children are the nodes ``j * FAN .. j * FAN + FAN - 1`` of level
l - 1, and no pointer is stored.  A group holds the bounds of its FAN nodes side by side, one coordinate after the
other, so that `hsr.box_bounds` judges all of them at once.  Bounds are float32, of keys divided by a power of two (the
unit domain of `hsr.scaling`).

Bounds.  For a node with middle u and half widths h, every score lies within ``sum_j |q_j| h_j`` of ``<q, u>`` (the page
score of Quest): a node whose upper bound misses the threshold is skipped, one whose lower bound reaches it is reported
whole, its keys untested.  This is the pruning of Corollary 3.1 part 1 of arXiv 2410.10165 in practice.  A second bound
uses norms: let c be a centre, h > 0 the distance from c to the half-space and p the half-space's point nearest to c.  A
key k of the half-space has ``|k - p|^2 <= |k - c|^2 - h^2``, so a node whose largest ``|k - c|^2`` is less than h^2
plus the squared distance from p to its box is skipped.  Splits treat ``NORM * |k - c|`` as one more coordinate, because
the keys of a half-space far from c are few only where norms differ little within a node.

Codes.  In a leaf of middle u and step s, a key is stored once more as ``u_j + s f_j code_j`` with codes of 8 bits, the
scale f_j of an axis being the same in every leaf; each coordinate is off by at most half a step, ``s f_j / 2``.  With
the query rounded once, ``z_j = f_j q_j = sigma a_j + t_j`` with a in int8,

    <q, k> <= <q, u> + s (sigma <a, code> + 128 sum_j |t_j| + sum_j |z_j| / 2)

so a key can reach the threshold only if the integer ``<a, code>`` reaches a bound that depends on the leaf alone
(``least``, found together with the leaf's other bounds): one comparison a key.  The few that pass are decided by the
exact test of `hsr.exact`, on the copies of the keys.

Cost.  Proven: a query judges every node at most once, 16/15 n / LEAF bounds, and reads each key at most twice, O(n + d)
whatever the keys; no bound below n holds for boxes, whose keys on a sphere a half-space can all touch.  Measured
(benchmarks/results/scaling.json; Gaussian keys, k = 64, n = 2**14 .. 2**20): nodes and keys grow as n^0.07 at d = 2,
n^0.10 at d = 3, n^0.20 at d = 4, n^0.41 at d = 8 and n at d = 64; other keys are in tree-data.json.  For d = 3 the
paper has O(log n + k) from shallow cuttings (Afshani and Chan 2009).  They are not built here: their constant is that
of O(log n) levels of point location in overlapping lists, with exact predicates of degree 3, to win against less than a
thousand judged nodes, 16 at a time.

Rounding.  Half widths and the largest ``|k - c|^2`` are pushed up by more than the rounding of keys, queries and
float32 sums can contribute (`relative_rounding`); so is ``least`` pushed down, by that share of the query's norm times
``reach``, the norm of the leaf's farthest corner, and by what computing it rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import get_num_threads, njit, prange
from numba.cpython.unsafe.numbers import trailing_zeros

from hsr.box_bounds import FAN, FAR, ROUNDING, judge
from hsr.exact import band, widest_of
from hsr.int8_scan import AXES, scan_one
from hsr.prefetch import prefetch_row
from hsr.report import Hits
from hsr.rows import gathered, scratch
from hsr.scaling import unit_into
from hsr.tree_layout import LEAF, LEVELS, OFFSET, layout, relative_rounding

CHUNKS = 16  # parts of one query, where queries are fewer than threads
CHUNK = 512  # leaves at least in each: reading fewer takes less time than waking a thread
BATCH = 512  # keys whose exact test waits for their rows to arrive
AHEAD = 6  # leaves whose codes are asked for before they are read
TINY = 2.0**-122  # more than roundings to zero contribute per coordinate, even where subnormals are flushed
HALF = 0.51  # steps between a coordinate and its code, and what finding the code rounds


@njit(cache=True)
def _aim(unit_query, threshold, centre, query, point):
    """Fill query, point (d,) float32 from the unit query (d,) float64 -> its norm, cap.

    Nodes are judged with the half-space's distance h from the centre as ``cap``, a little under h^2.
    """
    d = len(unit_query)
    square, distance = 0.0, threshold
    for i in range(d):
        square += unit_query[i] ** 2
        distance -= unit_query[i] * centre[i]
    norm, slack = math.sqrt(square), relative_rounding(d)
    distance -= slack * norm * math.sqrt(d)  # of the unit half-space, times norm
    step = max(distance, 0.0) / square if square > 0.0 else 0.0
    size = 0.0
    for i in range(d):
        aim = centre[i] + step * unit_query[i]
        query[i], point[i] = unit_query[i], aim
        size += aim * aim
    return norm, (step * norm) ** 2 - 2.0 * slack * (2.0 * math.sqrt(d) + math.sqrt(size)) ** 2


@njit(cache=True)
def _quantise(unit_query, scales, code):
    """Fill code (groups, 4) int8, the query as a -> 1 / sigma, base: a leaf's ``least`` is steps / sigma + base.

    The steps are those from the leaf's middle to the threshold.
    """
    d, largest = len(unit_query), 0.0
    for i in range(d):
        largest = max(largest, abs(unit_query[i] * scales[i]))
    levels = min(max(np.floor(FAR / (2 * OFFSET * d)), 1.0), np.float64(LEVELS))  # sums stay below FAR
    sigma = largest / levels if largest > 0.0 else 1.0
    total, loose = 0.0, 0.0
    for i in range(d):
        z = unit_query[i] * scales[i]
        a = np.rint(z / sigma)
        code[i // AXES, i % AXES] = np.int8(a)
        total += a
        loose += OFFSET * abs(z - sigma * a) + HALF * abs(z) + ROUNDING * OFFSET * abs(sigma * a)
    return 1.0 / sigma, OFFSET * total - loose / sigma * (1 + ROUNDING) - 2.0


@njit(cache=True)
def _descend(groups, starts, count, query, point, cuts, open_, least, whole):
    """List the leaves to scan in open_, each with its bound in least, and those to report whole; all (count,) int32.

    Returns how many are open, how many whole, and the nodes judged.
    """
    bounds = np.empty(FAN, np.int32)
    levels = len(starts) - 1
    stack = np.empty((levels * FAN, 2), np.int32)  # level, group within the level
    stack[0, 0], stack[0, 1] = levels - 1, 0
    top, opened, wholes, visited = 1, 0, 0, 0
    while top > 0:
        top -= 1
        level, group = stack[top, 0], stack[top, 1]
        span = FAN**level  # leaves per node
        nodes = min(FAN, (count + span - 1) // span - group * FAN)
        near, sure = judge(groups, starts[level] + group, query, point, cuts, bounds)
        visited += nodes
        for c in range(nodes):
            node, is_near, is_sure = group * FAN + c, (near >> c) & 1, (sure >> c) & 1
            if level == 0:  # without a branch on the verdict, which none predicts
                open_[opened], least[opened], whole[wholes] = node, bounds[c], node
                opened += is_near - is_sure
                wholes += is_sure
            elif is_sure:
                for leaf in range(node * span, min((node + 1) * span, count)):
                    whole[wholes] = leaf
                    wholes += 1
            elif is_near:
                stack[top, 0], stack[top, 1] = level - 1, node
                top += 1
    return opened, wholes, visited


@njit(cache=True)
def _plan(tree, query, threshold, key_exponent, code, open_, least, whole, sizes):
    """List what one query must read (see `_descend`): fill code (groups, 4) and sizes: open, whole leaves, visited."""
    codes, groups, starts, centre, scales = tree[2:]
    d = len(query)
    unit_query, aim, point = np.empty(d), np.empty(d, np.float32), np.empty(d, np.float32)
    lowered = unit_into(query, threshold, key_exponent, unit_query)
    norm, cap = _aim(unit_query, lowered, centre, aim, point)
    inverse, base = _quantise(unit_query, scales, code)
    margin = 2.0**-22 * abs(lowered) + (d + 1) * TINY
    cuts = (
        np.float32(lowered - margin),
        np.float32(lowered + margin),
        np.float32(cap),
        np.float32(relative_rounding(d) * norm),
        np.float32(inverse),
        np.float32(base),
    )
    sizes[0], sizes[1], sizes[2] = _descend(groups, starts, len(codes), aim, point, cuts, open_, least, whole)


@njit(fastmath={"contract"}, cache=True)
def _score(exact, keys, kept, size, totals):
    """Fill totals[:size] float64 with the scores of the kept places; indices are unsigned, which spares their tests."""
    for j in range(size):
        place, total = np.uint64(kept[j]), 0.0
        for i in range(len(exact)):
            total += exact[i] * np.float64(keys[place, np.uint64(i)])
        totals[j] = total


@njit(cache=True)
def _settle(rows, keys, exact, asked, kept, size, totals, indices, scores, found):
    """Append the members among kept[:size] to indices, scores (w,) -> the new number found."""
    threshold, widest, limit = asked
    collect = len(indices) > 0
    _score(exact, keys, kept, size, totals)
    for j in range(size):
        place, total = np.uint64(kept[j]), totals[j]
        row = rows[place]
        if collect:
            indices[found], scores[found] = row, total  # the next key overwrites all but a member
        inside = total >= threshold
        if (total < threshold) & (total + widest >= threshold):  # `reaches`: calling it would count references
            inside = total + band(exact, keys, place) >= threshold
        found += inside & (row < limit)
    return found


@njit(fastmath={"contract"}, cache=True)
def _take(rows, keys, exact, limit, leaf, indices, scores, found):
    """Append all of a leaf's keys to indices, scores (w,), untested -> the new number found."""
    first, n = leaf * LEAF, len(rows)
    size = min(LEAF, n - first)
    if len(indices) == 0:
        return found + (size if limit == n else (rows[first : first + size] < limit).sum())
    q = exact[0]
    for c in range(size):
        indices[found + c], scores[found + c] = rows[first + c], q * np.float64(keys[first + c, 0])
    for i in range(1, len(exact)):
        q = exact[i]
        for c in range(size):
            scores[found + c] += q * np.float64(keys[np.uint64(first + c), np.uint64(i)])
    if limit == n:
        return found + size
    for c in range(found, found + size):
        indices[found], scores[found] = indices[c], scores[c]
        found += indices[found] < limit
    return found


@njit(cache=True)
def _keep(rows, keys, leaf, mask, kept, size):
    """Append the places of a mask's keys to kept and ask for what their test reads -> the new size."""
    while mask != 0:
        place = leaf * LEAF + np.int64(trailing_zeros(mask))
        prefetch_row(keys, place)
        prefetch_row(rows, place)
        kept[size] = place
        size += 1
        mask &= mask - np.uint64(1)
    return size


@njit(cache=True)
def _read(tree, exact, asked, code, lists, start, stop, indices, scores):
    """Report from a query's listed leaves start..stop, those to take whole first; asked: threshold, widest, limit.

    Returns the number found, left in indices, scores (w,), and the keys tested.
    """
    rows, keys, codes = tree[:3]
    open_, least, whole, wholes = lists
    lines, blocks, n = rows.reshape(-1, 1), codes.reshape(len(codes), -1), len(rows)
    kept, totals = np.empty(BATCH + LEAF, np.int32), np.empty(BATCH + LEAF)
    found = size = tested = 0
    for p in range(start, min(stop, wholes)):
        found = _take(rows, keys, exact, asked[2], whole[p], indices, scores, found)
    for p in range(max(start - wholes, 0), stop - wholes):
        leaf = open_[p]
        if p + AHEAD < stop - wholes:
            prefetch_row(blocks, open_[p + AHEAD])
        mask = scan_one(codes, leaf, code, least[p])
        if n - leaf * LEAF < LEAF:
            mask &= (np.uint64(1) << np.uint64(n - leaf * LEAF)) - np.uint64(1)
        size = _keep(lines, keys, leaf, mask, kept, size)
        if size >= BATCH:
            found = _settle(rows, keys, exact, asked, kept, size, totals, indices, scores, found)
            tested, size = tested + size, 0
    return _settle(rows, keys, exact, asked, kept, size, totals, indices, scores, found), tested + size


@njit(parallel=True, cache=True)
def _plan_all(tree, asks, key_exponent, plans):
    """`_plan` of every query."""
    queries, thresholds, _ = asks
    code, open_, least, whole, sizes = plans
    for i in prange(len(queries)):
        _plan(tree, queries[i], thresholds[i], key_exponent, code[i], open_[i], least[i], whole[i], sizes[i])


@njit(cache=True)
def _do(task, tree, asks, largest, plans, part, wide_indices, wide_scores, counts, tested):
    """`_read` the task's part of its query's list."""
    i, chunk = task // counts.shape[1], task % counts.shape[1]
    queries, thresholds, limits = asks
    code, open_, least, whole, sizes = plans
    asked = thresholds[i], widest_of(queries[i], largest), limits[i]
    lists = open_[i], least[i], whole[i], sizes[i, 1]
    stop = min((chunk + 1) * part, sizes[i, 0] + sizes[i, 1])
    counts[i, chunk], tested[i, chunk] = _read(
        tree, queries[i], asked, code[i], lists, chunk * part, stop, wide_indices[task], wide_scores[task]
    )


@njit(parallel=True, cache=True)
def _do_all(tree, asks, largest, plans, part, wide_indices, wide_scores, counts, tested):
    """`_do` every task."""
    for task in prange(counts.size):
        _do(task, tree, asks, largest, plans, part, wide_indices, wide_scores, counts, tested)


@njit(cache=True)
def _report(tree, asks, key_exponent, largest, threads, collect):
    """Search for all queries; asks: queries (m, d), thresholds (m,), limits (m,) -> the fields of `Hits`.

    A single task stays on this thread: waking the others takes longer than a short query.
    """
    m, n, count = len(asks[0]), len(tree[0]), len(tree[2])
    code, sizes = np.zeros((m, tree[2].shape[1], AXES), np.int8), np.empty((m, 3), np.int64)
    lists = np.empty((3, m, count), np.int32)
    open_, least, whole = lists[0], lists[1], lists[2]
    plans = code, open_, least, whole, sizes
    if m == 1:
        _plan(tree, asks[0][0], asks[1][0], key_exponent, code[0], open_[0], least[0], whole[0], sizes[0])
    else:
        _plan_all(tree, asks, key_exponent, plans)
    longest = 1
    for i in range(m):
        longest = max(longest, sizes[i, 0] + sizes[i, 1])
    part = max(CHUNK, (longest + CHUNKS - 1) // CHUNKS) if m < threads else longest
    chunks = (longest + part - 1) // part
    counts, tested = np.empty((m, chunks), np.int64), np.empty((m, chunks), np.int64)
    width = min(n, min(part, longest) * LEAF) if collect else 0
    wide_indices, wide_scores = scratch(m * chunks, width)
    if m * chunks == 1:
        _do(0, tree, asks, largest, plans, part, wide_indices, wide_scores, counts, tested)
    else:
        _do_all(tree, asks, largest, plans, part, wide_indices, wide_scores, counts, tested)
    starts = (np.arange(m * chunks) * width).reshape(m, chunks).T
    hits = gathered(counts.T, starts, wide_indices.ravel(), wide_scores.ravel(), collect)
    return *hits, tested.sum(axis=1), sizes[:, 0] * LEAF + sizes[:, 2]


@dataclass(frozen=True)
class Tree:
    """The fields of `hsr.tree_layout.Layout`, and what bounds every rounding band."""

    exponent: int
    rows: np.ndarray
    keys: np.ndarray
    codes: np.ndarray
    groups: np.ndarray
    starts: np.ndarray
    centre: np.ndarray
    scales: np.ndarray
    largest: float  # largest magnitude of any key entry

    def report(
        self, keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray, limits: np.ndarray, collect: bool
    ) -> Hits:
        """See `hsr.structure.Structure`."""
        tree = (self.rows, self.keys, self.codes, self.groups, self.starts, self.centre, self.scales)
        asks = queries, thresholds, limits
        return Hits(*_report(tree, asks, self.exponent, self.largest, get_num_threads(), collect))


def build(keys: np.ndarray) -> Tree:
    """See `hsr.structure.Build`."""
    return Tree(*layout(keys), float(np.abs(keys).max()))
