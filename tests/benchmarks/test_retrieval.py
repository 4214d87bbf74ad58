"""Case ``retrieval`` on a tiny model: dense steps are one dense pass, rows and tables complete, a gate that shuts."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the case runs a torch model")
pytest.importorskip("transformers", reason="the model is transformers'")

from attention import Sampled, TopR  # noqa: E402
from attention.integrations.transformers import HSRCache  # noqa: E402
from attention.selectors import TopOracle  # noqa: E402
from benchmarks import retrieval_case as case  # noqa: E402
from benchmarks import retrieval_table, retrieval_tasks, run, smollm  # noqa: E402
from benchmarks.gate import WrongAnswer  # noqa: E402
from hsr.errors import ArgumentError  # noqa: E402
from tests import tiny_llama  # noqa: E402

N = 300
ESSAYS = ["There was a bright morning. Nobody asked why. " * 9, "Again some people walked home. Others stayed. " * 9]


class Words:
    """A tokenizer of words, figures and marks that knows what it has read, all but those that others replaced."""

    def __init__(self) -> None:
        self.backend_tokenizer = self
        self._known: dict[int, str] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        parts = re.findall(r"[a-zA-Z]+|\d|[^\w\s]", text)
        ids = [zlib.crc32(part.encode()) % tiny_llama.VOCABULARY for part in parts]
        self._known |= dict(zip(ids, parts, strict=True))
        return SimpleNamespace(ids=ids)

    def decode(self, ids: list[int]) -> str:
        return " ".join(self._known.get(i, "?") for i in ids)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> case.Reader:
    for name, value in {"KNOWN": 40, "GATE_TOKENS": 250}.items():
        monkeypatch.setattr(case, name, value)
    monkeypatch.setattr(retrieval_tasks, "KEYS", 3)
    return case.Reader(tiny_llama.tiny_model(512), Words())


def passkey(reader: case.Reader) -> retrieval_tasks.Sample:
    return retrieval_tasks.sample("passkey", N, 1, ESSAYS, reader.count)


def test_dense_steps_are_one_dense_pass_and_greedy_is_greedy(reader: case.Reader) -> None:
    one = passkey(reader)
    context, prompt = reader.read(one), reader.encode(one.context + one.question)
    found = reader.reply(one, context, None)
    assert found.logprob == pytest.approx(reader.whole(one), abs=1e-4) and found.share == 1 and found.exact == 0
    cache = HSRCache(reader._model.config)
    with torch.inference_mode():
        reader._pass(cache, prompt[:-1])
        first = int(reader._steps(cache, prompt[-1:]).argmax())
        greedy = reader._greedy(cache, first, 8)
        for place, token in enumerate(greedy):
            ids = torch.tensor([prompt + greedy[:place]])
            logits = reader._model(input_ids=ids, past_key_values=HSRCache(reader._model.config)).logits[0, -1]
            assert int(logits.argmax()) == token
    assert reader.reply(one, context, TopR(5)).share < 0.05


def test_a_reply_that_the_model_gives_is_exact(reader: case.Reader) -> None:
    one = passkey(reader)
    with torch.inference_mode():
        cache = HSRCache(reader._model.config)
        logits = reader._pass(cache, reader.encode(one.context + one.question))
        given = [int(logits[-1].argmax())]
        for _ in range(4):
            given.append(int(reader._steps(cache, given[-1:])[0].argmax()))
    reader.encode = lambda text, whole=reader.encode: given if text == " given" else whole(text)  # type: ignore[method-assign]
    assert reader.reply(one._replace(answers=("given",)), reader.read(one), None).exact == 1


def test_the_order_of_a_reply_counts_where_answers_have_one(
    reader: case.Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = passkey(reader)._replace(answers=("red", "blue", "green"))
    context = reader.read(one)
    for reply, exact in (("green, red, blue and", 1), ("green, red, red", 0), ("green, red, and blue", 0)):
        monkeypatch.setattr(reader, "_greedy", lambda *_, reply=reply: reader.encode(reply))
        assert reader.reply(one._replace(ordered=False), context, None).exact == exact
        assert reader.reply(one, context, None).exact == 0


def test_the_case_writes_rows_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: case.Reader) -> None:
    def load_model(tokens: int, device: str, dtype: torch.dtype) -> tuple[Any, Words]:
        return tiny_llama.tiny_model(max(tokens, 512), device, dtype), Words()

    def refuses(self: case.Reader, one: Any, context: Any, policy: Any, right: Any = case.Reader.reply) -> case.Reply:
        if policy == TopR(9):
            raise ArgumentError("nine is too many")
        reply: case.Reply = right(self, one, context, policy)
        return reply

    monkeypatch.setattr(smollm, "load_model", load_model)
    monkeypatch.setattr(smollm, "essays", lambda: ESSAYS)
    monkeypatch.setattr(case, "missing", lambda: None)
    monkeypatch.setattr(case, "policies", lambda device: (None, TopR(9), TopR(4 * N), Sampled(eps=0.3)))
    monkeypatch.setattr(case.Reader, "reply", refuses)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # --device decides, not what there is
    file = tmp_path / "retrieval.json"
    asked = "--tasks passkey variables --samples 2 --device cpu --tokens 600 300".split()
    assert run.main(["retrieval", *asked, "--json", str(file)]) == 0
    measured = run.json.loads(file.read_text())
    rows = measured["rows"]
    assert measured["device"] == "cpu"
    assert [(row["tokens"], row["task"]) for row in rows[::3]] == [
        (n, task) for n in (300, 600) for task in ("passkey", "variables")
    ]
    assert [row["method"] for row in rows[:3]] == ["Dense", "TopR", "Sampled"]
    for row in rows:
        assert row["samples"] == 2 and 0 < row["share"] <= 1
        dense = next(one for one in rows if all(one[name] == row[name] for name in ("tokens", "task")))
        assert dense["method"] == "Dense" and dense["logprob"] < 0
        for name in ("exact", "found", "logprob"):
            assert row[f"dense_{name}"] == dense[name]
        if row["method"] == "TopR":
            assert row["logprob"] == pytest.approx(row["dense_logprob"], abs=1e-4) and row["share"] == 1
    assert sum("nine is too many" in note for note in measured["notes"]) == 4
    assert sum("float32, RoPE for" in note for note in measured["notes"]) == 2
    retrieval_table.main([str(file)])
    assert "| Sampled | `eps=0.3` |" in (tmp_path / "retrieval.md").read_text()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("--tokens 0", "tokens must be at least 129; got 0"),
        ("--tokens 600 128", "tokens must be at least 129; got 128"),
        ("--samples 0", "samples must be at least 1; got 0"),
        ("--tokens 140", "tokens must hold a sample of passkey with a context beyond 128 tokens; got 140"),
        ("--device nowhere", "device must be cpu or cuda; got 'nowhere'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    asked: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm, "load_model", lambda *_: (tiny_llama.tiny_model(512), Words()))
    monkeypatch.setattr(smollm, "essays", lambda: ESSAYS)
    monkeypatch.setattr(case, "missing", lambda: None)
    monkeypatch.setattr(case, "gate", lambda *_: None)
    assert run.main(["retrieval", "--device", "cpu", "--tasks", "passkey", *asked.split()]) == 2
    assert capsys.readouterr().err == reason + "\n"


def test_the_device_that_is_asked_for_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, kind in (("cpu", TopR), ("cuda:0", TopOracle)):
        tops = [type(policy) for policy in case.policies(device) if isinstance(policy, TopR | TopOracle)]
        assert set(tops) == {kind}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="device must be cpu where torch finds no CUDA device; got 'cuda'"):
        case.where("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    assert (case.where("cpu"), case.where("cuda:1")) == ("cpu", "GPU cuda:1")


def test_dense_must_serve(reader: case.Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise ArgumentError("not today")

    monkeypatch.setattr(case.Reader, "reply", refuses)
    with pytest.raises(ArgumentError, match="not today"):
        list(case.measured({"task": "passkey", "tokens": N}, reader, [passkey(reader)], (None, TopR(9)), print))


@pytest.mark.parametrize("fault", ["TopOracle", "Sampled"])
def test_the_gate_shuts(fault: str, monkeypatch: pytest.MonkeyPatch, reader: case.Reader) -> None:
    case.gate(reader, ESSAYS, 1e-4, "cpu")
    monkeypatch.setattr(case, fault, lambda *_, **__: TopR(3))
    with pytest.raises(WrongAnswer, match=r"TopR\(r=3\): the reply's mean"):
        case.gate(reader, ESSAYS, 1e-4, "cpu")
