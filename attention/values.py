"""The value vectors of a cache, with what a certificate needs to know of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from hsr import checks
from hsr.errors import ArgumentError

LARGEST = 1e150  # squares of entries, and sums of them, stay finite


class Values:
    """Values (g, n, dv) that grow, inside a ball per head: ``||v_j - centre|| <= radius`` for every j.

    The centre is the mean of the first values and stays; the radius grows with the values.  It keeps its own copy,
    float32 for float32 and narrower, float64 for float64.
    """

    def __init__(self, values: Any) -> None:
        array = _moderate(values)
        if 0 in array.shape:
            raise ArgumentError(f"v must hold at least one value, head and dimension; got shape {array.shape}")
        self.dtype = checks.dtype_name("v", values)
        self._store = array.copy()  # (g, capacity, dv)
        self._n = array.shape[1]
        self.centre = array.mean(axis=1, dtype=np.float64)  # (g, dv)
        self.radius = self._reach(array)  # (g,)

    @property
    def array(self) -> np.ndarray:
        """The values (g, n, dv), as a view."""
        return self._store[:, : self._n]

    def checked(self, values: Any) -> np.ndarray:
        """Values (g, t, dv) that may be appended; ArgumentError if they do not match."""
        array = _moderate(values)
        found = checks.dtype_name("v", values)
        if found != self.dtype:
            raise ArgumentError(f"v must have the cache's dtype {self.dtype}; got {found}")
        heads, _, width = self._store.shape
        if (array.shape[0], array.shape[2]) != (heads, width):
            raise ArgumentError(f"v must be ({heads}, t, {width}) to match the cache; got {array.shape}")
        return array

    def append(self, array: np.ndarray) -> None:
        """Add values that `checked` returned."""
        n = self._n + array.shape[1]
        if n > self._store.shape[1]:
            heads, capacity, width = self._store.shape
            store = np.empty((heads, max(n, 2 * capacity), width), self._store.dtype)
            store[:, : self._n] = self.array
            self._store = store
        self._store[:, self._n : n] = array
        self._n = n
        self.radius = np.maximum(self.radius, self._reach(array))

    def _reach(self, array: np.ndarray) -> np.ndarray:
        """Largest distance (g,) of the given values from the centre, rounded up."""
        distance = np.sqrt(((array - self.centre[:, None]) ** 2).sum(axis=2)).max(axis=1, initial=0.0)
        return distance * (1 + 1e-12 * array.shape[2])


def _moderate(values: Any) -> np.ndarray:
    """Values as numpy, if the squares that a certificate sums are finite."""
    array = checks.floats("v", values, (3,))
    largest = float(np.abs(array).max(initial=0.0))
    if largest > LARGEST:
        raise ArgumentError(f"v must have entries of at most {LARGEST:.0e} in magnitude; got {largest:.3g}")
    return array
