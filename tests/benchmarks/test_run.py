"""The runner writes what it says, and never times a wrong answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import index_case, run
from benchmarks.dense import BLOCK, Faiss, Numpy
from benchmarks.gate import Answer, WrongAnswer, require, rounding
from benchmarks.measure import take_turns
from hsr import methods
from tests.strategies import served

HEAD = {"case", "device", "cpu", "threads", "commit", "command", "date", "versions", "notes", "rows"}
ROW = {
    "n",
    "d",
    "reported",
    "m",
    "method",
    "ms",
    "spread",
    "speedup_vs_best_baseline",
    "scanned_fraction",
    "visited_fraction",
    "build_s",
    "form",
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_case, "QUICK_SIZES", ((600, 2), (600, 20)))


@pytest.mark.usefixtures("tiny")
def test_quick_index_case_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "index.json"
    assert run.main(["index", "--quick", "--json", str(file)]) == 0
    measured = json.loads(file.read_text())
    assert set(measured) == HEAD
    assert measured["case"] == "index"
    assert measured["command"] == "python -m benchmarks.run index --quick", "where the results went is not recorded"
    settings = {(row["n"], row["d"], row["reported"], row["m"]) for row in measured["rows"]}
    assert settings == {(600, d, reported, m) for d in (2, 20) for reported in (16, 6) for m in (1, 8)}
    for setting in settings:
        rows = [row for row in measured["rows"] if (row["n"], row["d"], row["reported"], row["m"]) == setting]
        ours = {method for method in methods("build") if served(method, setting[1]) == setting[1]}
        assert {row["method"] for row in rows} == {"numpy", "faiss", *ours}
        assert max(row["speedup_vs_best_baseline"] for row in rows if row["build_s"] is None) == 1.0
    for row in measured["rows"]:
        assert set(row) == ROW | {"build_s", "form"}
        assert row["ms"] > 0
        assert row["spread"] >= 0
        assert 0 <= row["scanned_fraction"] <= 1
        assert row["visited_fraction"] >= 0
    printed = capsys.readouterr().out
    assert "speedup_vs_best_baseline" in printed
    assert "n = 600, d = 20: method 'layers' cannot serve this call: it needs keys of width 2, got width 20" in printed
    assert measured["commit"] in printed


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("wrong", ["numpy", "index"])
def test_a_wrong_answer_is_not_timed(
    wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drop_last(answer: Answer) -> Answer:
        return Answer(np.minimum(answer.offsets, len(answer.indices) - 1), answer.indices[:-1], answer.scores[:-1])

    owner, name = (Faiss, "search") if wrong == "numpy" else (index_case, "_ask")
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *call: drop_last(right(*call)))
    monkeypatch.setattr(index_case, "take_turns", take_turns_of_forms_only)
    file = tmp_path / "index.json"
    assert run.main(["index", "--quick", "--json", str(file)]) == 1
    assert not file.exists()
    assert "nothing was timed: " in capsys.readouterr().err


def take_turns_of_forms_only(contenders: dict, *rest: object, **options: object) -> dict:
    assert "numpy" not in contenders, "the clock started before the gate"
    return take_turns(contenders, *rest, **options)


def test_an_unknown_case_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["indexes"])
    assert stop.value.code == 2
    assert "invalid choice: 'indexes' (choose from" in (said := capsys.readouterr().err)
    assert all(case in said for case in run.CASES)


def test_a_command_is_recorded_without_where_its_results_went() -> None:
    words = ["hsr", "bench", "index", "--json", "a b", "--quick", "--json=c", "--", "--tokens", "9"]
    assert run.command(words) == "hsr bench index --quick -- --tokens 9"


@pytest.mark.parametrize("word", ["-h", "--help"])
@pytest.mark.parametrize("case", [[], ["index"]])
def test_help_lists_the_options_of_the_case(
    word: str, case: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(index_case, "options", lambda parser: parser.add_argument("--dtype"), raising=False)
    with pytest.raises(SystemExit) as stop:
        run.main([*case, word])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--quick" in said and ("--dtype" in said) == bool(case)


@pytest.mark.parametrize(("status", "mark"), [("", ""), (" M hsr/index.py", "-dirty")])
def test_a_changed_tree_marks_the_commit(status: str, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_git", lambda verb, *_: "abc" if verb == "rev-parse" else status)
    assert run.commit() == "abc" + mark


def test_no_repository_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_git", lambda *_: None)
    assert run.commit() == "unknown"


SCORES = np.array([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
RIGHT = Answer(np.array([0, 2, 4]), np.array([3, 2, 0, 1]), np.array([3.0, 2.0, 3.0, 2.0]))
FAULTS = {
    "missed": Answer(np.array([0, 1, 3]), np.array([2, 0, 1]), np.array([2.0, 3.0, 2.0])),
    "wrongly reported": Answer(np.array([0, 3, 5]), np.array([3, 2, 1, 0, 1]), np.array([3.0, 2.0, 1.0, 3.0, 2.0])),
    "repeated": Answer(np.array([0, 3, 5]), np.array([3, 2, 2, 0, 1]), np.array([3.0, 2.0, 2.0, 3.0, 2.0])),
    "misjudged": RIGHT._replace(scores=np.array([3.0, 2.0, 3.0, 2.1])),
    "queries": Answer(np.array([0, 2]), np.array([3, 2]), np.array([3.0, 2.0])),
}


def test_the_gate_lets_the_right_answer_through_and_the_band_go_either_way() -> None:
    require("x", RIGHT, SCORES, 2.0, 1e-9)
    require("x", RIGHT, SCORES, 1.0 + 1e-10, 1e-9)
    require("x", RIGHT, SCORES, 2.0 + 1e-10, 1e-9)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_refuses_planted_faults(fault: str) -> None:
    with pytest.raises(WrongAnswer, match=fault):
        require("x", FAULTS[fault], SCORES, 2.0, 1e-9)


@pytest.mark.parametrize("m", [1, 5])
def test_every_baseline_reports_the_closed_half_space(m: int) -> None:
    rng = np.random.default_rng(3)
    keys = rng.integers(-3, 4, (BLOCK + 70, 6)).astype(
        np.float32
    )  # products are small whole numbers: many ties, no rounding
    queries = rng.integers(-3, 4, (m, 6)).astype(np.float32)
    oracle = (queries @ keys.T).astype(np.float64)
    for name, form in {**Numpy(keys, m).forms(m), "faiss": Faiss(keys).search}.items():
        require(name, form(queries, np.float32(20)), oracle, 20.0, 0.0)


def test_rounding_covers_another_order_of_summation() -> None:
    rng = np.random.default_rng(4)
    keys, queries = rng.standard_normal((500, 64), np.float32), rng.standard_normal((8, 64), np.float32)
    exact = queries.astype(np.float64) @ keys.T.astype(np.float64)
    off = np.abs(queries @ keys.T - exact).max()
    assert 0 < off <= rounding(queries, keys, np.float32)


def test_contenders_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    contenders = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    timings = take_turns(contenders, 2, 3, shortest=0.0, pause=0.0)
    one_turn = [("a", 0), ("a", 0), ("a", 1), ("b", 0), ("b", 0), ("b", 1)]
    assert calls[-18:] == 3 * one_turn
    assert all(timing.median > 0 and timing.spread >= 0 for timing in timings.values())


def test_a_table_lines_up_and_shows_what_is_missing() -> None:
    lines = run.table([{"name": "a", "ms": 1.23456}, {"name": "long", "ms": None}]).splitlines()
    assert lines == ["name     ms", "   a  1.235", "long      -"]
    assert run.table([]) == "no rows"


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for module in ("benchmarks.index_case", "benchmarks.dense"):
        monkeypatch.delitem(sys.modules, module)
    assert run.main(["index", "--quick"]) == 1
    assert "the case index needs the package faiss: pip install '.[bench]'" in capsys.readouterr().err


class Stopped(Exception):
    """As whatever ends a run midway."""


def case_of(rows: int, fault: BaseException | None, watch: Callable[[], None] = lambda: None) -> Callable[..., Any]:
    """In place of a case's rows: so many, a note, and perhaps a fault."""

    def made(quick: bool, note: Callable[[str], None]) -> Iterator[dict[str, object]]:
        note("a note")
        for i in range(rows):
            yield {"n": i}
            watch()
        if fault is not None:
            raise fault

    return made


