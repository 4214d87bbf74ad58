"""Figure of the case ``figure3``: perplexity, and divergence from dense predictions, against the keys a row keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

CLAIMED = 2**4  # r from which on the paper sees no loss
LEAST = 1e-6  # divergences below it, of rounding alone, are drawn on a linear scale
STYLES = {  # colours of the Okabe-Ito palette; a line joins the settings of one parameter, the first has the default
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
        axis.set(xlabel="keys a row, mean", ylabel=label)
        axis.grid(alpha=0.25, linewidth=0.6, which="both")
    axes[0].set_yscale("log")
    axes[1].set_yscale("symlog", linthresh=LEAST)
    axes[1].set_ylim(-LEAST, 2 * max(row["kl"] for row in rows))
    axes[0].axhline(rows[0]["dense_perplexity"], color="0.4", linewidth=1, label="dense")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"{rows[0]['tokens']:,} tokens of Paul Graham's essays, every layer, head and row sparse", fontsize=10
    )
    return {"": figure}


def _panel(axis: Axes, rows: Sequence[Row], column: str) -> None:
    drawn = 0
    for name, (colour, mark) in STYLES.items():
        line = sorted((row for row in rows if _line(row) == name), key=lambda row: row["reported"])
        places = [(row["reported"], row[column]) for row in line]
        axis.plot(*zip(*places, strict=True) if places else ([], []), marker=mark, color=colour, label=name)
        drawn += len(line)
        if not name.startswith("TopR") and column == "kl":
            for row, place in zip(line, places, strict=True):
                value = row["setting"].partition("=")[2] or "default"
                axis.annotate(value, place, (4, 4), textcoords="offset points", fontsize=7)
    assert drawn == sum(row["method"] != "Dense" for row in rows), "a row has no line"
    axis.axvline(CLAIMED, color="#d55e00", linestyle="--", linewidth=1, label="the paper: no loss until r < 2^4")


def _line(row: Row) -> str | None:
    """The line of STYLES that a row belongs to; a default setting to its method's first."""
    name = f"{row['method']} {row['setting'].partition('=')[0]}"
    return next((line for line in STYLES if line.startswith(name)), None)
