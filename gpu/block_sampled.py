"""Keys that blocks of query rows share, drawn by importance: `attention.block_sampled` on the GPU.

Ten launches, and some that fill. The kernels of `gpu.importance` keep a byte of every key for every block of rows, its
importance in eighths of octaves; `count`, `threshold`, `size`, `places` and `draw` need no more than these bytes. Where
the selection is causal, `gpu.pacing` stands in for `threshold`. Codes, budgets and draws are defined in
`attention.listed_reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from attention.key_lists import KEYS, ROWS, KeyLists, budget, edges, row_blocks, spoken
from gpu import hopper, pacing
from gpu.codes import UNIT, mixed
from gpu.importance import EIGHTHS, LEVELS, code, normalise, pool, represent, typical
from gpu.sampled import seed_word
from gpu.tensors import where_it_lies

LN2 = tl.constexpr(0.6931471805599453)
ONE = tl.constexpr(2.0**24)  # a chance of 1, in units of 2 ** -UNIT


@triton.jit
def count(CODES, HISTOGRAMS, TOTALS, shift, lines, room, ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr):
    """Grid (lines, heads at work): HISTOGRAMS (heads at work, lines, LEVELS) int32 of the eligible keys' codes.

    They are added to TOTALS (heads at work, LEVELS) int64.
    """
    line = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    at = head * lines + line
    edge = (shift + line * ROWS) // KEYS * KEYS
    c = tl.arange(0, LEVELS)
    o = tl.arange(0, TILE)
    found = tl.zeros((LEVELS,), tl.int32)
    for first in tl.range(0, edge, TILE):
        ok = first + o < edge
        codes = tl.load(CODES + at * room + first + o, mask=ok, other=0).to(tl.int32)
        found += tl.histogram(codes, LEVELS, mask=ok)
    tl.store(HISTOGRAMS + at * LEVELS + c, found)
    tl.atomic_add(TOTALS + head * LEVELS + c, found.to(tl.int64), mask=found > 0, sem="relaxed")


@triton.jit
def threshold(TOTALS, BUDGETS, CHANCES):
    """Grid (heads at work,): TOTALS (heads at work, LEVELS) int64 -> CHANCES (heads at work, LEVELS) int32.

    Chances in units of 2 ** -UNIT: 1 from some code on, falling by an eighth of an octave a code below it, such that
    a head's budget is what is drawn on average: BUDGETS (heads at work,) float64.
    """
    at = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, LEVELS)
    many = tl.load(TOTALS + at * LEVELS + c).to(tl.float64)
    budget = tl.load(BUDGETS + at)
    value = tl.exp2(c.to(tl.float32) / EIGHTHS).to(tl.float64)
    weight = many * value
    below = tl.cumsum(weight, 0) - weight  # S, of codes below c
    certain = tl.sum(many, 0) - (tl.cumsum(many, 0) - many)  # N, of c and above
    expected = certain + below / value
    first = tl.min(tl.where(expected <= budget, c, LEVELS), 0)  # all below draw by chance
    S = tl.sum(tl.where(c < first, weight, 0.0), 0)
    left = budget - tl.sum(tl.where(c >= first, many, 0.0), 0)
    ratio = tl.where(first > 0, value * (left / tl.maximum(S, 1e-300)), 1.0)  # 2 ** ((c - t) / EIGHTHS)
    chance = tl.minimum(tl.maximum(tl.floor(ratio * ONE + 0.5), 1.0), ONE)
    chance = tl.where(c >= first, ONE, chance)
    tl.store(CHANCES + at * LEVELS + c, chance.to(tl.int32))


@triton.jit(do_not_specialize=["seed"])
def size(HISTOGRAMS, CHANCES, STARTS, LENGTHS, seed, first_head, lines, tables):
    """Grid (lines, heads at work): STARTS (heads at work, lines) int32, where a draw begins within a unit.

    LENGTHS (heads at work, lines) int64: the keys that it will list.  A head has ``tables`` of chances, one or one per
    line.
    """
    line = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, LEVELS)
    table = head * tables + tl.where(tables > 1, line, 0)
    many = tl.load(HISTOGRAMS + (head * lines + line) * LEVELS + c).to(tl.int64)
    all = tl.sum(many * tl.load(CHANCES + table * LEVELS + c), 0)
    own = mixed(seed.to(tl.uint32) ^ mixed((first_head + head).to(tl.uint32) + 0x9E3779B9))
    start = (mixed(own ^ mixed(line.to(tl.uint32) + 0x9E3779B9)) >> 8).to(tl.int32)
    tl.store(STARTS + head * lines + line, start)
    tl.store(LENGTHS + head * lines + line, (start + all) >> UNIT)


@triton.jit
def places(LENGTHS, OFFSETS, lines, FIRST: tl.constexpr, TILE: tl.constexpr):
    """Grid (1,): LENGTHS (lines,) -> OFFSETS (lines + 1,), both int64: where lists begin and end, one after another.

    The first begins at zero or, unless FIRST, where the lists before end.
    """
    o = tl.arange(0, TILE)
    if FIRST:
        tl.store(OFFSETS, tl.zeros((), tl.int64))
        carry = tl.zeros((), tl.int64)
    else:
        carry = tl.load(OFFSETS)
    for first in tl.range(0, lines, TILE):
        line = first + o
        sums = tl.cumsum(tl.load(LENGTHS + line, mask=line < lines, other=0), 0) + carry
        tl.store(OFFSETS + 1 + line, sums, mask=line < lines)
        carry = tl.max(sums, 0)


@triton.jit
def draw(
    CODES, CHANCES, STARTS, OFFSETS, TOKENS, LOG_WEIGHTS, shift, lines, room, tables, capacity,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (lines, heads at work): a systematic draw along a line's keys; OFFSETS (heads * lines + 1,) say where to.

    A key is listed where the sum of chances passes a whole number, at the place that this number says.
    """
    line = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    edge = (shift + line * ROWS) // KEYS * KEYS
    o = tl.arange(0, TILE)
    table = CHANCES + (head * tables + tl.where(tables > 1, line, 0)) * LEVELS
    start = tl.load(OFFSETS + head * lines + line)
    carry = tl.load(STARTS + head * lines + line).to(tl.int64)
    codes = CODES + (head * lines + line) * room
    for first in tl.range(0, edge, TILE):
        j = first + o
        ok = j < edge
        chance = tl.load(table + tl.load(codes + j, mask=ok, other=0).to(tl.int32), mask=ok, other=0)
        sums = tl.cumsum(chance.to(tl.int64), 0) + carry
        place = sums >> UNIT
        taken = place > ((sums - chance) >> UNIT)
        to = start + place - 1
        fits = taken & (to < capacity)
        tl.store(TOKENS + to, j, mask=fits)
        tl.store(LOG_WEIGHTS + to, -(tl.log2(chance.to(tl.float32)) - UNIT) * LN2, mask=fits)
        carry += tl.sum(chance.to(tl.int64), 0)


