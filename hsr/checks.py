"""Validation at the public edge: numpy or torch CPU arrays in, plain numpy out, or an error that says what came.

Nothing here modifies its argument.  Keys and queries of float16, bfloat16 and float32 become float32 (exactly), float64
stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hsr.errors import ArgumentError

DTYPES = ("float64", "float32", "float16", "bfloat16")
NUMPY_NAMES = {np.dtype(name): name for name in DTYPES[:3]}  # looking one up is ten times faster than str(dtype)


def device(array: Any) -> str:
    """The kind of device that an array lies on, "cpu" or as torch calls it; "cpu" of anything that is no tensor."""
    return getattr(getattr(array, "device", None), "type", "cpu")


def dtype_name(name: str, array: Any) -> str:
    """The name of the array's dtype, one of DTYPES."""
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise ArgumentError(f"{name} must be a numpy array or a torch CPU tensor; got {type(array).__name__}")
    found = NUMPY_NAMES.get(array.dtype) or str(array.dtype).removeprefix("torch.")
    if found not in DTYPES:
        raise ArgumentError(f"{name} must have dtype {', '.join(DTYPES)}; got {found}")
    return found


def floats(name: str, array: Any, ndim: tuple[int, ...]) -> np.ndarray:
    """A finite array of one of the given ranks, as C-contiguous float32 or float64; a view where it is one already."""
    dtype = dtype_name(name, array)
    if array.ndim not in ndim:
        wanted = " or ".join(f"{k} axes" for k in ndim)
        raise ArgumentError(f"{name} must have {wanted}; got shape {tuple(array.shape)}")
    if not isinstance(array, np.ndarray):
        array = _from_torch(name, array)
    plain = np.ascontiguousarray(array, np.float64 if dtype == "float64" else np.float32)
    if not np.isfinite(plain).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(plain))[0])
        raise ArgumentError(f"{name} must be finite; got {plain[where]} at {where}")
    return plain


def _from_torch(name: str, tensor: Any) -> np.ndarray:
    if getattr(getattr(tensor, "device", None), "type", None) != "cpu":
        raise ArgumentError(f"{name} must be on the CPU; got device {getattr(tensor, 'device', None)}")
    tensor = tensor.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def grouped(name: str, heads: int, key_heads: int) -> int:
    """Query heads per key-value head, at least 1."""
    if heads == 0 or heads % key_heads:
        raise ArgumentError(f"{name} must have a positive multiple of {key_heads} heads to match keys; got {heads}")
    return heads // key_heads


def thresholds(threshold: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A scalar or an array of the queries' leading shape -> float64 of that shape, never NaN."""
    if hasattr(threshold, "shape") and not isinstance(threshold, np.ndarray | np.generic):
        threshold = _from_torch("threshold", threshold)
    values = np.asarray(threshold)
    if values.dtype.kind not in "fiu":
        raise ArgumentError(f"threshold must be a real number or an array of them; got {values.dtype}")
    if values.ndim and values.shape != shape:
        raise ArgumentError(f"threshold must be a scalar or have shape {shape} to match queries; got {values.shape}")
    if np.isnan(values).any():
        raise ArgumentError("threshold must not be NaN; got NaN")
    return np.full(shape, values, np.float64)


def lengths(name: str, values: Any, shape: tuple[int, ...], most: int, least: int = 0) -> np.ndarray:
    """None, a scalar or an array of ``shape``, whole numbers in least..most -> int64 of ``shape``; None is ``most``."""
    if values is None:
        return np.full(shape, most, np.int64)
    found = np.asarray(values)
    if found.dtype.kind not in "iu":
        raise ArgumentError(f"{name} must be whole numbers; got {found.dtype}")
    if found.ndim and found.shape != shape:
        raise ArgumentError(f"{name} must be a scalar or have shape {shape}; got {found.shape}")
    if found.size and (found.min() < least or found.max() > most):
        raise ArgumentError(f"{name} must lie in {least}..{most}; got {found.min()}..{found.max()}")
    return np.full(shape, found, np.int64)


def distinct(name: str, values: Any, below: int) -> np.ndarray:
    """A sequence or array (t,) of different whole numbers in ``0..below - 1`` -> int64 (t,)."""
    try:
        found = np.asarray(values)
    except (TypeError, ValueError) as fault:  # ragged, or not on the CPU
        raise ArgumentError(f"{name} must be a sequence of whole numbers; got {type(values).__name__}") from fault
    if found.ndim != 1:
        raise ArgumentError(f"{name} must be a sequence of whole numbers; got shape {found.shape}")
    if not found.size:
        return np.empty(0, np.int64)
    if found.dtype.kind not in "iu":
        raise ArgumentError(f"{name} must be whole numbers; got {found.dtype}")
    if found.min() < 0 or found.max() >= below:
        raise ArgumentError(f"{name} must lie in 0..{below - 1}; got {found.min()}..{found.max()}")
    ordered = np.sort(found)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.size:
        raise ArgumentError(f"{name} must name each key once; got {repeated[0]} more than once")
    return found.astype(np.int64)


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number in ``least..most``; booleans are refused."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise ArgumentError(f"{name} must be a whole number; got {value!r}")
    if value < least or (most is not None and value > most):
        span = f"at least {least}" if most is None else f"in {least}..{most}"
        raise ArgumentError(f"{name} must be {span}; got {value}")
    return int(value)


def real(name: str, value: Any, least: float, below: float) -> float:
    """A real number in ``[least, below)``."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise ArgumentError(f"{name} must be a number; got {value!r}")
    if not least <= value < below:  # NaN fails too
        raise ArgumentError(f"{name} must be in [{least}, {below}); got {value}")
    return float(value)
