"""What ``hsr generate`` shows of the steps so far: beside the text, as a table at the end, and as curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from benchmarks.cli.decoding import Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, BESIDE = 52, 100  # columns of the figures, and of a terminal that has room for them beside the text
ATTENDED = "keys attended to"
LEGEND = "Keys attended to: of all, over layers and heads; what is read to choose them is not counted."
HOLDS = {
    "exact": "exact: nothing was dropped",
    "deterministic": "deterministic: holds for every input",
    "probability": "each bound holds at {:.0%}, over the codes' random shifts",
    "statistical": "statistical: each bound holds at about {:.0%}",
    "none": "none: the policy claims nothing of its error",
}


@dataclass(frozen=True)
class Setting:
    """What is being run.

    Attributes:
        model: as it was asked for.
        decode, prefill: the policies in words.
        prompt: tokens of the prompt.
        most: tokens to make at most.
    """

    model: str
    decode: str
    prefill: str
    prompt: int
    most: int


def certificate(step: Step) -> str:
    """The kind of certificate, in words."""
    if step.bound is None:
        return "dense: nothing was dropped" if not step.keys else HOLDS["none"]
    return HOLDS.get(step.bound.kind, step.bound.kind).format(step.bound.confidence)


def share(steps: Sequence[Step]) -> float:
    """Of the keys that these steps could have attended to, those that they did; 1 where all were dense."""
    keys = sum(step.keys for step in steps)
    return sum(step.reported for step in steps) / keys if keys else 1.0


def rows(setting: Setting, steps: Sequence[Step]) -> list[tuple[str, str]]:
    """The figures so far."""
    sparse = [step for step in steps[1:] if step.keys]
    found = [
        ("model", setting.model),
        ("prompt", f"{setting.prompt:,} tokens, attention {setting.prefill}"),
        ("steps", f"attention {setting.decode}"),
        ("tokens", f"{len(steps)} of {setting.most}"),
        (ATTENDED, f"{share(sparse):.1%}, of {len(sparse)} sparse steps" if sparse else "all: no step was sparse"),
    ]
    last = steps[-1] if steps else None
    if last is not None and last.keys:
        found.append(("of them, last step", f"{last.reported:,} of {last.keys:,} ({last.reported / last.keys:.1%})"))
    if last is not None and len(steps) > 1:
        found.append(("certificate", certificate(last)))
    bounds = [step.bound for step in sparse if step.bound is not None]
    if bounds:
        dropped = max(bound.dropped for bound in bounds)
        found += [
            (
                "dropped mass, at most",
                "made up for by the sample's weights" if math.isnan(dropped) else number(dropped),
            ),
            ("error bound, median", f"{number(float(np.median([bound.relative[0] for bound in bounds])))}, relative"),
            ("error bound, last step", f"{number(bounds[-1].relative[0])}, worst {number(bounds[-1].relative[1])}"),
        ]
    if steps:
        found.append(("prompt, s", f"{steps[0].seconds:.2f}"))
    if len(steps) > 1:
        found.append(("ms a token, median", f"{np.median([step.seconds for step in steps[1:]]) * 1e3:.0f}"))
    return found


def number(value: float) -> str:
    """A bound, if it is one."""
    return "unbounded" if math.isinf(value) else f"{value:.2g}"


def view(text: str, found: Sequence[tuple[str, str]], width: int, height: int) -> RenderableType:
    """The end of the text, and the figures beside it, or below where there is no room."""
    wide = width >= BESIDE
    across = max(20, (width - SIDE if wide else width) - 4)
    figures = Table.grid(padding=(0, 1))
    for name, shown in found:
        figures.add_row(Text(name, style="dim"), Text(shown))
    lines = [line[i : i + across] for line in text.splitlines() or [""] for i in range(0, max(1, len(line)), across)]
    room = max(3, height - 4 - (0 if wide else len(found) + 4))
    written = Panel(Text("\n".join(lines[-room:])), title="text", title_align="left")
    beside = Panel(figures, title="attention", title_align="left")
    if not wide:
        return Group(written, beside)
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(width=SIDE)
    grid.add_row(written, beside)
    return grid


def summary(found: Sequence[tuple[str, str]]) -> Table:
    """The figures at the end."""
    table = Table(show_header=False, caption=LEGEND, caption_justify="left")
    for name, shown in found:
        table.add_row(name, Text(shown))
    return table


def curves(steps: Sequence[Step]) -> Figure:
    """Share of keys attended to and the bounds on the error, step by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    kept, error = figure.subplots(1, 2)
    sparse = [(i, step) for i, step in enumerate(steps) if step.keys]
    kept.plot([i for i, _ in sparse], [step.reported / step.keys for _, step in sparse], ".-", color="#0072b2")
    kept.set(ylim=(0, None), xlabel="token", title=f"{ATTENDED}, share")
    bounds = [(i, step.bound.relative) for i, step in sparse if step.bound is not None]
    for part, name, colour in ((0, "median", "#0072b2"), (1, "worst", "#d55e00")):
        finite = [(i, relative[part]) for i, relative in bounds if math.isfinite(relative[part])]
        if finite:
            error.plot(*zip(*finite, strict=True), ".-", color=colour, label=f"{name} of layers and heads")
    if error.lines:
        error.set_yscale("log")
        error.legend(fontsize=8, frameon=False)
    error.set(xlabel="token", title="bound on the relative error, where finite")
    for axis in (kept, error):
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure
