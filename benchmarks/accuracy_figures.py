"""Figures of the case ``accuracy``: the error against the keys of a head, and against the bytes read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

STYLES = {  # colours of the Okabe-Ito palette
    "oracle-topk": ("#000000", "--"),
    "oracle-topk-union": ("#000000", "-"),
    "topr-sketch": ("#999999", ":"),
    "certified": ("#cc79a7", ""),
    "sampled-exact-union": ("#e69f00", "--"),
    "sampled-int4-union": ("#0072b2", "-"),
    "sampled-24B-union": ("#56b4e9", "-"),
    "sampled-16B-union": ("#009e73", "-"),
    "sampled-int4": ("#d55e00", "-"),
}
AXES = {"keys": ("keys_per_head", "keys a head expects"), "bytes": ("bytes_read", "bytes read per key-value head")}


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A panel per number of tokens; lines join budgets, bars end at the 90th percentile."""
    return {name: _figure(rows, column, label) for name, (column, label) in AXES.items()}


def _figure(rows: Sequence[Mapping[str, Any]], column: str, label: str) -> Figure:
    sizes = list(dict.fromkeys(row["tokens"] for row in rows))
    figure = Figure(figsize=(6 * len(sizes), 5.2), layout="constrained")
    axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axis, tokens in zip(axes, sizes, strict=True):
        for policy, (colour, style) in STYLES.items():
            line = [row for row in rows if (row["tokens"], row["policy"]) == (tokens, policy)]
            places, means, tails = ([row[name] for row in line] for name in (column, "err_mean", "err_p90"))
            axis.plot(places, means, linestyle=style, marker="." if style else "s", color=colour, label=policy)
            axis.vlines(places, means, tails, color=colour, alpha=0.3, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=label, title=f"{tokens:,} tokens")
        axis.grid(alpha=0.25, linewidth=0.6)
    axes[0].set_ylabel("relative output error: mean, and 90th percentile")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure
