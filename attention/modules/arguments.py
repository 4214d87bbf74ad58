"""Tensors at the public edge of the modules: what came, if it is not what was wanted."""

from __future__ import annotations

from typing import Any

import torch

from hsr import checks
from hsr.errors import ArgumentError


def tensor(name: str, value: Any, *sizes: int | str, dtype: torch.dtype | tuple[torch.dtype, ...]) -> torch.Tensor:
    """A tensor of the given sizes, a letter standing for any of at least 1, and of the dtype or one of them.

    Raises:
        ArgumentError: anything else; the message has the name, what was wanted and what came.
    """
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    wanted = "(" + ", ".join(map(str, sizes)) + ") of " + " or ".join(str(x).removeprefix("torch.") for x in dtypes)
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(f"{name} must be a tensor {wanted}; got {type(value).__name__}")
    fits = len(sizes) == value.ndim and all(
        (found > 0 if isinstance(size, str) else size == found) for size, found in zip(sizes, value.shape, strict=True)
    )
    if not fits or value.dtype not in dtypes:
        found = str(value.dtype).removeprefix("torch.")
        raise ArgumentError(f"{name} must be {wanted}; got {tuple(value.shape)} of {found}")
    return value


def finite(name: str, value: torch.Tensor) -> torch.Tensor:
    """The tensor, if it has neither NaN nor infinities; a GPU is waited for.

    Raises:
        ArgumentError: it has.
    """
    if not bool(torch.isfinite(value).all()):
        raise ArgumentError(f"{name} must be finite; got {value[~torch.isfinite(value)][0].item()}")
    return value


def host(name: str, value: Any) -> None:
    """Nothing, for what is on the CPU.

    Raises:
        ArgumentError: a tensor on another device.
    """
    if checks.device(value) != "cpu":
        raise ArgumentError(f"{name} must be on the CPU; got device {value.device}")


def share(name: str, whole: Any, part: str, parts: int) -> int:
    """``whole / parts``, both whole numbers of at least 1, if that is one.

    Raises:
        ArgumentError: it is not.
    """
    if checks.whole(name, whole, 1) % parts:
        raise ArgumentError(f"{name} must be a multiple of {part}, {parts}; got {whole}")
    return int(whole) // parts
