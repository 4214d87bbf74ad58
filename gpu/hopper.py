"""The launches of CUDA C++ that sparse prefill has: `listed.cu`, `importance.cu` for Hopper's tensor cores, `codes.cu`.

They do what the kernels of `gpu.listed`, `gpu.importance` and `gpu.block_sampled` define, several times faster.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from functools import cache
from typing import Any

import torch

from attention.key_lists import KEYS, KeyLists, row_blocks
from hsr.errors import BackendUnavailable

STAGES = {64: 6, 128: 3}  # tiles of keys and of values in shared memory, by width
CODES_STAGES = {1: 4, 2: 4, 4: 5, 8: 5, 16: 5, 32: 5}  # tiles of keys that wait, by representatives of a block
ITEMS, SHORTEST, LONGEST = 8, 4, 32  # of a processor, so that all end together; their tiles
THREADS = 384  # of a program: one group that asks for tiles, two that multiply


def _structure(pointers: str, wide: str, narrow: str, scaled: bool, mapped: bool = False) -> type[ctypes.Structure]:
    """A kernel's `Arguments`: a tensor map, pointers, 64-bit and 32-bit numbers, a scale."""
    fields: list[tuple[str, Any]] = [("map", ctypes.c_ubyte * 128)] * mapped
    fields += [(name, ctypes.c_void_p) for name in pointers.split()]
    fields += [(name, ctypes.c_int64) for name in wide.split()]
    fields += [(name, ctypes.c_int) for name in narrow.split()]
    fields += [("scale", ctypes.c_float)] * scaled + [("padding", ctypes.c_ubyte * 64)] * mapped  # it is aligned so
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


Listed = _structure(
    "q k v mean_k mean_v output lse q_sizes k_sizes token_starts tokens log_weights block_starts blocks mean_starts "
    "means counter",
    "q_b q_h q_m k_b k_h k_n v_b v_h v_n o_b o_h o_m",
    "rows keys heads groups lines all",
    True,
)
Importance = _structure(
    "queries sums shares far codes counter",
    "",
    "rows keys heads groups first_head many lines room together chunk",
    True,
    mapped=True,
)
Codes = _structure(
    "codes histograms totals chances starts offsets tokens log_weights", "capacity", "shift lines room tables", False
)


@cache
def present() -> bool:
    """Whether CUDA C++ can be compiled here."""
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a Hopper; 0 of anything else."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on(device: torch.device) -> bool:
    """Whether CUDA C++ for Hopper can be compiled and run there."""
    return present() and _processors(device) > 0


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the tensor cores' kernels have a form for the tensors, on their device."""
    whole = all(part.data_ptr() % 16 == 0 and not any(s % 8 for s in part.stride()[:3]) for part in (q, k, v))
    return on(q.device) and whole and k.shape[3] in STAGES and v.shape[3] == k.shape[3]


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _launch(
    name: str,
    function: str,
    settings: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    arguments: ctypes.Structure,
    device: torch.device,
) -> None:
    from gpu import compiled  # only where cuda-bindings is

    assert device.index is not None
    compiled.kernel(name, function, tuple(settings.items()), device.index)(grid, threads, arguments)


def _tensor_map(x: torch.Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    """Of x (B, g, n, d): boxes of 64 rows by 64 columns, in shared memory as `hopper.cuh` has tiles."""
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    kind = (
        kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if x.dtype == torch.bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    )
    sizes = [driver.cuuint64_t(size) for size in reversed(x.shape)]
    bytes_apart = [  # of an axis of one, any will do
        driver.cuuint64_t(2 * stride if size > 1 else 16)
        for stride, size in zip(x.stride()[2::-1], x.shape[2::-1], strict=True)
    ]
    status, found = driver.cuTensorMapEncodeTiled(
        kind, 4, x.data_ptr(), sizes, bytes_apart, [driver.cuuint32_t(side) for side in (64, 64, 1, 1)],
        [driver.cuuint32_t(1)] * 4, driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if int(status):
        raise BackendUnavailable(f"CUDA says {status} to a tensor map of {tuple(x.shape)} with strides {x.stride()}")
    return (ctypes.c_ubyte * 128).from_buffer_copy(ctypes.string_at(int(found.getPtr()), 128))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: KeyLists,
    means: tuple[torch.Tensor, torch.Tensor],
    sizes: tuple[torch.Tensor | None, torch.Tensor | None],
    scale: float,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """As `gpu.listed.attend`, into output and lse."""
    B, h, m, d = q.shape
    g, n = k.shape[1:3]
    settings = {
        "D": d,
        "BF16": int(q.dtype == torch.bfloat16),
        "TOKENS": int(lists.log_weights is not None),
        "BLOCKS": int(lists.blocks is not None),
        "MEANS": int(lists.means is not None),
        "STAGES": STAGES[d],
    }
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    tensors = (
        q, k, v, *means, output, lse, *sizes, lists.token_offsets, lists.tokens, lists.log_weights,
        lists.block_offsets, lists.blocks, lists.mean_offsets, lists.means, counter,
    )  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *output.stride()[:3])
    arguments = Listed(*map(_address, tensors), *strides, m, n, h, h // g, row_blocks(m), B * h, scale)
    _launch("listed.cu", "listed", settings, (_processors(q.device), 1), THREADS, arguments, q.device)


def importance(
    queries: torch.Tensor,
    k: torch.Tensor,
    sums: torch.Tensor,
    shares: torch.Tensor,
    far: torch.Tensor,
    codes: torch.Tensor,
    heads_and_rows: tuple[int, int],
    first: int,
    scale: float,
) -> None:
    """As `gpu.importance.code`, of heads from the first on, as many as there are codes for.

    Query heads of the same keys are scored side by side, if all of them are at work.
    """
    h, m = heads_and_rows
    g, n, d = k.shape[1:]
    many, lines, room = codes.shape
    R = queries.shape[2]
    settings = {"D": d, "BF16": int(k.dtype == torch.bfloat16), "R": R, "STAGES": CODES_STAGES[R]}
    counter = torch.zeros(1, dtype=torch.int32, device=k.device)
    tiles = many * R * lines * (n - m + room) // (4 * KEYS * KEYS)  # of 128 keys and 256 representatives
    chunk = KEYS * min(max(tiles // (ITEMS * _processors(k.device)), SHORTEST), LONGEST)
    arguments = Importance(
        _tensor_map(k), *map(_address, (queries, sums, shares, far, codes, counter)), m, n, h, h // g, first, many,
        lines, room, math.gcd(h // g, first, many), chunk, scale,
    )  # fmt: skip
    _launch("importance.cu", "importance", settings, (_processors(k.device), 1), THREADS, arguments, k.device)


def count(codes: torch.Tensor, histograms: torch.Tensor, totals: torch.Tensor, shift: int) -> None:
    """As `gpu.block_sampled.count`."""
    many, lines, room = codes.shape
    arguments = Codes(*map(_address, (codes, histograms, totals)), *[None] * 5, 0, shift, lines, room, 0)
    _launch("codes.cu", "count", {}, (lines, many), 256, arguments, codes.device)


def draw(
    codes: torch.Tensor,
    chances: torch.Tensor,
    starts: torch.Tensor,
    offsets: torch.Tensor,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    shift: int,
) -> None:
    """As `gpu.block_sampled.draw`."""
    many, lines, room = codes.shape
    arguments = Codes(
        *map(_address, (codes, None, None, chances, starts, offsets, tokens, weights)), len(tokens), shift, lines, room,
        chances.shape[1],
    )  # fmt: skip
    _launch("codes.cu", "draw", {}, (lines, many), 32, arguments, codes.device)
