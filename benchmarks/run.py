"""Run one benchmark case, print its table and write its measurements.

python -m benchmarks.run index --quick
python -m benchmarks.run index --json benchmarks/results/index.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from benchmarks import page
from benchmarks.gate import WrongAnswer
from hsr.errors import ArgumentError, BackendUnavailable

if TYPE_CHECKING:
    from benchmarks.ledger import Row

CASES = {  # name -> module with rows(quick, note), an iterable of dicts with equal keys; DEVICE where not the CPU, or
    # where(**settings) that names the device where its options decide; missing() where it needs packages that pip's
    # extras do not hold: one line that says how to install them; and options(parser) where it has some of its own,
    # which rows() then takes
    "index": "benchmarks.index_case",
    "scaling": "benchmarks.scaling_case",
    "tree-data": "benchmarks.tree_data_case",
    "pruning": "benchmarks.pruning_case",
    "accuracy": "benchmarks.accuracy_case",
    "decode-cpu": "benchmarks.decode_cpu_case",
    "long-decode": "benchmarks.long_decode_case",
    "decode-gpu": "benchmarks.decode_gpu_case",
    "accuracy-gpu": "benchmarks.accuracy_gpu_case",
    "prefill-gpu": "benchmarks.prefill_gpu_case",
    "prefill-accuracy": "benchmarks.prefill_accuracy_case",
    "leaderboard": "benchmarks.leaderboard_case",
    "figure3": "benchmarks.figure3_case",
    "retrieval": "benchmarks.retrieval_case",
    "model-checks": "benchmarks.model_checks_case",
    "end-to-end": "benchmarks.end_to_end_case",
}
PACKAGES = ("hsr-attention", "numpy", "scipy", "numba", "faiss-cpu", "torch", "triton", "transformers")
ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = {
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
}  # unset, so that numpy's BLAS runs its best kernels for this processor
PARTIAL = ".partial"  # added to the name of the file that measurements are for, while they come
MEASURED = "benchmarks/results"  # measurements of other cases do not make the code dirty


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the case named on the command line; returns the exit status."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    general = _parser(add_help=not any(word in CASES for word in typed))
    name = general.parse_known_args(typed)[0].case
    try:
        case = loaded(name)
    except BackendUnavailable as lacking:
        print(lacking, file=sys.stderr)
        return 1
    parser = _parser(add_help=True)
    if hasattr(case, "options"):
        case.options(parser)
    settings = vars(parser.parse_args(typed))
    _, quick, file = (settings.pop(own) for own in ("case", "quick", "json"))
    try:
        facts = head(name, case, command(["python", "-m", "benchmarks.run", *typed]), settings)
        for fact, value in facts.items():
            print(f"{fact}: {value}")
        found = measured(
            case.rows, quick, settings, facts, file, lambda row: print(line(row), file=sys.stderr, flush=True)
        )
    except WrongAnswer as fault:
        print(f"{'stopped' if hasattr(fault, '__notes__') else 'nothing was timed'}: {told(fault)}", file=sys.stderr)
        return 1
    except ArgumentError as fault:
        print(told(fault), file=sys.stderr)
        return 2
    print(table(found["rows"]))
    for note in found["notes"]:
        print(note)
    return 0


def measured(
    rows: Callable[..., Iterable[Row]],
    quick: bool,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    file: Path | None,
    show: Callable[[Row], None],
) -> dict[str, Any]:
    """Run a case: its facts, notes and rows, which are written to ``file`` where there is one.

    After each row all there are so far are written to PARTIAL beside it, so that a run that stops loses none.

    Args:
        rows: of the case, called with ``quick``, what takes a note, and ``settings``.
        quick: as the case has it.
        settings: the case's own.
        facts: what `head` found.
        file: where the measurements are to lie.
        show: called with each row as it comes.

    Raises:
        ArgumentError: ``file`` cannot be written; before anything is measured.
    """
    found: dict[str, Any] = {**facts, "notes": [], "rows": []}
    partial = None if file is None else file.with_name(file.name + PARTIAL)
    reason = None if file is None else page.unwritable("--json", file)
    if reason:
        raise ArgumentError(reason)
    try:
        for row in rows(quick, found["notes"].append, **settings):
            found["rows"].append(row)
            if partial is not None:
                dump(partial, found)
            show(row)
    except BaseException as fault:
        if found["rows"]:
            fault.add_note(f"the rows so far are in {partial}" if partial else f"{len(found['rows'])} rows came before")
        raise
    if file is not None and partial is not None:
        dump(file, found)
        partial.unlink(missing_ok=True)
    return found


def told(fault: BaseException) -> str:
    """What went wrong, with what was noted about it."""
    return "; ".join([str(fault), *getattr(fault, "__notes__", ())])


def _parser(*, add_help: bool) -> argparse.ArgumentParser:
    """What every case can be asked for."""
    opening = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=opening, add_help=add_help, allow_abbrev=False
    )
    parser.add_argument("case", choices=CASES, metavar="CASE", help=f"CASE --help lists its own: {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks that the case works, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    return parser


def own_settings(program: str, case: ModuleType, typed: Sequence[str]) -> dict[str, Any]:
    """What a case's own options are set to by these words."""
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False)
    if hasattr(case, "options"):
        case.options(parser)
    return vars(parser.parse_args(typed))


