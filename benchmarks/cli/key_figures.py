"""The plots of ``hsr explain``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from benchmarks.cli.key_facts import Concentration, Shape
from benchmarks.cli.key_search import DENSE, Cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, GREY = "#0072b2", "0.55"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of the Okabe-Ito palette
STYLES = dict(zip(DENSE, ("--", ":"), strict=True))
PANELS = {  # part of a cost -> title, scale; bounds may be none
    "scanned": ("keys read in full, share", "log"),
    "visited": ("bounds evaluated per key", "linear"),
    "milliseconds": ("ms per query", "log"),
}
FEW = 8  # lines that are told apart; more are drawn alike


def spectrum(shapes: Sequence[Shape]) -> Figure:
    """Share of the variance by principal axis, a line for each key head."""
    figure, (single, summed) = _panels(2)
    for shape in shapes:
        axes = np.arange(1, len(shape.variances) + 1)
        single.plot(axes, np.maximum(shape.variances, 1e-12), color=BLUE, alpha=_faint(len(shapes)))
        summed.plot(axes, shape.variances.cumsum(), color=BLUE, alpha=_faint(len(shapes)))
    single.set(yscale="log", xlabel="principal axis", ylabel="share of the variance", title="each axis")
    summed.set(ylim=(0, 1.02), xlabel="leading axes", title="all up to it")
    return figure


def mass(found: Sequence[Concentration]) -> Figure:
    """Attention mass of the best keys, mean over queries, a line for each query head."""
    figure, (axis,) = _panels(1)
    for head in found:
        axis.plot(np.arange(1, len(head.curve) + 1), head.curve, color=BLUE, alpha=_faint(len(found)))
    for share in (0.9, 0.99):
        axis.axhline(share, color=GREY, linewidth=0.8, linestyle=":")
        axis.text(1, share, f"{share:.0%}", va="top", fontsize=8, color="0.35")
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="best keys of a query", ylabel="attention mass they hold, mean")
    return figure


def pruning(costs: Sequence[Cost]) -> Figure:
    """Keys read, bounds evaluated and time of each method, by the share of keys reported."""
    figure, panels = _panels(3)
    names = list(dict.fromkeys(cost.contender for cost in costs))
    ours = [name for name in names if name not in DENSE]
    for name in names:
        line = [cost for cost in costs if cost.contender == name]
        style = STYLES.get(name, "-")
        colour = GREY if name in DENSE else COLOURS[ours.index(name) % len(COLOURS)]
        shown = (name in ours, name in ours, True)
        for axis, part, drawn in zip(panels, PANELS, shown, strict=True):
            if drawn:
                values = [getattr(cost, part) for cost in line]
                axis.plot([cost.k for cost in line], values, style, marker=".", color=colour, label=name)
    for axis, (title, scale) in zip(panels, PANELS.values(), strict=True):
        axis.set(xscale="log", yscale=scale, xlabel="keys reported", title=title)
    panels[1].set_ylim(0, None)
    panels[-1].legend(fontsize=8, frameon=False)
    return figure


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _faint(lines: int) -> float:
    return 0.8 if lines <= FEW else 0.25
