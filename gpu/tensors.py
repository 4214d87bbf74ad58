"""Arguments on a GPU, checked once at the public edge: tensors of one device in, or an error that says what came.

Nothing is moved between devices, cast or replaced; a scalar is a Python or numpy number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from hsr import checks
from hsr.errors import ArgumentError

DTYPES = ("float32", "float16", "bfloat16")
P = ParamSpec("P")
R = TypeVar("R")


def where_it_lies(call: Callable[Concatenate[torch.Tensor, P], R]) -> Callable[Concatenate[torch.Tensor, P], R]:
    """The call, on the device of its first argument: Triton launches on the current one."""

    @functools.wraps(call)
    def wrapped(first: torch.Tensor, *rest: P.args, **named: P.kwargs) -> R:
        with torch.cuda.device_of(first):
            return call(first, *rest, **named)

    return wrapped


def sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, for which the host does not wait."""
    here = torch.from_numpy(array)
    return (here.pin_memory() if device.type == "cuda" else here).to(device, non_blocking=True)


def floats(
    name: str, array: Any, ndim: tuple[int, ...], device: torch.device, dtype: str | None = None
) -> torch.Tensor:
    """A finite tensor of one of the given ranks, on the device, of the dtype or of one of DTYPES; any strides."""
    if not isinstance(array, torch.Tensor) or array.device != device:
        raise ArgumentError(f"{name} must be a torch tensor on {device}; got {_what(array)}")
    found = checks.dtype_name(name, array)
    if found not in ((dtype,) if dtype else DTYPES):
        wanted = f"the index's dtype {dtype}" if dtype else f"dtype {', '.join(DTYPES)} on {device.type}"
        raise ArgumentError(f"{name} must have {wanted}; got {found}")
    if array.ndim not in ndim:
        axes = " or ".join(f"{k} axes" for k in ndim)
        raise ArgumentError(f"{name} must have {axes}; got shape {tuple(array.shape)}")
    if not bool(torch.isfinite(array).all()):
        raise ArgumentError(f"{name} must be finite; got NaN or infinity")
    return array.detach()


def thresholds(threshold: Any, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A number, or a tensor on the device of the queries' leading shape -> float64 of that shape, never NaN."""
    if not isinstance(threshold, torch.Tensor):
        number = checks.thresholds(_single("threshold", threshold, device), ())
        return torch.full(shape, float(number), dtype=torch.float64, device=device)
    values = _shaped("threshold", threshold, shape, device)
    if values.dtype == torch.bool or values.is_complex():
        raise ArgumentError(f"threshold must be a real number or a tensor of them; got {values.dtype}")
    if bool(torch.isnan(values).any()):
        raise ArgumentError("threshold must not be NaN; got NaN")
    return values.double()


def lengths(
    name: str, values: Any, shape: tuple[int, ...], most: int, device: torch.device, least: int = 0
) -> torch.Tensor:
    """None, a number or a tensor on the device, whole, in least..most -> int64 of ``shape``; None is ``most``."""
    if not isinstance(values, torch.Tensor):
        number = most if values is None else checks.lengths(name, _single(name, values, device), (), most, least)
        return torch.full(shape, int(number), dtype=torch.int64, device=device)
    found = _shaped(name, values, shape, device)
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise ArgumentError(f"{name} must be whole numbers; got {found.dtype}")
    if found.numel():
        low, high = (int(x) for x in torch.aminmax(found))
        if low < least or high > most:
            raise ArgumentError(f"{name} must lie in {least}..{most}; got {low}..{high}")
    return found.long()


def _shaped(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if tensor.device != device:
        raise ArgumentError(f"{name} must be a number or a tensor on {device}; got one on {tensor.device}")
    if tensor.ndim and tuple(tensor.shape) != shape:
        raise ArgumentError(
            f"{name} must be a scalar or have shape {shape} to match queries; got {tuple(tensor.shape)}"
        )
    return tensor.detach().expand(shape).contiguous()


def _single(name: str, value: Any, device: torch.device) -> Any:
    """A number of Python's or numpy's; arrays of numpy would have to be moved."""
    if np.ndim(value) or isinstance(value, str):
        raise ArgumentError(f"{name} must be a number or a tensor on {device}; got {_what(value)}")
    return value


def _what(value: Any) -> str:
    """What came, in a few words."""
    if isinstance(value, torch.Tensor):
        return f"one on {value.device}"
    return f"{type(value).__name__} of shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)[:80]
