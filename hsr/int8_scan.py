"""The inner loop of the sketch: four int8 queries against a block of 64 uint8 keys, as bit masks of hits.

Codes lie as (groups, 64, 4): for each group of four axes, four bytes of each of the block's 64 keys.  One load of 64
bytes then holds four axes of 16 keys, which is what ``vpdpbusd`` (AVX512-VNNI) multiplies and adds in one instruction.
numba cannot name that instruction, so `vnni_block` spells the loop in LLVM IR; `plain_block` is the same loop in Python
and serves every other CPU.  Sums are exact: at most 255 * 127 * d, within int32 for d up to 66,000.
"""

from __future__ import annotations

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

QUERIES = 4  # a tile of queries
KEYS = 64  # a block of keys
AXES = 4  # axes in a group
LANES = 16  # keys in a 512-bit register of int32


@njit(cache=True)
def plain_block(codes, block, queries, tile, least, masks):
    """Set bit j of masks[i] iff ``sum_a codes[block, a // 4, j, a % 4] * queries[tile, i, a // 4, a % 4] >= least[i]``.

    codes (blocks, groups, 64, 4) uint8, queries (tiles, 4, groups, 4) int8, least (4,) int32, masks (4,) uint64.
    """
    sums = np.empty(KEYS, np.int32)
    words = codes[block].view(np.uint32)  # (groups, 64, 1): whole words are what compilers vectorise
    byte = np.uint32(255)
    for i in range(QUERIES):
        row = queries[tile, i]
        sums[:] = 0
        for group in range(codes.shape[1]):
            f0, f1, f2, f3 = (
                np.int32(row[group, 0]),
                np.int32(row[group, 1]),
                np.int32(row[group, 2]),
                np.int32(row[group, 3]),
            )
            word = words[group]
            for j in range(KEYS):
                w = word[j, 0]
                low = np.int32(w & byte) * f0 + np.int32((w >> np.uint32(8)) & byte) * f1
                high = np.int32((w >> np.uint32(16)) & byte) * f2 + np.int32(w >> np.uint32(24)) * f3
                sums[j] = np.int32(sums[j] + np.int32(low + high))
        mask = np.uint64(0)
        for j in range(KEYS):
            mask |= np.uint64(sums[j] >= least[i]) << np.uint64(j)
        masks[i] = mask


@intrinsic
def _vnni(typing_context, codes, queries, groups, least, masks):
    """Addresses of one block's codes, one tile's queries, four int32 and four uint64; groups counts groups of axes."""
    address = types.uintp
    if (codes, queries, groups, least, masks) != (address,) * 5:
        return None

    def codegen(context, builder, signature, arguments):
        p_codes, p_queries, n_groups, p_least, p_masks = arguments
        i16, i32, i64 = (ir.IntType(bits) for bits in (16, 32, 64))
        vector = ir.VectorType(i32, LANES)
        multiply_add = builder.module.globals.get("llvm.x86.avx512.vpdpbusd.512") or ir.Function(
            builder.module, ir.FunctionType(vector, [vector] * 3), "llvm.x86.avx512.vpdpbusd.512"
        )

        def load(base, offset, kind, align):
            place = builder.inttoptr(builder.add(base, offset), kind.as_pointer())
            value = builder.load(place)
            value.align = align
            return value

        def splat(value):
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(i32, 0))
            return builder.shuffle_vector(
                one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(i32, LANES), [0] * LANES)
            )

        before = builder.block
        loop, done = builder.append_basic_block("groups"), builder.append_basic_block("compare")
        builder.branch(loop)
        builder.position_at_end(loop)
        group = builder.phi(i64)
        sums = [[builder.phi(vector) for _ in range(KEYS // LANES)] for _ in range(QUERIES)]
        group.add_incoming(ir.Constant(i64, 0), before)
        keys_at = builder.mul(group, ir.Constant(i64, KEYS * AXES))
        keys = [
            load(p_codes, builder.add(keys_at, ir.Constant(i64, 4 * LANES * v)), vector, 1)
            for v in range(KEYS // LANES)
        ]
        stride = builder.mul(n_groups, ir.Constant(i64, AXES))
        for i in range(QUERIES):
            row = builder.add(builder.mul(stride, ir.Constant(i64, i)), builder.mul(group, ir.Constant(i64, AXES)))
            factor = splat(load(p_queries, row, i32, 1))
            for v, total in enumerate(sums[i]):
                total.add_incoming(ir.Constant(vector, None), before)
                updated = builder.call(multiply_add, [total, keys[v], factor])
                total.add_incoming(updated, loop)
                sums[i][v] = updated
        following = builder.add(group, ir.Constant(i64, 1))
        group.add_incoming(following, loop)
        builder.cbranch(builder.icmp_unsigned("<", following, n_groups), loop, done)
        builder.position_at_end(done)
        for i in range(QUERIES):
            bound = splat(load(p_least, ir.Constant(i64, 4 * i), i32, 4))
            mask = ir.Constant(i64, 0)
            for v, total in enumerate(sums[i]):
                part = builder.bitcast(builder.icmp_signed(">=", total, bound), i16)
                shifted = builder.shl(builder.zext(part, i64), ir.Constant(i64, LANES * v))
                mask = builder.or_(mask, shifted)
            place = builder.inttoptr(builder.add(p_masks, ir.Constant(i64, 8 * i)), i64.as_pointer())
            builder.store(mask, place)
        return context.get_dummy_value()

    return types.void(codes, queries, groups, least, masks), codegen


@njit(cache=True)
def vnni_block(codes, block, queries, tile, least, masks):
    """See `plain_block`; the arrays must be C-contiguous."""
    groups = codes.shape[1]
    _vnni(
        np.uintp(codes.ctypes.data + block * (groups * KEYS * AXES)),
        np.uintp(queries.ctypes.data + tile * (groups * QUERIES * AXES)),
        np.uintp(groups),
        np.uintp(least.ctypes.data),
        np.uintp(masks.ctypes.data),
    )


@njit(cache=True)
def popcount(mask):
    """How many bits of a uint64 are set."""
    pairs = mask - ((mask >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bytes_ = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bytes_ * np.uint64(0x0101010101010101)) >> np.uint64(56))


HAS_VNNI = bool(llvmlite.binding.get_host_cpu_features().get("avx512vnni")) and not numba.config.DISABLE_JIT
scan_block = vnni_block if HAS_VNNI else plain_block
