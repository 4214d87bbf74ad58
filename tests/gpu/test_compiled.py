"""Machine code is compiled once and kept; no GPU needed, but the compiler."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cuda.bindings")

from gpu import compiled  # noqa: E402
from hsr.errors import BackendUnavailable  # noqa: E402


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """What was compiled, with an empty folder to keep it in."""
    made, compile = [], compiled._compiled
    monkeypatch.setattr(compiled, "_compiled", lambda *call: made.append(call[3]) or compile(*call))
    monkeypatch.setenv("HSR_CACHE_DIR", str(tmp_path / "kept"))
    return made


def test_code_is_compiled_once_for_its_settings(compilations, tmp_path):
    first = compiled.machine_code("codes.cu", {}, "sm_90a")
    assert first.startswith(b"\x7fELF") and compiled.machine_code("codes.cu", {}, "sm_90a") == first
    assert len(compilations) == 1
    compiled.machine_code("codes.cu", {"OTHER": 1}, "sm_90a")
    assert len(compilations) == 2 and len(list((tmp_path / "kept").iterdir())) == 2


def test_nothing_is_kept_where_nothing_can_be(compilations, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("", str(tmp_path / "file")):
        monkeypatch.setenv("HSR_CACHE_DIR", folder)
        compiled.machine_code("codes.cu", {}, "sm_90a")
        compiled.machine_code("codes.cu", {}, "sm_90a")
    assert len(compilations) == 4


def test_what_does_not_compile_says_why(compilations, tmp_path):
    with pytest.raises(BackendUnavailable, match=r"codes\.cu does not compile with --gpu-architecture=sm_90a: .*error"):
        compiled.machine_code("codes.cu", {"int": 7}, "sm_90a")
    assert not (tmp_path / "kept").exists()


@pytest.mark.gpu
def test_a_capture_that_would_load_says_so():
    x, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    compiled.kernel.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"codes\.cu is not loaded yet"), torch.cuda.graph(graph):
        x += 1
        compiled.kernel("codes.cu", "count", (), x.device.index)
    compiled.kernel("codes.cu", "count", (), x.device.index)
