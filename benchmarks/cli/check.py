"""``hsr check``: the statements of `proofs_checks` and their verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from benchmarks.cli import terminal
from hsr.errors import ArgumentError
from proofs_checks.__main__ import Outcome, outcomes
from proofs_checks.check import Check, discover


def run(names: Sequence[str], examples: int | None, constants: bool, listed: bool) -> int:
    """Check the named statements, or all; status 1 where one fails."""
    checks = discover()
    unknown = [name for name in names if name not in checks]
    if unknown:
        raise ArgumentError(f"no check is named {', '.join(unknown)}; there are {', '.join(checks)}")
    chosen = {name: checks[name] for name in names or checks}
    console = terminal.results()
    if listed:
        console.print(listing(chosen))
        return 0
    found: list[Outcome] = []
    with terminal.progress() as bar:
        task = bar.add_task("", total=sum(max(1, len(check.operations)) for check in chosen.values()))
        for name, check in chosen.items():
            bar.update(task, description=f"{name:36}")
            for outcome in outcomes(name, check, examples):
                found.append(outcome)
                bar.advance(task)
    console.print(verdicts(found, constants))
    failed = sum(outcome.failed for outcome in found)
    console.print(f"{len(found)} checks, {failed} failed")
    return int(failed > 0)


def listing(checks: Mapping[str, Check]) -> Table:
    """Names, statements and sources."""
    table = Table("name", "statement", "source", "evidence")
    for name, check in checks.items():
        table.add_row(*map(Text, (name, check.statement, check.source, check.evidence)))
    return table


def verdicts(found: Sequence[Outcome], constants: bool) -> Table:
    """A line for each statement and operation."""
    table = Table("statement", "operation", "evidence", "verdict", "s", *["largest constants met"] * constants)
    for outcome in found:
        met = "; ".join(f"{name}: {value:.4g}" for name, value in outcome.constants.items())
        style = "red bold" if outcome.failed else "green" if outcome.status == "holds" else "yellow"
        table.add_row(
            Text(outcome.check.statement),
            Text(outcome.operation),
            Text(outcome.check.evidence),
            Text(outcome.status, style=style),
            f"{outcome.seconds:.1f}",
            *[Text(met)] * constants,
        )
    return table
