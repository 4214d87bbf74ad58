"""Figures of the case ``leaderboard``: the error of every method against what it reads, attends to and takes.

A mark per setting, ours larger and with an edge; the grey steps are the Pareto front: nothing lies below and left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = {
    "decode": {"kilobytes": "KB read per key-value head and step", "ms": "ms per step, append and attend"},
    "prefill": {"share": "share of the visible keys", "ms": "ms per layer"},
}
KNOWING = ("Dense", "Oracle", "TopOracle")  # what all methods are measured by; on no front
WHOLE = 1 - 1e-6  # share of the keys that is all of them
MARKS = "osD^v<>PX*"

Row = Mapping[str, Any]


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """A figure per part of the leaderboard."""
    return {part: _figure([row for row in rows if row["part"] == part], panels) for part, panels in PANELS.items()}


def front(rows: Sequence[Row], column: str) -> list[Row]:
    """The rows that no other beats in both the column and the error, by the column."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row[column], row["rel_err"])):
        if not best or row["rel_err"] < best[-1]["rel_err"]:
            best.append(row)
    return best


def _figure(rows: Sequence[Row], panels: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(7 * len(panels), 7.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    inexact = [row for row in rows if row["share"] < WHOLE]
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        _panel(axis, inexact, column)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(alpha=0.25, linewidth=0.6)
    for dense in (row for row in rows if row["method"] == "Dense"):
        axes[-1].axvline(dense["dense_ms"], color="black", linewidth=1, linestyle=":", label="torch, dense")
    axes[0].set_ylabel("mean relative output error")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _panel(axis: Axes, rows: Sequence[Row], column: str) -> None:
    best = front([row for row in rows if row["method"] not in KNOWING], column)
    axis.step([row[column] for row in best], [row["rel_err"] for row in best], where="post", color="0.75", linewidth=3)
    colours = mpl.colormaps["tab20"](np.arange(20))
    for place, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        line = [row for row in rows if row["method"] == method]
        axis.plot(
            [row[column] for row in line],
            [row["rel_err"] for row in line],
            linestyle="",
            marker=MARKS[place % len(MARKS)],
            markersize=8 if line[0]["ours"] else 5,
            markeredgecolor="black" if line[0]["ours"] else "none",
            color=colours[place % len(colours)],
            label=method,
        )
