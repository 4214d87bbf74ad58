"""Case ``prefill-accuracy`` on made-up heads: complete rows, rules that keep to their budgets, a gate that shuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the case measures torch tensors")

from attention import BlockSampled, prefill  # noqa: E402
from benchmarks import prefill_accuracy_case as case  # noqa: E402
from benchmarks import prefill_oracles, real_keys, run  # noqa: E402
from benchmarks.gate import WrongAnswer  # noqa: E402
from benchmarks.prefill_oracles import RULES, Head  # noqa: E402
from benchmarks.real_keys import Prompt  # noqa: E402
from tests.gpu.interpreted import pytestmark  # noqa: E402, F401

H, G, N, D, T = 4, 2, 1024, 32, 8


def prompt(seed: int, n: int = N, d: int = D) -> Prompt:
    """Queries that turn slowly, keys of which some matter to all rows."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(H, n, d, generator=random) + 2 * torch.randn(H, n // 64, d, generator=random).repeat_interleave(
        64, 1
    )
    k, v = (torch.randn(G, n, d, generator=random) for _ in range(2))
    k[:, ::37] += q[::2].mean(1, keepdim=True)
    return Prompt(q, 1.5 * k, v + 0.5)


@pytest.fixture
def head() -> Head:
    q, k, v = prompt(5)
    return Head(q[0], k[0], v[0])


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "HERE", "cpu")
    monkeypatch.setattr(case, "DTYPE", torch.float32)


def test_there_is_a_row_per_density_and_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def prompts(tokens: int, chosen: Sequence[int], device: str) -> list[Prompt]:
        assert (tokens, device) == (4096, "cpu")
        return [prompt(layer) for layer in chosen]

    monkeypatch.setattr(real_keys, "prompts", prompts)
    monkeypatch.setattr(case, "missing", lambda: None)
    monkeypatch.setattr(case, "DENSITIES", (0.1, 0.3, 0.5))
    monkeypatch.setattr(case, "STRIDE", 1)  # oracles are best over all blocks
    file = tmp_path / "found.json"
    assert run.main(["prefill-accuracy", "--quick", "--json", str(file)]) == 0
    rows = run.json.loads(file.read_text())["rows"]
    assert [(row["density"], row["method"]) for row in rows] == [(x, m) for x in (0.1, 0.3, 0.5) for m in case.METHODS]
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    by_place = {(row["density"], row["method"]): row for row in rows}
    for (asked, method), row in by_place.items():
        banded = method in ("token-oracle", *case.SAMPLED)  # a band of 2/9 of the keys alone, no sink
        assert (
            (row["skipped"] is not None) == (asked == 0.1 or (asked == 0.3 and not banded)) == (row["rel_err"] is None)
        )
        assert (row["to_block_oracle"] is None) == (asked < 0.5)
        if row["skipped"] is None:
            assert row["realised"] == pytest.approx(asked, abs=0.03)
    found = {method: by_place[0.5, method] for method in case.METHODS}
    assert found["block-oracle"]["to_block_oracle"] == found["block-oracle"]["worst_head"] == 1
    assert max(row["kept_mass"] for row in found.values()) == found["token-oracle"]["kept_mass"]
    blocks = {method: found[method]["kept_mass"] for method in ("block-oracle", "pooled-blocks")}
    assert blocks["block-oracle"] >= blocks["pooled-blocks"]
    assert all(row["worst_head"] >= row["to_block_oracle"] for row in found.values())


def test_a_length_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def prompts(tokens: int, chosen: Sequence[int], device: str) -> list[Prompt]:
        if tokens == 2 * N:
            raise torch.OutOfMemoryError("too long")
        return [prompt(0)]

    monkeypatch.setattr(real_keys, "prompts", prompts)
    for name, value in {"QUICK_TOKENS": (2 * N, N), "QUICK_LAYERS": (0,), "DENSITIES": (0.5,)}.items():
        monkeypatch.setattr(case, name, value)
    notes: list[str] = []
    assert {row["n"] for row in case.rows(True, notes.append)} == {N}
    assert "nothing of 2048 tokens: OutOfMemoryError: too long" in notes


def test_a_file_of_whole_prompts_stands_for_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "prompts.npz"
    layers = [real_keys.Layer(*(part.numpy() for part in prompt(seed))) for seed in (1, 2)]
    real_keys.keep(path, layers, range(N))
    for layer, wanted in zip(real_keys.read_whole(path), layers, strict=True):
        assert torch.equal(layer.q, torch.from_numpy(wanted.queries).half().float())
        assert layer.k.shape == layer.v.shape == (G, N, D)
    monkeypatch.setenv("HSR_HEADS", str(path))
    monkeypatch.setattr(case, "DENSITIES", (0.5,))
    assert case.missing() is None
    assert [(row["n"], row["h"]) for row in case.rows(False, lambda _: None)] == [(N, H)] * len(case.METHODS)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_to_its_budget_and_to_what_rows_see(rule: str, head: Head) -> None:
    assert RULES[rule](head, 0.1) is None
    before = torch.zeros(T, N, dtype=torch.bool)
    for asked in (0.45, 0.6, 0.8, 1.0):
        chosen = RULES[rule](head, asked)
        assert asked - 0.04 < prefill_oracles.density(head, chosen) <= asked
        seen = torch.ones(T, T, dtype=torch.bool).tril().repeat_interleave(128, 1)
        assert not (chosen & ~seen).any()
        assert (chosen | ~torch.eye(T, dtype=torch.bool).repeat_interleave(128, 1)).all()
        assert rule == "token-oracle" or chosen[:, :128].all()
        assert rule == "vertical-slash" or not (before & ~chosen).any()
        before = chosen
    assert torch.equal(chosen, seen)


