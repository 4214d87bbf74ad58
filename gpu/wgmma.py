"""The launch of `listed.cu`: attention over shared lists on Hopper's tensor cores."""

from __future__ import annotations

import ctypes
import importlib.util

import torch

from attention.key_lists import KeyLists, row_blocks

POINTERS = (
    "q k v mean_k mean_v output lse q_sizes k_sizes token_starts tokens log_weights block_starts blocks mean_starts "
    "means counter"
).split()
STRIDES = "q_b q_h q_m k_b k_h k_n v_b v_h v_n o_b o_h o_m".split()
COUNTS = "rows keys heads groups lines all".split()
STAGES = {64: 6, 128: 3}  # tiles of keys and of values in shared memory, by width


class Arguments(ctypes.Structure):
    """As in `listed.cu`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in STRIDES),
        *((name, ctypes.c_int) for name in COUNTS),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether this launch has a form for the tensors, on their device."""
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    there = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
    whole = all(part.data_ptr() % 16 == 0 and not any(s % 8 for s in part.stride()[:3]) for part in (q, k, v))
    return there and whole and k.shape[3] in STAGES and v.shape[3] == k.shape[3]


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
    from gpu import compiled  # only where cuda-bindings is

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
    strides = (part.stride()[:3] for part in (q, k, v, output))
    arguments = Arguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(stride for group in strides for stride in group),
        m, n, h, h // g, row_blocks(m), B * h, scale,
    )  # fmt: skip
    kernel = compiled.kernel("listed.cu", "listed", tuple(settings.items()), q.device.index)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    kernel((programs, 1), 384, arguments)
