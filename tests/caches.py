"""What tests of decode selectors share: caches that are kind or unkind to clusters, lists as sets, sums of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from attention.decode_selector import DecodeSelector, Steps
from attention.token_lists import TokenLists, check

KINDS = ("gaussian", "grouped", "repeated", "same", "zero", "huge", "offset")


class Cache(NamedTuple):
    """One query a head, and all keys and values."""

    q: torch.Tensor  # (H, d)
    k: torch.Tensor  # (G, n, d)
    v: torch.Tensor  # (G, n, dv)
    scale: float

    def first(self, n: int) -> Cache:
        return self._replace(k=self.k[:, :n], v=self.v[:, :n])

    def to(self, dtype: torch.dtype) -> Cache:
        return Cache(*(x.to(dtype) for x in self[:3]), self.scale)


def cache(seed: int, n: int, kind: str = "grouped", g: int = 2, group: int = 2, d: int = 16) -> Cache:
    """float64; "grouped" has topics that come and go, and queries near some of them, as attention has."""
    random = np.random.default_rng(seed)
    q, k, v = (
        random.standard_normal((g * group, d)),
        random.standard_normal((g, n, d)),
        random.standard_normal((g, n, 5)),
    )
    topics = 2 * random.standard_normal((g, 12, d))
    which = random.integers(0, 12, (g, n // 8 + 1)).repeat(8, axis=1)[:, :n]
    made = {
        "gaussian": lambda: k,
        "grouped": lambda: 0.7 * k + topics[np.arange(g)[:, None], which],
        "repeated": lambda: k[:, random.integers(0, min(n, 3), n)],
        "same": lambda: np.broadcast_to(k[:, :1], k.shape).copy(),
        "zero": lambda: k * (random.random((g, n, 1)) < 0.3),
        "huge": lambda: 1e4 * k / np.linalg.norm(k, axis=2, keepdims=True),
        "offset": lambda: k + 30 * random.standard_normal(d),
    }
    keys = made[kind]()
    q = q + (topics[:, :1].repeat(group, 1).reshape(g * group, d) if kind == "grouped" else 0)
    return Cache(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (q, keys, v)), 1.5 * d**-0.5)


def begun(selector: DecodeSelector, made: Cache, cuts: Sequence[int] = (), batch: int = 1) -> Steps:
    """The state after a beginning of ``cuts[0]`` tokens and appends up to each later cut and to the end."""
    ends = [*cuts, made.k.shape[1]]
    start = made.first(ends[0])
    steps = selector.begin(start.k, start.v, None, made.scale, batch)
    for end in ends[1:]:
        steps.append(*made.first(end)[1:3])
    return steps


def chosen_by(selector: DecodeSelector, made: Cache, cuts: Sequence[int] = (), batch: int = 1) -> TokenLists:
    """Sound lists, of a session that grew so."""
    lists = begun(selector, made, cuts, batch).choose(*made[:3])
    check(lists, len(made.q), *made.k.shape[:2])
    return lists


def sets(lists: TokenLists) -> list[set[int]]:
    return [set(line[:count]) for line, count in zip(lists.tokens.tolist(), lists.counts.tolist(), strict=True)]


def weights(lists: TokenLists, line: int) -> dict[int, float]:
    """Log weights of a line by token."""
    count = int(lists.counts[line])
    logs = [0.0] * count if lists.log_weights is None else lists.log_weights[line, :count].tolist()
    return dict(zip(lists.tokens[line, :count].tolist(), logs, strict=True))


def scores(made: Cache, head: int) -> np.ndarray:
    """Of all keys, (n,) float64."""
    g = head * len(made.k) // len(made.q)
    return made.scale * made.k[g].double().numpy() @ made.q[head].double().numpy()


def of_keys(made: Cache, head: int) -> np.ndarray:
    """Keys that a head reads, (n, d) float64."""
    return made.k[head * len(made.k) // len(made.q)].double().numpy()


def lloyd_by_loops(points: np.ndarray, start: np.ndarray, iterations: int, spherical: bool) -> np.ndarray:
    """Lloyd's iteration for one head, (n,)."""
    centres = start.copy()

    def nearest() -> np.ndarray:
        if spherical:
            return (points @ centres.T).argmax(axis=1)
        return np.array([((x - centres) ** 2).sum(axis=1).argmin() for x in points])

    owners = nearest()
    for _ in range(iterations):
        for c in range(len(centres)):
            if (owners == c).any():
                mean = points[owners == c].mean(axis=0)
                centres[c] = mean / max(np.linalg.norm(mean), 1e-12) if spherical else mean
        owners = nearest()
    return owners


def assert_serves(selector: DecodeSelector, kind: str) -> None:
    """Lists are sound for few tokens and many, in every dtype, after appends that take it past what it must do."""
    cases = [(n, torch.float32) for n in (1, 2, 3, 9, 40, 150)]
    for n, dtype in [*cases, *((500, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16))]:
        lists = chosen_by(selector, cache(n, n + 90, kind).to(dtype), (n, n + 1))
        assert int(lists.counts.min()) >= 1
        if lists.log_weights is not None:
            assert torch.isfinite(lists.log_weights[lists.valid()]).all()
        if lists.means is not None:
            assert all(torch.isfinite(x).all() for x in (lists.means.keys, lists.means.values))
            assert not torch.isnan(lists.means.log_weights).any()


def assert_folds(selector: DecodeSelector, n: int = 400) -> None:
    """Two sequences folded into the heads are shown what each is alone."""
    one, other = cache(1, n), cache(2, n)
    both = Cache(*(torch.cat(pair) for pair in zip(one[:3], other[:3], strict=True)), one.scale)
    together = sets(chosen_by(selector, both, (n - 100,), batch=2))
    assert together == sets(chosen_by(selector, one, (n - 100,))) + sets(chosen_by(selector, other, (n - 100,)))
