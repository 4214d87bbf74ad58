"""Heads kept in a file are the heads that were read, and a file of others is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import decode_cpu_case, real_keys
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
    read = real_keys.read_kept(path, lambda tokens: [tokens - 7, tokens - 5, tokens - 2])
    assert len(read) == 3
    for one, other in zip(found, read, strict=True):
        for wanted, part in zip(one, other, strict=True):
            assert part.dtype == np.float32
            assert np.array_equal(part, wanted.astype(np.float16).astype(np.float32))
    for positions in ([3, 5], [3, 5, 9]):
        with pytest.raises(ArgumentError, match="HSR_HEADS must name heads with queries of the case's positions"):
            real_keys.read_kept(path, lambda _, positions=positions: positions)


def test_the_program_keeps_evenly_spaced_layers_of_as_many_tokens_as_asked(
    found: list[real_keys.Layer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(real_keys, "layers", lambda *arguments: asked.append(arguments) or found)
    path = tmp_path / "heads.npz"
    real_keys.main([str(path), "--tokens", "16384", "--layers", "3", "--device", "cuda"])
    assert asked == [(16384, decode_cpu_case.known_positions(16384), "cuda", [0, 14, 29])]
    with np.load(path) as file:
        assert file["positions"].tolist() == asked[0][1]
    for wrong in (["--layers", "31"], ["--tokens", "511"]):
        with pytest.raises(SystemExit):
            real_keys.main([str(path), *wrong])
    assert len(asked) == 1


def test_rope_is_named_by_length() -> None:
    assert [real_keys.rope(tokens) for tokens in (512, 8192, 12288, 131072)] == [
        "as trained",
        "as trained",
        "yarn x1.5",
        "yarn x16",
    ]
