"""Keys, queries and values from a file of arrays, with what was taken for what."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hsr import checks
from hsr.errors import ArgumentError

NAMES = {  # what an array is called where nobody says
    "keys": ("k", "K", "keys", "key", "key_states"),
    "queries": ("q", "Q", "queries", "query", "query_states"),
    "values": ("v", "V", "values", "value", "value_states"),
}


@dataclass(frozen=True)
class KeySet:
    """What a file holds, in the wider of float32 and the dtype it came in.

    Attributes:
        keys: (g, n, d).
        queries: (h, m, d), h a multiple of g; None where the file has none.
        limits: (m,) int64; query i sees the keys before ``limits[i]``.
        values: (g, n, dv), or None.
        said: what was taken for what, one line each.
    """

    keys: np.ndarray
    queries: np.ndarray | None
    limits: np.ndarray
    values: np.ndarray | None
    said: tuple[str, ...]


def read(path: Path, asked: Mapping[str, str | None], layer: int | None, causal: bool) -> KeySet:
    """Read a file of `numpy.savez`.

    Args:
        path: of the file.
        asked: names of the arrays "keys", "queries" and "values"; None finds them by NAMES.
        layer: which part of arrays with four axes, such as (layers, g, n, d), to take; None the first.
        causal: query i of m sees the keys up to ``i + n - m``.  Without it, an array "positions" (m,) says up to which
            key each query sees; where there is none, all see all.

    Raises:
        ArgumentError: no npz file, no keys in it, shapes that do not fit, NaN or infinity.
    """
    arrays = _arrays(path)
    said: list[str] = []
    parts: list[str] = []  # arrays of which a part is taken

    def taken(role: str, ndim: tuple[int, ...]) -> np.ndarray | None:
        name = _name(role, arrays, asked[role])
        if name is None:
            return None
        found = arrays[name]
        line = f"{role}: array {name}, {found.dtype} {found.shape}"
        if found.ndim == 4:
            part = layer or 0
            if part >= len(found):
                raise ArgumentError(f"--layer must be below {len(found)}, the first axis of {name}; got {part}")
            found, line = found[part], f"{line}, part {part} of the first axis"
            parts.append(name)
        said.append(line)
        return checks.floats(name, found, ndim)

    keys = taken("keys", (2, 3))
    assert keys is not None
    queries, values = taken("queries", (2, 3)), taken("values", (2, 3))
    if layer is not None and not parts:
        raise ArgumentError(f"--layer needs arrays with four axes; got {layer} where {'; '.join(said)}")
    keys = keys if keys.ndim == 3 else keys[None]
    if min(keys.shape) == 0 or keys.shape[1] < 2:
        raise ArgumentError(f"keys must hold at least two keys of at least one dimension; got shape {keys.shape}")
    if queries is not None:
        queries = queries if queries.ndim == 3 else queries[None]
        if queries.shape[2] != keys.shape[2] or 0 in queries.shape:
            raise ArgumentError(f"queries must be (h, m, {keys.shape[2]}) to match keys; got {queries.shape}")
        checks.grouped("queries", len(queries), len(keys))
        wide = np.result_type(keys, queries)
        keys, queries = keys.astype(wide, copy=False), queries.astype(wide, copy=False)
    if values is not None:
        values = values if values.ndim == 3 else values[None]
        if values.shape[:2] != keys.shape[:2] or 0 in values.shape:
            wanted = f"{(*keys.shape[:2], 'dv')} to match keys, dv at least 1"
            raise ArgumentError(f"values must be {wanted}; got {values.shape}")
    limits, line = _limits(arrays, keys.shape[1], queries, causal)
    return KeySet(keys, queries, limits, values, (*said, *line))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ArgumentError(f"FILE must be a file; there is none at {path}")
    if not zipfile.is_zipfile(path):
        raise ArgumentError(f"FILE must be an npz file, as numpy.savez writes it; {path} is not")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, MemoryError, NotImplementedError, zlib.error, zipfile.BadZipFile) as fault:
        raise ArgumentError(f"FILE must be an npz file of plain arrays; {path}: {fault}") from fault
    other = [name for name, part in found.items() if not isinstance(part, np.ndarray)]
    if other:
        raise ArgumentError(f"FILE must be an npz file of plain arrays; {path}: {', '.join(other)} is none")
    return found


def _name(role: str, arrays: Mapping[str, np.ndarray], asked: str | None) -> str | None:
    """The array that plays a role; keys may also be the only array with as many axes as keys have."""
    held = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items()) or "nothing"
    if asked is not None:
        if asked not in arrays:
            raise ArgumentError(f"--{role} must name an array of the file; got {asked!r}, it holds {held}")
        return asked
    found = next((name for name in NAMES[role] if name in arrays), None)
    if found is None and role == "keys":
        likely = [name for name, array in arrays.items() if array.ndim in (2, 3) and array.dtype.kind == "f"]
        if len(likely) != 1:
            raise ArgumentError(f"FILE must hold keys; name them by --keys, it holds {held}")
        return likely[0]
    return found


def _limits(
    arrays: Mapping[str, Any], n: int, queries: np.ndarray | None, causal: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    """How many keys each query sees, and the line that says so."""
    if queries is None:
        if causal:
            raise ArgumentError("--causal needs queries; got none")
        return np.empty(0, np.int64), ()
    m = queries.shape[1]
    if causal:
        if m > n:
            raise ArgumentError(f"queries must be at most as many as keys where they are causal; got {m} over {n}")
        return np.arange(n - m + 1, n + 1), ("queries are the last positions; none sees later keys",)
    positions = arrays.get("positions")
    if positions is not None and (positions.shape != (m,) or positions.dtype.kind not in "iu"):
        told = (
            f"the array positions, {positions.dtype} {positions.shape}, is not one whole number for each of {m} queries"
        )
        return np.full(m, n), (f"every query sees every key: {told}",)
    if positions is not None:
        if positions.min() < 0 or positions.max() >= n:
            raise ArgumentError(f"positions must lie in 0..{n - 1}; got {positions.min()}..{positions.max()}")
        return positions.astype(np.int64) + 1, ("a query sees the keys up to its entry of the array positions",)
    return np.full(m, n), ("every query sees every key",)
