"""A saved index comes back the same, and a damaged file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hsr import HSRIndex, StorageError, methods
from tests.strategies import served


@pytest.fixture
def saved(tmp_path: Path) -> tuple[HSRIndex, Path]:
    rng = np.random.default_rng(0)
    index = HSRIndex(rng.standard_normal((2, 300, 5)).astype(np.float32), "sketch", buffer=32)
    for _ in range(3):
        index.append(rng.standard_normal((2, 25, 5)).astype(np.float32))
    path = tmp_path / "keys.hsr"
    index.save(path)
    return index, path


@pytest.mark.parametrize("method", methods("build"))
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_loaded_index_answers_alike_and_grows_alike(tmp_path: Path, method: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    d = served(method, 6)
    keys, queries = rng.standard_normal((700, d)).astype(dtype), rng.standard_normal((9, d)).astype(dtype)
    index = HSRIndex(keys[:600], method)
    index.append(keys[600:650])
    index.save(tmp_path / "keys.hsr")
    loaded = HSRIndex.load(tmp_path / "keys.hsr")
    assert loaded.explain() == index.explain()
    for one in (index, loaded):
        one.append(keys[650:])
    first, second = index.query(queries, 0.5), loaded.query(queries, 0.5)
    assert np.array_equal(first.offsets, second.offsets)
    assert np.array_equal(first.indices, second.indices)
    assert np.array_equal(first.scores, second.scores)
    assert np.array_equal(first.scanned, second.scanned)


def test_every_truncation_is_refused(saved: tuple[HSRIndex, Path]) -> None:
    _, path = saved
    data = path.read_bytes()
    for size in [0, 3, 8, 11, 20, 51, 52, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(StorageError, match=r"truncated|not a saved index"):
            HSRIndex.load(path)


def test_every_altered_byte_is_refused(saved: tuple[HSRIndex, Path]) -> None:
    _, path = saved
    data = path.read_bytes()
    positions = [*range(60), *np.random.default_rng(0).integers(60, len(data), 60).tolist(), len(data) - 1]
    for position in positions:
        changed = bytearray(data)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(StorageError, match=r"altered|not a saved index|version"):
            HSRIndex.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(StorageError, match="altered"):
        HSRIndex.load(path)


@pytest.mark.parametrize("version", [1, 7])
def test_another_version_is_named(saved: tuple[HSRIndex, Path], version: int) -> None:
    _, path = saved
    data = bytearray(path.read_bytes())
    data[8:12] = version.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(StorageError, match=f"format version {version}; this library reads version 2"):
        HSRIndex.load(path)


def test_a_failed_save_leaves_the_old_file(saved: tuple[HSRIndex, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    index, path = saved
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    index.append(np.ones((2, 40, 5), np.float32))
    with pytest.raises(OSError, match="no space"):
        index.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HSRIndex.load(tmp_path / "none.hsr")
