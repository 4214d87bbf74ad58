"""Case ``decode-cpu``: one decode step over a long cache, by half-space reporting and by dense attention.

Keys, values and queries are real ones of SmolLM2-135M reading the essays, so that scores are as sharp as a model's and
have its sinks; two things are made up.  A cache longer than the text repeats each head's keys and values, but the
sinks, every time with fresh noise of a tenth of their own spread, so that no key is there twice and the law of a
head's scores stays.  Heads of width 128 are two heads of width 64 side by side, in keys, values and queries, so a
score is the sum of two real ones over sqrt(2).  Layers and heads are taken in turn.

The gate: a policy's cheapest setting is sought whose mean relative output error against float64, over ASKED steps and
all heads, is at most ERROR; one that has none is left out, which is noted.  It is timed next to the faster of torch's
``scaled_dot_product_attention`` and the explicit products, over the same cache in the same dtype.  A row whose policy
ends in "+append" adds a token before each step.  ``keys_per_head`` are those of the list that a group shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from attention import Certified, DecodeSession, Policy, Sampled, Softmax, TopR, Values
from attention.engine import Plan
from attention.reference import dense
from benchmarks import real_keys
from benchmarks.ledger import MILLI, Row
from benchmarks.measure import Call, take_turns

TEXT, QUICK_TEXT = 8192, 512  # tokens that the model reads
SIZES, QUICK_SIZES = (8192, 32768, 131072), (512,)  # keys
ASKED = 8  # queries, one a step
ERROR = 0.01
NOISE = 0.1  # of the spread of a head's keys, and of its values
SINKS = 4
REPEATS = 7


class Shape(NamedTuple):
    """Key-value heads, query heads of each, and how many real heads make one."""

    g: int
    group: int
    side: int


SHAPES = {"llama-3.1-8b": Shape(8, 4, 2), "smollm2-135m": Shape(3, 3, 1)}
DTYPES = ("float32", "bfloat16")


def _sampled(bytes_per_key: int, n: int) -> Iterator[Policy | Sampled]:
    return (Sampled(eps=0.05 * 0.95**i, bytes_per_key=bytes_per_key) for i in range(64))


SETTINGS: Mapping[str, Callable[[int], Iterator[Policy | Sampled]]] = {  # from the cheapest on, by the number of keys
    "sampled-48B": partial(_sampled, 48),
    "sampled-32B": partial(_sampled, 32),
    "sampled-16B": partial(_sampled, 16),
    "topr": lambda n: (TopR(r) for r in (64 << i for i in range(12)) if r < n),
    "certified": lambda n: (Certified(eps) for eps in (0.5, 0.3, 0.1, 0.03, 0.01)),
}

missing = partial(real_keys.missing, "decode-cpu")


class Costs(NamedTuple):
    """How a policy did, means."""

    policy: Policy | Sampled
    error: float
    keys: float


class Cache(NamedTuple):
    """One layer's shape of real keys."""

    queries: np.ndarray  # (h, ASKED, d) float32
    known: np.ndarray  # (h, many, d) float32, of earlier positions
    keys: np.ndarray  # (g, n, d) float32
    values: np.ndarray  # (g, n, d) float32


def rows(quick: bool, note: Callable[[str], None]) -> Iterator[Row]:
    """One row per shape, size, dtype and policy, with and without an append."""
    tokens = QUICK_TEXT if quick else TEXT
    layers = real_keys.layers(tokens, known_positions(tokens))
    for name, shape in SHAPES.items():
        for n in QUICK_SIZES if quick else SIZES:
            cache = assembled(layers, shape, n, np.random.default_rng(n))
            for dtype in DTYPES:
                head = {"shape": name, "n": n, "dtype": dtype}
                yield from (head | row for row in _timed(cache, dtype, note, quick))


def known_positions(tokens: int) -> list[int]:
    """Positions whose queries are kept: 64 for codes to be fitted to, and the last ones, which are asked."""
    return [*np.linspace(64, tokens - 2 * ASKED, 64).astype(np.int64).tolist(), *range(tokens - ASKED, tokens)]


def assembled(layers: list[real_keys.Layer], shape: Shape, n: int, rng: np.random.Generator) -> Cache:
    """Heads from one layer after another, ``side`` of them side by side, and n keys of each."""
    parts = []
    for side in range(shape.side):
        heads = [_head(layers, i, shape.group, side) for i in range(shape.g)]
        queries, known, keys, values = (np.concatenate(column) for column in zip(*heads, strict=True))
        parts.append(Cache(queries, known, _longer(keys, n, rng), _longer(values, n, rng)))
    return Cache(*(np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)))


