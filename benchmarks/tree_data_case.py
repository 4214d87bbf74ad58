"""Case ``tree-data``: how much of a tree a query looks at, by the keys' distribution and width.

The cost that matters is ``visited``, the nodes judged, and ``scanned``, the keys read, per query and as shares of n;
``work_share`` is their sum's.  Distributions: see `benchmarks.key_laws`; on the moment curve and on the sphere every
key is a vertex of the hull, which leaves nothing to discard and peels into very few layers.  Queries are random
directions, thresholds their exact ranks: 64 keys, and 1 % of them.  "brute" is the linear method, "numpy" the dense
baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.key_laws import LAWS, directions
from benchmarks.ledger import MILLI, Costs, Row
from benchmarks.searches import Contender, dense_searcher, problem, searched, searcher, serving
from hsr import HSRIndex

WIDTHS, QUICK_WIDTHS = (2, 3, 4, 6, 8, 12, 16), (2, 3)
SIZE, QUICK_SIZE = 1 << 18, 1 << 10
QUERIES, QUICK_QUERIES = 32, 4
FEW, SHARE = 64, 100  # keys reported; one key in so many is reported
COMPARED = ("brute", "tree", "layers")
SEED = 20242


def rows(quick: bool, note: Callable[[str], None]) -> Iterator[Row]:
    """One row per distribution, width, threshold and contender."""
    n, m = (QUICK_SIZE, QUICK_QUERIES) if quick else (SIZE, QUERIES)
    for d in QUICK_WIDTHS if quick else WIDTHS:
        for i, (data, law) in enumerate(LAWS.items()):
            rng = np.random.default_rng((SEED, d, i))
            given = problem(law(rng, n, d), directions(rng, m, d))
            thresholds = {k: given.at_rank(k) for k in (FEW, n // SHARE)}
            dense = dense_searcher(given, thresholds[FEW])
            for method, contender in _contenders(given.keys, dense):
                for k, bounds in thresholds.items():
                    costs = searched(method, contender, given, bounds, quick)
                    yield {"data": data, "n": n, "d": d, "k": k, "method": method, **_figures(costs, n)}


def _contenders(keys: np.ndarray, dense: Contender) -> Iterator[tuple[str, Contender]]:
    """One index at a time is kept."""
    for method in serving(keys.shape[1]):
        if method in COMPARED:
            yield method, searcher(HSRIndex(keys[None], method))
    yield "numpy", dense


def _figures(costs: Costs, n: int) -> Row:
    """Means over the queries."""
    visited, scanned = float(costs.visited.mean()), float(costs.scanned.mean())
    low, high = np.percentile(costs.seconds, [25, 75])
    return {
        "visited": visited,
        "scanned": scanned,
        "reported": float(costs.reported.mean()),
        "work_share": (visited + scanned) / n,
        "ms": float(costs.seconds.mean()) * MILLI,
        "spread": float(high - low) * MILLI,
    }
