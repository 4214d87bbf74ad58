"""Real heads of longer prompts: chosen layers alone are held, whole, and `accuracy-gpu` measures at both lengths."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import real_keys
from hsr import ArgumentError

torch = pytest.importorskip("torch", reason="the model runs in torch")
pytest.importorskip("transformers", reason="the model is transformers'")
smollm = pytest.importorskip("benchmarks.smollm", reason="the model's own packages")
tiny_llama = pytest.importorskip("tests.tiny_llama")

LAYERS, WIDTH, N = tiny_llama.LAYERS, tiny_llama.WIDTH, 2 * tiny_llama.CONTEXT
TOKENS = np.random.default_rng(3).integers(0, tiny_llama.VOCABULARY, N).tolist()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "load_model", lambda *options: (tiny_llama.tiny_model(*options), None))
    monkeypatch.setattr(smollm, "essay_tokens", lambda _, count: TOKENS[:count])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_hold_what_the_chosen_layers_attend_with(dtype: str) -> None:
    found = real_keys.prompts(N, [2, 0], dtype=dtype)
    with torch.no_grad():
        cache = tiny_llama.tiny_model(N, dtype=getattr(torch, dtype))(torch.tensor([TOKENS])).past_key_values
    for number, prompt in zip((2, 0), found, strict=True):
        assert (prompt.q.shape, prompt.k.shape, prompt.v.shape) == ((6, N, WIDTH), (2, N, WIDTH), (2, N, WIDTH))
        for part, wanted in ((prompt.k, cache.layers[number].keys[0]), (prompt.v, cache.layers[number].values[0])):
            assert part.dtype == getattr(torch, dtype) and part.is_contiguous() and not part.is_inference()
            error = (part.double() - wanted.double()).norm() / wanted.double().norm()
            assert error < (1e-5 if dtype == "float32" else 2e-2)
    if dtype == "float32":
        (layer,) = real_keys.layers(N, [5, N - 1], chosen=[2])
        assert np.array_equal(layer.queries, found[0].q[:, [5, N - 1]].numpy())
        assert np.array_equal(layer.keys, found[0].k.numpy())


@pytest.mark.usefixtures("tiny")
def test_a_layer_that_is_not_there_is_refused() -> None:
    for chosen in ([3], [0, -1]):
        with pytest.raises(ArgumentError, match=r"chosen must be layers from 0 to 2; got"):
            real_keys.prompts(10, chosen)


def test_other_layers_are_not_held() -> None:
    recorder = real_keys.Recorder(lambda *parts: parts, [1])
    parts = torch.randn(6, 20, 8), torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    for layer in range(LAYERS):
        recorder.attend(layer, *parts, 0.3)
    assert list(recorder.kept) == [1]


def test_accuracy_on_a_gpu_has_rows_for_both_lengths_or_for_those_of_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = pytest.importorskip("benchmarks.accuracy_gpu_case", reason="its kernels are Triton's")
    one = real_keys.Layer(*(np.ones(shape, np.float32) for shape in ((9, 72, 4), (3, 16384, 4), (3, 16384, 4))))
    path = tmp_path / "heads.npz"
    real_keys.keep(path, [one], case.known_positions(16384))
    monkeypatch.setattr(case, "exact_gate", lambda: None)
    monkeypatch.setattr(case, "_layer", lambda *_: (np.full(8, 0.2), np.full(8, 0.1), np.full(8, 50)))
    shortened = {8192: SimpleNamespace(keys=np.empty((3, 8192)), queries=one.queries)}
    shortened[32768] = SimpleNamespace(keys=np.empty((3, 32768)), queries=one.queries)
    monkeypatch.setattr(real_keys, "layers", lambda tokens, _, device: [shortened[tokens]] if device == "cuda" else [])
    for name, wanted in (
        ("", [(8192, "as trained"), (32768, "yarn x4")]),
        (str(path), [(16384, "yarn x2")]),
    ):
        monkeypatch.setenv("HSR_HEADS", name)
        rows = list(case.rows(False, lambda _: None))
        assert list(dict.fromkeys((row["tokens"], row["rope"]) for row in rows)) == wanted
        assert {tuple(row) for row in rows} == {tuple(rows[0])}
        assert len(rows) == len(wanted) * len(case.SHARES) * len(case.SETTINGS) * 2
