"""How long attention over shared lists takes here: rates measured in the process, once for a kind of call."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from attention.chances import starts
from attention.key_lists import KEYS, ROWS, KeyLists, bands, edges, ends, least_density, row_blocks
from hsr.backend import choose

ROWS_TIMED, HEADS_TIMED = 1024, 4  # of the prompt that is timed
TAKES = 3


class Rates(NamedTuple):
    """Seconds."""

    code: float  # to code a key for a line
    line: float  # for a line, however few its keys
    pair: float  # for a row and a key of its line


def density_for(seconds: float, shape: tuple[int, int, int], rates: Rates) -> float:
    """The density that attention of shape (heads, m, n) may have to take about so long; what is least, if none does.

    The least is one key a line beside the bands, and the most 1.
    """
    heads, m, n = shape
    seen, lines = int(ends(m, n).sum()), heads * row_blocks(m)
    left = seconds - rates.code * heads * int(edges(m, n).sum()) - rates.line * lines
    least = least_density(m, n) + row_blocks(m) / seen
    return float(np.clip(left / (rates.pair * ROWS * heads * seen), min(least, 1.0), 1.0))


@functools.lru_cache(maxsize=64)
def rates(d: int, width: int, dtype: str, rows: int, method: str) -> Rates:
    """Of keys of width d, values of another width and a dtype, lists by so many representative rows."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((HEADS_TIMED, ROWS_TIMED, size)).astype(dtype) for size in (d, d, width))
    m, lines, scale = ROWS_TIMED, HEADS_TIMED * row_blocks(ROWS_TIMED), d**-0.5
    select, attend = choose("key_lists", method), choose("listed", method)
    first = starts(0, HEADS_TIMED, row_blocks(m))
    selecting = _best(lambda: select(q, k, v, np.full(HEADS_TIMED, 0.3), first, rows, False, scale))
    none, every = _listing(np.zeros_like(edges(m, m))), _listing(edges(m, m) // KEYS)
    bare, full = (_best(lambda lists=lists: attend(q, k, v, lists, scale)) for lists in (none, every))  # type: ignore[misc]
    coded, paired = HEADS_TIMED * edges(m, m).sum(), ROWS * HEADS_TIMED * edges(m, m).sum()
    pair = max((full - bare) / paired, 1e-15)
    line = max(bare - pair * ROWS * HEADS_TIMED * bands(m, m).sum(), 0.0) / lines
    return Rates(selecting / coded, line, pair)


def _listing(blocks: np.ndarray) -> KeyLists:
    """The first so many key blocks (T,) on the lines of every head."""
    counts = np.tile(blocks, HEADS_TIMED)
    ids = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    nothing = np.zeros(len(counts) + 1, np.int64)
    return KeyLists(nothing, np.empty(0, np.int32), block_offsets=np.concatenate([[0], np.cumsum(counts)]), blocks=ids)


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that may have to compile."""
    call()
    taken = []
    for _ in range(TAKES):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return min(taken)
