"""Figures of the case ``scaling``: work against n, exponents against d, and the ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

COLOURS = {  # of the Okabe-Ito palette
    "brute": "#999999",
    "numpy": "#000000",
    "dense": "#000000",
    "tree": "#0072b2",
    "layers": "#009e73",
    "sketch": "#d55e00",
}
OTHER = "#cc79a7"  # a method that the palette does not know
STYLES = {"64": "-", "n^0.8": "--"}
THEORIES: dict[str, tuple[str, Any]] = {  # column of a fit -> label and style; one more for a prompt of n rows
    "theory": ("1 - 1/floor(d/2)", ":"),
    "theory_output": ("output", "-."),
    "theory_log": ("log n", (0, (1, 4))),
}
COLUMNS = 5
SERIES = ("kind", "data", "d", "rule", "method", "weight")


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Name -> figure."""
    queries = [row for row in rows if row["kind"] == "query"]
    fits = [row for row in rows if row["kind"] == "fit"]
    drawn = {f"work-{data}": draw_work(queries, data) for data in _values(queries, "data")}
    return drawn | {
        "exponents": draw_exponents([row for row in fits if row["of"] == "query"]),
        "ends": draw_ends(rows),
        "end-exponents": draw_end_exponents([row for row in fits if row["of"] != "query"]),
    }


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    """The different values of a column, in order of appearance."""
    return list(dict.fromkeys(row[name] for row in rows))


def _lines(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each series, by n."""

    def series(row: Row) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in SERIES)

    return [sorted(group, key=lambda row: row["n"]) for _, group in groupby(sorted(rows, key=series), key=series)]


def _panels(count: int, width: float = 3.0, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, COLUMNS to a row, of one scale."""
    columns = min(count, COLUMNS)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 6.5), height * lines + 1.2), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, list(axes[:count])


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, above them."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in found}
    columns = max(2, int(figure.get_figwidth() / 2.2))
    words: dict[str, Any] = {"loc": "outside upper center", "ncols": columns, "fontsize": 8, "frameon": False}
    figure.legend(list(found.values()), list(found), **words)


def draw_work(rows: Sequence[Row], data: str) -> Figure:
    """Work against n, one panel per width, with the slopes of theory from where the lowest curve begins."""
    kept = [row for row in rows if row["data"] == data and row["method"] != "numpy"]
    widths = sorted(_values(kept, "d"))
    figure, axes = _panels(len(widths))
    for axis, d in zip(axes, widths, strict=True):
        for line in _lines([row for row in kept if row["d"] == d]):
            first = line[0]
            axis.plot(
                [row["n"] for row in line],
                [row["visited"] + row["scanned"] for row in line],
                STYLES[first["rule"]],
                color=COLOURS.get(first["method"], OTHER),
                marker=".",
                label=f"{first['method']}, k = {first['rule']}",
            )
        _theory(axis, [row for row in kept if row["d"] == d], d)
        _sizes(axis)
        axis.set_title(f"d = {d}")
    figure.supxlabel(f"keys n ({data})", fontsize=10)
    figure.supylabel("work per query: bounds visited + keys scanned", fontsize=10)
    _legend(figure, axes)
    return figure


