"""A decode step in one launch (`step.cu`): a cache's buffers in the form that the kernel reads."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from gpu.planes import Planes

if TYPE_CHECKING:
    from gpu.sampled import Draws, SampledCache

POINTERS = (
    "q k v new_k new_v output pages codes query_map means spreads key_map key_mean centre floor half top lengths "
    "counts found status tickets seeds trim rho budget parts sums lse drawn"
).split()
STRIDES = "q_b q_h k_b k_h k_n k_p v_b v_h v_n v_p a_b a_h b_b b_h o_b o_h".split()
COUNTS = "room groups sinks recent least crowd cap padded most dense_below".split()
LONG = 1 << 18  # tokens from which more warps of a program pay
MOST = 64  # programs of a head
RING = 150_000  # bytes of shared memory for codes
ROUNDS = 4  # of eight keys a warp: up to so many, all keys are attended to sooner than some are chosen, on an H200


class Arguments(ctypes.Structure):
    """As in `step.cu`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in STRIDES),
        *((name, ctypes.c_int) for name in COUNTS),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


class Step:
    """The launch of a cache's steps.

    Args:
        cache: it must be one that `serves` accepts.
        warps: of a program; None is what was fastest on an H200.
        stages: rounds of codes in shared memory of every warp; None is what fits.
    """

    def __init__(self, cache: SampledCache, warps: int | None = None, stages: int | None = None) -> None:
        self._cache = cache
        planes, device, heads = cache.planes, cache.keys.device, cache.batch * cache.groups
        if warps is None:
            warps = 12 if cache.width <= 128 and planes.row < 32 and cache.room >= LONG else 8
        self._warps = warps
        self._splits = min(max(properties(device).multi_processor_count // heads, 1), MOST)

        placed = planes.on(device)
        self._query_map, self._key_map, self._half, self._top = placed.by_axis
        self._means, self._spreads = placed.axes(cache.means), placed.axes(cache.spreads)
        self._tickets = torch.zeros(heads, dtype=torch.int32, device=device)
        self._parts = torch.empty(heads, self._splits, cache.per, cache.width, device=device)
        self._sums = torch.empty(heads, self._splits, 2, cache.per, device=device)
        chosen = settings(
            cache.width, cache.per, planes, warps, stages, cache.draws, cache.tokens.page, shared_limit(device)
        ) | {"BF16": int(cache.keys.dtype == torch.bfloat16)}  # fmt: skip
        from gpu import compiled  # only where cuda-bindings is

        self._kernels = [  # both at once, because a capture of either must not compile
            compiled.kernel("step.cu", "step", tuple((chosen | {"GROW": grow}).items()), device.index)
            for grow in (0, 1)
        ]

    @property
    def dense_below(self) -> int:
        """Tokens below which attending to every key is the faster step."""
        return 8 * ROUNDS * self._warps * self._splits

    @staticmethod
    def serves(cache: SampledCache) -> bool:
        """Whether this launch has a form for the cache, on this device."""
        planes, device = cache.planes, cache.keys.device
        whole = planes.nibbles % 16 == 0 and (planes.row - planes.nibbles) % 8 == 0
        if device.type != "cuda" or not whole or cache.per > 8 or properties(device).major < 9 or not compiles():
            return False
        return shared_bytes(cache.width, cache.per, planes, 8, 2) <= shared_limit(device)

    def __call__(self, q: torch.Tensor, output: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None) -> None:
        """As `SampledCache.attend`, or as `SampledCache.step` with a token."""
        cache, held, draws = self._cache, self._cache.tokens, self._cache.draws
        new_k, new_v = (q, q) if k is None or v is None else (k, v)
        key_mean, centre, floor = cache._maps[1:4]
        tensors = (
            q, held.keys, held.values, new_k, new_v, output, held.pages, cache.codes, self._query_map, self._means,
            self._spreads, self._key_map, key_mean, centre, floor, self._half, self._top, cache.lengths, cache.counts,
            cache.found, cache.status, self._tickets, cache.seeds, cache.trim, cache.rho, cache.budget, self._parts,
            self._sums, cache.lse, cache.drawn,
        )  # fmt: skip
        k_b, k_h, k_n, k_p, v_b, v_h, v_n, v_p = held.strides
        strides = (
            *q.stride()[:2], k_b, k_h, k_n, k_p, v_b, v_h, v_n, v_p, *new_k.stride()[:2], *new_v.stride()[:2],
            *output.stride()[:2],
        )  # fmt: skip
        counts = (
            held.room, cache.groups, draws.sinks, draws.recent, cache.floor, cache.crowd, cache.cap, cache.padded,
            held.most, cache.dense_below,
        )  # fmt: skip
        arguments = Arguments(
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors), *strides, *counts, cache.scale
        )
        self._kernels[k is not None]((self._splits, cache.batch * cache.groups), 32 * self._warps, arguments)


@functools.cache
def compiles() -> bool:
    """Whether cuda-bindings is there."""
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


@functools.cache
def properties(device: torch.device) -> Any:
    """Of a GPU; stubs lack some of them."""
    return torch.cuda.get_device_properties(device)


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    return int(properties(device).shared_memory_per_block_optin)


def shared_bytes(width: int, per: int, planes: Planes, warps: int, stages: int) -> int:
    """The size of `Shared` in step.cu."""
    axes, threads = 2 * planes.nibbles + 4 * (planes.row - planes.nibbles), 32 * warps
    slices = threads // axes if axes <= threads else 1
    ends = warps * per * width + 2 * per * warps
    union = 4 * max(slices * per * axes, ends, 65 * per, 64 * width + 64)
    queries = 16 * width + 4 * width * (4 if per <= 4 else 8) + 8 * axes
    rest = 4 * 8 * 5 + warps * (64 + 8) * 8 + 8
    return -(-(warps * stages * 64 * planes.row + -(-union // 16) * 16 + queries + rest) // 128) * 128


def settings(
    width: int, per: int, planes: Planes, warps: int, stages: int | None, draws: Draws, page: int, limit: int
) -> dict[str, int]:
    """What `step.cu` is compiled with, but for GROW and BF16; ``limit`` bytes of shared memory are there."""
    if stages is None:
        stages = max(2, min(4, RING // (64 * planes.row * warps)))
        while stages > 2 and shared_bytes(width, per, planes, warps, stages) > limit:
            stages -= 1
    return {
        "D": width,
        "G": per,
        "NIBBLES": planes.nibbles,
        "CRUMBS": planes.row - planes.nibbles,
        "WARPS": warps,
        "STAGES": stages,
        "SYSTEMATIC": int(draws.systematic),
        "REDRAW": int(draws.redraw),
        "LISTING": int(draws.listing),
        "PAGE": page,
    }
