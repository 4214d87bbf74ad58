"""TopOracle beside scores in float64, and as the limit of every selection of its size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from attention.decode_selector import DecodeSelector
from attention.selectors import TopOracle, catalogue
from hsr.errors import ArgumentError
from tests.decode_selectors import SIZES, Cache, best, cache, caches, listed


@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_largest_scores(n: int) -> None:
    made = cache(n, n, group=3)
    for x, shown in enumerate(listed(TopOracle(20), made)):
        q, k = made.head(x)
        assert shown == best(k @ q, 20)


@settings(max_examples=60)
@given(made=caches())
def test_nothing_left_out_scores_more_whatever_the_keys(made: Cache) -> None:
    for x, shown in enumerate(listed(TopOracle(7), made)):
        q, k = made.head(x)
        scores, left = k @ q, set(range(len(k))) - shown
        assert len(shown) == min(7, len(k))
        if left:
            slack = 1e-5 * np.abs(q).sum() * np.abs(k).max()
            assert min(scores[list(shown)]) >= max(scores[list(left)]) - slack


@pytest.mark.parametrize(
    "other", [e for found in catalogue(DecodeSelector).values() for e in found.examples()], ids=str
)
def test_no_selection_of_as_many_keys_has_more_mass(other: DecodeSelector) -> None:
    made = cache(4, 400)
    for x, shown in enumerate(listed(other, made)):
        q, k = made.head(x)
        shares = np.exp(k @ q - (k @ q).max())
        most = listed(TopOracle(max(len(shown), 1)), made)[x]
        assert shares[list(shown)].sum() <= shares[list(most)].sum() * (1 + 1e-5)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ArgumentError, match="r must be at least 1; got 0"):
        TopOracle(0)
