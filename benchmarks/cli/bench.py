"""``hsr bench``: a case of `benchmarks.run`, with its figures and a page."""

from __future__ import annotations

import html as markup
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks import page
from benchmarks import plots as drawing
from benchmarks import run as cases
from benchmarks.cli import terminal
from hsr.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(name: str | None, quick: bool, json: Path | None, plots: bool | None, html: Path | None) -> int:
    """Run a case, or list all; WrongAnswer where a contender missed a key."""
    console = terminal.results()
    if name is None:
        console.print(listing())
        return 0
    refuse(name, json, plots)
    case = cases.loaded(name)
    measured = cases.head(name, case, shlex.join(["hsr", *sys.argv[1:]]))
    start = time.perf_counter()
    rows: list[dict[str, object]] = []
    notes: list[str] = []
    with terminal.spinner() as bar:
        task = bar.add_task(name)
        for row in case.rows(quick, notes.append):
            rows.append(row)
            bar.update(task, description=f"{name}: {len(rows)} rows, the last {cases.line(row)}"[:100])
    measured |= {"notes": notes, "rows": rows}
    seconds = time.perf_counter() - start
    written = []
    if json:
        cases.dump(json, measured)
        written.append(json)
    figures: dict[str, Figure] = {}
    if name in drawing.FIGURES and (html or (json and plots is not False)):
        figures = drawing.figures(measured)
    if json and plots is not False:
        written += drawing.saved(figures, json)
    if html:
        page.write(html, report(measured, figures, seconds))
        written.append(html)
    for line in (cases.table(rows), *notes, *(f"written: {path}" for path in written)):
        console.print(line, soft_wrap=True, markup=False)
    return 0


def refuse(name: str, json: Path | None, plots: bool | None) -> None:
    """ArgumentError for what could not be done, before anything is."""
    if name not in cases.CASES:
        raise ArgumentError(f"CASE must be one of {', '.join(cases.CASES)}; got {name!r}")
    if plots and json is None:
        raise ArgumentError("--plots needs --json FILE, beside which figures are written")
    if plots and name not in drawing.FIGURES:
        raise ArgumentError(f"--plots needs a case that has figures: {', '.join(drawing.FIGURES)}; got {name!r}")


def listing() -> Table:
    """The cases, what each is, and whether it has figures."""
    table = Table("case", "what it measures", "figures")
    for name, module in cases.CASES.items():
        table.add_row(name, first_line(module), "yes" if name in drawing.FIGURES else "")
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
    sections = [(name, page.image(name, page.png(figure))) for name, figure in figures.items()]
    sections.append(("Measurements", page.table(list(rows[0]) if rows else [], cells)))
    sections.append((page.MADE, page.made(measured, f"{seconds:.0f} s")))
    return page.page(f"Benchmark {measured['case']}", lead, sections)