TAKEN = 8  # representatives that a program of `represent` makes
REPRESENTED = 64  # representatives that a program of `normalise` takes at most, unless a block has more
BUSY = 256  # programs that keep a GPU busy
COLUMNS = 128  # representatives that a program of `code` takes
TILE = 1024  # codes that `count` and `draw` take at once
PLACED = 4096  # lines that `places` takes at once
GRID = 65535  # programs that the second axis of a launch may have
BYTES = 1 << 31  # of codes that are kept at once, but for a single head's: heads beyond that wait


@where_it_lies
def key_lists(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    density: float | np.ndarray,
    rows: int,
    causal_selection: bool,
    seed: int,
    scale: float,
) -> KeyLists:
    """Draw the keys that blocks of rows attend to.

    Nothing waits for the device: thresholds keep to the budget, so that lists fit what it says beforehand.  Different
    densities are copied there.

    Args:
        q: (B, h, m, d) float16 or bfloat16, rows contiguous.
        k: (B, g, n, d).
        v: (B, g, n, dv), dv a power of two.
        density: of all pairs, as `attention.key_lists.KeyLists.densities` has it: of every head, or of each, (B h,).
        rows: representatives of a block, a power of two up to 128; fewer are faster.
        causal_selection: whether nothing after a row may bear on what it attends to; heads are of one density then.
        seed: of the draw.
        scale: of the scores.

    Returns:
        KeyLists: tokens with log weights, on the device.

    Raises:
        ArgumentError: a density that the bands alone exceed.
    """
    B, h, m = q.shape[:3]
    n = k.shape[2]
    heads, T, device = B * h, row_blocks(m), q.device
    room = int(edges(m, n)[-1])
    plan = _Plan(q, k, v, rows, causal_selection, scale, T, room)
    different, which = np.unique(np.broadcast_to(density, heads), return_inverse=True)
    kept = np.array([budget(float(own), m, n) for own in different])[which]
    assert not causal_selection or (kept == kept[0]).all()
    offsets = (torch.empty if room else torch.zeros)(heads * T + 1, dtype=torch.int64, device=device)
    capacity = int(np.minimum(np.ceil(kept) + T, edges(m, n).sum()).sum())
    tokens = torch.empty(max(capacity, 1), dtype=torch.int32, device=device)
    weights = torch.empty(max(capacity, 1), dtype=torch.float32, device=device)
    if room == 0:
        return KeyLists(offsets, tokens, weights)
    slab = min(max(BYTES // (T * room), 1), GRID)
    together = q.shape[1] // k.shape[1]  # heads of the same keys
    slab -= slab % together if slab > together else 0
    for first in range(0, heads, slab):
        many = min(slab, heads - first)
        drawn = plan.drawn(first, many, kept[first : first + many], seed_word(seed))
        own = offsets[first * T : (first + many) * T + 1]  # begins where the heads before end
        places[(1,)](drawn.lengths, own, many * T, FIRST=first == 0, TILE=PLACED, num_warps=16)
        drawn.into(own, tokens, weights)
    return KeyLists(offsets, tokens, weights)


def stages(d: int) -> int:
    """Tiles of keys in shared memory: three of width 256 would not fit beside the rows."""
    return 2 if d == 256 else 3


def lines_together(heads: int, R: int, lines: int) -> int:
    """Of so many lines of some heads side by side, those of a program of `normalise`, which reads the bands of all.

    Few, so that there are programs enough, but with 16 rows of a product at least.
    """
    least = max(16 // (heads * R), 1)
    found = max(min(16 // R, REPRESENTED // (heads * R), 8), least)
    while found > least and lines < BUSY * found:
        found //= 2
    return found


def warps(d: int) -> int:
    """Of `normalise`: with four, width 256 and one representative do not fit the registers (`gpu.sm90`)."""
    return 8 if d == 256 else 4


def _placed(kept: np.ndarray, device: torch.device) -> torch.Tensor:
    """Budgets (heads,) on the device; made there where they are alike, so that the host copies nothing."""
    if (kept == kept[0]).all():
        return torch.full((len(kept),), float(kept[0]), dtype=torch.float64, device=device)
    return torch.from_numpy(kept).to(device)


@dataclass(frozen=True)
class _Drawn:
    """Codes and chances of some heads, from which their lists are written."""

    codes: torch.Tensor  # (heads, T, room) uint8
    chances: torch.Tensor  # (heads, 1 or T, 256) int32
    starts: torch.Tensor  # (heads, T) int32
    lengths: torch.Tensor  # (heads, T) int64
    shift: int  # n - m

    def into(self, offsets: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor) -> None:
        """Write the lists from their offsets (heads T + 1,) on."""
        heads, T, room = self.codes.shape
        if hopper.on(self.codes.device):
            hopper.draw(self.codes, self.chances, self.starts, offsets, tokens, weights, self.shift)
            return
        draw[(T, heads)](
            self.codes, self.chances, self.starts, offsets, tokens, weights, self.shift, T, room, self.chances.shape[1],
            len(tokens), ROWS=ROWS, KEYS=KEYS, TILE=TILE, num_warps=4,
        )  # fmt: skip


class _Plan:
    """What the heads' draws share."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: int,
        causal: bool,
        scale: float,
        T: int,
        room: int,
    ) -> None:
        B, g, n, d = k.shape
        self._q, self._k, self._rows, self._causal, self._scale, self._T, self._room = (
            q,
            k,
            rows,
            causal,
            scale,
            T,
            room,
        )
        self._means = torch.empty(B * g, n // KEYS, d, dtype=k.dtype, device=k.device)
        self._far = torch.empty(B * g, triton.cdiv(n, KEYS) * KEYS, dtype=torch.int8, device=k.device)
        centres = torch.empty(B * g, v.shape[3], dtype=torch.float32, device=k.device)
        squares = torch.empty(B * g, dtype=torch.float32, device=k.device)
        typical[(B * g,)](v, centres, squares, *v.stride()[:3], n, g, DV=v.shape[3], KEYS=KEYS, num_warps=8)
        pool[(triton.cdiv(n, KEYS), B * g, 2)](
            k, v, centres, squares, self._means, self._far, *k.stride()[:3], *v.stride()[:3], n, g, D=d,
            DV=v.shape[3], KEYS=KEYS, num_warps=8,
        )  # fmt: skip

    def drawn(self, first: int, many: int, kept: np.ndarray, seed: int) -> _Drawn:
        """Codes, thresholds and lengths of heads first .. first + many, which keep so many keys each."""
        q, k, T, room, R = self._q, self._k, self._T, self._room, self._rows
        h, m, d = q.shape[1:]
        g, n = k.shape[1:3]

        def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=q.device)

        queries = new(many, T, R, d, dtype=q.dtype)
        represent[(triton.cdiv(T * R, TAKEN), many)](
            q, queries, *q.stride()[:3], m, h, first, T, D=d, R=R, S=spoken(R), ROWS=ROWS,
            CAUSAL=self._causal, TAKEN=TAKEN, num_warps=1,
        )  # fmt: skip
        sums, shares = new(many, T, R, dtype=torch.float32), new(many, n // KEYS, T, dtype=torch.float32)
        together = self._together(first, many)
        padded = triton.next_power_of_2(together)
        lines = lines_together(padded, R, T * many // together)
        normalise[(triton.cdiv(T, lines), many // together)](
            queries, k, self._means, sums, shares, *k.stride()[:3], m, n, h, first, T, self._scale, G=h // g, D=d, R=R,
            LINES=lines, ROWS=ROWS, KEYS=KEYS, CAUSAL=self._causal, TOGETHER=together, PADDED=padded,
            num_warps=warps(d), num_stages=stages(d),
        )  # fmt: skip
        codes = new(many, T, room, dtype=torch.uint8)
        self._code(queries, sums, shares, codes, first)
        counts = new(many, T, 256, dtype=torch.int32)
        totals = torch.zeros(many, 256, dtype=torch.int64, device=q.device)
        if hopper.on(codes.device):
            hopper.count(codes, counts, totals, n - m)
        else:
            count[(T, many)](codes, counts, totals, n - m, T, room, ROWS=ROWS, KEYS=KEYS, TILE=TILE, num_warps=4)
        if self._causal:
            chances = pacing.chances(counts, float(kept[0]), n - m)
        else:
            chances = new(many, 1, 256, dtype=torch.int32)
            threshold[(many,)](totals, _placed(kept, q.device), chances, num_warps=4)
        starts, lengths = new(many, T, dtype=torch.int32), new(many, T, dtype=torch.int64)
        size[(T, many)](counts, chances, starts, lengths, seed, first, T, chances.shape[1], num_warps=4)
        return _Drawn(codes, chances, starts, lengths, n - m)

    def _together(self, first: int, many: int) -> int:
        """How many of the heads at work read the same keys and are few enough for a program of `normalise`."""
        G = math.gcd(self._q.shape[1] // self._k.shape[1], first, many)
        return G if triton.next_power_of_2(G) * self._rows <= REPRESENTED else 1

    def _code(
        self, queries: torch.Tensor, sums: torch.Tensor, shares: torch.Tensor, codes: torch.Tensor, first: int
    ) -> None:
        k, R = self._k, self._rows
        h, m, d = self._q.shape[1:]
        if R in hopper.CODES_STAGES and hopper.serves(k, k, k):
            hopper.importance(queries, k, sums, shares, self._far, codes, (h, m), first, self._scale)
            return
        g, n = k.shape[1:3]
        many, T, room = codes.shape
        lines = COLUMNS // R
        code[(triton.cdiv(T, lines), many)](
            queries, k, sums, shares, self._far, codes, *k.stride()[:3], m, n, h, first, T, room, self._scale,
            G=h // g, D=d, R=R, LINES=lines, ROWS=ROWS, KEYS=KEYS, STAGES=stages(d), num_warps=8,
        )  # fmt: skip
