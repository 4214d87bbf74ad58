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

ROWS_TIMED, HEADS_TIMED = (1024, 2048), 2  # of the prompts that are timed
TAKES = 3


class Rates(NamedTuple):
    """Seconds."""

    head: float  # to choose a head's keys, however few
    code: float  # more for each key and line that it may be listed on
    line: float  # to attend to a line, however few its keys
    pair: float  # more for each row and key of it


def density_for(seconds: float, shape: tuple[int, int, int], rates: Rates) -> float:
    """The density that attention of shape (heads, m, n) may have to take about so long; what is least, if none does.

    The least is one key a line beside the bands, and the most 1.
    """
    heads, m, n = shape
    seen, lines = int(ends(m, n).sum()), heads * row_blocks(m)
    left = seconds - heads * (rates.head + rates.code * int(edges(m, n).sum())) - rates.line * lines
    least = least_density(m, n) + row_blocks(m) / seen
    return float(np.clip(left / (rates.pair * ROWS * heads * seen), min(least, 1.0), 1.0))


@functools.lru_cache(maxsize=64)
def rates(d: int, width: int, dtype: str, rows: int, method: str) -> Rates:
    """Of keys of width d, values of another width and a dtype, lists by so many representatives."""
    short, long = (_prompt(m, d, width, dtype) for m in ROWS_TIMED)
    select = choose("key_lists", method)

    def selected(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        first = starts(0, HEADS_TIMED, row_blocks(q.shape[1]))
        select(q, k, v, np.full(HEADS_TIMED, 0.5), first, rows, False, d**-0.5)

    times = [_best(selected, *prompt) / HEADS_TIMED for prompt in (short, long)]
    coded = [int(edges(m, m).sum()) for m in ROWS_TIMED]
    code = max((times[1] - times[0]) / (coded[1] - coded[0]), 1e-15)
    head = max(times[0] - code * coded[0], 0.0)
    m, attend = ROWS_TIMED[1], choose("listed", method)
    none, every = (_listing(blocks) for blocks in (np.zeros_like(edges(m, m)), edges(m, m) // KEYS))
    bare, full = (_best(attend, *long, lists, d**-0.5) / HEADS_TIMED for lists in (none, every))
    pair = max((full - bare) / (ROWS * coded[1]), 1e-15)
    line = max(bare - pair * ROWS * int(bands(m, m).sum()), 0.0) / row_blocks(m)
    return Rates(head, code, line, pair)


def _prompt(m: int, d: int, width: int, dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((HEADS_TIMED, m, size)).astype(dtype) for size in (d, d, width)]


def _listing(blocks: np.ndarray) -> KeyLists:
    """The first so many key blocks (T,) on the lines of every head."""
    counts = np.tile(blocks, HEADS_TIMED)
    ids = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    nothing = np.zeros(len(counts) + 1, np.int64)
    return KeyLists(nothing, np.empty(0, np.int32), block_offsets=np.concatenate([[0], np.cumsum(counts)]), blocks=ids)


def _best(call: Callable[..., object], *arguments: object) -> float:
    """Seconds of the fastest of some calls, after one that may have to compile."""
    call(*arguments)
    taken = []
    for _ in range(TAKES):
        begun = time.perf_counter()
        call(*arguments)
        taken.append(time.perf_counter() - begun)
    return min(taken)
