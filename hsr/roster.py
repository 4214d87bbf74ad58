"""Deleting without rebuilding at once: which id each stored key has, and which stored keys are dead.

A deleted key stays in its structure, dead, and is struck from every report; when half of the stored keys are dead, the
index is rebuilt over the living (global rebuilding: Overmars, The Design of Dynamic Data Structures, 1983).  A rebuild
over L keys follows at least L deletions, and no deletion counts for two rebuilds: one key is built per deletion.

Ids are the positions that keys got when they were added; they are never reused.  Keys are stored in the order of their
ids, so the first keys by id are the first by place, and a bound on ids is a bound on places.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from hsr.errors import ArgumentError
from hsr.report import Hits


@njit(cache=True)
def _strike(dead, old, fresh, offsets, indices, scores, kept, ids):
    """Places (nnz,) -> ids of the living ones; their scores move forward in place; kept (m + 1,) are the offsets."""
    target = 0
    for i in range(len(offsets) - 1):
        for j in range(offsets[i], offsets[i + 1]):
            place = indices[j]
            if not (len(dead) and dead[place]):
                ids[target] = old[place] if place < len(old) else place - len(old) + fresh
                scores[target] = scores[j]
                target += 1
        kept[i + 1] = target


class Held(NamedTuple):
    """What an index holds of the ids below ``prefix``, for a caller that reads a few keys itself."""

    keys: np.ndarray  # (g, capacity, d), read-only, C-contiguous: s keys in the order of ids, then room; some are dead
    dead: np.ndarray  # (s,) bool, which of them are dead; (0,) where none is
    limits: np.ndarray  # like prefix, int64: how many of the keys, dead or not, have ids below it
    living: np.ndarray  # like prefix, int64: how many of those live


class Roster:
    """Ids and deaths of the stored keys.

    Attributes:
        stored: how many keys are stored, dead ones among them.
        old: (c,) int64, ascending; ids of the first c of them, which the last rebuild kept.
        fresh: id of the next; from there on ids are consecutive.
        n: how many ids were given.
        deaths: how many stored keys are dead.
    """

    def __init__(self, stored: int, old: np.ndarray, fresh: int, dead: np.ndarray) -> None:
        self.stored, self.old, self.fresh = stored, old, fresh
        self.n = fresh + stored - len(old)
        self.deaths = int(np.count_nonzero(dead))
        self._dead = dead  # (capacity,) bool, longer than the keys are many once one is dead

    @classmethod
    def of(cls, stored: int) -> Roster:
        """Keys of which none was ever deleted."""
        return cls(stored, np.empty(0, np.int64), 0, np.empty(0, bool))

    @property
    def alive(self) -> int:
        """How many keys live."""
        return self.stored - self.deaths

    @property
    def dead(self) -> np.ndarray:
        """(stored,) bool, which stored keys are dead; (0,) where none is.  A view."""
        return self._dead[: self.stored if self.deaths else 0]

    @property
    def ids(self) -> np.ndarray:
        """(stored,) int64, ascending: the ids of the stored keys."""
        return np.concatenate([self.old, np.arange(self.fresh, self.n)])

    @property
    def keep(self) -> np.ndarray:
        """(stored,) bool, which stored keys live.  A copy."""
        return ~self.dead if self.deaths else np.ones(self.stored, bool)

    def places(self, ids: np.ndarray) -> np.ndarray:
        """ids (...) int64 in 0..n -> how many stored keys have smaller ids: the place of the id's key, if stored."""
        return np.searchsorted(self.old, ids) + np.maximum(ids - self.fresh, 0) if self.fresh else ids

    def living(self, places: np.ndarray) -> np.ndarray:
        """places (...) int64 in 0..stored -> how many of the keys before each live."""
        if not self.deaths:
            return places
        ends, which = np.unique(places, return_inverse=True)
        gone = np.array([np.count_nonzero(self.dead[:end]) for end in ends], np.int64)
        return places - gone[which].reshape(places.shape)

    def found(self, ids: np.ndarray) -> np.ndarray:
        """ids (t,) int64 in 0..n-1 -> the places of their keys.

        Raises:
            ArgumentError: one of the keys is dead.
        """
        self._cover()
        places = self.places(ids)
        gone = self._dead[places] | (self.places(ids + 1) == places)
        if gone.any():
            raise ArgumentError(f"ids must be those of living keys; got {ids[gone][0]}, which was deleted before")
        return places

    def bury(self, places: np.ndarray) -> None:
        """Mark keys that `found` returned as dead."""
        self._dead[places] = True
        self.deaths += len(places)

    def extend(self, count: int) -> None:
        """Add living keys with the next ids."""
        self.stored, self.n = self.stored + count, self.n + count
        if self.deaths:
            self._cover()

    def rebuilt(self, keep: np.ndarray) -> Roster:
        """The roster once only the keys marked in keep (s,) bool are stored; keys beyond the stored ones are new."""
        count = len(keep) - self.stored
        ids = np.concatenate([self.ids, np.arange(self.n, self.n + count)])
        return Roster(int(np.count_nonzero(keep)), ids[keep], self.n + count, np.empty(0, bool))

    def reported(self, hits: Hits, collect: bool, index_dtype: type[np.integer]) -> Hits:
        """Collected hits at places -> those of living keys, at ids, or their counts alone; scores are overwritten."""
        offsets, ids = np.zeros_like(hits.offsets), np.empty(len(hits.indices), index_dtype)
        _strike(self.dead, self.old, self.fresh, hits.offsets, hits.indices, hits.scores, offsets, ids)
        size = int(offsets[-1]) if collect else 0
        return hits._replace(offsets=offsets, indices=ids[:size], scores=hits.scores[:size])

    def _cover(self) -> None:
        """Make room for the deaths of all stored keys, and for one place beyond."""
        if len(self._dead) <= self.stored:
            dead = np.zeros(2 * self.stored + 1, bool)
            dead[: len(self._dead)] = self._dead
            self._dead = dead
