"""Draw the figures of a case from its committed measurements alone.

python -m benchmarks.plots benchmarks/results/scaling.json    # writes scaling-*.png beside it
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = {  # case -> module with figures(rows), a dict of matplotlib figures by name, "" for one alone
    "scaling": "benchmarks.scaling_figures",
    "tree-data": "benchmarks.tree_data_figures",
    "pruning": "benchmarks.pruning_figures",
    "accuracy": "benchmarks.accuracy_figures",
    "decode-cpu": "benchmarks.decode_cpu_figures",
    "leaderboard": "benchmarks.leaderboard_figures",
    "figure3": "benchmarks.figure3_figures",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures of the file named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help=f"measurements of one of: {', '.join(FIGURES)}")
    file = parser.parse_args(arguments).file
    measured = json.loads(file.read_text())
    if measured.get("case") not in FIGURES:
        parser.error(f"FILE must hold measurements of one of {', '.join(FIGURES)}; got case {measured.get('case')!r}")
    try:
        found = figures(measured)
    except ModuleNotFoundError as missing:
        print(f"plots need the package {missing.name}: pip install '.[plot]'", file=sys.stderr)
        return 1
    for path in saved(found, file):
        print(path)
    return 0


def figures(measured: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a case of FIGURES by name, each with a line that says where it was measured."""
    device = "" if measured["device"] == "cpu" else f"{measured['device']}; "
    where = f"{device}{measured['cpu']}, {measured['threads']} threads, commit {measured['commit'][:10]}"
    drawn: dict[str, Figure] = importlib.import_module(FIGURES[measured["case"]]).figures(measured["rows"])
    for figure in drawn.values():
        figure.text(0.005, 0.005, where, ha="left", va="bottom", fontsize=7, color="0.4")
    return drawn


def saved(found: Mapping[str, Figure], beside: Path) -> list[Path]:
    """Write each figure as PNG beside the measurements; returns where."""
    paths = {
        beside.with_name(f"{beside.stem}-{name}.png" if name else f"{beside.stem}.png"): figure
        for name, figure in found.items()
    }
    for path, figure in paths.items():
        figure.savefig(path, dpi=120)
    return list(paths)


if __name__ == "__main__":
    sys.exit(main())
