"""Write the leaderboard as Markdown, from its committed measurements alone.

python -m benchmarks.leaderboard_table benchmarks/results/leaderboard.json    # writes leaderboard.md beside it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.leaderboard_figures import KNOWING, PANELS, front
from benchmarks.readme_table import markdown, written_beside

LEGEND = (
    "`benchmarks/leaderboard_case.py` says what the columns mean.  Bold: no method but oracles has a smaller error and "
    "reads (decode) or attends to (prefill) less.  Oracles know all scores: their times and bytes say nothing.  "
    "SkipSoftmax scores all keys, whatever its share."
)
COLUMNS: Mapping[str, Callable[[Any], str]] = {
    "method": str,
    "setting": lambda text: f"`{text}`" if text else "",
    "rel_err": "{:.4f}".format,
    "rel_err_p90": "{:.3f}".format,
    "audit": "{:.3f}".format,
    "kept_mass": "{:.4f}".format,
    "share": "{:.2%}".format,
    "kilobytes": "{:.0f}".format,
    "select_ms": "{:.3g}".format,
    "ms": "{:.3g}".format,
    "speedup": "{:.2f}x".format,
    "looks_ahead": lambda ahead: "yes" if ahead else "no",
}


def table(measured: Mapping[str, Any]) -> str:
    """Both parts, the smallest errors last among what each method offers; bold where nothing beats it."""
    parts = [_part(measured["rows"], part) for part in PANELS]
    notes = "".join(f"- {note}\n" for note in measured["notes"])
    where = f"{measured['device']}; {measured['cpu']}, {measured['threads']} threads, commit {measured['commit'][:10]}"
    return (
        f"# Leaderboard\n\n{where}, `{measured['command']}`.  {LEGEND}\n\n"
        + "\n".join(parts)
        + (f"\nLeft out:\n\n{notes}" if notes else "")
    )


def _part(rows: Sequence[Mapping[str, Any]], part: str) -> str:
    found = [row for row in rows if row["part"] == part]
    used = [name for name in COLUMNS if any(row[name] is not None for row in found)]
    cost = next(iter(PANELS[part]))
    best = {id(row) for row in front([row for row in found if row["method"] not in KNOWING], cost)}
    lines = [[_cell(name, row, id(row) in best) for name in used] for row in found]
    head = found[0]
    what = f"{head['n']:,} tokens, {head['layers']} layers, dense attention in {head['dense_ms']:.3g} ms"
    return f"## {part.capitalize()}: {what}\n\n{markdown(used, lines)}\n"


def _cell(name: str, row: Mapping[str, Any], best: bool) -> str:
    if row[name] is None:
        return ""
    text = COLUMNS[name](row[name])
    return f"**{text}**" if best and name == "method" else text


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table of the file named on the command line."""
    written_beside("leaderboard_table", "leaderboard", table, arguments)


if __name__ == "__main__":
    main()