def _theory(axis: Axes, rows: Sequence[Row], d: int) -> None:
    """Lines n^(1 - 1/floor(d/2)) and n^(4/5)."""
    sizes = np.array(sorted(_values(rows, "n")), float)
    start = min(row["visited"] + row["scanned"] for row in rows if row["n"] == sizes[0])
    for power, style, label in (
        (1 - 1 / max(1, d // 2), ":", "slope 1 - 1/floor(d/2)"),
        (0.8, "-.", "slope 4/5"),
    ):
        axis.plot(sizes, start * (sizes / sizes[0]) ** power, style, color="0.6", linewidth=1, label=label)


def draw_exponents(fits: Sequence[Row]) -> Figure:
    """Fitted exponents of work and time against d, a panel per data, threshold and quantity."""
    panels = [
        (data, rule, quantity)
        for data in _values(fits, "data")
        for quantity in ("work", "ms")
        for rule in _values(fits, "rule")
    ]
    columns = 2
    figure = Figure(figsize=(11, 3.2 * (-(-len(panels) // columns)) + 0.8), layout="constrained")
    axes = list(figure.subplots(-(-len(panels) // columns), columns, sharex=True, sharey=True, squeeze=False).ravel())
    for axis, (data, rule, quantity) in zip(axes, panels, strict=True):
        kept = [row for row in fits if (row["data"], row["rule"], row["quantity"]) == (data, rule, quantity)]
        for i, method in enumerate(sorted(_values(kept, "method"))):
            _bars(axis, [row for row in kept if row["method"] == method], method, 1 + 0.02 * (i - 2))
        _widths(axis, kept)
        axis.set_title(f"{data}, k = {rule}: {'time' if quantity == 'ms' else quantity}", fontsize=10)
        axis.set_ylim(-0.2, 1.3)
    figure.supxlabel("width d", fontsize=10)
    figure.supylabel("exponent of n, 95 % interval", fontsize=10)
    _legend(figure, axes)
    return figure


def _bars(axis: Axes, fits: Sequence[Row], method: str, shift: float) -> None:
    """Exponents with their intervals; a shift keeps methods apart on the logarithmic axis."""
    reach = np.array([[row["exponent"] - row["low"], row["high"] - row["exponent"]] for row in fits]).T
    axis.errorbar(
        [row["d"] * shift for row in fits],
        [row["exponent"] for row in fits],
        np.maximum(reach, 0.0),  # a percentile interval need not hold the estimate
        fmt=".-",
        color=COLOURS.get(method, OTHER),
        capsize=2,
        linewidth=1,
        label=method,
    )


def _sizes(axis: Axes) -> None:
    """Both axes logarithmic, n by powers of two."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.25, linewidth=0.6)


def _widths(axis: Axes, fits: Sequence[Row]) -> None:
    """The axis of widths, and the exponents of theory."""
    found = {row["d"]: row for row in fits}
    widths = sorted(found)
    for name, (label, style) in THEORIES.items():
        axis.plot(widths, [found[d][name] for d in widths], ls=style, color="0.6", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(d) for d in widths])
    axis.grid(alpha=0.25, linewidth=0.6)


def draw_ends(rows: Sequence[Row]) -> Figure:
    """Time against n for decoding and prompts, a panel per width and weight."""
    kinds, weights = ("decode", "prefill"), ("relu", "softmax")
    kept = [row for row in rows if row["kind"] in kinds]
    widths = sorted(_values(kept, "d"))
    figure = Figure(figsize=(3.0 * len(widths) + 1, 11), layout="constrained")
    panels = [(kind, weight) for kind in kinds for weight in weights]
    grid = figure.subplots(len(panels), len(widths), sharex="row", sharey="row", squeeze=False)
    for axes, (kind, weight) in zip(grid, panels, strict=True):
        for axis, d in zip(axes, widths, strict=True):
            for line in _lines([row for row in kept if (row["kind"], row["weight"], row["d"]) == (kind, weight, d)]):
                method = line[0]["method"]
                colour = COLOURS.get(method, OTHER)
                n, ms = ([row[name] for row in line] for name in ("n", "ms"))
                axis.plot(n, ms, ".-", color=colour, label=method)
            _sizes(axis)
            axis.set_title(f"{kind}, {weight}, d = {d}", fontsize=9)
    figure.supxlabel("keys n", fontsize=10)
    figure.supylabel("milliseconds per query (decode) or prompt (prefill)", fontsize=10)
    _legend(figure, list(grid.ravel()))
    return figure


def draw_end_exponents(fits: Sequence[Row]) -> Figure:
    """Exponents of the ends against d, a row per kind and weight, work left and time right."""
    panels = [(kind, weight) for kind in ("decode", "prefill") for weight in ("relu", "softmax")]
    figure = Figure(figsize=(12, 3.2 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, sharex=True, squeeze=False)
    for axes, (kind, weight) in zip(grid, panels, strict=True):
        for axis, quantity in zip(axes, ("work", "ms"), strict=True):
            kept = [row for row in fits if (row["of"], row["weight"], row["quantity"]) == (kind, weight, quantity)]
            for i, method in enumerate(sorted(_values(kept, "method"))):
                _bars(axis, [row for row in kept if row["method"] == method], method, 1 + 0.02 * (i - 1))
            _widths(axis, kept)
            axis.set_title(f"{kind}, {weight}: {'time' if quantity == 'ms' else quantity}", fontsize=10)
    figure.supxlabel("width d", fontsize=10)
    figure.supylabel("exponent of n, 95 % interval", fontsize=10)
    _legend(figure, list(grid.ravel()))
    return figure
