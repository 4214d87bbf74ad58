"""Figure of the case ``figure3``: perplexity, and divergence from dense predictions, against the keys a row keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

CLAIMED = 2**4  # r from which on the paper sees no loss
STYLES = {  # colours of the Okabe-Ito palette; a line joins the settings of one parameter
    "TopR r": ("#000000", "o"),
    "Sampled eps": ("#0072b2", "s"),
    "Sampled budget": ("#56b4e9", "D"),
    "Certified eps": ("#cc79a7", "^"),
}
PANELS = {"perplexity": "perplexity", "kl": "KL(dense || sparse) of the next token, nats"}

Row = Mapping[str, Any]


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """One figure, named like its file."""
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (column, label) in zip(axes, PANELS.items(), strict=True):
        _panel(axis, rows, column)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(xlabel="keys that a row attends to (TopR: r)", ylabel=label)
        axis.grid(alpha=0.25, linewidth=0.6, which="both")
    axes[0].axhline(rows[0]["dense_perplexity"], color="0.4", linewidth=1, label="dense")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"{rows[0]['tokens']:,} tokens of Paul Graham's essays, every layer, head and row sparse", fontsize=10
    )
    return {"": figure}


def _panel(axis: Axes, rows: Sequence[Row], column: str) -> None:
    for name, (colour, mark) in STYLES.items():
        method, parameter = name.split()
        line = [row for row in rows if row["method"] == method and row["setting"].startswith(parameter)]
        line = sorted((row for row in line if row["ratio"] and row[column] > 0), key=_keys)
        axis.plot([_keys(row) for row in line], [row[column] for row in line], marker=mark, color=colour, label=name)
        if method != "TopR" and column == "kl":
            for row in line:
                place = (_keys(row), row[column])
                axis.annotate(row["setting"].split("=")[1], place, (4, 4), textcoords="offset points", fontsize=7)
    axis.axvline(CLAIMED, color="#d55e00", linestyle="--", linewidth=1, label="the paper: no loss until r < 2^4")


def _keys(row: Row) -> float:
    return float(row["r"] or row["reported"])
