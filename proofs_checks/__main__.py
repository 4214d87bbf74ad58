"""Run every check and write RESULTS.md: ``python -m proofs_checks``; with names of files, run those and only print."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import perf_counter

from benchmarks.run import commit, cpu
from proofs_checks.check import Check, discover

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("numpy", "scipy", "numba", "hypothesis")
HEAD = """# Results of the checks

Written by `{command}` on {date}, commit {commit}, on one {cpu}, Python {python}, {packages}; {seconds:.0f} s in all.
What each statement is, how it is checked and what that does not show stands at the top of its file. A constant is
the largest value that was met over the inputs drawn, unless its name says otherwise.

| statement | file | operation | evidence | status | measured constants | s |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Outcome:
    """One check of one operation."""

    name: str
    check: Check
    operation: str
    status: str
    constants: dict[str, float]
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether the operation broke its statement, or broke down."""
        return self.status.startswith("FAILS")

    @property
    def row(self) -> str:
        """A line of the table."""
        constants = "; ".join(f"{name}: {value:.4g}" for name, value in self.constants.items())
        cells = [self.check.statement, f"`{self.name}.py`", self.operation, self.check.evidence, self.status, constants]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + f" | {self.seconds:.1f} |"


def outcomes(name: str, check: Check, examples: int | None) -> Iterator[Outcome]:
    """The check of each of its operations, as it is done; one that has none yet says why."""
    if not check.operations:
        yield Outcome(name, check, "none", f"not yet: {check.pending}", {}, 0.0)
    for label, operation in check.operations.items():
        start = perf_counter()
        constants: dict[str, float] = {}
        try:
            constants = check(operation, examples)
            status = "holds"
        except Exception as fault:  # every other check still runs; the exit status tells
            traceback.print_exc()
            status = "FAILS" if isinstance(fault, AssertionError) else f"FAILS: {type(fault).__name__}"
        yield Outcome(name, check, label, status, constants, perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks named on the command line, or all; returns the exit status."""
    checks = discover()
    parser = argparse.ArgumentParser(prog="python -m proofs_checks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(checks)}")
    parser.add_argument("--examples", type=int, metavar="N", help="random inputs per check, in place of each one's own")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where the table goes; all checks: RESULTS.md")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in checks]
    if unknown:
        parser.error(f"no check is named {', '.join(unknown)}")
    typed = sys.argv[1:] if arguments is None else arguments
    head = {
        "command": shlex.join(["python", "-m", "proofs_checks", *typed]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "cpu": cpu(),
        "python": platform.python_version(),
        "packages": ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES),
    }
    start = perf_counter()
    chosen = options.names or checks
    found: list[Outcome] = []
    for outcome in (outcome for name in chosen for outcome in outcomes(name, checks[name], options.examples)):
        found.append(outcome)
        sys.stdout.write(outcome.row + "\n")
        sys.stdout.flush()
    target = options.to or (None if options.names or options.examples else RESULTS)
    if target:
        table = HEAD.format(**head, seconds=perf_counter() - start) + "\n".join(outcome.row for outcome in found)
        target.write_text(table + "\n")
    return int(any(outcome.failed for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