@pytest.mark.parametrize("fault", [Stopped("no more"), KeyboardInterrupt(), WrongAnswer("bad")], ids=repr)
def test_a_run_that_stops_leaves_its_rows(
    fault: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "index.json"
    left = file.with_name("index.json.partial")
    monkeypatch.setattr(index_case, "rows", case_of(3, fault))
    if isinstance(fault, WrongAnswer):
        assert run.main(["index", "--json", str(file)]) == 1
        assert capsys.readouterr().err.endswith(f"stopped: bad; the rows so far are in {left}\n")
    else:
        with pytest.raises(type(fault)) as raised:
            run.main(["index", "--json", str(file)])
        assert raised.value.__notes__ == [f"the rows so far are in {left}"]
    measured = json.loads(left.read_text())
    assert set(measured) == HEAD and measured["rows"] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert measured["notes"] == ["a note"] and measured["case"] == "index"
    assert list(file.parent.iterdir()) == [left]


def test_a_run_that_ends_leaves_its_file_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, seen = tmp_path / "index.json", []
    left = tmp_path / "index.json.partial"
    left.write_text("of a run that was stopped before")
    monkeypatch.setattr(
        index_case, "rows", case_of(3, None, lambda: seen.append(len(json.loads(left.read_text())["rows"])))
    )
    assert run.main(["index", "--json", str(file)]) == 0
    assert seen == [1, 2, 3] and list(tmp_path.iterdir()) == [file]
    assert len(json.loads(file.read_text())["rows"]) == 3


@pytest.mark.parametrize("name", ["folder", "file/below.json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(index_case, "rows", case_of(1, Stopped("it was measured")))
    assert run.main(["index", "--json", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith(f"--json must name a file; {tmp_path / name}")


def test_a_fault_before_the_first_row_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(index_case, "rows", case_of(0, Stopped("at once")))
    with pytest.raises(Stopped):
        run.main(["index", "--json", str(tmp_path / "index.json")])
    assert not list(tmp_path.iterdir())