def test_mass_is_that_of_exact_attention_and_oracles_keep_the_most(head: Head) -> None:
    scores = (head.q @ head.k.T * D**-0.5).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    assert torch.allclose(head.mass, scores.softmax(1).reshape(T, 128, N).sum(1), atol=1e-4)
    kept = {name: float(head.mass[rule(head, 0.6)].sum()) for name, rule in RULES.items()}
    assert max(kept, key=lambda name: kept[name]) == "token-oracle"
    assert kept["block-oracle"] > kept["pooled-blocks"]
    chosen = RULES["token-oracle"](head, 0.6) & head.earlier.repeat_interleave(128, 1)
    order = head.mass[head.earlier.repeat_interleave(128, 1)].sort(descending=True).values
    assert torch.equal(head.mass[chosen].sort(descending=True).values, order[: int(chosen.sum())])


def test_vertical_slash_finds_a_column_and_both_offsets_of_a_diagonal() -> None:
    n, distance, column = 2048, 300, 200
    turns = torch.arange(n)[:, None] * torch.linspace(0.05, 3.0, 64)
    turned = turns - distance * torch.linspace(0.05, 3.0, 64)
    q = torch.cat([turned.cos(), turned.sin(), torch.ones(n, 1)], 1)  # <q, k> is largest at that distance
    k = torch.cat([turns.cos(), turns.sin(), torch.zeros(n, 1)], 1)
    k[column, -1] = 64.0
    head = Head(3 * q, k, torch.zeros(n, 4))
    assert head.weights(15)[:, column].mean() > 0.2
    chosen = RULES["vertical-slash"](head, 0.6)
    assert chosen[2:, column].all()
    for offset in (distance // 128, distance // 128 + 1):
        for block in range(offset + 1, 16):
            assert chosen[block, 128 * (block - offset) : 128 * (block - offset + 1)].all()


@pytest.mark.parametrize("causal", [False, True])
def test_ours_on_the_cpu_is_what_prefill_does(causal: bool) -> None:
    parts = prompt(2)
    found = case.drawn(parts, 0.4, 4, causal, 3)
    wanted = prefill(*parts, policy=BlockSampled(density=0.4, rows=4, causal_selection=causal, seed=3))
    assert torch.equal(found.output, wanted.output.float())
    for i in range(H):
        kept = found.kept(i, T)
        assert kept.sum() / (128 * T * (T + 1) / 2) == pytest.approx(wanted.densities[i])


@pytest.mark.parametrize("causal", [False, True])
def test_ours_on_the_gpu_errs_as_on_the_cpu(causal: bool) -> None:
    pytest.importorskip("triton", reason="the kernels are Triton's")
    single = prompt(4, 512, 64)
    half = Prompt(*(part.to(case.HERE).half() for part in single))
    found: dict[str, list[tuple[float, float, float]]] = {"cpu": [], "gpu": []}
    for seed in range(6):  # half precision moves codes, and with them what a seed draws
        kept, outputs = {}, {}
        for name, drawn in (
            ("cpu", case.drawn_on_cpu(single, 0.7, 4, causal, seed)),
            ("gpu", case.drawn_on_gpu(half, 0.7, 4, causal, seed)),
        ):
            kept[name, 0.7], outputs[name, 0.7] = drawn.kept(1, 4), drawn.output[1].float()
        judged = case.judged(Head(single.q[1], single.k[0], single.v[0]), kept, outputs)
        for name, each in found.items():
            one = judged[name, 0.7]
            each.append((float(one.density), float(one.mass), float(one.errors.mean())))
    cpu, gpu = (np.array(each).mean(axis=0) for each in found.values())
    assert gpu[0] == pytest.approx(cpu[0], abs=0.01) and gpu[1] == pytest.approx(cpu[1], abs=0.02)
    assert gpu[2] == pytest.approx(cpu[2], rel=0.2)


@pytest.mark.parametrize("fault", ["token-oracle", "sampled-8"])
def test_the_gate_shuts(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault in RULES:
        monkeypatch.setitem(RULES, fault, lambda head, density: prefill_oracles.token_oracle(head, 0.9 * density))
    else:
        right = case.drawn_on_cpu
        monkeypatch.setattr(case, "drawn_on_cpu", lambda *call: off(right(*call), rows=call[2]))
    with pytest.raises(WrongAnswer, match=f"{fault} at density 1"):
        case.gate()


def off(drawn: case.Drawn, rows: int) -> case.Drawn:
    return drawn._replace(output=drawn.output * (1.01 if rows == 8 else 1))
