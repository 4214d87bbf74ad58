"""Case ``prefill-gpu`` without its clock: whole rows under the interpreter, a gate that shuts, failures as notes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the case measures torch tensors")
pytest.importorskip("triton", reason="its kernels are Triton's")

from attention.key_lists import least_density  # noqa: E402
from benchmarks import dense_prefill, prefill_gpu_case, real_keys  # noqa: E402
from benchmarks.gate import WrongAnswer  # noqa: E402
from benchmarks.measure import Timing  # noqa: E402
from tests.gpu.interpreted import pytestmark  # noqa: E402, F401

SHAPE, N = (2, 1, 64), 384
KERNELS = {"one": lambda q, k, v: partial_sdpa(q, k, v), "broken": lambda q, k, v: fail()}


def partial_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def fail() -> Callable[[], torch.Tensor]:
    raise RuntimeError("no kernel serves the shape")


def once(call: Callable[[], object], repeats: int) -> Timing:
    call()
    return Timing(0.002, 0.0001 * repeats)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "HERE": "cpu",
        "DTYPE": torch.float16,
        "SHAPES": (SHAPE,),
        "QUICK_LENGTHS": (N,),
        "SAMPLE": 16,
        "GATE": 140,
    }
    settings |= {"SETTINGS": ((0.8, 4),), "KERNELS": KERNELS, "replayed": once, "launched": once, "FLEX_LENGTHS": ()}
    settings |= {"peak_bytes": lambda call: call() or 10**9}
    for name, value in settings.items():
        monkeypatch.setattr(prefill_gpu_case, name, value)


def test_a_row_is_whole_and_a_kernel_that_fails_is_a_note() -> None:
    notes: list[str] = []
    (row,) = prefill_gpu_case.rows(True, notes.append)
    assert set(row) == set(prefill_gpu_case.EMPTY)
    assert all(value is not None for value in row.values())
    assert (row["h"], row["g"], row["d"], row["n"], row["method"]) == (*SHAPE, N, "sampled-4")
    assert row["dense_ms"] == {"one": 2.0} and row["dense_best"] == "one" and row["speedup"] == 1
    assert row["realised"] == pytest.approx(0.8, abs=0.02) and 0.8 < row["kept_mass"] <= 1
    assert 0 < row["rel_err"] < 0.5
    blocks = N // 128
    seen = row["realised"] * 128 * 128 * blocks * (blocks + 1) / 2 - blocks * 128 * 127 / 2  # pairs, less those masked
    assert row["attend_tflops"] == pytest.approx(4 * 64 * SHAPE[0] * seen / 0.002 / 1e12)
    assert [note for note in notes if "broken" in note and "no kernel serves the shape" in note] == notes


def test_a_prompt_that_fails_is_a_note_and_the_next_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = prefill_gpu_case.made

    def short(h: int, g: int, d: int, n: int) -> prefill_gpu_case.Prompt:
        if n == 256:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return made(h, g, d, n)

    monkeypatch.setattr(prefill_gpu_case, "made", short)
    monkeypatch.setattr(prefill_gpu_case, "QUICK_LENGTHS", (256, N))
    notes: list[str] = []
    rows = list(prefill_gpu_case.rows(True, notes.append))
    assert [row["n"] for row in rows] == [N]
    assert "n = 256" in notes[0] and "OutOfMemoryError" in notes[0]


def test_long_prompts_meet_only_the_fastest_kernel_and_the_longest_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
        calls.append(f"slow {q.shape[2]}")
        return partial_sdpa(q, k, v)

    seconds = iter([0.003, 0.001, *[0.002] * 100])
    monkeypatch.setattr(prefill_gpu_case, "KERNELS", {"slow": slow, "one": KERNELS["one"]})
    monkeypatch.setattr(prefill_gpu_case, "replayed", lambda call, repeats: Timing(next(seconds), 0.0))
    for name, value in {"LENGTHS": (256, N), "LONG": N, "LONGEST": (SHAPE, N, (0.8, 4))}.items():
        monkeypatch.setattr(prefill_gpu_case, name, value)
    monkeypatch.setattr(real_keys, "missing", lambda program: f"{program} needs a model")
    notes: list[str] = []
    rows = list(prefill_gpu_case.rows(False, notes.append))
    assert calls == ["slow 256"] and notes == ["no real heads: prefill-gpu needs a model"]
    assert [(row["n"], row["dense_best"]) for row in rows] == [(256, "one"), (N, "one"), (N, None)]


def test_real_heads_are_those_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "prompts.npz"
    layer = real_keys.Layer(*(np.ones((heads, 256, 64), np.float32) for heads in (9, 3, 3)))
    real_keys.keep(path, [layer, layer], range(256))
    monkeypatch.setenv("HSR_HEADS", str(path))
    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(prefill_gpu_case, "compared", lambda data, prompt, *_: seen.append((data, prompt)) or ())
    monkeypatch.setattr(prefill_gpu_case, "SHAPES", ())
    monkeypatch.setattr(prefill_gpu_case, "LONGEST", (SHAPE, 128, (0.8, 4)))
    monkeypatch.setattr(prefill_gpu_case, "ours", lambda *_: ())
    assert list(prefill_gpu_case.rows(False, pytest.fail)) == []
    ((data, prompt),) = seen
    assert data == "smollm2" and [part.shape[1] for part in prompt] == [9, 3, 3]
    assert prompt.q.shape == (1, 9, 256, 64) and prompt.q.dtype == torch.float16


@pytest.mark.parametrize("fault", ["one key is meant", "weights are doubled"])
def test_the_gate_shuts(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = prefill_gpu_case.everything

    def faulty(h: int, n: int) -> prefill_gpu_case.KeyLists:
        lists = everything(h, n)
        if fault == "one key is meant":
            return replace(lists, tokens=torch.zeros_like(lists.tokens))
        return replace(lists, log_weights=torch.full(lists.tokens.shape, np.log(2.0), dtype=torch.float32))

    monkeypatch.setattr(prefill_gpu_case, "everything", faulty)
    with pytest.raises(WrongAnswer, match="lists of everything"):
        next(iter(prefill_gpu_case.rows(True, lambda _: None)))


def test_flex_takes_as_many_blocks_as_the_density_says() -> None:
    n, h, density = 4096, 3, 0.3
    flex = dense_prefill.Flex(torch.empty(1, h, n, 8), torch.empty(1, 1, n, 8), torch.empty(1, 1, n, 8))
    assert density > least_density(n, n)
    mask, pairs = flex.mask(density)
    blocks = mask.to_dense()[0]
    assert blocks.shape == (h, 32, 32) and not blocks.triu(1).any() and (blocks.diagonal(dim1=1, dim2=2) == 1).all()
    assert mask.full_kv_num_blocks.sum() == blocks.sum() - 32 * h
    assert pairs == h * 32 * 128 * 129 // 2 + 128 * 128 * int(mask.full_kv_num_blocks.sum())
    assert pairs / (h * n * (n + 1) / 2) == pytest.approx(density, abs=0.03)
    everything, pairs = flex.mask(1.0)
    assert pairs == h * n * (n + 1) // 2 and (everything.to_dense()[0] == torch.ones(32, 32).tril()).all()
