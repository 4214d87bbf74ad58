"""Half-spaces over int8 codes: which keys can reach a row's threshold, listed row by row in the order of their ids.

Four steps of fixed shape, without a word from the host: `prepare` rounds the queries, `scan` reads every code once and
leaves a bit per row and key, a running sum over the tiles' counts places them, `expand` turns bits into lists.  There
are no atomics: lists are in the order of ids, whatever the programs' order.  `gpu.int8_codes` proves the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpu.int8_codes import Int8Codes

PLANE = tl.constexpr(254)  # what the high plane of a query counts in units of the low one
LEVELS = tl.constexpr(32258.0)  # PLANE * 127: the largest magnitude of a rounded query
FAR = tl.constexpr(2.0**120)
NEAR = tl.constexpr(2.0**-100)
ID = 0x7FFFFFFF  # of a listed pair
SPAN = 1024  # keys whose bits a program expands


@triton.jit(do_not_specialize=["rows"])
def prepare(
    Q, MIDDLE, SPREAD, THRESHOLDS, ROUNDED, REACH, WIDTH, LEVEL, rows, D: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Round a query to two planes of int8; grid (heads * rows,), a program per row.

    Q (heads * rows, D); MIDDLE, SPREAD (heads, D) float64, the codes' middle and weights; THRESHOLDS (heads * rows,)
    float64 -> ROUNDED (heads * rows, 2, R) int8; REACH, WIDTH, LEVEL (heads * rows,) float32.  A query that is not
    finite gets a level that every key passes, so that it shows in what is computed from the keys.
    """
    i = tl.program_id(0).to(tl.int64)
    head = i // rows
    r = tl.arange(0, R)
    q = tl.load(Q + i * D + r, mask=r < D, other=0.0).to(tl.float32).to(tl.float64)
    size = tl.sum(tl.abs(q), 0)
    finite = size - size == 0
    q = tl.where(finite, q, 0.0)
    middle = tl.load(MIDDLE + head * D + r, mask=r < D, other=0.0)
    z = q * tl.load(SPREAD + head * D + r, mask=r < D, other=0.0)
    top = tl.max(tl.abs(z), 0)
    unit = tl.where(top > 0, top / LEVELS, 1.0)
    scaled = z / unit
    high = tl.floor(scaled / PLANE + 0.5)
    low = tl.floor(scaled - high * PLANE + 0.5)
    left = scaled - high * PLANE - low
    reach = tl.sqrt(tl.sum(left * left, 0) * D) * 127.0
    width = tl.maximum(tl.sqrt(tl.sum(scaled * scaled, 0)), LEVELS)
    products = q * middle
    band = tl.sum(tl.abs(products), 0) * ((D + 16) * 2.0**-51)  # of the sum below, and of the scores' own
    level = (tl.load(THRESHOLDS + i) - tl.sum(products, 0) - band) / unit
    level = tl.where(finite, tl.minimum(tl.maximum(level, -FAR), FAR), -FAR)
    level -= tl.abs(level) * 2.0**-22 + NEAR  # rounding to float32 included
    tl.store(ROUNDED + i * (2 * R) + r, high.to(tl.int8))
    tl.store(ROUNDED + i * (2 * R) + R + r, low.to(tl.int8))
    tl.store(REACH + i, (reach * (1 + 2.0**-20)).to(tl.float32))
    tl.store(WIDTH + i, (width * (1 + 2.0**-20)).to(tl.float32))
    tl.store(LEVEL + i, level.to(tl.float32))


