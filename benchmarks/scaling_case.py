"""Case ``scaling``: how work and time grow with n, for a query, for decoding and for a whole prompt.

Keys.  "gaussian": standard normal, new ones for every n.  "smollm2": keys of SmolLM2-135M on the essays, after the
rotary embedding, drawn from all layers and heads together, because one head has no more than the model's context; a
tree also tells the heads apart, which it could not in an index of one head (case ``pruning`` looks at single heads).
Widths below the model's 64 are its keys' and queries' leading principal axes.  Queries are random directions, and the
model's own.

Thresholds.  Exact ranks, one per query: 64 keys, or n^(4/5) as in the paper.  The gate compares every timed answer with
float64 scores, and every output of attention with float64 attention.

Work.  What `HSRIndex` counts: visited, the bounds evaluated, plus scanned, the keys read at full precision.  Keys of a
box that is reported whole are in neither; nor is the sample that places the half-space of a top-r (1024 keys at most).
"brute" is the linear method of ours, "numpy" and "dense" are numpy over all keys.  A time is that of one call, some
tens of microseconds of Python included, so that small work grows slower in time than in work.

Columns and fits: see `benchmarks.ledger`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks import real_keys
from benchmarks.attending import DENSE, RULE, WEIGHTS
from benchmarks.decoding import Decoding
from benchmarks.key_laws import directions, gaussian
from benchmarks.ledger import RULES, Ledger, Row, Series
from benchmarks.prompts import prefilled, prompt
from benchmarks.searches import Problem, dense_searcher, problem, searched, searcher, serving
from hsr import HSRIndex

SEED = 20241
LINEAR = "brute"  # no end of its own: the dense one is faster
MOST = 1 << 26  # entries of the keys: 256 MiB, of which an index and a baseline keep several copies

Note = Callable[[str], None]
Draw = Callable[[int], tuple[np.ndarray, np.ndarray]]  # n -> keys (n, d), queries (m, d), float32


class Extent(NamedTuple):
    """How much to measure."""

    sizes: Sequence[int]
    widths: Sequence[int]
    queries: int
    lengths: Sequence[int]  # of prompts
    end_widths: Sequence[int]  # of decoding and of prompts
    draws: int  # prompts of each length
    tokens: int  # of the essays
    quick: bool = False


FULL = Extent(
    sizes=[1 << e for e in range(12, 21)],
    widths=(2, 3, 4, 6, 8, 12, 16, 32, 64, 128),
    queries=32,
    lengths=[1 << e for e in range(9, 14)],
    end_widths=(2, 3, 4, 8, 64),
    draws=5,
    tokens=4096,
)
QUICK = Extent(
    sizes=[1 << e for e in range(9, 12)],
    widths=(2, 4),
    queries=4,
    lengths=(64, 128),
    end_widths=(2,),
    draws=2,
    tokens=128,
    quick=True,
)


def rows(quick: bool, note: Note) -> Iterator[Row]:
    """One row per kind, data, width, size, threshold and contender, then the fits."""
    extent, ledger = QUICK if quick else FULL, Ledger()
    for d in extent.widths:
        yield from _grown(ledger, "gaussian", d, partial(_gaussian, d, extent.queries), extent, note)
    for d in extent.end_widths:
        yield from _prompts(ledger, d, extent)
    yield from _real(ledger, extent, note)
    yield from ledger.fits(np.random.default_rng(SEED))


def _gaussian(d: int, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((SEED, d, n))
    return gaussian(rng, n, d), directions(rng, m, d)


def _real(ledger: Ledger, extent: Extent, note: Note) -> Iterator[Row]:
    """The model's queries and keys, as far as its tokens reach."""
    reason = real_keys.missing("the keys of SmolLM2 are left out")
    if reason:
        note(reason)
        return
    pool = real_keys.pool(extent.tokens, SEED)
    count, width = pool.keys.shape
    reached = extent._replace(sizes=[n for n in extent.sizes if n <= count], end_widths=())
    note(f"smollm2: n ends at {reached.sizes[-1]}; {extent.tokens} tokens are {count} keys of all layers and heads")
    for d in [d for d in extent.widths if d <= width]:
        yield from _grown(ledger, "smollm2", d, pool.projected(d, extent.queries), reached, note)


def _grown(ledger: Ledger, data: str, d: int, draw: Draw, extent: Extent, note: Note) -> Iterator[Row]:
    """One width at every size."""
    sizes = [n for n in extent.sizes if n * d <= MOST]
    if len(sizes) < len(extent.sizes):
        note(f"{data}, d = {d}: n ends at {sizes[-1]}; more would take too long to build, and too much memory")
    for n in sizes:
        keys, queries = draw(n)
        yield from _one_size(ledger, data, problem(keys, queries), extent)


def _one_size(ledger: Ledger, data: str, given: Problem, extent: Extent) -> Iterator[Row]:
    """Every contender's queries and, at some widths, decoding; one index at a time is kept."""
    n, d = given.keys.shape
    thresholds = {rule: given.at_rank(RULES[rule].keys(n)) for rule in RULES}
    decoding = _decoding(given, thresholds[RULE], extent) if d in extent.end_widths else None
    for method in serving(d):
        index = HSRIndex(given.keys[None], method)
        for rule, bounds in thresholds.items():
            costs = searched(method, searcher(index), given, bounds, extent.quick)
            yield ledger.row(Series("query", data, d, rule, method), n, costs)
        if decoding and method != LINEAR:
            for weight, costs in decoding.sparse(method, index):
                yield ledger.row(Series("decode", data, d, RULE, method, weight), n, costs)
    dense = dense_searcher(given, thresholds[RULE])
    for rule, bounds in thresholds.items():
        costs = searched("numpy", dense, given, bounds, extent.quick)
        yield ledger.row(Series("query", data, d, rule, "numpy"), n, costs)
    if decoding:
        for weight, costs in decoding.dense():
            yield ledger.row(Series("decode", data, d, RULE, DENSE, weight), n, costs)


def _decoding(given: Problem, thresholds: np.ndarray, extent: Extent) -> Decoding:
    n, d = given.keys.shape
    return Decoding(given, thresholds, gaussian(np.random.default_rng((SEED, d, n, 1)), n, d), extent.quick)


def _prompts(ledger: Ledger, d: int, extent: Extent) -> Iterator[Row]:
    """Prompts of every length, new ones for each draw; the same for every method."""
    methods = [method for method in serving(d) if method != LINEAR]
    for weight in WEIGHTS:
        for n in extent.lengths:
            asked = [prompt(np.random.default_rng((SEED, d, n, draw)), n, d, weight) for draw in range(extent.draws)]
            for method in (*methods, DENSE):
                costs = prefilled(method, asked)
                yield ledger.row(Series("prefill", "gaussian", d, RULE, method, weight), n, costs)
