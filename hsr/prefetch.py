"""Asking the processor to fetch a row that will be read soon."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LINE = 64  # bytes in a cache line


@intrinsic
def _prefetch(typing_context, address):
    def codegen(context, builder, signature, arguments):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        )
        read, keep, data = (ir.Constant(word, value) for value in (0, 3, 1))
        builder.call(hint, [builder.inttoptr(arguments[0], byte), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.uintp), codegen


@njit(cache=True)
def prefetch_bytes(address, width):
    """Begin to load ``width`` bytes from an address (uintp) on; a hint without effect on any result."""
    for offset in range(0, width, LINE):
        _prefetch(address + np.uintp(offset))


@njit(cache=True)
def prefetch_row(rows, i):
    """`prefetch_bytes` of row i of rows (n, d), C-contiguous; where it counts, the address is found once instead."""
    width = rows.shape[1] * rows.itemsize
    prefetch_bytes(np.uintp(rows.ctypes.data) + np.uintp(i * width), width)
