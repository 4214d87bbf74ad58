"""StreamingLLM's pattern against its paper, row by row."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.selectors.streaming_llm import StreamingLLM
from hsr.errors import ArgumentError
from tests.selectors import SHAPES, Line, gaussian, lines, places

shapes = st.sampled_from(SHAPES)
few = settings(max_examples=40)


@few
@given(shape=shapes, sinks=st.integers(0, 300), window=st.integers(1, 600))
def test_streaming_rows_see_their_sinks_and_window(shape: tuple[int, int], sinks: int, window: int) -> None:
    prompt = gaussian(0, *shape, d=2)
    found = lines(StreamingLLM(sinks, window), prompt)
    for line, place in zip(found, places(*shape) * len(prompt.q), strict=True):
        edge = 128 * place.own
        windows = {j for p in place.positions for j in range(max(0, p - window + 1), edge)}
        blocks = {j // 128 for j in windows}
        assert line == Line({j for j in range(min(sinks, edge)) if j // 128 not in blocks}, blocks, set())


@pytest.mark.parametrize("given", [{"sinks": -1}, {"window": 0}])
def test_settings_out_of_range_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match="must be"):
        StreamingLLM(**given)
