"""DoubleSparsity beside its two steps written out: channels by calibration, then tokens by their labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from attention import DecodeSession, Dense, decode
from attention.selectors import DoubleSparsity
from attention.token_lists import check
from hsr import HSRIndex
from hsr.errors import ArgumentError
from tests.decode_selectors import SIZES, Cache, best, cache, caches, sets


def asked(made: Cache, m: int = 9) -> torch.Tensor:
    """Queries like those to come (H, m, d), with some channels stronger than others."""
    noise = torch.randn(len(made.q), m, made.q.shape[1], generator=torch.Generator().manual_seed(1))
    return made.q[:, None] + noise * torch.linspace(0.2, 2, made.q.shape[1])


def channels(made: Cache, g: int, count: int, queries: torch.Tensor | None) -> list[int]:
    """The largest of mean |q| times mean |k|."""
    d = made.q.shape[1]
    strength = made.k[g].double().numpy().__abs__().mean(axis=0)
    if queries is not None:
        group = len(made.q) // len(made.k)
        of_group = queries[g * group : (g + 1) * group].double().numpy().reshape(-1, d)
        strength = strength * np.abs(of_group).mean(axis=0)
    return sorted(best(strength, min(count, d)))


def labels(k: np.ndarray, kept: list[int], codes: bool) -> np.ndarray:
    """Of every key, rounded to sixteen levels between its own least and largest."""
    found = k[:, kept].copy()
    if codes:
        for row in found:
            low, high = row.min(), row.max()
            step = (high - low) / 15 or 1.0
            row[:] = low + step * np.round((row - low) / step)
    return found


def wanted(made: Cache, chosen: DoubleSparsity, queries: torch.Tensor | None = None) -> list[set[int]]:
    found = []
    for x in range(len(made.q)):
        q, k = made.head(x)
        kept = channels(made, x * len(made.k) // len(made.q), chosen.channels, queries)
        found.append(best(labels(k, kept, chosen.codes) @ q[kept], chosen.budget))
    return found


def shown(made: Cache, chosen: DoubleSparsity, queries: torch.Tensor | None = None, first: int = 0) -> list[set[int]]:
    begin = first or made.k.shape[1]
    state = chosen.begin(made.k[:, :begin], made.v[:, :begin], queries, made.scale)
    state.append(made.k, made.v)
    lists = state.choose(*made)
    check(lists, len(made.q), len(made.k), made.k.shape[1])
    return sets(lists, len(made.q))


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_papers_choice(n: int, codes: bool, calibrated: bool) -> None:
    made = cache(n, n, group=3)
    queries = asked(made) if calibrated else None
    for count in (3, 8, 99):
        chosen = DoubleSparsity(20, count, codes)
        assert shown(made, chosen, queries) == wanted(made, chosen, queries)


def test_queries_matter() -> None:
    made = cache(1, 300)
    assert channels(made, 0, 4, asked(made)) != channels(made, 0, 4, None)
    chosen = DoubleSparsity(20, 4)
    assert shown(made, chosen, asked(made)) != shown(made, chosen)


@settings(max_examples=60)
@given(made=caches())
def test_what_is_shown_has_the_largest_label_scores_whatever_the_keys(made: Cache) -> None:
    found = shown(made, DoubleSparsity(9, 99))  # every channel, so that which of equal ones come in does not matter
    for x, inside in enumerate(found):
        q, k = made.head(x)
        scores, left = labels(k, list(range(len(q))), True) @ q, set(range(len(k))) - inside
        step = (k.max(axis=1) - k.min(axis=1)) / 15 * np.abs(q).max()  # where rounding to a code may go either way
        assert len(inside) == min(9, len(k))
        if left:
            slack = step.max() * 2 + 1e-5 * np.abs(q).sum() * np.abs(k).max()
            assert min(scores[list(inside)]) >= max(scores[list(left)]) - slack


@pytest.mark.parametrize("codes", [True, False])
def test_appending_keeps_the_first_channels_and_is_otherwise_building(codes: bool) -> None:
    made = cache(2, 120)
    chosen = DoubleSparsity(20, 5, codes)
    first = made._replace(k=made.k[:, :70], v=made.v[:, :70])
    kept = [channels(first, g, 5, None) for g in range(2)]
    truth = []
    for x in range(4):
        q, k = made.head(x)
        truth.append(best(labels(k, kept[x // 2], codes) @ q[kept[x // 2]], 20))
    assert shown(made, chosen, first=70) == truth


def test_the_whole_budget_is_dense_attention() -> None:
    q, k, v = (x.numpy() for x in cache(6, 333))
    found = DecodeSession(k, v, policy=DoubleSparsity(333), queries=q[:, None]).attend(q[:, None])
    assert np.allclose(found.output, decode(q[:, None], HSRIndex(k), v, policy=Dense()).output, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"budget": 0}, "budget must be at least 1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"codes": 4}, "codes must be True or False; got 4"),
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DoubleSparsity(**bad)
