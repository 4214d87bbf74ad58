"""The runner writes what it found and tells failure by its exit status."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from proofs_checks import __main__ as program
from proofs_checks.check import Check, discover

NAME = "quantisation_bounds"


def replace_checks(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    check: Check = dataclasses.replace(discover()[NAME], **changes)  # type: ignore[arg-type]
    monkeypatch.setattr(program, "discover", lambda: {NAME: check})


def test_the_table_has_a_row_for_every_operation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.md"
    assert program.main([NAME, "--examples", "5", "--to", str(file)]) == 0
    table = file.read_text()
    assert f"`python -m proofs_checks {NAME} --examples 5 --to {file}`" in table
    (row,) = [line for line in table.splitlines() if f"`{NAME}.py`" in line]
    assert " | holds | error / L1 bound: 1; error / L2 bound: 1 | " in row
    assert row in capsys.readouterr().out


def test_named_checks_do_not_touch_the_committed_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "RESULTS", tmp_path / "RESULTS.md")
    assert program.main([NAME, "--examples", "5"]) == 0
    assert not program.RESULTS.exists()
    replace_checks(monkeypatch, examples=5)
    assert program.main([]) == 0
    assert f"`{NAME}.py`" in program.RESULTS.read_text()


@pytest.mark.parametrize("wrong", ["a fault", "an error"])
def test_a_failure_is_reported_and_the_status_is_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    fault = next(iter(discover()[NAME].faults.values()))
    replace_checks(monkeypatch, operations={"bad": fault if wrong == "a fault" else divide_by_zero}, examples=100)
    assert program.main(["--to", str(tmp_path / "table.md")]) == 1
    status = "FAILS" if wrong == "a fault" else "FAILS: ZeroDivisionError"
    assert f" | bad | exact rationals | {status} |  | " in (tmp_path / "table.md").read_text()
    assert "Traceback" in capsys.readouterr().err


def divide_by_zero(*arguments: object) -> float:
    return 1 / 0


def test_a_check_without_an_operation_is_not_yet_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replace_checks(monkeypatch, operations={}, pending="nobody wrote it")
    assert program.main(["--to", str(tmp_path / "table.md")]) == 0
    assert " | not yet: nobody wrote it | " in (tmp_path / "table.md").read_text()


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["theorem_9_9"])
    assert "no check is named theorem_9_9" in capsys.readouterr().err


def test_the_results_are_those_of_all_checks() -> None:
    names = {line.split("|")[2].strip() for line in program.RESULTS.read_text().splitlines() if line.startswith("| ")}
    assert {f"`{name}.py`" for name in discover()} == names - {"file"}
    assert "FAILS" not in program.RESULTS.read_text()
