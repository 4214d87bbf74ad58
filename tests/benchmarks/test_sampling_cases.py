"""Cases ``accuracy`` and ``decode-cpu`` on made-up heads: complete rows, figures from the file, a gate that shuts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import accuracy_case, decode_cpu_case, long_decode_case, measure, plots, real_keys, run
from hsr import lifted_numba
from hsr.rows import scratch

LAYERS, HEADS, GROUPS, WIDTH = 2, 6, 2, 32


def fake_layers(tokens: int, positions: Sequence[int]) -> list[real_keys.Layer]:
    """Keys with a few strong axes; values that follow them."""
    rng = np.random.default_rng(9)
    scale = np.geomspace(3, 0.1, WIDTH)
    keys = (rng.standard_normal((LAYERS, GROUPS, tokens, WIDTH)) * scale).astype(np.float32)
    values = (rng.standard_normal(keys.shape) + 0.3 * keys).astype(np.float32)
    queries = (2 * rng.standard_normal((LAYERS, HEADS, len(positions), WIDTH))).astype(np.float32)
    return [real_keys.Layer(*layer) for layer in zip(queries, keys, values, strict=True)]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_keys, "layers", fake_layers)
    for case in (accuracy_case, decode_cpu_case, long_decode_case):
        monkeypatch.setattr(case, "missing", lambda: None)


def measured(case: str, folder: Path) -> list[dict]:
    file = folder / f"{case}.json"
    assert run.main([case, "--quick", "--json", str(file)]) == 0
    assert plots.main([str(file)]) == 0
    assert sorted(path.read_bytes()[:4] for path in folder.glob("*.png"))[0] == b"\x89PNG"
    return json.loads(file.read_text())["rows"]


def test_accuracy_has_a_row_per_budget_and_policy(tmp_path: Path) -> None:
    rows = measured("accuracy", tmp_path)
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    by_place = {(row["budget"], row["policy"]): row for row in rows}
    (tokens,) = accuracy_case.QUICK_TOKENS
    for share in accuracy_case.SHARES:
        budget = accuracy_case.RULES["n^0.8"].keys(tokens) / share
        found = {name: row for (spent, name), row in by_place.items() if spent == budget}
        assert len(found) == 9
        assert found["oracle-topk"]["to_oracle-topk"] == 1
        assert found["topr-sketch"]["err_mean"] == pytest.approx(found["oracle-topk"]["err_mean"], rel=1e-3)
        union = found["sampled-int4-union"]["union_keys"]
        assert found["oracle-topk-union"]["union_keys"] == pytest.approx(union, rel=0.05)
        assert found["sampled-exact-union"]["union_keys"] == pytest.approx(union, rel=0.2)
        assert found["sampled-int4"]["keys_per_head"] == pytest.approx(found["sampled-int4"]["union_keys"], rel=0.15)
        for row in found.values():
            measured_bounds = row["policy"] not in (*accuracy_case.ORACLES, "sampled-exact-union")
            assert (row["held_lse"] is not None) == (row["held_output"] is not None) == measured_bounds
            if measured_bounds:
                assert min(row["held_output"], row["held_lse"]) >= (0.85 if "sampled" in row["policy"] else 1)
            assert row["err_median"] <= row["err_p90"] <= row["err_p99"]
            assert row["policy"] == "oracle-topk-union" or row["keys_per_head"] >= budget * 0.95
        exact, coded = (found[f"sampled-{name}-union"]["err_mean"] for name in ("exact", "int4"))
        assert exact == pytest.approx(coded, rel=0.5)
    assert by_place[None, "certified"]["to_oracle-topk"] is None


def test_decode_times_policies_that_are_accurate_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "PROBE", 1e-9)
    monkeypatch.setattr(decode_cpu_case, "DTYPES", ("bfloat16",))
    rows = measured("decode-cpu", tmp_path)
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert {(row["shape"], row["dtype"]) for row in rows} == {
        (shape, dtype) for shape in decode_cpu_case.SHAPES for dtype in decode_cpu_case.DTYPES
    }
    for row in rows:
        assert row["rel_err"] <= decode_cpu_case.ERROR
        assert row["speedup"] == pytest.approx(row["dense_best_ms"] / row["ms"])
        assert 0 < row["keys_per_head"] <= row["n"]
    assert any(row["policy"].endswith("+append") for row in rows)


def test_long_decode_follows_a_session_as_it_grows(tmp_path: Path) -> None:
    file = tmp_path / "long-decode.json"
    assert run.main(["long-decode", "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    first, last = long_decode_case.QUICK_PROMPT, long_decode_case.QUICK_PROMPT + long_decode_case.QUICK_STEPS
    for shape in long_decode_case.SHAPES:
        mine = [row for row in rows if row["shape"] == shape]
        assert [row["n"] for row in mine] == np.linspace(first, last, long_decode_case.WINDOWS + 1)[1:].tolist()
        assert all(row["ms"] <= row["slowest_ms"] and row["rel_err"] < 0.2 for row in mine)
        assert all(row["cache_mib"] < row["session_mib"] < 8 * row["cache_mib"] for row in mine)


def test_arrays_held_are_counted_once() -> None:
    array = np.zeros(1000)
    assert long_decode_case.held({"a": [array, array[5:]], "b": array.reshape(10, 100)}) == array.nbytes
    assert long_decode_case.held(scratch(2, 50)) == 2 * 50 * (4 + 8), "made by numba"
    assert long_decode_case.held(["nothing", 7]) == 0


def test_a_wrong_sampler_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = lifted_numba.draw

    def lying(*arguments: object) -> None:
        real(*arguments)
        arguments[7][..., 1:] = 0.5  # pis

    monkeypatch.setattr(lifted_numba, "draw", lying)
    file = tmp_path / "accuracy.json"
    assert run.main(["accuracy", "--quick", "--json", str(file)]) == 1
    assert not file.exists()
    assert "Sampled" in capsys.readouterr().err


def test_longer_caches_keep_their_sinks_and_their_own_text() -> None:
    rng = np.random.default_rng(0)
    text = rng.standard_normal((2, 50, 8)).astype(np.float32)
    for n in (30, 50, 51, 170):
        rows = decode_cpu_case._longer(text, n, rng)
        assert rows.shape == (2, n, 8)
        assert np.array_equal(rows[:, :4], text[:, :4])
        assert np.array_equal(rows[:, -26:], text[:, max(4, min(n, 50) - 26) : min(n, 50)])
        assert len(np.unique(rows[0], axis=0)) == n
    cache = decode_cpu_case.assembled(fake_layers(60, range(20)), decode_cpu_case.SHAPES["llama-3.1-8b"], 100, rng)
    assert (cache.queries.shape, cache.keys.shape, cache.values.shape) == ((32, 8, 64), (8, 100, 64), (8, 100, 64))
    assert cache.known.shape == (32, 12, 64)
