"""Case ``model-checks`` on a tiny model: rows complete, figures those of the model, faults told and not hidden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the case runs a torch model")
pytest.importorskip("transformers", reason="the model is transformers'")

from attention import BlockSampled, TopR  # noqa: E402
from attention.integrations.transformers import NAME, register  # noqa: E402
from benchmarks import model_checks_case as case  # noqa: E402
from benchmarks import run, smollm  # noqa: E402
from benchmarks.retrieval_case import Reply  # noqa: E402
from tests import tiny_llama  # noqa: E402

TEXT = torch.randint(tiny_llama.VOCABULARY, (200,), generator=torch.Generator().manual_seed(1)).tolist()
SIZES = [30, 45, 35, 20]


class Reader:
    """Stands for that of ``retrieval``; samples are their seeds, and sparse steps miss those of ``missed``."""

    context = tiny_llama.CONTEXT
    missed = ()

    def __init__(self, model: Any, tokenizer: Any) -> None:
        register()
        self.count = len

    def read(self, one: int) -> int:
        return one

    def reply(self, one: int, context: int, policy: Any) -> Reply:
        exact = one == context and one != 2 and (policy is None or one not in self.missed)
        return Reply(float(exact), 0.0, -1.0 if policy is None else -1.5, 0.25)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = tiny_llama.tiny_model()
    sizes = {"NEW": 5, "SHORTEST": 20, "LONGEST": 40, "PREFIX": 24, "BATCHED": 2}
    here = {"HERE": "cpu", "Reader": Reader, "missing": lambda: None, "sample": lambda task, tokens, seed, *_: seed}
    for name, value in (sizes | here).items():
        monkeypatch.setattr(case, name, value)
    monkeypatch.setattr(smollm, "load_model", lambda tokens, device, dtype: (model, None))
    monkeypatch.setattr(smollm, "essay_tokens", lambda tokenizer, count: (TEXT * 2)[:count])
    monkeypatch.setattr(smollm, "essays", lambda: [])
    register()
    return model


def generated(model: Any, notes: list[str]) -> list[dict[str, Any]]:
    return list(case.generation(model, case.inputs(TEXT, SIZES, "cpu"), notes.append))


def test_the_case_writes_a_row_per_check(tmp_path: Path, model: Any) -> None:
    file = tmp_path / "checks.json"
    asked = "--tokens 200 --prompts 4 --samples 3 --device cpu".split()
    assert run.main(["model-checks", *asked, "--json", str(file)]) == 0
    rows = run.json.loads(file.read_text())["rows"]
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    checks = [(row["check"], row["measured"], row["reference"]) for row in rows[:-1]]
    assert checks == [*[("generation", 4, 4)] * 3, ("bits", 20, 20), ("passkey", 2, 2)]
    assert [row["steps"] for row in rows] == [12, 12, 0, 0, None, 175]  # a batch and two alone, four steps each
    assert [row["share"] for row in rows[:5]] == [1, 1, 1, 1, 0.25] and 0 < rows[-1]["share"] < 1
    assert all(row["holds"] for row in rows[:-1]) and rows[-1]["check"] == "perplexity"


def test_prompts_are_cut_one_after_the_other_and_some_padded() -> None:
    batch, *alone = case.inputs(range(130), [5, 7, 4], "cpu")[:2]
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4]] and len(alone) == 1
    assert alone[0]["input_ids"].tolist() == [[*range(5, 12)]] and alone[0]["attention_mask"].all()
    both = case.padded([[7, 8, 9], [5]], "cpu")
    assert both["input_ids"].tolist() == [[7, 8, 9], [0, 0, 5]]
    assert both["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_sequences_that_part_are_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few, notes = {"decode": TopR(1), "prefill": TopR(1), "dense_below": 0}, list[str]()
    monkeypatch.setattr(case, "SAME", {"few": few, "dense": few})
    rows = generated(model, notes)
    for row in rows[:2]:
        assert not row["holds"] and row["measured"] < row["reference"] == 4 and row["share"] < 0.1
        assert row["detail"].count("one parts at token") == 4 - row["measured"]
    assert rows[2]["check"] == "bits" and rows[2]["measured"] == 0 and not rows[2]["holds"]
    monkeypatch.setattr(case, "SAME", {"refused": {"decode": BlockSampled(density=0.5)}})
    assert generated(model, notes) == [] and notes[0].startswith(
        "generation without BlockSampled(density=0.5): decode: policy must"
    )


def test_the_perplexity_is_the_models_and_shows_a_loss(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "SPARSE", {"decode": TopR(1000), "dense_below": 0})
    whole = case.surprise(model, TEXT[:90])
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(torch.tensor([TEXT[:90]])).logits[0, case.PREFIX : -1]
    wanted = float(torch.nn.functional.cross_entropy(logits, torch.tensor(TEXT[case.PREFIX + 1 : 90])).exp())
    assert whole["reference"] == pytest.approx(wanted, rel=1e-4) and whole["share"] == 1
    assert whole["measured"] == pytest.approx(wanted, rel=1e-4) and whole["holds"]
    assert "tokens 26 to 90; ratio 1.0000" in str(whole["detail"])
    monkeypatch.setattr(case, "SPARSE", {"decode": TopR(1), "dense_below": 0})
    lossy = case.surprise(model, TEXT[:90])
    assert not lossy["holds"] and lossy["reference"] == whole["reference"]
    assert model.config._attn_implementation == NAME


def test_pass_keys_that_sparse_steps_miss_are_counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "missed", (0,))
    row = case.retrieval(Reader(model, None), 64, 4)  # type: ignore[arg-type]
    assert (row["measured"], row["reference"], row["holds"]) == (2, 3, False)
    assert "of 4 with 64 tokens, 3 of them" in str(row["detail"]) and "-1.5000, dense -1.0000" in str(row["detail"])


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--tokens", "-4"], "tokens must be at least 26; got -4"),
        (["--prompts", "0"], "prompts must be at least 1; got 0"),
        (["--samples", "0"], "samples must be at least 1; got 0"),
        (["--device", "meta"], "device must be cpu or cuda; got 'meta'"),
    ],
)
def test_settings_that_leave_nothing_to_measure_are_refused(
    option: list[str], reason: str, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["model-checks", *option]) == 2
    assert capsys.readouterr().err == f"{reason}\n"


def test_the_device_is_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "device_name", lambda device: f"a {device}")
    assert run.head("model-checks", case, "", {"device": "thing", "dtype": "float32"})["device"] == "a thing"
