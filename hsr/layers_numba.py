"""The method ``layers``: the plane peeled into hulls, outermost first (Corollary 3.1 part 2 of arXiv 2410.10165).

Layers.  Keys are rounded to a grid of 2**-52 times a power of two above their entries; keys of one grid point stay
together, so an outlier that takes up the whole grid costs speed, never a key.  A query that looks up (``q_y >= 0``) has
its best key on the upper hull, so upper hulls are peeled one after the other until no key is left, each a chain from
its leftmost to its rightmost key.  Queries that look down use a second peeling, of the negated keys.  (The convex
layers of Chazelle, Guibas and Lee serve both with one; two halve the work per layer, need no cyclic search, and are
built by two threads that share nothing.)  Points on a hull's edge belong to a deeper layer.

Query.  The best vertex of the first layer is found by binary search over its edges, and both walks from it report keys
while vertices reach the threshold.  A layer whose best vertex misses ends the search, for deeper keys lie below its
chain.  Every vertex knows which vertices of the next layer can be best where it is best itself (a merge of the two
chains' slopes), mostly one or two, and the search of the next layer is confined to them.  The work is O(log n + k) plus
the logarithms of these ranges.  An upright first edge is flat to the query (1, 0) although others rise after it; it is
looked at only where no other edge is left, which is where none rises.

Peeling.  A binary tree over the keys in lexicographic order holds in every node the bridge between the upper hulls of
its children, which implies the hull of every node (Overmars and van Leeuwen 1981).  Keys only leave, so a bridge is
sought anew only when it loses an end, by descending both children at once: O(n log^2 n) in all, whatever the input, but
for ties that floats cannot order, where a step costs another O(log n).

Rounding.  Grid coordinates are integers of at most 53 bits, differences included, so `_turn` gives the exact
orientation and chains are convex, in the grid, without exception.  Nothing else is exact in a query, and `SLACK` covers
it (unit domain, |q_x|, |q_y| < 1): the grid moves a score by 2**-53 * 2, float64 sums by 6 * 2**-53, and an edge whose
direction is misjudged deviates from flat by 2**-52 * |q| at most, as do all edges between it and the best vertex, which
is thus missed by less than 2**-52 * |q| times the chain's length of at most 6.  Beyond a vertex that misses by SLACK,
scores along a chain only fall, or the best misses, too.  Whatever remains is decided by the exact test of `hsr.exact`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit, prange

from hsr.exact import BAND, UNDERFLOW, widest_band
from hsr.report import Hits
from hsr.rows import gathered, scratch
from hsr.scaling import exponent, unit

BITS = 52  # grid points per unit are 2**BITS: differences fit the 53 bits of a float64
SURE = 2.0**60  # a float64 cross product beyond has the right sign; within, 64 bits hold it
TOP = np.uint64(2**63)  # and beyond: negative modulo 2**64
SLACK = 2.0**-46  # over three times what rounding contributes to a unit score
SCALED = 1000  # a power of two up to here can multiply a lossless copy back
PATIENCE = 2**14  # keys and vertices that one thread has looked at before the others are awake

EMPTY, PASS = -1, -2  # a node without points; one whose points are all under one child


@njit(cache=True)
def _turn(ax, ay, bx, by):
    """The sign of the cross product a x b, exactly: integers of magnitude up to 2**53."""
    rounded = float(ax) * float(by) - float(bx) * float(ay)
    if abs(rounded) > SURE:
        return 1 if rounded > 0.0 else -1
    product = np.uint64(ax) * np.uint64(by) - np.uint64(bx) * np.uint64(ay)  # signed integers must not overflow
    return int(product != 0) if product < TOP else -1


@njit(cache=True)
def _above(grid, a, b, c):
    """Whether point c lies on or above the line from point a to point b, a before b."""
    ax, ay = grid[a, 0], grid[a, 1]
    return _turn(grid[b, 0] - ax, grid[b, 1] - ay, grid[c, 0] - ax, grid[c, 1] - ay) >= 0


@njit(cache=True)
def _child(first, last, node):
    """The topmost node below or at a node that is not empty and holds a bridge or is a leaf."""
    return last[node] if first[node] == PASS else node


@njit(cache=True)
def _reached(grid, first, last, node, a, b):
    """Whether some point under a node lies on or above the line from point a to point b."""
    half = len(first) // 2
    dx, dy = grid[b, 0] - grid[a, 0], grid[b, 1] - grid[a, 1]
    while node < half:
        c, d = first[node], last[node]
        steeper = _turn(dx, dy, grid[d, 0] - grid[c, 0], grid[d, 1] - grid[c, 1]) > 0
        node = _child(first, last, 2 * node + int(steeper))
    return _above(grid, a, b, node - half)


@njit(cache=True)
def _crossing(grid, a, b, c, d, middle):
    """Where the lines ab and cd cross: -1 left of x = middle, 1 right of it, 0 if float64 cannot tell."""
    ex, ey = float(grid[b, 0] - grid[a, 0]), float(grid[b, 1] - grid[a, 1])
    fx, fy = float(grid[d, 0] - grid[c, 0]), float(grid[d, 1] - grid[c, 1])
    gx, gy = float(grid[c, 0] - grid[b, 0]), float(grid[c, 1] - grid[b, 1])
    away = float(middle - grid[b, 0])
    left, right = ex * (gy * fx - gx * fy), away * (ey * fx - ex * fy)
    wide = ex * (abs(gy * fx) + abs(gx * fy)) + away * (abs(ey * fx) + abs(ex * fy))
    if abs(left - right) <= 2.0**-48 * wide:
        return 0
    return -1 if left < right else 1


@njit(cache=True)
def _bridge(grid, first, last, node, middle):
    """The edge of a node's upper hull from its left child's points to its right child's; ``middle`` parts their x.

    An edge ab of the left hull bounds the bridge's left end: at or before a if some right point is on or above ab, else
    at or after b; the mirror image holds on the right.  Where two edges lie below each other's lines, the lines
    cross on one side of ``middle``, and the other side's points all lie below that other line.
    """
    half = len(first) // 2
    u, w = _child(first, last, 2 * node), _child(first, last, 2 * node + 1)
    while u < half or w < half:
        a, b, c, d = first[u], last[u], first[w], last[w]
        back = u < half and (_above(grid, a, b, c) or _above(grid, a, b, d))
        ahead = w < half and (_above(grid, c, d, a) or _above(grid, c, d, b))
        step_u, step_w = int(not back), int(ahead)
        move_u, move_w = back or w >= half, ahead or u >= half
        if not (move_u or move_w):
            side = _crossing(grid, a, b, c, d, middle)
            move_u, move_w = side <= 0, side > 0
            if side == 0:
                step_u = int(not _reached(grid, first, last, w, a, b))
        if move_u and u < half:
            u = _child(first, last, 2 * u + step_u)
        if move_w and w < half:
            w = _child(first, last, 2 * w + step_w)
    return u - half, w - half


@njit(cache=True)
def _refresh(grid, first, last, node, span):
    """Bring a node of ``span`` leaves up to date after points under it have left."""
    half = len(first) // 2
    left, right = 2 * node, 2 * node + 1
    if first[left] == EMPTY or first[right] == EMPTY:
        child = right if first[left] == EMPTY else left
        first[node] = EMPTY if first[child] == EMPTY else PASS
        last[node] = _child(first, last, child)
    elif first[node] < 0 or first[half + first[node]] == EMPTY or first[half + last[node]] == EMPTY:
        middle = grid[node * span - half + span // 2 - 1, 0]
        first[node], last[node] = _bridge(grid, first, last, node, middle)


@njit(cache=True)
def _hull(first, last, stack, order, placed):
    """Append the upper hull of all points to order, left to right -> the new number placed."""
    half, top = len(first) // 2, 1
    stack[0, 0], stack[0, 1], stack[0, 2] = 1, 0, half - 1  # node, first and last leaf wanted
    while top > 0:
        top -= 1
        node, low, high = _child(first, last, stack[top, 0]), stack[top, 1], stack[top, 2]
        if node >= half:
            order[placed] = node - half
            placed += 1
            continue
        a, b = first[node], last[node]
        if high > a:
            stack[top, 0], stack[top, 1], stack[top, 2] = 2 * node + 1, max(low, b), high
            top += 1
        if low < b:
            stack[top, 0], stack[top, 1], stack[top, 2] = 2 * node, low, min(high, a)
            top += 1
    return placed


@njit(cache=True)
def _peel(grid, order, starts):
    """grid (u, 2) int64, lexicographic -> order (u,) int32 by layer, starts (u + 1,) int32; how many layers."""
    n = len(grid)
    half = 2
    while half < n:
        half *= 2
    first, last = np.full(2 * half, EMPTY, np.int32), np.full(2 * half, EMPTY, np.int32)
    for j in range(n):
        first[half + j] = last[half + j] = j
    level, span = half // 2, 2
    while level > 0:
        for node in range(level, 2 * level):
            _refresh(grid, first, last, node, span)
        level, span = level // 2, span * 2
    stack, touched = np.empty((128, 3), np.int64), np.empty(n, np.int64)
    placed = layers = starts[0] = 0
    while placed < n:
        begin, placed = placed, _hull(first, last, stack, order, placed)
        layers += 1
        starts[layers] = placed
        count, span = placed - begin, 1
        for j in range(count):
            touched[j] = half + order[begin + j]
            first[touched[j]] = EMPTY
        while touched[0] > 1:
            parents, span = 0, 2 * span
            for j in range(count):
                node = touched[j] // 2
                if parents == 0 or touched[parents - 1] != node:
                    touched[parents] = node
                    parents += 1
                    _refresh(grid, first, last, node, span)
            count = parents
    return layers


@njit(cache=True)
def _link(grid, order, starts, layers, hints):
    """hints (u,) int32: the first place of the next layer that can be best where this place is best or to its right."""
    for layer in range(layers - 1):
        begin, end, stop = starts[layer], starts[layer + 1], starts[layer + 2]
        place = end
        for p in range(begin, end):
            if p > begin:
                a, b = order[p - 1], order[p]
                dx, dy = grid[b, 0] - grid[a, 0], grid[b, 1] - grid[a, 1]
                while place + 1 < stop:
                    c, d = order[place], order[place + 1]
                    if _turn(dx, dy, grid[d, 0] - grid[c, 0], grid[d, 1] - grid[c, 1]) < 0:
                        break
                    place += 1
            hints[p] = place


@njit(parallel=True, cache=True)
def _layered(grids):
    """grids (2, u, 2) int64, each lexicographic -> order (2, u), starts (2, u + 1), hints (2, u), layers (2,)."""
    n = grids.shape[1]
    order, hints = np.empty((2, n), np.int32), np.zeros((2, n), np.int32)
    starts, layers = np.full((2, n + 1), n, np.int32), np.empty(2, np.int64)
    for side in prange(2):
        layers[side] = _peel(grids[side], order[side], starts[side])
        _link(grids[side], order[side], starts[side], layers[side], hints[side])
    return order, starts, hints, layers


@njit(cache=True)
def _judged(qx, qy, x, y, threshold, widest):
    """The score of a key and whether it `hsr.exact.reaches` the threshold, all scalars."""
    total = qx * x + qy * y
    inside = total >= threshold
    if inside != (total + widest >= threshold):
        inside = total + 3 * (BAND * (abs(qx * x) + abs(qy * y)) + UNDERFLOW) >= threshold
    return total, inside


@njit(cache=True)
def _search(side, keys, exact, aim, low, asked, indices, scores):
    """Report one query -> keys found, keys tested, edges looked at and vertices that ended a walk.

    All loops are in here: a call with array arguments counts references, which takes longer than a vertex.
    """
    points, firsts, rows, starts, hints = side
    threshold, widest, limit = asked
    count, lossless, collect = len(points), len(keys) == 0, len(indices) > 0
    found = scanned = visited = layer = 0
    first, last = 0, starts[1] - 1
    while True:
        best, right = first, last  # the vertex with the largest score of a chain lies in best..right
        while best < right:
            middle = (best + right) // 2
            visited += 1
            dx, dy = points[middle + 1, 0] - points[middle, 0], points[middle + 1, 1] - points[middle, 1]
            if aim[0] * dx + aim[1] * dy > 0.0:
                best = middle + 1
            else:
                right = middle
        begin, end = starts[layer], starts[layer + 1]
        silent = False
        for step in (-1, 1):
            place = best if step < 0 else best + 1
            while begin <= place < end and aim[0] * points[place, 0] + aim[1] * points[place, 1] >= low:
                x, y = points[place, 0], points[place, 1]
                scanned += firsts[place + 1] - firsts[place]
                for j in range(firsts[place], firsts[place + 1]):
                    row = rows[j]
                    if row < limit:
                        if not lossless:
                            x, y = keys[row, 0], keys[row, 1]
                        total, inside = _judged(exact[0], exact[1], x, y, threshold, widest)
                        if collect:  # the next key overwrites all but a member
                            indices[found], scores[found] = row, total
                        found += inside
                place += step
            silent |= place == best
        visited += 1 if silent else 2
        if silent or end == count:
            return found, scanned, visited
        layer += 1
        first = hints[best]
        last = hints[best + 1] if best + 1 < end else starts[layer + 1] - 1


@njit(cache=True)
def _answer(sides, keys, query, unit_query, low, asked, indices, scores, work):
    """Choose the side a query looks at, and search it; work (3,) int64: found, scanned, visited."""
    points, firsts, rows, starts, hints = sides
    down = unit_query[1] < 0.0
    sign, s = (-1.0, 1) if down else (1.0, 0)
    side = points[s], firsts[s], rows[s], starts[s], hints[s]
    exact = query if len(keys) else sign * query
    work[0], work[1], work[2] = _search(side, keys, exact, sign * unit_query, low, asked, indices, scores)


@njit(cache=True)
def _report_few(sides, keys, queries, thresholds, unit_queries, lows, widest, limits, work, indices, scores):
    """Answer queries on one thread until all are, or PATIENCE is used up -> how many are answered.

    Their hits follow each other in indices, scores (PATIENCE + n,).
    """
    spent = placed = i = 0
    while i < len(queries) and spent < PATIENCE:
        asked = thresholds[i], widest[i], limits[i]
        rest = indices[placed:], scores[placed:]
        _answer(sides, keys, queries[i], unit_queries[i], lows[i], asked, rest[0], rest[1], work[i])
        spent += work[i, 1] + work[i, 2]
        placed += work[i, 0] if len(indices) else 0
        i += 1
    return i


@njit(parallel=True, cache=True)
def _report_many(sides, keys, queries, thresholds, unit_queries, lows, widest, limits, work, wide_indices, wide_scores):
    for i in prange(len(queries)):
        asked = thresholds[i], widest[i], limits[i]
        _answer(sides, keys, queries[i], unit_queries[i], lows[i], asked, wide_indices[i], wide_scores[i], work[i])


@dataclass(frozen=True)
class Layers:
    """Grid points by layer, upwards (0) and, negated, downwards (1); see the module's text."""

    exponent: int  # unit keys are keys times 2**-exponent
    largest: float  # largest magnitude of any key entry
    lossless: bool  # whether points times 2**exponent are the keys
    points: np.ndarray  # (2, u, 2) float64, distinct grid points in the unit domain, layer after layer, left to right
    firsts: np.ndarray  # (2, u + 1) int32, where in rows the keys of each point begin
    rows: np.ndarray  # (2, n) int32
    starts: np.ndarray  # (2, layers + 1) int32, first point of each layer, filled up with u
    hints: np.ndarray  # (2, u) int32, see `_link`

    def report(
        self, keys: np.ndarray, queries: np.ndarray, thresholds: np.ndarray, limits: np.ndarray, collect: bool
    ) -> Hits:
        """See `hsr.structure.Structure`."""
        m, width = len(queries), len(keys) if collect else 0
        head = PATIENCE + width if collect else 0
        aims, lows = unit(queries, thresholds - 3 * UNDERFLOW, self.exponent)  # float64 may score 0 below 0
        (indices,), (scores,) = scratch(1, head + m * width)
        work = np.empty((m, 3), np.int64)
        shared = (
            (self.points, self.firsts, self.rows, self.starts, self.hints),
            np.empty((0, 2)) if self.lossless else keys.astype(np.float64, copy=False),
        )
        single = (
            queries * 2.0**self.exponent if self.lossless else queries,
            thresholds,
            aims,
            lows - SLACK,
            widest_band(queries, self.largest),
            limits,
            work,
        )
        done = _report_few(*shared, *single, indices[:head], scores[:head])
        if done < m:
            rest = (array[done:] for array in single)
            wide = (flat[head:].reshape(m, width)[done:] for flat in (indices, scores))
            _report_many(*shared, *rest, *wide)
        found = work[:, 0].copy()
        starts = head + np.arange(m) * width
        starts[:done] = np.cumsum(found[:done]) - found[:done]
        offsets, indices, scores = gathered(found[None], starts[None], indices, scores, collect)
        return Hits(offsets, indices, scores, work[:, 1].copy(), work[:, 2].copy())


