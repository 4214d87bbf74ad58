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
    for name, value in {"KNOWN": 40, "GATE_TOKENS": 250, "CUDA": False}.items():
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
    found = reader.reply(one._replace(answers=("given",)), reader.read(one), None)
    assert found.exact == 1


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
    monkeypatch.setattr(case, "POLICIES", (None, TopR(9), TopR(4 * N), Sampled(eps=0.3)))
    monkeypatch.setattr(case.Reader, "reply", refuses)
    file = tmp_path / "retrieval.json"
    asked = "--tasks passkey variables --samples 2 --device cpu --dtype float32 --tokens 600 300".split()
    assert run.main(["retrieval", *asked, "--json", str(file)]) == 0
    measured = run.json.loads(file.read_text())
    rows = measured["rows"]
    assert [(row["tokens"], row["task"]) for row in rows[::3]] == [
        (n, task) for n in (300, 600) for task in ("passkey", "variables")
    ]
    assert [row["method"] for row in rows[:3]] == ["Dense", "TopR", "Sampled"]
    for row in rows:
        assert row["samples"] == 2 and 0 < row["share"] <= 1 and row["dense_exact"] <= 1
        if row["method"] == "TopR":
            assert row["logprob"] == pytest.approx(row["dense_logprob"], abs=1e-4) and row["share"] == 1
    assert sum("nine is too many" in note for note in measured["notes"]) == 4
    assert sum("RoPE for" in note for note in measured["notes"]) == 2
    retrieval_table.main([str(file)])
    assert "| Sampled | `eps=0.3` |" in (tmp_path / "retrieval.md").read_text()


def test_the_gate_shuts(monkeypatch: pytest.MonkeyPatch, reader: case.Reader) -> None:
    case.gate(reader, ESSAYS, 1e-4)
    monkeypatch.setattr(case, "TopOracle", lambda r: case.Top(3))
    with pytest.raises(WrongAnswer, match=r"TopR\(r=3\): the reply's mean"):
        case.gate(reader, ESSAYS, 1e-4)
