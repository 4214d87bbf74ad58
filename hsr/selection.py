"""``method="auto"``: which structure suits these keys, from n, d and a measured sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsr.backend import choose

FEW = 1024  # up to here one pass over the keys costs less than any structure's overhead
SAMPLE = 1 << 15  # keys of the trial tree
PROBES = 16  # trial queries
SHARE = 0.01  # share of the keys that a trial query reports
PLANE = (
    "d = 2: the method layers answers from fewer keys, but its build takes several times a tree's and more as n grows; "
    "name it where very many queries repay that"
)


@dataclass(frozen=True)
class Choice:
    """A method and the reasons for it, in words."""

    method: str
    reasons: tuple[str, ...]


def asked(method: str) -> Choice:
    """The method the caller named."""
    return Choice(method, ("asked for by name",))


def suggest(keys: np.ndarray) -> Choice:
    """keys (n, d) -> ``brute`` for few keys; else ``tree`` if a trial tree reads fewer bytes than ``sketch`` would.

    Never ``layers``: the build is what most callers wait for, and only the caller knows how many queries will follow.

    The trial: a tree over at most SAMPLE keys, probed in the directions of PROBES keys from their mean, at thresholds
    that report SHARE of them.  A tree reads 4 d bytes for a key it scans and 8 d for a box; a sketch reads d for every
    key.
    """
    n = len(keys)
    if n <= FEW:
        return Choice("brute", (f"{n} keys are at most {FEW}: scoring every one is cheapest",))
    sample = np.ascontiguousarray(keys[:: -(-n // SAMPLE)])
    size = len(sample)
    scale = max(float(np.abs(sample).max()), 1e-300)
    unit = (sample / scale).astype(np.float64)
    directions = np.ascontiguousarray(unit[:: max(1, size // PROBES)] - unit.mean(axis=0))
    thresholds = np.quantile(directions @ unit.T, 1 - SHARE, axis=1) * scale
    limits = np.full(len(directions), size, np.int64)
    hits = choose("build", "tree")(sample).report(sample, directions, thresholds, limits, False)
    scanned, visited = hits.scanned.mean() / size, hits.visited.mean() / size
    cost = 4 * scanned + 8 * visited
    measured = (
        f"a trial tree over {size} keys scanned {scanned:.1%} of them and {visited:.1%} as many boxes "
        f"at {SHARE:.0%} reported"
    )
    verdict = f"it would read {cost:.2f} d bytes per key, a sketch reads 1 d"
    return Choice("tree" if cost < 1 else "sketch", (measured, verdict) + (PLANE,) * (keys.shape[1] == 2))
