"""``hsr bench``: a case of `benchmarks.run`, with its figures and a page."""

from __future__ import annotations

import html as markup
import importlib
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from benchmarks import page
from benchmarks import plots as drawing
from benchmarks import run as cases
from benchmarks.cli import terminal
from benchmarks.ledger import Row
from hsr.errors import ArgumentError, BackendUnavailable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(
    name: str | None, more: Sequence[str], quick: bool, json: Path | None, plots: bool | None, html: Path | None
) -> int:
    """Run a case with its own options, or list all; WrongAnswer where a contender missed a key."""
    console = terminal.results()
    if name is None:
        console.print(listing())
        return 0
    refuse(name, json, plots, html)
    drawn = name in drawing.FIGURES and bool(html or (json and plots is not False))
    if drawn:
        require_plots(name)
    case = cases.loaded(name)
    settings = cases.own_settings(f"hsr bench {name} --", case, more)
    facts = cases.head(name, case, cases.command(["hsr", *sys.argv[1:]]), settings)
    start = time.perf_counter()
    with terminal.spinner() as bar:
        task = bar.add_task(name)
        count = itertools.count(1)

        def show(row: Row) -> None:
            bar.console.print(cases.line(row), soft_wrap=True, markup=False)
            bar.update(task, description=f"{name}: {next(count)} rows")

        measured = cases.measured(case.rows, quick, settings, facts, json, show)
    seconds = time.perf_counter() - start
    for line in (cases.table(measured["rows"]), *measured["notes"]):
        console.print(line, soft_wrap=True, markup=False)
    written = [json] if json else []
    figures = drawing.figures(measured) if drawn else {}
    if json and plots is not False:
        written += drawing.saved(figures, json)
    if html:
        page.write(html, report(measured, figures, seconds))
        written.append(html)
    for path in written:
        console.print(f"written: {path}", soft_wrap=True, markup=False)
    return 0


def require_plots(name: str) -> None:
    """BackendUnavailable where the figures of a case could not be drawn in the end."""
    try:
        importlib.import_module(drawing.FIGURES[name])
    except ModuleNotFoundError as missing:
        raise BackendUnavailable(f"figures need the package {missing.name}: pip install '.[plot]'") from missing


def refuse(name: str, json: Path | None, plots: bool | None, html: Path | None) -> None:
    """ArgumentError for what could not be done, before anything is."""
    if name not in cases.CASES:
        raise ArgumentError(f"CASE must be one of {', '.join(cases.CASES)}; got {name!r}")
    if plots and json is None:
        raise ArgumentError("--plots needs --json FILE, beside which figures are written")
    if plots and name not in drawing.FIGURES:
        raise ArgumentError(f"--plots needs a case that has figures: {', '.join(drawing.FIGURES)}; got {name!r}")
    for option, path in (("--json", json), ("--html", html)):
        reason = None if path is None else page.unwritable(option, path)
        if reason:
            raise ArgumentError(reason)


def listing() -> Table:
    """The cases, what each is, and whether it has figures."""
    table = Table("case", "what it measures", "figures")
    for name, module in cases.CASES.items():
        table.add_row(name, Text(first_line(module)), "yes" if name in drawing.FIGURES else "")
    return table


def first_line(module: str) -> str:
    """What the docstring of a case says it is; read, not imported, since a case may need packages that are missing."""
    source = Path(cases.__file__).with_name(f"{module.rpartition('.')[2]}.py")
    opening = " ".join(source.read_text(encoding="utf-8").split('"""')[1].split("\n\n")[0].split()).rstrip(".")
    return opening.partition(": ")[2] or opening


def report(measured: dict[str, Any], figures: dict[str, Figure], seconds: float) -> str:
    """The page: table, figures, notes, and where it comes from."""
    rows = measured["rows"]
    cells = [[cases.cell(value) for value in row.values()] for row in rows]
    lead = "".join(f"<p>{markup.escape(note)}</p>" for note in measured["notes"])
    titled = {name or measured["case"]: figure for name, figure in figures.items()}
    sections = [(title, page.image(title, page.png(figure))) for title, figure in titled.items()]
    sections.append(("Measurements", page.table(list(rows[0]) if rows else [], cells)))
    sections.append((page.MADE, page.made(measured, f"{seconds:.0f} s")))
    return page.page(f"Benchmark {measured['case']}", lead, sections)
