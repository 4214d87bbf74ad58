"""Case ``accuracy``: how wrong attention is when so many keys a head are attended to, on a real model's heads.

SmolLM2-135M reads the essays; every layer and head answers the queries of 16 positions spread over the last 64, after
the rotary embedding.  A row is the relative output error against dense float64 over all of them, for policies that
attend to ``budget`` keys a head: a share of n^(4/5), sinks and recent keys included.

``oracle-topk`` keeps each head's keys of largest score, ``oracle-topk-union`` lets a group's heads share the union of
their tops, of as many keys as the union that ``sampled-int4-union`` drew: no top-k that reads all keys can do better.
``sampled-exact-union`` samples by exact scores, the other ``sampled`` by codes of so many bytes ("int4" is 32), and
``sampled-int4`` has a list per head.  ``keys_per_head`` is what a head expects on its own account, ``union_keys`` what
its group's list holds; ``bytes_read`` is the codes (or keys) read to choose and the keys and values of the list, per
key-value head.  ``certified`` spends what its bound asks for.  The coder knows queries of earlier positions.
``held_output`` and ``held_lse`` are how often the certificates' bounds on the output's error and on the log-sum-exp's
held, whose stated confidence is 0.95 for samples and 1 else; "independent" draws one number a key, not one a block.

The gate: `Dense` and a sample of all keys are dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from attention import Certified, Dense, Policy, Sampled, Softmax, TopR, Values
from attention.engine import Plan
from benchmarks import real_keys
from benchmarks.gate import require_rows
from benchmarks.ledger import RULES, Row
from benchmarks.real_keys import Layer
from hsr.coded_scan import KEYS
from hsr.reference import draw

TOKENS, QUICK_TOKENS = (4096, 8192), (512,)
SHARES = (8, 2, 1)  # a budget is n^(4/5) over this
ASKED, LAST = 16, 64  # positions that are asked, and over how many they are spread
KNOWN, UNKNOWN = 256, 64  # earlier positions that the coder knows, not among so many first ones and the last 2 * LAST
SINKS, RECENT = 4, 16
SIZES = {"sampled-int4-union": 32, "sampled-24B-union": 24, "sampled-16B-union": 16}
ORACLES = ("oracle-topk", "oracle-topk-union")
TOLERANCE = 1e-4  # of an output's entry, over the values' largest
ITEM = 4  # bytes of a float32

missing = partial(real_keys.missing, "accuracy")


class Found(NamedTuple):
    """What one policy did in one layer, arrays (h, m)."""

    outputs: np.ndarray  # (h, m, dv)
    own: np.ndarray  # keys that a head expects on its own account
    union: np.ndarray  # keys attended to
    held: np.ndarray | None = None  # (2, h, m) bool: whether the certificate's bounds on output and LSE held


class Costs(NamedTuple):
    """The same of one layer in few numbers."""

    errors: np.ndarray  # (h m,) relative
    own: float
    union: float
    held: np.ndarray | None  # (2,): how often


class Heads:
    """A layer's heads, the positions asked, and exact attention."""

    def __init__(self, layer: Layer, positions: np.ndarray, seed: int) -> None:
        """The queries of ``positions`` come last among the layer's."""
        m = len(positions)
        self.seed, self.queries, self.known = seed, layer.queries[:, -m:], layer.queries[:, :-m]
        self.keys, self.values = layer.keys, layer.values
        self.group = len(self.queries) // len(self.keys)
        self.limits = np.broadcast_to(positions + 1, self.queries.shape[:2]).astype(np.int64)
        wide = (np.repeat(x, self.group, axis=0).astype(np.float64) for x in (layer.keys, layer.values))
        keys, self._values = wide
        scores = np.einsum("hmd,hnd->hmn", self.queries, keys) / np.sqrt(keys.shape[2])
        self.scores = np.where(np.arange(keys.shape[1]) < self.limits[..., None], scores, -np.inf)
        self.exact = self.over(np.isfinite(self.scores))

    @cached_property
    def _lse(self) -> np.ndarray:
        """(h, m), exact."""
        return np.logaddexp.reduce(self.scores, axis=2)

    def over(self, chosen: np.ndarray, logs: np.ndarray | float = 0.0) -> np.ndarray:
        """Softmax attention over the chosen keys (h, m, n), scores lowered by ``logs`` -> (h, m, dv)."""
        scores = np.where(chosen, self.scores - logs, -np.inf)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        return np.einsum("hmn,hnd->hmd", weights, self._values) / weights.sum(axis=2, keepdims=True)

    def asked(self, policy: Policy | Sampled, shared: bool = True) -> Found:
        """The library's answer; without a shared list, every query head has a key head of its own."""
        repeat = 1 if shared else self.group
        keys, values = (np.repeat(x, repeat, axis=0) for x in (self.keys, self.values))
        plan = Plan(Softmax(), policy, None)
        index, held = plan.index(keys, "auto"), Values(values)
        plan.calibrate(self.known, index, held)
        result = plan.attend(self.queries, index, held, self.limits)
        off = np.linalg.norm(result.output - self.exact, axis=2), np.abs(result.lse - self._lse)
        bounds = result.certificate.output_error, result.certificate.lse_error
        reported = result.counters.reported
        return Found(result.output, reported, reported, np.array(off) <= np.array(bounds))

    def sampled(self, budget: float, size: int, shared: bool = True, draw: str = "systematic") -> Found:
        """`Sampled` of a budget that counts the keys attended to anyway."""
        certain = self.limits - np.maximum((self.limits - RECENT) // KEYS * KEYS - SINKS, 0)
        rest = max(1.0, budget - float(certain.mean()))
        policy = Sampled(budget=rest, bytes_per_key=size, sinks=SINKS, recent=RECENT, seed=self.seed, draw=draw)
        found = self.asked(policy, shared)
        return found._replace(own=certain + rest)

    def sampled_exactly(self, budget: float) -> Found:
        """The same law with exact scores for estimates, in plain numpy."""
        stop = np.maximum((self.limits - RECENT) // KEYS * KEYS, 0)[..., None]
        places = np.arange(self.keys.shape[1])
        free = (places >= SINKS) & (places < stop)
        certain = np.isfinite(self.scores) & ~free
        rest = max(1.0, budget - float(certain.sum(axis=2).mean()))
        held = Values(self.values)
        lift = np.repeat(held.lift[:, : self.keys.shape[1]], self.group, axis=0)[:, None]
        pis = _chances(np.where(free, self.scores + lift, -np.inf), rest)
        pis = pis.reshape(len(self.keys), self.group, *pis.shape[1:]).max(axis=1)  # (g, m, n): a list per group
        rng = np.random.default_rng(self.seed)
        drawn = np.zeros(pis.shape, bool)
        for head, row in np.ndindex(pis.shape[:2]):
            drawn[head, row, draw(pis[head, row], int(rng.integers(1 << 32)), systematic=True)] = True
        chosen = np.repeat(drawn, self.group, axis=0) | certain
        with np.errstate(divide="ignore"):
            logs = np.where(certain, 0.0, np.log(np.repeat(pis, self.group, axis=0)))
        logs = np.where(chosen, logs, 0.0)
        return Found(self.over(chosen, logs), certain.sum(axis=2) + rest, chosen.sum(axis=2))

    def costs(self, found: Found) -> Costs:
        """What remains of an answer."""
        errors = np.linalg.norm(found.outputs - self.exact, axis=2) / np.linalg.norm(self.exact, axis=2)
        held = None if found.held is None else found.held.mean(axis=(1, 2))
        return Costs(errors.ravel(), float(found.own.mean()), float(found.union.mean()), held)

    def top(self, rank: int) -> Found:
        """Each head's so many keys of largest score."""
        chosen = self._ranks < rank
        return Found(self.over(chosen), np.full(self.limits.shape, rank), chosen.sum(axis=2))

    def top_union(self, sizes: np.ndarray) -> Found:
        """A list per group: the largest union of its heads' tops of equal rank with at most ``sizes`` (h, m) keys."""
        shape = len(self.keys), self.group, *self._ranks.shape[1:]
        least = self._ranks.reshape(shape).min(axis=1)  # (g, m, n): the rank from which on a key is in the union
        order = np.sort(least, axis=2)
        wanted = sizes.reshape(shape[:3]).max(axis=1)
        rank = np.take_along_axis(order, np.minimum(wanted, shape[3] - 1)[..., None], axis=2)
        chosen = np.repeat(least < rank, self.group, axis=0)
        return Found(self.over(chosen), np.repeat(rank[..., 0], self.group, axis=0), chosen.sum(axis=2))

    @cached_property
    def _ranks(self) -> np.ndarray:
        """(h, m, n) the rank of each key by score, 0 for the largest."""
        order = np.argsort(-self.scores, axis=2, kind="stable")
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.arange(order.shape[2])[None, None], axis=2)
        return ranks


def rows(quick: bool, note: Callable[[str], None]) -> Iterator[Row]:
    """One row per number of tokens, budget and policy; certified has one per number of tokens."""
    for tokens in QUICK_TOKENS if quick else TOKENS:
        asked = np.linspace(tokens - LAST, tokens - 1, ASKED).astype(np.int64)
        known = np.linspace(UNKNOWN, tokens - 2 * LAST, KNOWN).astype(np.int64)
        layers = real_keys.layers(tokens, [*known.tolist(), *asked.tolist()])
        group, d = len(layers[0].queries) // len(layers[0].keys), layers[0].keys.shape[2]
        note(f"{tokens} tokens: {len(layers)} layers of {len(layers[0].queries)} query heads, {ASKED} positions")
        budgets = [RULES["n^0.8"].keys(tokens) / share for share in SHARES]
        costs: dict[tuple[float | None, str], list[Costs]] = {}
        for seed, layer in enumerate(layers):
            heads = Heads(layer, asked, seed)
            _require_dense(heads)
            for budget in budgets:
                for name, found in _of_budget(heads, budget).items():
                    costs.setdefault((budget, name), []).append(heads.costs(found))
            costs.setdefault((None, "certified"), []).append(heads.costs(heads.asked(Certified())))
        means = {place: np.mean([cost.errors for cost in parts]) for place, parts in costs.items()}
        for (spent, name), parts in costs.items():
            head = {"tokens": tokens, "policy": name, "budget": spent}
            oracles = {f"to_{oracle}": means.get((spent, oracle)) for oracle in ORACLES}
            ratios = {place: mean and float(means[spent, name] / mean) for place, mean in oracles.items()}
            yield head | _figures(name, parts, (tokens, d, group)) | ratios


def _require_dense(heads: Heads) -> None:
    """The gate."""
    wanted = heads.exact.reshape(-1, heads.exact.shape[2])
    tolerance = TOLERANCE * float(np.abs(heads.values).max())
    for policy in (Dense(), Sampled(budget=1e9)):
        require_rows(repr(policy), heads.asked(policy).outputs.reshape(wanted.shape), wanted, tolerance)


def _of_budget(heads: Heads, budget: float) -> dict[str, Found]:
    """The policies that can be told how many keys to attend to."""
    found = {name: heads.sampled(budget, size) for name, size in SIZES.items()}
    found["sampled-int4"] = heads.sampled(budget, SIZES["sampled-int4-union"], shared=False)
    found["sampled-int4-union-independent"] = heads.sampled(budget, SIZES["sampled-int4-union"], draw="independent")
    found["sampled-exact-union"] = heads.sampled_exactly(budget)
    found["topr-sketch"] = heads.asked(TopR(round(budget)))
    found["oracle-topk"] = heads.top(round(budget))
    found["oracle-topk-union"] = heads.top_union(found["sampled-int4-union"].union)
    return found


def _figures(policy: str, costs: list[Costs], shape: tuple[int, int, int]) -> Row:
    """Means and quantiles over layers, heads and positions; the shape is (tokens, d, G)."""
    tokens, d, group = shape
    int4 = SIZES["sampled-int4-union"]
    size = {"sampled-int4": int4, "sampled-int4-union-independent": int4, "topr-sketch": d, "certified": d} | SIZES
    bytes_per_key = size.get(policy, ITEM * d)
    errors = np.concatenate([cost.errors for cost in costs])
    union = float(np.mean([cost.union for cost in costs]))
    held = [cost.held for cost in costs if cost.held is not None]
    output, lse = np.mean(held, axis=0).tolist() if held else (None, None)
    lists = group if policy == "sampled-int4" else 1
    return {
        "bytes_per_key": bytes_per_key,
        "keys_per_head": float(np.mean([cost.own for cost in costs])),
        "union_keys": union,
        "bytes_read": tokens * bytes_per_key + lists * union * 2 * ITEM * d,
        **error_figures(errors),
        "held_output": output,
        "held_lse": lse,
    }


def error_figures(errors: np.ndarray) -> Row:
    """Mean and quantiles of relative errors (rows,)."""
    median, p90, p99 = (float(np.percentile(errors, share)) for share in (50, 90, 99))
    return {"err_mean": float(errors.mean()), "err_median": median, "err_p90": p90, "err_p99": p99}


def _chances(lifted: np.ndarray, budget: float) -> np.ndarray:
    """Lifted scores (h, m, n), -inf where not up for sampling -> pi of the same shape, adding up to the budget."""
    low = np.min(lifted, axis=2, keepdims=True, where=np.isfinite(lifted), initial=np.inf)
    high = np.logaddexp.reduce(lifted, axis=2, keepdims=True) - np.log(budget)
    for _ in range(60):
        middle = (low + high) / 2
        over = np.exp(np.minimum(lifted - middle, 0)).sum(axis=2, keepdims=True) > budget
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    return np.exp(np.minimum(lifted - high, 0))