def refuses(**call: object) -> str | None:
    """Why this module cannot serve a call: layers are for the plane."""
    width = call.get("d", 2)  # loading an index asks without a width
    return None if width == 2 else f"needs keys of width 2, got width {width}"


def build(keys: np.ndarray) -> Layers:
    """See `hsr.structure.Build`."""
    n, power = len(keys), int(exponent(keys))
    grid = np.rint(np.ldexp(keys.astype(np.float64), BITS - power)).astype(np.int64)
    by_place = np.lexsort((grid[:, 1], grid[:, 0])).astype(np.int32)
    grid = grid[by_place]
    new = np.flatnonzero(np.concatenate([[True], (grid[1:] != grid[:-1]).any(axis=1)]))
    sizes = np.diff(np.append(new, n))
    grids = np.stack([grid[new], -grid[new][::-1]])
    order, starts, hints, layers = _layered(grids)
    firsts, rows = np.zeros((2, len(new) + 1), np.int32), np.empty((2, n), np.int32)
    for side, groups in enumerate((order[0], len(new) - 1 - order[1])):
        np.cumsum(sizes[groups], out=firsts[side, 1:])
        rows[side] = by_place[np.repeat(new[groups] - firsts[side, :-1], sizes[groups]) + np.arange(n)]
    points = np.ldexp(np.take_along_axis(grids, order[:, :, None], axis=1).astype(np.float64), -BITS)
    back = np.ldexp(points[0], power)
    lossless = abs(power) < SCALED and bool((np.repeat(back, np.diff(firsts[0]), axis=0) == keys[rows[0]]).all())
    starts = np.ascontiguousarray(starts[:, : layers.max() + 1])
    return Layers(power, float(np.abs(keys).max()), lossless, points, firsts, rows, starts, hints)