def command(words: Sequence[str]) -> str:
    """A command line without --json FILE, which says where the results go on the machine that measures."""
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--json":
            next(rest, None)
        elif not word.startswith("--json="):
            kept.append(word)
    return shlex.join(kept)


def loaded(name: str) -> ModuleType:
    """The module of a case; BackendUnavailable says what to install for it."""
    try:
        case = importlib.import_module(CASES[name])
    except ModuleNotFoundError as missing:
        raise BackendUnavailable(
            f"the case {name} needs the package {missing.name}: pip install '.[bench]'"
        ) from missing
    lacking = case.missing() if hasattr(case, "missing") else None
    if lacking:
        raise BackendUnavailable(lacking)
    return case


def head(name: str, case: ModuleType, command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the measurements of a case begin with."""
    device = case.where(**settings) if hasattr(case, "where") else getattr(case, "DEVICE", "cpu")
    return {"case": name, **provenance(command, device)}


def provenance(command: str, device: str = "cpu") -> dict[str, Any]:
    """Machine, commit, command, date and versions."""
    return {
        "device": device,
        "cpu": cpu(),
        "threads": use_all_threads(),
        "commit": commit(),
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def dump(path: Path, measured: Mapping[str, Any]) -> None:
    """Write measurements as JSON; who is stopped while writing leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".writing")
    written.write_text(json.dumps(measured, indent=1) + "\n")
    written.replace(path)


def cpu() -> str:
    """The processor's name."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def use_all_threads() -> int:
    """Give BLAS and OpenMP as many threads as numba takes, one per core; returns how many."""
    import numba
    import threadpoolctl

    threads = numba.get_num_threads()
    threadpoolctl.threadpool_limits(threads)
    return threads


def commit() -> str:
    """The commit of this working tree, with -dirty where files differ from it; "unknown" outside a repository."""
    hashed = _git("rev-parse", "HEAD")
    if hashed is None:
        return "unknown"
    return hashed + ("-dirty" if _git("status", "--porcelain", "--", ".", f":!{MEASURED}") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Python, the BLAS that numpy uses (its kernels matter as much as its version), and the packages installed."""
    import threadpoolctl

    found = {"python": platform.python_version()}
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas" and "numpy" in library["filepath"]:
            found["numpy's BLAS"] = f"{library['internal_api']} {library['version']} {library.get('architecture', '')}"
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows as aligned text; a missing value is a dash."""
    if not rows:
        return "no rows"
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def line(row: Mapping[str, object]) -> str:
    """A row as it comes, in one line."""
    return "  ".join(f"{name} {cell(value)}" for name, value in row.items())


def cell(value: object) -> str:
    """A value as text, four digits of a float; what is missing is a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def restart_without_overrides(module: str) -> None:
    """Begin this process again as that module's program, with its arguments, where a variable of OVERRIDES is set."""
    overrides = OVERRIDES & os.environ.keys()
    if overrides:
        kept = {name: value for name, value in os.environ.items() if name not in overrides}
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], kept)


if __name__ == "__main__":
    restart_without_overrides("benchmarks.run")
    sys.exit(main())
