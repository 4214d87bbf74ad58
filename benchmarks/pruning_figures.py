"""Figure of the case ``pruning``: the surviving fraction of each bound, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

COLOURS = {  # of the Okabe-Ito palette
    "ball of 16": "#cc79a7",
    "box of 16": "#e69f00",
    "16 leading axes": "#56b4e9",
    "32 leading axes": "#0072b2",
    "int4 codes": "#d55e00",
    "int8 codes": "#009e73",
}
STYLES = {"tokens": "--", "kd": "-", "none": "-"}


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A panel per threshold; the grey line is what is reported."""
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    figure = Figure(figsize=(6 * len(rules), 5.2), layout="constrained")
    axes = figure.subplots(1, len(rules), sharex=True, sharey=True, squeeze=False)[0]
    for axis, rule in zip(axes, rules, strict=True):
        kept = [row for row in rows if row["rule"] == rule]
        for name, order in dict.fromkeys((row["bound"], row["order"]) for row in kept):
            line = [row for row in kept if (row["bound"], row["order"]) == (name, order)]
            layers, shares = ([row[column] for row in line] for column in ("layer", "surviving_fraction"))
            label = name if order == "none" else f"{name}, {order}"
            axis.plot(layers, shares, STYLES[order], marker=".", color=COLOURS[name], label=label)
        axis.axhline(kept[0]["reported_share"], color="0.5", linewidth=1, label="reported")
        axis.set(yscale="log", xlabel="layer", title=f"{kept[0]['k']:,} of {kept[0]['n']:,} keys reported ({rule})")
        axis.grid(alpha=0.25, linewidth=0.6)
    axes[0].set_ylabel("keys that survive the bound, share")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return {"survivors": figure}
