"""The value vectors of a cache, with what a certificate needs to know of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from hsr import checks
from hsr.bounded import Bounded
from hsr.errors import ArgumentError
from hsr.growth import with_room
from hsr.lifted import Lifted

LARGEST = 1e150  # squares of entries, and sums of them, stay finite
NEAR = 0.1  # times the mean distance from the centre: values nearer are sampled as if there
FEW = 64  # values that tell what a mean distance is
TINY = 1e-150  # where all values coincide
SAMPLE = 1 << 12  # values whose covariance is taken


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
        self._lift, self._lifts = np.empty((len(array), 0)), 0
        self.distance = np.maximum(self._distance(array).mean(axis=1), TINY)  # (g,) of the first values from the centre
        self._directions, self._surveyed = np.ones(len(array)), 0
        self._lifted: dict[tuple[float, int], Lifted] = {}
        self._bounded: dict[tuple[int, float, int], Bounded] = {}

    @property
    def array(self) -> np.ndarray:
        """The values (g, n, dv), as a view."""
        return self._store[:, : self._n]

    @property
    def store(self) -> np.ndarray:
        """The values and room for more, (g, capacity, dv), C-contiguous."""
        return self._store

    @property
    def lift(self) -> np.ndarray:
        """``ln ||v_j - centre||``, not much below the typical one: what an attended key can change.

        (g, capacity) float64, C-contiguous: n of them, and room for more.
        """
        if self._lifts < self._n:
            first = self._lifts if self._lifts >= FEW else 0
            distance = self._distance(self.array[:, first:])
            if not first:
                self.distance = np.maximum(distance.mean(axis=1), TINY)
            self._lift = with_room(self._lift, first, self._n)
            self._lift[:, first : self._n] = np.log(np.maximum(distance, NEAR * self.distance[:, None]))
            self._lifts = self._n
        return self._lift

    @property
    def directions(self) -> np.ndarray:
        """(g,) how many principal directions the values spread over: ``tr(C)^2 / tr(C^2)`` of their covariance C.

        Taken anew whenever there are twice as many.
        """
        if self._n >= 2 * self._surveyed:
            sample = self.array[:, :: -(-self._n // SAMPLE)] - self.centre[:, None]
            sample /= np.maximum(self.radius, TINY)[:, None, None]
            moment = np.matmul(sample.swapaxes(1, 2), sample)
            square = (moment**2).sum(axis=(1, 2))
            trace = np.trace(moment, axis1=1, axis2=2)
            self._directions = np.divide(trace**2, square, out=np.ones(len(square)), where=square > 0)
            self._surveyed = self._n
        return self._directions

    @property
    def unit(self) -> np.ndarray:
        """(g,) in the values' dtype: powers of two that make the radius about 1, so that squares stay finite."""
        room = np.finfo(self._store.dtype).maxexp - 8
        return np.ldexp(np.ones((), self._store.dtype), np.clip(-np.frexp(self.radius)[1], -room, room))

    def lifted(self, keys: np.ndarray, queries: np.ndarray, scale: float, bytes_per_key: int) -> Lifted:
        """The codes of keys (g, n, d), lifted by these values; made once, then kept up with the keys.

        The queries (g, rows, G, d) of the first call set the codes' metric.
        """
        place = scale, bytes_per_key
        if place not in self._lifted:
            known = queries.reshape(len(queries), -1, queries.shape[-1])
            self._lifted[place] = Lifted(keys, self.lift, scale, bytes_per_key, known)
        self._lifted[place].follow(keys, self.lift)
        return self._lifted[place]

    def bounded(self, keys: np.ndarray, queries: np.ndarray, bytes_per_key: int, delta: float, seed: int) -> Bounded:
        """The bounded codes of keys (g, n, d); made once, then kept up with the keys.  Queries as for `lifted`."""
        place = bytes_per_key, delta, seed
        if place not in self._bounded:
            known = queries.reshape(len(queries), -1, queries.shape[-1])
            self._bounded[place] = Bounded(keys, bytes_per_key, known, delta, seed)
        self._bounded[place].follow(keys)
        return self._bounded[place]

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
        self._store = with_room(self._store, self._n, n)
        self._store[:, self._n : n] = array
        self._n = n
        self.radius = np.maximum(self.radius, self._reach(array))

    def _reach(self, array: np.ndarray) -> np.ndarray:
        """Largest distance (g,) of the given values from the centre, rounded up."""
        return self._distance(array).max(axis=1, initial=0.0) * (1 + 1e-12 * array.shape[2])

    def _distance(self, array: np.ndarray) -> np.ndarray:
        """Distances (g, t) of the given values from the centre."""
        return np.sqrt(((array - self.centre[:, None]) ** 2).sum(axis=2))


def _moderate(values: Any) -> np.ndarray:
    """Values as numpy, if the squares that a certificate sums are finite."""
    array = checks.floats("v", values, (3,))
    largest = float(np.abs(array).max(initial=0.0))
    if largest > LARGEST:
        raise ArgumentError(f"v must have entries of at most {LARGEST:.0e} in magnitude; got {largest:.3g}")
    return array
