"""Case ``pruning``: which share of a real model's keys survives which exact bound, layer by layer.

SmolLM2-135M reads the essays; the queries are those of the last positions, the keys those that all of them see, after
the rotary embedding.  Thresholds are exact ranks, one per query: n^(4/5) keys, or 1 % of them.  A row is the mean over
a layer's key heads, their query heads and positions.

``surviving_fraction`` is the share of keys that a bound does not exclude, ``ratio_to_reported`` how many survive per
key reported: 1 is perfect.  Bounds: see `benchmarks.pruning_bounds`.  The gate: a bound that excludes a key of the
half-space stops the run.  ``score_rms_nats`` is the root mean square, over all queries and keys, of what the codes of
keys and queries get wrong in ``<q, k> / sqrt(d)``: 0.01 changes a softmax weight by 1 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from benchmarks import pruning_bounds as bounds
from benchmarks import real_keys
from benchmarks.gate import WrongAnswer
from benchmarks.ledger import RULES, Row
from benchmarks.real_keys import Layer

TOKENS, QUICK_TOKENS = 4096, 256  # keys
RANKS: dict[str, Callable[[int], int]] = {"n^0.8": RULES["n^0.8"].keys, "1%": lambda n: max(1, n // 100)}
BOUNDS: dict[tuple[str, str], bounds.MakeBound] = {  # name, order of the keys (none: one bound per key) -> maker
    ("ball of 16", "tokens"): partial(bounds.balls, order=bounds.tokens),
    ("ball of 16", "kd"): partial(bounds.balls, order=bounds.kd),
    ("box of 16", "tokens"): partial(bounds.boxes, order=bounds.tokens),
    ("box of 16", "kd"): partial(bounds.boxes, order=bounds.kd),
    ("16 leading axes", "none"): partial(bounds.suffix, leading=16),
    ("32 leading axes", "none"): partial(bounds.suffix, leading=32),
    ("int4 codes", "none"): partial(bounds.Codes, levels=bounds.INT4),
    ("int8 codes", "none"): partial(bounds.Codes, levels=bounds.INT8),
}
ROUNDING = 1e-10  # of a score, over the largest: float64 bounds and scores, with room

missing = partial(real_keys.missing, "pruning")


def rows(quick: bool, note: Callable[[str], None]) -> Iterator[Row]:
    """One row per layer, bound and threshold."""
    n = QUICK_TOKENS if quick else TOKENS
    found = real_keys.layers(n + real_keys.LAST - 1)
    note(f"{len(found)} layers, {found[0].keys.shape[0]} key heads, {found[0].queries.shape[0]} query heads")
    for number, layer in enumerate(found):
        yield from layer_rows(number, layer)


def layer_rows(number: int, layer: Layer) -> Iterator[Row]:
    """Means over the heads of one layer."""
    _, positions, d = layer.queries.shape
    n = layer.keys.shape[1] - positions + 1  # every query sees these
    grouped = layer.queries.reshape(len(layer.keys), -1, d).astype(np.float64)  # (g, h / g * positions, d)
    pairs = list(zip(grouped, layer.keys[:, :n].astype(np.float64), strict=True))
    return ({"layer": number, **row} for row in survival(pairs))


def survival(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[Row]:
    """A row per bound and rule: means over heads, each queries (m, d) and keys (n, d) float64, of one m and n."""
    n, m = len(pairs[0][1]), sum(len(queries) for queries, _ in pairs)
    for (name, order), make in BOUNDS.items():
        judged = [_judged(name, make(keys), queries, keys) for queries, keys in pairs]
        for rule, rank in RANKS.items():
            reported, surviving = np.mean([shares[rule] for shares, _ in judged], axis=0)
            errors = [error for _, error in judged if error is not None]
            yield {
                "bound": name,
                "order": order,
                "n": n,
                "queries": m,
                "rule": rule,
                "k": rank(n),
                "reported_share": float(reported),
                "surviving_fraction": float(surviving),
                "ratio_to_reported": float(surviving / reported),
                "score_rms_nats": float(np.sqrt(np.mean(np.square(errors)))) if errors else None,
            }


def _judged(
    name: str, bound: bounds.Bound, queries: np.ndarray, keys: np.ndarray
) -> tuple[dict[str, tuple[float, float]], float | None]:
    """Queries (m, d), keys (n, d) -> shares reported and surviving by rule, and the error of codes."""
    scores, upper = queries @ keys.T, bound(queries)
    slack = ROUNDING * float(np.abs(scores).max())
    shares = {}
    for rule, rank in RANKS.items():
        threshold = np.partition(scores, -rank(len(keys)), axis=1)[:, -rank(len(keys)), None]
        inside, kept = scores >= threshold, upper + slack >= threshold
        if (inside & ~kept).any():
            raise WrongAnswer(f"the bound {name} excludes {(inside & ~kept).sum()} keys of the half-space")
        shares[rule] = float(inside.mean()), float(kept.mean())
    if not isinstance(bound, bounds.Codes):
        return shares, None
    return shares, float(np.sqrt(np.mean((bound.scores(queries) - scores) ** 2) / keys.shape[1]))