@triton.jit(do_not_specialize=["rows", "blocks", "tiles"])
def scan(
    CODES, STEPS, SLACK, ROUNDED, REACH, WIDTH, LEVEL, LIMITS, BITS, COUNTS, room, rows, blocks, tiles,
    ROW: tl.constexpr, R: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mark the keys whose bound reaches a row's level; grid (blocks * tiles, heads), blocks of N rows.

    Keys are the M side of the integer products.  CODES (heads, room, ROW) int8, ROW at most R; STEPS, SLACK (heads,
    room) float32; LIMITS (heads * rows,) int32: keys from there on are not seen; the rest as in `prepare` -> BITS
    (heads * rows, tiles * TILE / 32) int32, bit j of word i being key 32 i + j; COUNTS (heads * rows, tiles) int32.
    """
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks  # next to each other, so that a tile's codes are in the cache
    head = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, R)
    key = tile * TILE + tl.arange(0, TILE)
    place = head * room + tl.minimum(key, room - 1)
    if ROW == R:
        codes = tl.load(CODES + place[:, None] * ROW + r[None, :])
    else:
        codes = tl.load(CODES + place[:, None] * ROW + r[None, :], mask=r[None, :] < ROW, other=0)
    step = tl.load(STEPS + place)
    slack = tl.load(SLACK + place)
    column = block * N + tl.arange(0, N)
    real = column < rows
    row = head * rows + tl.where(real, column, 0)
    rounded = ROUNDED + row[:, None] * (2 * R) + r[None, :]
    sums = tl.dot(codes, tl.trans(tl.load(rounded)), out_dtype=tl.int32) * PLANE
    sums = tl.dot(codes, tl.trans(tl.load(rounded + R)), acc=sums, out_dtype=tl.int32)
    bound = step[:, None] * (sums.to(tl.float32) + tl.load(REACH + row)[None, :])
    bound += slack[:, None] * tl.load(WIDTH + row)[None, :]
    limit = tl.load(LIMITS + row, mask=real, other=0)
    hit = (bound >= tl.load(LEVEL + row)[None, :]) & (key[:, None] < limit[None, :])
    one = hit.to(tl.int32)
    bit = tl.reshape(one, (TILE // 32, 32, N)) << tl.arange(0, 32)[None, :, None]
    word = tile * (TILE // 32) + tl.arange(0, TILE // 32)
    target = BITS + row[None, :] * (tiles * (TILE // 32)) + word[:, None]
    tl.store(target, tl.sum(bit, 1), mask=real[None, :])
    tl.store(COUNTS + row * tiles + tile, tl.sum(one, 0), mask=real)


@triton.jit(do_not_specialize=["tiles", "spans"])
def expand(
    BITS, STARTS, LISTED, tiles, spans, TILE: tl.constexpr, KEYS: tl.constexpr, PAIRED: tl.constexpr
):  # fmt: skip
    """Bits of KEYS keys -> their ids, ascending; grid (heads * rows * spans,), spans = cdiv(tiles * TILE, KEYS).

    BITS as in `scan`, STARTS (heads * rows * tiles + 1,) int64 -> LISTED: from STARTS[row * tiles] on a row's ids,
    int32, or with PAIRED ``row << 32 | id``, int64.
    """
    row = (tl.program_id(0) // spans).to(tl.int64)
    span = tl.program_id(0) % spans
    tile = span * (KEYS // TILE)
    start = tl.load(STARTS + row * tiles + tile)
    stop = tl.load(STARTS + row * tiles + tl.minimum(tile + KEYS // TILE, tiles))
    if start < stop:
        word = span * (KEYS // 32) + tl.arange(0, KEYS // 32)
        words = tiles * (TILE // 32)
        bits = tl.load(BITS + row * words + word, mask=word < words, other=0)
        j = tl.arange(0, 32)
        one = (bits[:, None] >> j[None, :]) & 1
        count = tl.sum(one, 1)
        place = (tl.cumsum(count, 0) - count)[:, None] + tl.cumsum(one, 1) - one
        listed = word[:, None] * 32 + j[None, :]
        if PAIRED:
            tl.store(LISTED + start + place, (row << 32) | listed.to(tl.int64), mask=one > 0)
        else:
            tl.store(LISTED + start + place, listed, mask=one > 0)


@triton.jit(do_not_specialize=["total", "rows"])
def refine(
    Q, K, PAIRS, THRESHOLDS, SCORES, KEEP, total, rows, room, D: tl.constexpr, C: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Score listed pairs in float64 and keep those that reach the threshold or its band; grid (cdiv(total, C),).

    Q (heads * rows, D), K (heads, room, D), PAIRS (total,) int64 as in `expand`, THRESHOLDS (heads * rows,) float64 ->
    SCORES (total,) float64, KEEP (total,) int8.  Products of float32 are exact in float64; the band is that of
    `hsr.exact`.
    """
    o = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    ok = o < total
    pair = tl.load(PAIRS + o, mask=ok, other=0)
    row = pair >> 32
    key = (row // rows) * room + (pair & 0x7FFFFFFF)
    score = tl.zeros((C,), tl.float64)
    size = tl.zeros((C,), tl.float64)
    for first in range(0, D, PART):
        c = first + tl.arange(0, PART)
        m = ok[:, None] & (c[None, :] < D)
        k = tl.load(K + key[:, None] * D + c[None, :], mask=m, other=0.0).to(tl.float32).to(tl.float64)
        q = tl.load(Q + row[:, None] * D + c[None, :], mask=m, other=0.0).to(tl.float32).to(tl.float64)
        product = q * k
        score += tl.sum(product, 1)
        size += tl.sum(tl.abs(product), 1)
    band = size * ((D + 1) * 2.3e-16) + (D + 1) * 1e-323
    tl.store(SCORES + o, score, mask=ok)
    tl.store(KEEP + o, (score + band >= tl.load(THRESHOLDS + row)).to(tl.int8), mask=ok)


@dataclass(frozen=True)
class Marked:
    """What a scan leaves: `expand` makes lists of it.

    Attributes:
        bits: (heads * rows, words) int32.
        starts: (heads * rows * tiles + 1,) int64: where each row's and tile's candidates begin in a list of them all.
        tile: keys of a tile.
    """

    bits: torch.Tensor
    starts: torch.Tensor
    tile: int

    @property
    def tiles(self) -> int:
        """Tiles of a row."""
        return self.bits.shape[1] * 32 // self.tile

    @property
    def row_starts(self) -> torch.Tensor:
        """(heads * rows + 1,) int64: where each row's candidates begin."""
        return self.starts[:: self.tiles]

    def listed(self, target: torch.Tensor) -> None:
        """Fill target with ids (int32) or pairs (int64), see `expand`; it must hold them all."""
        spans = triton.cdiv(self.tiles * self.tile, SPAN)
        expand[(len(self.bits) * spans,)](
            self.bits, self.starts, target, self.tiles, spans, self.tile, SPAN, target.dtype == torch.int64,
            num_warps=4,
        )  # fmt: skip


def marked(coded: Int8Codes, queries: torch.Tensor, thresholds: torch.Tensor, limits: torch.Tensor) -> Marked:
    """The keys that can reach the thresholds: no host sync, and the same launches whatever is found.

    queries (g, rows, d) in the keys' dtype, rows >= 1; thresholds (g, rows) float64; limits (g, rows) int32, at most n;
    all contiguous.
    """
    heads, rows, d = queries.shape
    columns, row = padded(d), coded.codes.shape[2]
    tile, block = tile_keys(columns), min(max(triton.next_power_of_2(rows), 8), 64)
    tiles, blocks = max(triton.cdiv(coded.n, tile), 1), triton.cdiv(rows, block)

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=queries.device)

    rounded = new(heads * rows, 2, columns, dtype=torch.int8)
    reach, width, level = new(3, heads * rows, dtype=torch.float32)
    prepare[(heads * rows,)](
        queries, coded.middle, coded.weights, thresholds, rounded, reach, width, level, rows, d, columns, num_warps=1
    )
    bits = new(heads * rows, tiles * (tile // 32), dtype=torch.int32)
    counts = new(heads * rows * tiles, dtype=torch.int32)
    scan[(blocks * tiles, heads)](
        coded.codes, coded.steps, coded.slack, rounded, reach, width, level, limits, bits, counts, coded.room, rows,
        blocks, tiles, row, columns, block, tile, num_warps=4,
    )  # fmt: skip
    starts = torch.zeros(len(counts) + 1, dtype=torch.int64, device=queries.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return Marked(bits, starts, tile)


def refined(
    coded: Int8Codes, queries: torch.Tensor, thresholds: torch.Tensor, pairs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (total,) int64 of `Marked.listed` -> scores (total,) float64, and which are reported (total,) bool."""
    total, (_, rows, d) = len(pairs), queries.shape
    scores = torch.empty(total, dtype=torch.float64, device=pairs.device)
    keep = torch.empty(total, dtype=torch.int8, device=pairs.device)
    if total:
        part = min(padded(d), 128)
        many = 2048 // part
        refine[(triton.cdiv(total, many),)](
            queries, coded.keys, pairs, thresholds, scores, keep, total, rows, coded.room, d, many, part, num_warps=4
        )
    return scores, keep.bool()


def padded(d: int) -> int:
    """Columns of a kernel's tile for width d: a power of two, at least what an int8 product needs."""
    return max(32, triton.next_power_of_2(d))


def tile_keys(columns: int) -> int:
    """Keys of a scan's tile, which four warps hold in their registers."""
    return 128 if columns <= 128 else 64
