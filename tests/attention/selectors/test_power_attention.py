"""PowerAttention's pattern against its paper, block by block."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.selectors.power_attention import PowerAttention
from hsr.errors import ArgumentError
from tests.selectors import SHAPES, Line, eligible, gaussian, lines, places

shapes = st.sampled_from(SHAPES)
few = settings(max_examples=40)


@few
@given(shape=shapes, sinks=st.integers(0, 3), window=st.integers(1, 5))
def test_power_attention_sees_powers_of_two(shape: tuple[int, int], sinks: int, window: int) -> None:
    prompt = gaussian(0, *shape, d=2)
    found = lines(PowerAttention(sinks, window), prompt)
    for line, place in zip(found, places(*shape) * len(prompt.q), strict=True):
        near = {place.own - i for i in range(window)}
        wanted = eligible(set(range(sinks)) | near | {place.own - 2**i for i in range(12)}, place)
        assert line == Line(set(), wanted, set())


@pytest.mark.parametrize("given", [{"sinks": -1}, {"window": 0}])
def test_settings_out_of_range_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match="must be"):
        PowerAttention(**given)
