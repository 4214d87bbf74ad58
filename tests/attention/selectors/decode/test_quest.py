"""Quest beside the paper's bound, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from attention import DecodeSession, Dense, decode
from attention.selectors import Quest
from hsr import HSRIndex
from hsr.errors import ArgumentError
from tests.decode_selectors import SIZES, Cache, best, cache, caches, listed


def page_scores(q: np.ndarray, k: np.ndarray, page: int) -> np.ndarray:
    """Score(page) = sum over channels of max(q_c lo_c, q_c hi_c)."""
    found = []
    for first in range(0, len(k), page):
        low, high = k[first : first + page].min(axis=0), k[first : first + page].max(axis=0)
        found.append(sum(max(q[c] * low[c], q[c] * high[c]) for c in range(len(q))))
    return np.array(found)


def wanted(made: Cache, budget: int, page: int) -> list[set[int]]:
    found = []
    for x in range(len(made.q)):
        q, k = made.head(x)
        scores = page_scores(q, k, page)
        last = len(scores) - 1
        pages = best(scores[:last], budget // page - 1) | {last}
        found.append({j for j in range(len(k)) if j // page in pages})
    return found


@pytest.mark.parametrize(("budget", "page"), [(64, 16), (16, 16), (50, 7), (5, 1)])
@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_papers_choice(n: int, budget: int, page: int) -> None:
    made = cache(n, n, group=3)
    assert listed(Quest(budget, page), made) == wanted(made, budget, page)


@settings(max_examples=60)
@given(made=caches())
def test_what_is_shown_has_the_largest_bounds_whatever_the_keys(made: Cache) -> None:
    for x, shown in enumerate(listed(Quest(48), made)):
        q, k = made.head(x)
        scores, last = page_scores(q, k, 16), (len(k) - 1) // 16
        pages = {j // 16 for j in shown}
        assert last in pages and len(pages) == min(3, last + 1) and len(shown) == min(len(k), 32 + len(k) - 16 * last)
        inside, outside = pages - {last}, set(range(last)) - pages
        slack = 1e-5 * np.abs(q).sum() * np.abs(k).max()
        if outside:
            assert min(scores[list(inside)]) >= max(scores[list(outside)]) - slack
        assert all(scores[j // 16] >= q @ k[j] - slack for j in range(len(k)))


@pytest.mark.parametrize("steps", [(1, 99), (15, 1, 1, 83), (16, 84), (33, 5, 10, 52), (100,)])
def test_appending_is_building_at_once(steps: tuple[int, ...]) -> None:
    made = cache(5, 100)
    place = steps[0]
    state = Quest(48).begin(made.k[:, :place], made.v[:, :place], None, made.scale)
    for more in steps[1:]:
        place += more
        state.append(made.k[:, :place], made.v[:, :place])
    assert torch.equal(state.choose(*made).tokens, Quest(48).begin(made.k, made.v, None, 1.0).choose(*made).tokens)


def test_the_whole_budget_is_dense_attention() -> None:
    q, k, v = (x.numpy() for x in cache(6, 333))
    found = DecodeSession(k, v, policy=Quest(336)).attend(q[:, None])
    assert np.allclose(found.output, decode(q[:, None], HSRIndex(k), v, policy=Dense()).output, atol=1e-5)
    assert (found.counters.reported == 333).all()


@pytest.mark.parametrize(("bad", "message"), [({"budget": 15}, "budget must be at least 16"), ({"page": 0}, "page")])
def test_bad_settings_are_refused(bad: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Quest(**bad)
