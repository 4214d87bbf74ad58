"""Where the commands print: results to stdout, progress to stderr, neither with control codes where nobody looks."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

WIDE = 160  # columns of what goes to a file or a pipe, so that no table is cut


def results() -> Console:
    """The console of results."""
    return _console(sys.stdout.isatty(), stderr=False)


def aside() -> Console:
    """The console of progress and complaints."""
    return _console(sys.stderr.isatty(), stderr=True)


def _console(seen: bool, *, stderr: bool) -> Console:
    return Console(stderr=stderr, width=None if seen else WIDE, force_terminal=seen, highlight=False)


def progress() -> Progress:
    """Bars on stderr that vanish when they are done: a description, steps done of all, the time."""
    return _bars(
        TextColumn("{task.description}", markup=False), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
    )


def spinner() -> Progress:
    """The same for work of unknown length."""
    return _bars(SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())


def _bars(*columns: ProgressColumn) -> Progress:
    console = aside()
    return Progress(*columns, console=console, transient=True, refresh_per_second=4, disable=not console.is_terminal)
