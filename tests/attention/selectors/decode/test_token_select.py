"""TokenSelect beside the paper's soft vote, written out, and its cache of the last choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from attention import DecodeSession, Dense, decode
from attention.selectors import TokenSelect
from hsr import HSRIndex
from hsr.errors import ArgumentError
from tests.decode_selectors import SIZES, Cache, best, cache, caches, listed, sets, together

FEW = TokenSelect(k=32, sinks=4, window=16)


def soft_vote(made: Cache, sinks: int, window: int, pool: int = 1) -> np.ndarray:
    """Sum over heads of softmax over the middle, then the largest of a window."""
    votes = np.zeros(made.k.shape[1] - sinks - window)
    for x in range(len(made.q)):
        q, k = made.head(x)
        scores = k[sinks : len(k) - window] @ q
        weights = np.exp(scores - scores.max())
        votes += weights / weights.sum()
    reach = pool // 2
    return np.array([votes[max(i - reach, 0) : i + reach + 1].max() for i in range(len(votes))])


def wanted(made: Cache, chosen: TokenSelect) -> set[int]:
    n, ends = made.k.shape[1], set(range(chosen.sinks)) | set(range(made.k.shape[1] - chosen.window, made.k.shape[1]))
    if n <= chosen.sinks + chosen.k + chosen.window:
        return set(range(n))
    return ends | {i + chosen.sinks for i in best(soft_vote(made, chosen.sinks, chosen.window), chosen.k)}


@pytest.mark.parametrize("n", [*SIZES, 52, 53])
def test_it_is_the_papers_vote(n: int) -> None:
    made = cache(n, n, group=3)
    assert listed(FEW, made) == [wanted(made, FEW)] * 6


def test_votes_do_not_cross_sequences() -> None:
    parts = cache(1, 300), cache(2, 300)
    found = listed(FEW, together(*parts), batch=2)
    assert found == [wanted(parts[0], FEW)] * 4 + [wanted(parts[1], FEW)] * 4
    assert found != listed(FEW, together(*parts), batch=1)


@settings(max_examples=40)
@given(made=caches())
def test_what_is_shown_has_most_votes_whatever_the_keys(made: Cache) -> None:
    chosen = TokenSelect(k=9, sinks=2, window=3, pool=3)
    n = made.k.shape[1]
    for shown in listed(chosen, made):
        assert len(shown) == min(n, 14)
        if n > 14:
            assert {0, 1, n - 3, n - 2, n - 1} <= shown
            votes = soft_vote(made, 2, 3, 3)
            inside = [j - 2 for j in shown if 2 <= j < n - 3]
            outside = sorted(set(range(n - 5)) - set(inside))
            # scores of keys as long as 1e4 are rounded by about 0.01 in float32, which moves votes by as much
            assert min(votes[inside]) >= max(votes[outside]) * 0.9 - 1e-3


def test_a_choice_is_kept_while_queries_are_alike_and_its_ends_move_on() -> None:
    made = cache(3, 400)
    turned = made._replace(q=torch.randn(made.q.shape, generator=torch.Generator().manual_seed(0)))
    state = FEW.begin(made.k[:, :300], made.v[:, :300], None, made.scale)
    grown = [Cache(q, made.k[:, :n], made.v[:, :n]) for q, n in ((made.q, 300), (1.5 * made.q, 350), (turned.q, 400))]
    found = []
    for part in grown:
        state.append(part.k, part.v)
        found.append(sets(state.choose(*part), 4)[0])
    voted = wanted(grown[0], FEW) - set(range(4)) - set(range(284, 300))
    assert found[0] == wanted(grown[0], FEW)
    assert found[1] == set(range(4)) | voted | set(range(334, 350)) != wanted(grown[1], FEW)
    assert found[2] == wanted(grown[2], FEW)
    always = TokenSelect(k=32, sinks=4, window=16, alike=None).begin(made.k, made.v, None, made.scale)
    assert [sets(always.choose(*part), 4)[0] for part in grown] == [wanted(part, FEW) for part in grown]


def test_queries_are_compared_with_those_that_chose_not_with_the_last_ones() -> None:
    made, turned = cache(7, 300), torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    turned -= made.q * (made.q * turned).sum() / (made.q**2).sum()
    turned *= made.q.norm() / turned.norm()
    state, found = FEW.begin(made.k, made.v, None, made.scale), []
    for angle in (0.0, 0.4, 0.8):  # cosines with the first and with the one before: 0.92 each, then 0.70 and 0.92
        asked = np.cos(angle) * made.q + np.sin(angle) * turned
        found.append(sets(state.choose(asked, made.k, made.v), 4)[0])
    assert found[1] == found[0] and found[2] == wanted(made._replace(q=asked), FEW) != found[0]


def test_each_sequence_keeps_its_own_choice() -> None:
    parts = cache(4, 300), cache(5, 300)
    both = together(*parts)
    state = FEW.begin(both.k, both.v, None, both.scale, batch=2)
    state.choose(*both)
    asked = both.q.clone()
    asked[4:] = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    asked[:4] += 0.05
    found = sets(state.choose(asked, both.k, both.v), 8)
    assert found[0] == wanted(parts[0], FEW)
    assert found[4] == wanted(parts[1]._replace(q=asked[4:]), FEW)


def test_enough_keys_are_dense_attention() -> None:
    q, k, v = (x.numpy() for x in cache(6, 333))
    found = DecodeSession(k, v, policy=TokenSelect()).attend(q[:, None])
    assert np.allclose(found.output, decode(q[:, None], HSRIndex(k), v, policy=Dense()).output, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"window": 0}, "window must be at least 1"),
        ({"alike": 0.0}, "alike must be in"),
        ({"alike": 1.1}, "alike must be in"),
        ({"pool": 4}, "pool must be odd; got 4"),
    ],
)
def test_bad_settings_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TokenSelect(**bad)
