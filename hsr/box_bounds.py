"""The inner loop of the tree: the bounds of the FAN nodes of a group, side by side in vector registers.

LLVM vectorises the same loop written in Python poorly (five times slower), so it is spelled in LLVM IR; it names no
processor's instructions, so every CPU runs it.  Products and sums may be fused or not: the bounds have room for both.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

FAN = 16  # nodes per group: one AVX-512 register of float32
FAR = 2.0**29  # beyond any sum of products of codes
ROUNDING = 2.0**-20  # relative, of `least`; several times the need
EXTRA = 3  # rows of a group besides its boxes: largest |k - c|^2, reach, 1 / step


@intrinsic
def _bounds(typing_context, group, query, point, width, cuts, least):
    """Addresses of a group, a query, a point and of FAN int32; see `judge`."""
    address = types.uintp
    if (group, query, point, width, least) != (address,) * 5 or cuts != types.UniTuple(types.float32, 6):
        return None

    def codegen(context, builder, signature, arguments):
        p_group, p_query, p_point, n_width, scalars, p_least = arguments
        f32, i32, i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
        vector, integers = ir.VectorType(f32, FAN), ir.VectorType(i32, FAN)

        def fused(a, b, c):  # a * b + c
            return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

        def splat(value):
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(i32, 0))
            return builder.shuffle_vector(
                one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(i32, FAN), [0] * FAN)
            )

        def constant(value):
            return ir.Constant(vector, [float(value)] * FAN)

        def row(number):
            offset = builder.mul(number, ir.Constant(i64, 4 * FAN))
            value = builder.load(builder.inttoptr(builder.add(p_group, offset), vector.as_pointer()))
            value.align = 4
            return value

        def entry(base, number):
            offset = builder.mul(number, ir.Constant(i64, 4))
            return builder.load(builder.inttoptr(builder.add(base, offset), f32.as_pointer()))

        def larger(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def smaller(a, b):
            return builder.select(builder.fcmp_ordered("<", a, b), a, b)

        def absolute(a):
            return larger(a, builder.fsub(constant(0.0), a))

        def bits(flags):
            return builder.zext(builder.bitcast(flags, ir.IntType(FAN)), i32)

        zero = constant(0.0)
        before = builder.block
        loop, done = builder.append_basic_block("axes"), builder.append_basic_block("verdict")
        builder.branch(loop)
        builder.position_at_end(loop)
        axis = builder.phi(i64)
        total, half, gap = (builder.phi(vector) for _ in range(3))
        axis.add_incoming(ir.Constant(i64, 0), before)
        q, p = entry(p_query, axis), entry(p_point, axis)
        middle, reach = row(axis), row(builder.add(axis, n_width))
        beyond = builder.fsub(absolute(builder.fsub(splat(p), middle)), reach)
        beyond = larger(beyond, zero)
        sums = (
            (total, fused(splat(q), middle, total)),
            (half, fused(absolute(splat(q)), reach, half)),
            (gap, fused(beyond, beyond, gap)),
        )
        for old, new in sums:
            old.add_incoming(zero, before)
            old.add_incoming(new, loop)
        following = builder.add(axis, ir.Constant(i64, 1))
        axis.add_incoming(following, loop)
        builder.cbranch(builder.icmp_unsigned("<", following, n_width), loop, done)
        builder.position_at_end(done)
        total, half, gap = (new for _, new in sums)
        low, sure, cap, lift, unstep, base = (splat(builder.extract_value(scalars, i)) for i in range(6))
        after = builder.shl(n_width, ir.Constant(i64, 1))
        far, size, inverse = (row(builder.add(after, ir.Constant(i64, i))) for i in range(EXTRA))
        near = builder.and_(
            builder.fcmp_ordered(">=", builder.fadd(total, half), low),
            builder.fcmp_ordered("<=", builder.fadd(gap, cap), far),
        )
        whole = builder.and_(near, builder.fcmp_ordered(">=", builder.fsub(total, half), sure))
        steps = builder.fsub(builder.fsub(low, builder.fmul(lift, size)), total)
        steps = builder.fmul(steps, builder.fmul(inverse, unstep))
        steps = larger(smaller(steps, constant(FAR)), constant(-FAR))
        rounding = builder.fmul(absolute(steps), constant(ROUNDING))
        steps = builder.fadd(builder.fsub(steps, rounding), base)
        builder.store(builder.fptosi(steps, integers), builder.inttoptr(p_least, integers.as_pointer()), align=4)
        return builder.or_(bits(near), builder.shl(bits(whole), ir.Constant(i32, FAN)))

    return types.uint32(group, query, point, width, cuts, least), codegen


@njit(cache=True)
def judge(groups, group, query, point, cuts, least):
    """Judge the nodes of one group of groups (groups, 2 d + 3, FAN) float32 -> near, sure: bit masks of nodes.

    The rows of a group are middles u and half widths h, then the largest |k - c|^2, the reach and 1 / step.  cuts are
    float32: low, sure, cap, lift, inverse, base.  A node is near iff ``<q, u> + <|q|, h>`` reaches low and its largest
    |k - c|^2 reaches cap plus the squared distance of point from its box, sure iff also ``<q, u> - <|q|, h>`` reaches
    sure.  least (FAN,) int32 gets ``(low - lift reach - <q, u>) / step * inverse + base``, less what that rounds.
    """
    d = len(query)
    masks = _bounds(
        np.uintp(groups.ctypes.data + group * ((2 * d + EXTRA) * FAN * 4)),
        np.uintp(query.ctypes.data),
        np.uintp(point.ctypes.data),
        np.uintp(d),
        cuts,
        np.uintp(least.ctypes.data),
    )
    return np.int64(masks & np.uint32((1 << FAN) - 1)), np.int64(masks >> np.uint32(FAN))
