"""Case ``figure3``: top-r by threshold, readings of a tiny model, a gate that shuts, sentences that follow the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the case runs a torch model")
pytest.importorskip("transformers", reason="the model is transformers'")

from attention import Dense, Sampled, TopR, prefill  # noqa: E402
from benchmarks import figure3_case as case  # noqa: E402
from benchmarks import figure3_figures, figure3_statement, perplexity, plots, run, smollm  # noqa: E402
from benchmarks.gate import WrongAnswer  # noqa: E402
from tests import tiny_llama  # noqa: E402

N = 90
TEXT = torch.randint(tiny_llama.VOCABULARY, (N,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def model() -> Any:
    model = tiny_llama.tiny_model()
    smollm.hook(model)
    return model


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    def load_model(tokens: int, device: str, dtype: torch.dtype) -> tuple[Any, None]:
        return model.to(dtype), None

    monkeypatch.setattr(smollm, "load_model", load_model)
    monkeypatch.setattr(smollm, "essay_tokens", lambda tokenizer, count: (TEXT * 9)[:count])
    monkeypatch.setattr(case, "missing", lambda: None)
    monkeypatch.setattr(case, "GATE_TOKENS", N)


@pytest.mark.parametrize("r", [1, 7, 64, N])
@pytest.mark.parametrize("m", [N, 20])
def test_top_attention_is_the_policy(r: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(r)
    q, k, v = (torch.randn(shape, generator=random) for shape in [(6, m, 16), (2, N, 16), (2, N, 16)])
    wanted = prefill(q, k, v, policy=TopR(r), scale=0.3)
    for pairs in (1, 6 * N * 7, 1 << 24):  # a row at a time, blocks with a rest, all at once
        monkeypatch.setattr(perplexity, "PAIRS", pairs)
        output, reported = perplexity.top_attention(q, k, v, r, 0.3)
        torch.testing.assert_close(output, wanted.output, atol=1e-5, rtol=1e-5)
        assert (reported.numpy() == wanted.counters.reported).all()


def test_keys_that_tie_with_the_last_one_are_kept() -> None:
    k = torch.tensor([[[2.0], [1.0], [1.0], [0.0]]])
    output, reported = perplexity.top_attention(torch.ones(1, 1, 1), k, k, 2, 1.0)
    weights = torch.tensor([2.0, 1.0, 1.0]).exp()
    assert reported.item() == 3
    assert output.item() == pytest.approx(float((weights * k[0, :3, 0]).sum() / weights.sum()))


def test_a_reading_is_the_models_own(model: Any) -> None:
    dense = perplexity.read(model, TEXT, perplexity.DenseStage())
    own = model(torch.tensor([TEXT]), use_cache=False, stage=perplexity.DenseStage()).logits[0].detach().log_softmax(-1)
    assert torch.allclose(dense.surprise, -own[range(N - 1), TEXT[1:]].double(), atol=1e-5)
    assert dense.perplexity(40) == pytest.approx(float(dense.surprise[40:].mean().exp()))
    sparse = perplexity.read(model, TEXT, perplexity.TopStage(4), dense.states)
    there = perplexity.read(model, TEXT, perplexity.TopStage(4)).states
    predicted = model.lm_head(there).detach().log_softmax(-1)[:-1]
    divergence = (own[:-1].exp() * (own[:-1] - predicted)).sum(1)
    assert torch.allclose(sparse.divergence, divergence.double(), atol=1e-5) and float(divergence.mean()) > 1e-3
    same = perplexity.read(model, TEXT, perplexity.PolicyStage(Dense()), dense.states)
    assert float(same.divergence.abs().max()) < 1e-5


def test_rows_before_the_r_th_are_dense(model: Any) -> None:
    dense, sparse = (
        perplexity.read(model, TEXT, stage) for stage in (perplexity.DenseStage(), perplexity.TopStage(32))
    )
    assert torch.allclose(dense.states[:32], sparse.states[:32], atol=1e-4)
    assert not torch.allclose(dense.states[40:], sparse.states[40:], atol=1e-2)


@pytest.mark.usefixtures("here")
def test_the_case_writes_rows_a_figure_and_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "OTHERS", (Sampled(eps=0.3),))
    file = tmp_path / "figure3.json"
    assert run.main(["figure3", "--tokens", "150", "--device", "cpu", "--json", str(file)]) == 0
    measured = run.json.loads(file.read_text())
    assert measured["command"] == "python -m benchmarks.run figure3 --tokens 150 --device cpu"
    assert measured["device"] == "cpu"
    rows = measured["rows"]
    assert [row["setting"] for row in rows] == ["", "r=4", "r=8", "r=16", "r=32", "r=64", "r=128", "eps=0.3"]
    assert {tuple(row) for row in rows} == {tuple(rows[0])} and rows[0]["ratio"] == 1
    assert [row["kl"] for row in rows[1:7]] == sorted((row["kl"] for row in rows[1:7]), reverse=True)
    assert rows[3]["reported"] == pytest.approx(sum(min(16, i + 1) for i in range(150)) / 150)
    assert plots.main([str(file)]) == 0 and (tmp_path / "figure3.png").exists()
    figure3_statement.main([str(file)])
    assert "| TopR | `r=128` |" in (tmp_path / "figure3.md").read_text()


@pytest.mark.usefixtures("here")
def test_an_option_that_the_case_has_not_is_refused() -> None:
    with pytest.raises(SystemExit):
        run.main(["figure3", "--quick", "--layers", "3"])


@pytest.mark.usefixtures("here")
def test_no_tokens_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["figure3", "--tokens", "0", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "tokens must be at least 8; got 0\n"


@pytest.mark.parametrize("fault", ["top", "opposite", "dense"])
def test_the_gate_shuts(fault: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case.gate(model, TEXT, 1e-4)
    if fault == "top":
        right = case.top_attention
        monkeypatch.setattr(case, "top_attention", lambda q, k, v, r, scale: right(q, k, v, max(r - 1, 1), scale))
    elif fault == "opposite":  # errors whose mean is 0
        reading = case.read
        signs = torch.arange(N - 1) % 2 * 2.0 - 1
        signs[-1] = 0

        def off(model: Any, text: Any, stage: Any) -> Any:
            found = reading(model, text, stage)
            return found._replace(surprise=found.surprise + (1e-3 * signs if type(stage) is case.PolicyStage else 0))

        monkeypatch.setattr(case, "read", off)
    else:
        monkeypatch.setattr(case.PolicyStage, "attend", lambda self, layer, q, k, v, scale: 0.9 * q)
    with pytest.raises(WrongAnswer, match=r"top_attention\(4\)" if fault == "top" else "prefill of all keys"):
        case.gate(model, TEXT, 1e-4)


def test_sentences_follow_from_the_rows() -> None:
    head = {"tokens": 64, "perplexity": 1.0, "kl": 0.1, "setting": "eps=0.1"}
    ratios = {4: 2.0, 8: 1.001, 16: 1.2, 32: 1.005, 64: 1.0}
    rows = [
        head | {"method": "TopR", "r": r, "reported": r, "ratio": x, "late_ratio": 2 * x} for r, x in ratios.items()
    ]
    rows.append(head | {"method": "Sampled", "r": None, "reported": 20.0, "ratio": 1.004, "late_ratio": 1.0})
    rows.append(rows[-1] | {"reported": 10.0, "ratio": 1.001, "late_ratio": 1.02, "setting": "eps=0.2"})
    said = " ".join(figure3_statement.claims(rows))
    assert "less than 1 % over the whole text from r = 32 (32 keys a row) on" in said
    assert "more over its second half" in said
    assert "does not hold" in said and "r = 16 (16 keys a row) the loss is +20.00 %, +140.00 % in the" in said
    assert "Sampled loses less than 1 % over the whole text with 10 keys a row (`eps=0.2`): +0.10 %, +2.00 %" in said
    assert "Sampled loses less than 1 % over its second half with 20 keys a row (`eps=0.1`): +0.40 %" in said
    assert "top-r with r = 32 (32 keys a row): +0.50 %, +101.00 % in the second half." in said


def test_all_rows_are_drawn_at_their_keys_a_row() -> None:
    measured = run.json.loads((run.ROOT / run.MEASURED / "figure3.json").read_text())
    sparse = [row for row in measured["rows"] if row["method"] != "Dense"]
    assert any(row["setting"] == "" for row in sparse)
    figure = plots.figures(measured)[""]
    for axis, column in zip(figure.axes, ("perplexity", "kl"), strict=True):
        drawn = [tuple(place) for line in axis.lines[: len(figure3_figures.STYLES)] for place in line.get_xydata()]
        assert sorted(drawn) == sorted((row["reported"], row[column]) for row in sparse)
    marks = [text.get_text() for text in figure.axes[1].texts]
    assert len(marks) == sum(row["method"] != "TopR" for row in sparse) and "default" in marks
    with pytest.raises(AssertionError, match="no line"):
        figure3_figures.figures([*measured["rows"], sparse[0] | {"method": "Other"}])
