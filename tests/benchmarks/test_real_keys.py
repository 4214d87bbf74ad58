"""Heads kept in a file are the heads that were read, and a file of others is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import real_keys
from hsr import ArgumentError

POSITIONS = [3, 5, 8]


@pytest.fixture
def found() -> list[real_keys.Layer]:
    rng = np.random.default_rng(2)
    shapes = (6, len(POSITIONS), 4), (2, 10, 4), (2, 10, 4)
    return [real_keys.Layer(*(rng.standard_normal(shape, np.float32) for shape in shapes)) for _ in range(3)]


def test_kept_heads_are_read_back(
    found: list[real_keys.Layer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "heads.npz"
    monkeypatch.delenv("HSR_HEADS", raising=False)
    assert real_keys.kept() is None
    monkeypatch.setenv("HSR_HEADS", str(path))
    with pytest.raises(ArgumentError, match="HSR_HEADS must name a file"):
        real_keys.kept()
    real_keys.keep(path, found, POSITIONS)
    assert real_keys.kept() == path
    read = real_keys.layers(10, POSITIONS, path)
    assert len(read) == 3
    for one, other in zip(found, read, strict=True):
        for wanted, part in zip(one, other, strict=True):
            assert part.dtype == np.float32
            assert np.array_equal(part, wanted.astype(np.float16).astype(np.float32))
    for tokens, positions in ((11, POSITIONS), (10, [3, 5]), (10, None)):
        with pytest.raises(ArgumentError, match=f"HSR_HEADS must name heads of {tokens} tokens"):
            real_keys.layers(tokens, positions, path)