def _head(layers: list[real_keys.Layer], i: int, group: int, side: int) -> Cache:
    """Key head i; a group larger than the model's takes queries of the positions before, too."""
    layer = layers[(7 * i + 3 * side) % len(layers)]
    heads = len(layer.keys)
    of_model = len(layer.queries) // heads
    head = (i + side) % heads
    mine = layer.queries[head * of_model : (head + 1) * of_model]
    shifted = np.stack([np.roll(mine[h % of_model], h // of_model, axis=0) for h in range(group)])
    one = slice(head, head + 1)
    return Cache(shifted[:, -ASKED:], shifted[:, :-ASKED], layer.keys[one], layer.values[one])


def _longer(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows (g, t, d) -> (g, n, d): the sinks, copies of the rest, each with its own noise, and the rest itself."""
    rest, copies = rows[:, SINKS:n], []
    spread, missing_rows = NOISE * rows.std(axis=1, keepdims=True), n - min(n, rows.shape[1])
    while missing_rows:
        copy = rest[:, :missing_rows]
        copies.append(copy + spread * rng.standard_normal(copy.shape, np.float32))
        missing_rows -= copy.shape[1]
    return np.concatenate([rows[:, :SINKS], *copies, rest], axis=1)


def _timed(cache: Cache, dtype: str, note: Callable[[str], None], quick: bool) -> Iterator[Row]:
    import torch

    q, known, k, v = (torch.from_numpy(part).to(getattr(torch, dtype)) for part in cache)
    exact, values = exact_outputs(*(part.float().numpy() for part in (q, k, v))), Values(v)
    contenders: dict[str, Call] = {f"dense {name}": form for name, form in _dense_forms(q, k, v).items()}
    costs: dict[str, Costs] = {}
    for name, settings in SETTINGS.items():
        found = next(
            (cost for cost in _judged(settings(k.shape[1]), values, q, known, k, exact) if cost.error <= ERROR), None
        )
        if found is None:
            note(f"{name}: no setting is within {ERROR:.0%} at n = {k.shape[1]}, {dtype}")
            continue
        for form, call in {name: _step, f"{name}+append": _grow}.items():
            session = DecodeSession(k, v, policy=found.policy, queries=known)
            contenders[form], costs[form] = partial(call, session, q, k, v), found
    pause = {"shortest": 0.0, "pause": 0.0} if quick else {}
    times = take_turns(contenders, ASKED, 1 if quick else REPEATS, **pause)
    best = min(times[name].median for name in contenders if name.startswith("dense "))
    for name, cost in costs.items():
        yield {
            "policy": name,
            "setting": repr(cost.policy),
            "ms": times[name].median * MILLI,
            "dense_best_ms": best * MILLI,
            "speedup": best / times[name].median,
            "rel_err": cost.error,
            "keys_per_head": cost.keys,
        }


def exact_outputs(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Dense attention (h, m, dv) in float64, a key head at a time."""
    parts = []
    for queries, keys, values in zip(q.reshape(len(k), -1, *q.shape[1:]), k, v, strict=True):
        wide_keys, wide_values = keys[None].astype(np.float64), values[None].astype(np.float64)
        parts.append(dense(queries.astype(np.float64), wide_keys, wide_values, Softmax(), k.shape[2] ** -0.5)[0])
    return np.concatenate(parts)


def _judged(
    settings: Iterator[Policy | Sampled], values: Values, q: Any, known: Any, k: Any, exact: np.ndarray
) -> Iterator[Costs]:
    """Each policy's mean relative error and mean keys over steps and heads; they share one index."""
    index = None
    limits = np.full(exact.shape[:2], k.shape[1], np.int64)
    for policy in settings:
        plan = Plan(Softmax(), policy, None)
        index = index or plan.index(k, "auto")
        plan.calibrate(known, index, values)
        result = plan.attend(q, index, values, limits)
        errors = np.linalg.norm(result.output - exact, axis=2) / np.linalg.norm(exact, axis=2)
        yield Costs(policy, float(errors.mean()), float(result.counters.reported.mean()))


def _step(session: DecodeSession, q: Any, k: Any, v: Any, i: int) -> object:
    return session.attend(q[:, i : i + 1])


def _grow(session: DecodeSession, q: Any, k: Any, v: Any, i: int) -> object:
    session.append(k[:, -1 - i :][:, :1], v[:, -1 - i :][:, :1])
    return session.attend(q[:, i : i + 1])


def _dense_forms(q: Any, k: Any, v: Any) -> dict[str, Call]:
    """Both ways to write it in torch, query heads of a group together."""
    import torch

    g, _, d = k.shape
    grouped = q.reshape(g, -1, *q.shape[1:])  # (g, G, m, d)

    def sdpa(i: int) -> object:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q[None, :, i : i + 1], k[None], v[None], enable_gqa=True)

    def products(i: int) -> object:
        scores = torch.matmul(grouped[:, :, i], k.mT) * d**-0.5  # (g, G, n)
        return torch.matmul(torch.softmax(scores, dim=-1), v)

    return {"sdpa": sdpa, "products": products}
