"""Figure of the case ``tree-data``: the share of work against the width, by distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#000000", "#009e73", "#d55e00", "#cc79a7")  # of the Okabe-Ito palette
MARKS = {"tree": ".-", "layers": "s"}


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A panel per threshold; lines are trees, squares the layers of the plane."""
    counts, laws = (list(dict.fromkeys(row[name] for row in rows)) for name in ("k", "data"))
    figure = Figure(figsize=(5.5 * len(counts), 4.6), layout="constrained")
    axes = figure.subplots(1, len(counts), sharex=True, sharey=True, squeeze=False)[0]
    for axis, k in zip(axes, counts, strict=True):
        for data, colour in zip(laws, COLOURS, strict=True):
            for method, mark in MARKS.items():
                kept = [row for row in rows if (row["k"], row["data"], row["method"]) == (k, data, method)]
                label = data if method == "tree" else None
                widths, shares = ([row[name] for row in kept] for name in ("d", "work_share"))
                axis.plot(widths, shares, mark, color=colour, label=label)
        axis.set(
            yscale="log",
            xticks=list(dict.fromkeys(row["d"] for row in rows)),
            xlabel="width d",
            title=f"n = {rows[0]['n']:,}, {k:,} keys reported",
        )
        axis.grid(alpha=0.25, linewidth=0.6)
    axes[0].set_ylabel("(nodes visited + keys scanned) / n")
    axes[0].legend(fontsize=8)
    return {"work": figure}
