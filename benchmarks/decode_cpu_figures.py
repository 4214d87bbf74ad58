"""Figure of the case ``decode-cpu``: a step's time against the number of keys, policies and dense attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

COLOURS = {
    "sampled-48B": "#56b4e9",
    "sampled-32B": "#0072b2",
    "sampled-16B": "#009e73",
    "topr": "#e69f00",
    "certified": "#cc79a7",
}


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A panel per shape and dtype; black is the faster dense form, dashed lines append a token first."""
    panels = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(4.6 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        kept = [row for row in rows if (row["shape"], row["dtype"]) == panel]
        best = {row["n"]: row["dense_best_ms"] for row in kept}
        axis.plot(list(best), list(best.values()), "-o", color="#000000", label="dense, the faster form")
        for policy in dict.fromkeys(row["policy"] for row in kept):
            line = [row for row in kept if row["policy"] == policy]
            name, _, appends = policy.partition("+")
            style = "--" if appends else "-"
            places, times = ([row[column] for row in line] for column in ("n", "ms"))
            axis.plot(places, times, style, marker=".", color=COLOURS[name], label=policy)
        axis.set(xscale="log", yscale="log", xlabel="keys", title=", ".join(panel))
        axis.grid(alpha=0.25, linewidth=0.6)
    axes[0].set_ylabel("milliseconds a step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return {"steps": figure}
