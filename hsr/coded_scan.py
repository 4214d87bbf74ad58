"""The inner loop over codes of mixed width: four int8 queries against a block of 64 keys, as int32 sums.

`hsr.coder` has the layout.  A word is read once, as four registers of 16 keys; shifting and masking turn it into its
planes, each four axes of unsigned codes, which ``vpdpbusd`` (AVX512-VNNI) multiplies with four int8 of a query and
adds.  `vnni_sums` spells that loop in LLVM IR; `plain_sums` is the same loop in Python, for every other CPU.  Sums are
exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from hsr.int8_scan import HAS_VNNI

QUERIES = 4  # a tile of queries
KEYS = 64  # a block of keys
BYTES = 4  # of a key in a word, and axes in a plane
WIDTHS = (8, 4, 2, 1)  # bits of a code, in the order of a layout's words
LANES = 16  # keys in a 512-bit register of int32
REGISTERS = KEYS // LANES
DOT = "llvm.x86.avx512.vpdpbusd.512"


@njit(cache=True)
def plain_sums(codes, block, tiles, tile, words, sums):
    """sums[i, j] = sum over planes p and bytes t of tiles[tile, i, p, t] times the code of key j at that place.

    codes (blocks, words, 64, 4) uint8, tiles (tiles, 4, planes, 4) int8, words (4,) int64, sums (4, 64) int32.
    """
    sums[:] = 0
    word = plane = 0
    for group in range(len(WIDTHS)):
        width = 8 >> group
        mask = np.uint8((1 << width) - 1)
        for _ in range(words[group]):
            part = codes[block, word]
            for p in range(8 // width):
                shift = np.uint8(width * p)
                for i in range(QUERIES):
                    for t in range(BYTES):
                        factor = np.int32(tiles[tile, i, plane, t])
                        for j in range(KEYS):
                            sums[i, j] += factor * np.int32((part[j, t] >> shift) & mask)
                plane += 1
            word += 1


class _Emitter:
    """Writes the loop; one instance per compilation."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.i32, self.i64 = ir.IntType(32), ir.IntType(64)
        self.vector = ir.VectorType(self.i32, LANES)
        signature = ir.FunctionType(self.vector, [self.vector] * 3)
        self.dot = builder.module.globals.get(DOT) or ir.Function(builder.module, signature, DOT)

    def count(self, value: int) -> Any:
        return ir.Constant(self.i64, value)

    def load(self, address: Any, kind: Any) -> Any:
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = 1
        return value

    def splat(self, value: Any) -> Any:
        undefined = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.insert_element(undefined, value, ir.Constant(self.i32, 0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(self.i32, LANES), [0] * LANES))

    def words(self, width: int, trips: Any, state: list[Any], stride: Any) -> list[Any]:
        """A loop of ``trips`` words of the given width; state is (code address, query address, the 16 sums)."""
        b = self.builder
        before = b.block
        head, body, done = (b.append_basic_block(f"{name}{width}") for name in ("head", "body", "done"))
        b.branch(head)
        b.position_at_end(head)
        trip = b.phi(self.i64)
        carried = [b.phi(value.type) for value in state]
        trip.add_incoming(self.count(0), before)
        for phi, value in zip(carried, state, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_unsigned("<", trip, trips), body, done)
        b.position_at_end(body)
        codes, query, *sums = carried
        registers = [self.load(b.add(codes, self.count(4 * LANES * r)), self.vector) for r in range(REGISTERS)]
        mask = ir.Constant(self.vector, [0x01010101 * ((1 << width) - 1)] * LANES)
        for plane in range(8 // width):
            shift = ir.Constant(self.vector, [width * plane] * LANES)
            parts = registers if width == 8 else [b.and_(b.lshr(word, shift), mask) for word in registers]
            for i in range(QUERIES):
                at = b.add(query, b.add(b.mul(stride, self.count(i)), self.count(BYTES * plane)))
                factor = self.splat(self.load(at, self.i32))
                for r, part in enumerate(parts):
                    place = i * REGISTERS + r
                    sums[place] = b.call(self.dot, [sums[place], part, factor])
        following = [b.add(codes, self.count(KEYS * BYTES)), b.add(query, self.count(BYTES * (8 // width))), *sums]
        for phi, value in zip(carried, following, strict=True):
            phi.add_incoming(value, b.block)
        trip.add_incoming(b.add(trip, self.count(1)), b.block)
        b.branch(head)
        b.position_at_end(done)
        return carried


@intrinsic
def _vnni(typing_context, codes, queries, stride, eights, fours, twos, ones, sums):
    """Addresses of a block's codes, of a tile's queries (``stride`` bytes apart) and of the sums; words per width."""

    def codegen(context, builder, signature, arguments):
        at_codes, at_queries, n_stride, *trips, at_sums = arguments
        emit = _Emitter(builder)
        state = [at_codes, at_queries, *[ir.Constant(emit.vector, None)] * (QUERIES * REGISTERS)]
        for width, count in zip(WIDTHS, trips, strict=True):
            state = emit.words(width, count, state, n_stride)
        for place, total in enumerate(state[2:]):
            address = builder.add(at_sums, emit.count(place * 4 * LANES))
            builder.store(total, builder.inttoptr(address, emit.vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.uintp] * 8), codegen


@njit(cache=True)
def vnni_sums(codes, block, tiles, tile, words, sums):
    """See `plain_sums`; the arrays must be C-contiguous."""
    stride = tiles.shape[2] * BYTES
    _vnni(
        np.uintp(codes.ctypes.data + block * (codes.shape[1] * KEYS * BYTES)),
        np.uintp(tiles.ctypes.data + tile * (QUERIES * stride)),
        np.uintp(stride),
        np.uintp(words[0]),
        np.uintp(words[1]),
        np.uintp(words[2]),
        np.uintp(words[3]),
        np.uintp(sums.ctypes.data),
    )


block_sums = vnni_sums if HAS_VNNI else plain_sums
