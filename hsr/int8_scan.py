"""The inner loop of sketch and tree: int8 queries against blocks of 64 uint8 keys, as bit masks of hits.

Codes lie as (groups, 64, 4): for each group of four axes, four bytes of each of the block's 64 keys.  One load of 64
bytes then holds four axes of 16 keys, which is what ``vpdpbusd`` (AVX512-VNNI) multiplies and adds in one instruction.
numba cannot name that instruction, so `vnni_run` spells the loop in LLVM IR; `plain_run` is the same loop in Python and
serves every other CPU.  Both go over a run of blocks a call: passing an array counts references, which takes as long as
half a block.  Sums are exact: at most 255 * 127 * d, within int32 for d up to 66,000.
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
def plain_mask(codes, block, query, least):
    """A uint64 whose bit j is set iff ``sum_a codes[block, a // 4, j, a % 4] * query[a // 4, a % 4] >= least``.

    codes (blocks, groups, 64, 4) uint8, query (groups, 4) int8, least int32.
    """
    sums = np.zeros(KEYS, np.int32)
    words = codes[block].view(np.uint32)  # (groups, 64, 1): whole words are what compilers vectorise
    byte = np.uint32(255)
    for group in range(codes.shape[1]):
        f0, f1 = np.int32(query[group, 0]), np.int32(query[group, 1])
        f2, f3 = np.int32(query[group, 2]), np.int32(query[group, 3])
        word = words[group]
        for j in range(KEYS):
            w = word[j, 0]
            low = np.int32(w & byte) * f0 + np.int32((w >> np.uint32(8)) & byte) * f1
            high = np.int32((w >> np.uint32(16)) & byte) * f2 + np.int32(w >> np.uint32(24)) * f3
            sums[j] = np.int32(sums[j] + np.int32(low + high))
    mask = np.uint64(0)
    for j in range(KEYS):
        mask |= np.uint64(sums[j] >= least) << np.uint64(j)
    return mask


@njit(cache=True)
def plain_run(codes, first, queries, tile, least, masks):
    """`plain_mask` of a tile of queries and a run of blocks from ``first`` on.

    queries (tiles, w, groups, 4) int8, w being 1 or QUERIES, least (w, run) int32 -> masks (w, run) uint64.
    """
    for i in range(queries.shape[1]):
        for j in range(least.shape[1]):
            masks[i, j] = plain_mask(codes, first + j, queries[tile, i], least[i, j])


def _emit_masks(builder, p_codes, p_queries, groups, bounds):
    """LLVM IR for one block's keys against ``len(bounds)`` queries: their bounds (i32) -> their masks (i64).

    Codes (groups, 64, 4) uint8 and queries (queries, groups, 4) int8 are given by address.
    """
    i16, i32, i64 = (ir.IntType(bits) for bits in (16, 32, 64))
    vector = ir.VectorType(i32, LANES)
    multiply_add = builder.module.globals.get("llvm.x86.avx512.vpdpbusd.512") or ir.Function(
        builder.module, ir.FunctionType(vector, [vector] * 3), "llvm.x86.avx512.vpdpbusd.512"
    )

    def load(base, offset, kind):
        value = builder.load(builder.inttoptr(builder.add(base, offset), kind.as_pointer()))
        value.align = 1
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
    sums = [[builder.phi(vector) for _ in range(KEYS // LANES)] for _ in bounds]
    group.add_incoming(ir.Constant(i64, 0), before)
    keys_at = builder.mul(group, ir.Constant(i64, KEYS * AXES))
    keys = [load(p_codes, builder.add(keys_at, ir.Constant(i64, 4 * LANES * v)), vector) for v in range(KEYS // LANES)]
    stride = builder.mul(groups, ir.Constant(i64, AXES))
    for i, totals in enumerate(sums):
        row = builder.add(builder.mul(stride, ir.Constant(i64, i)), builder.mul(group, ir.Constant(i64, AXES)))
        factor = splat(load(p_queries, row, i32))
        for v, total in enumerate(totals):
            total.add_incoming(ir.Constant(vector, None), before)
            updated = builder.call(multiply_add, [total, keys[v], factor])
            total.add_incoming(updated, loop)
            totals[v] = updated
    following = builder.add(group, ir.Constant(i64, 1))
    group.add_incoming(following, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, groups), loop, done)
    builder.position_at_end(done)
    masks = []
    for bound, totals in zip(bounds, sums, strict=True):
        least, mask = splat(bound), ir.Constant(i64, 0)
        for v, total in enumerate(totals):
            part = builder.bitcast(builder.icmp_signed(">=", total, least), i16)
            mask = builder.or_(mask, builder.shl(builder.zext(part, i64), ir.Constant(i64, LANES * v)))
        masks.append(mask)
    return masks


@intrinsic
def _vnni(typing_context, codes, queries, groups, least, masks, stride):
    """Addresses of one block's codes, one tile's queries, an int32 and a uint64, the next query's lying stride further.

    groups counts groups of axes, stride entries.
    """
    address = types.uintp
    if (codes, queries, groups, least, masks, stride) != (address,) * 6:
        return None

    def codegen(context, builder, signature, arguments):
        p_codes, p_queries, n_groups, p_least, p_masks, n_stride = arguments
        i32, i64 = ir.IntType(32), ir.IntType(64)

        def place(base, i, kind):
            offset = builder.mul(n_stride, ir.Constant(i64, kind.width // 8 * i))
            return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

        bounds = [builder.load(place(p_least, i, i32)) for i in range(QUERIES)]
        for i, mask in enumerate(_emit_masks(builder, p_codes, p_queries, n_groups, bounds)):
            builder.store(mask, place(p_masks, i, i64))
        return context.get_dummy_value()

    return types.void(codes, queries, groups, least, masks, stride), codegen


@intrinsic
def _vnni_one(typing_context, codes, query, groups, least):
    """Addresses of one block's codes and of one query, the number of groups of axes, an int32 -> uint64."""
    address = types.uintp
    if (codes, query, groups, least) != (address, address, address, types.int32):
        return None

    def codegen(context, builder, signature, arguments):
        p_codes, p_query, n_groups, bound = arguments
        return _emit_masks(builder, p_codes, p_query, n_groups, [bound])[0]

    return types.uint64(codes, query, groups, least), codegen


@njit(cache=True)
def vnni_mask(codes, block, query, least):
    """See `plain_mask`; the arrays must be C-contiguous."""
    groups = codes.shape[1]
    return _vnni_one(
        np.uintp(codes.ctypes.data + block * (groups * KEYS * AXES)),
        np.uintp(query.ctypes.data),
        np.uintp(groups),
        least,
    )


@njit(cache=True)
def vnni_run(codes, first, queries, tile, least, masks):
    """See `plain_run`; the arrays must be C-contiguous."""
    groups, width, run = codes.shape[1], queries.shape[1], least.shape[1]
    size, stride = np.uintp(groups * KEYS * AXES), np.uintp(run)
    p_codes = np.uintp(codes.ctypes.data) + np.uintp(first) * size
    p_query = np.uintp(queries.ctypes.data) + np.uintp(tile * width * groups * AXES)
    p_least, p_masks = np.uintp(least.ctypes.data), np.uintp(masks.ctypes.data)
    if width == 1:
        for j in range(run):
            masks[0, j] = _vnni_one(p_codes + np.uintp(j) * size, p_query, np.uintp(groups), least[0, j])
        return
    for j in range(run):
        bounds, found = p_least + np.uintp(4 * j), p_masks + np.uintp(8 * j)
        _vnni(p_codes + np.uintp(j) * size, p_query, np.uintp(groups), bounds, found, stride)


@njit(cache=True)
def popcount(mask):
    """How many bits of a uint64 are set."""
    pairs = mask - ((mask >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bytes_ = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bytes_ * np.uint64(0x0101010101010101)) >> np.uint64(56))


HAS_VNNI = bool(llvmlite.binding.get_host_cpu_features().get("avx512vnni")) and not numba.config.DISABLE_JIT
scan_run = vnni_run if HAS_VNNI else plain_run
scan_one = vnni_mask if HAS_VNNI else plain_mask
