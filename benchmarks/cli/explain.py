"""``hsr explain``: what a set of keys looks like, which index method suits it, and what that costs."""

from __future__ import annotations

import html
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks import page, pruning_case
from benchmarks.cli import key_facts, key_file, key_search, terminal
from benchmarks.cli.key_facts import MASSES, Concentration, Shape
from benchmarks.cli.key_file import KeySet
from benchmarks.cli.key_search import DENSE, Cost, Methods
from benchmarks.ledger import Row
from benchmarks.run import provenance, use_all_threads
from hsr import HSRIndex, checks
from hsr.errors import ArgumentError

PAIRS = 1 << 24  # most (query, key) pairs of a head that are looked at
LINES = 16  # heads that the terminal shows; reports show all
BOUND_ROWS = len(pruning_case.BOUNDS) * len(pruning_case.RANKS)
PER_HEAD = ("Keys", "Values", "Attention")
COSTS = "What methods cost"
MADE_QUERIES = "queries: self-made, keys drawn at random less their mean (seed {seed}); a model's are elsewhere"


class Facts(NamedTuple):
    """All that is found out."""

    said: list[str]
    shapes: list[Shape]  # of key heads
    values: list[Shape]  # of value heads; none without values
    concentrations: list[Concentration]  # of query heads
    survival: list[Row]  # of the bounds of `benchmarks.pruning_bounds`, means over heads
    methods: Methods
    costs: list[Cost]
    advice: list[str]


class Block(NamedTuple):
    """A table, for the terminal and for the page."""

    title: str
    head: tuple[str, ...]
    rows: list[list[str]]
    caption: str = ""


def run(
    file: Path,
    keys: str | None,
    queries: str | None,
    values: str | None,
    layer: int | None,
    head: int,
    causal: bool,
    scale: float | None,
    probes: int,
    seed: int,
    save: Path | None,
) -> int:
    """Describe the keys of a file; status 0."""
    use_all_threads()
    start = time.perf_counter()
    reason = None if save is None else page.unwritable("--save", save, folder=True)
    if reason:
        raise ArgumentError(reason)
    held = key_file.read(file, {"keys": keys, "queries": queries, "values": values}, layer, causal)
    if head >= len(held.keys):
        raise ArgumentError(f"--head must be below {len(held.keys)}, the number of key heads; got {head}")
    if scale is not None:
        checks.real("scale", scale, np.nextafter(0, 1), math.inf)
    facts = described(held, head, scale or held.keys.shape[2] ** -0.5, probes, seed)
    blocks = [*looks(facts), *search(facts, head)]
    console = terminal.results()
    for line in facts.said:
        console.print(line, markup=False, soft_wrap=True)
    for block in blocks:
        console.print(shown(block))
    for line in facts.advice:
        console.print(line, markup=False, soft_wrap=True)
    if save:
        path = report(save, file, facts, blocks, time.perf_counter() - start)
        console.print(f"report: {path}", soft_wrap=True, markup=False)
    return 0


def described(held: KeySet, head: int, scale: float, probes: int, seed: int) -> Facts:
    """Look at every head's keys and attention, and search those of one head."""
    g, n, d = held.keys.shape
    said = list(held.said)
    asked, limits = probed(held, min(probes, max(1, PAIRS // n)), seed, said)
    h = len(asked)
    size = float(np.abs(asked).max()) * float(np.abs(held.keys).max()) * d
    if not math.isfinite(size * scale):
        raise ArgumentError("keys and queries must have finite products; theirs overflow")
    said.append(f"looked at: {asked.shape[1]} queries of each of {h} query heads, scores times {scale:.4g}")
    (searched, by), (sought, and_by) = key_search.scaled(held.keys), key_search.scaled(asked)
    if by or and_by:
        said.append(f"for the costs, keys are scaled by 2^{by}, queries by 2^{and_by}: so float32 holds their products")
    pairs = [(rows.reshape(-1, d), keys) for rows, keys in zip(np.split(sought, g), searched, strict=True)]
    with terminal.progress() as bar:
        rules = key_search.sizes(n)
        stored = [] if held.values is None else list(held.values)
        task = bar.add_task("", total=g + len(stored) + h + BOUND_ROWS + 1 + len(rules))

        def step(name: str) -> None:
            bar.update(task, description=f"{name:24}")

        def each(name: str, count: int, make: Callable[[int], Any]) -> list[Any]:
            step(name)
            found = []
            for i in range(count):
                found.append(make(i))
                bar.advance(task)
            return found

        shapes = each("keys", g, lambda i: key_facts.shape(held.keys[i]))
        values = each("values", len(stored), lambda i: key_facts.shape(stored[i]))
        concentrations = each(
            "attention", h, lambda i: key_facts.concentration(asked[i], held.keys[i // (h // g)], limits, scale)
        )
        wide = [(rows.astype(np.float64), keys.astype(np.float64)) for rows, keys in pairs]
        bounds = pruning_case.survival(wide)
        survival = each("bounds", BOUND_ROWS, lambda _: next(bounds))
        building = partial(key_search.built, searched[head], lambda method: step(f"building {method}"))
        methods = each("building", 1, lambda _: building())[0]
        costs: list[Cost] = []
        for rule in rules:
            step(f"{rule} of the keys")
            costs += key_search.costs(searched[head], pairs[head][0], methods.indexes, rule)
            bar.advance(task)
    return Facts(said, shapes, values, concentrations, survival, methods, costs, advice(searched[head], costs))


def probed(held: KeySet, most: int, seed: int, said: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Queries (h, m, d), evenly spaced of those given or made of the keys, and how many keys each sees."""
    if held.queries is not None:
        rows = np.unique(np.linspace(0, held.queries.shape[1] - 1, most).round().astype(np.int64))
        return np.ascontiguousarray(held.queries[:, rows]), held.limits[rows]
    said.append(MADE_QUERIES.format(seed=seed))
    n = held.keys.shape[1]
    rows = np.random.default_rng(seed).choice(n, min(most, n), replace=False)
    centred = held.keys[:, rows] - held.keys.mean(axis=1, keepdims=True, dtype=np.float64).astype(held.keys.dtype)
    return np.ascontiguousarray(centred), np.full(len(rows), n)


def advice(keys: np.ndarray, costs: Sequence[Cost]) -> list[str]:
    """What "auto" would take and why, and what was fastest here."""
    chosen = HSRIndex(keys).explain()
    lines = [f'suggested: method {chosen["method"]}, as method="auto" chooses: {"; ".join(chosen["reasons"])}']
    for rule in dict.fromkeys(cost.rule for cost in costs):
        found = [cost for cost in costs if cost.rule == rule]
        ours, dense = (
            min((cost for cost in found if (cost.contender in DENSE) == side), key=lambda cost: cost.milliseconds)
            for side in (False, True)
        )
        ratio = dense.milliseconds / ours.milliseconds
        lines.append(
            f"measured, {ours.k:,} keys ({rule}): {ours.contender} is the fastest method, {ours.milliseconds:.3g} ms a "
            f"query, {ratio:.2g} times as fast as dense ({dense.contender}, {dense.milliseconds:.3g} ms)"
        )
    return lines


def looks(facts: Facts) -> list[Block]:
    """Tables of the keys' shapes, the values' if there are any, and of attention."""
    attention = [
        [
            str(i),
            f"{np.median(found.perplexity):,.0f}",
            *(f"{np.median(held):,.0f}" for held in found.keys.T),
            f"{found.keys[:, 1].max():,}",
        ]
        for i, found in enumerate(facts.concentrations)
    ]
    return [
        outline("Keys", facts.shapes),
        *([outline("Values", facts.values)] if facts.values else []),
        Block(
            "Attention",
            ("query head", "perplexity", *(f"keys for {share:.0%}" for share in MASSES), "most for 90%"),
            attention,
            "Medians over queries, and the largest: how many keys hold so much of the softmax mass.",
        ),
    ]


def outline(title: str, shapes: Sequence[Shape]) -> Block:
    """Norms, spectrum and repeats, a line for each head."""
    rows = [
        [
            str(i),
            *(f"{norm:.3g}" for norm in shape.norms),
            f"{shape.offset:.2f}",
            f"{shape.effective:.1f} of {len(shape.variances)}",
            *(f"{share:.1%}" for share in shape.variances[:1]),
            *(str(shape.axes(share)) for share in (0.9, 0.99)),
            f"{shape.duplicates:,}",
            f"{shape.zeros:,}",
        ]
        for i, shape in enumerate(shapes)
    ]
    norms = ("least norm", "median", "largest")
    spectrum = ("offset", "effective dimension", "first axis", "axes for 90%", "for 99%")
    return Block(
        title,
        ("head", *norms, *spectrum, "duplicates", "zeros"),
        rows,
        "Offset: the mean's norm over the root mean square norm. Effective dimension: the participation ratio of the "
        "variances along principal axes; so many axes hold 90 and 99 % of the variance.",
    )


def search(facts: Facts, head: int) -> list[Block]:
    """Tables of what bounds exclude, and of what methods cost."""
    survival = [
        [
            str(row["bound"]) + ("" if row["order"] == "none" else f", {row['order']}"),
            f"{row['k']:,} ({row['rule']})",
            f"{row['surviving_fraction']:.1%}",
            f"{row['ratio_to_reported']:.3g}",
        ]
        for row in facts.survival
    ]
    costs = [
        [
            f"{cost.k:,} ({cost.rule})",
            cost.contender,
            f"{cost.milliseconds:.3g}",
            f"{cost.spread:.2g}",
            f"{cost.scanned:.1%}",
            f"{cost.visited:.1%}",
        ]
        for cost in facts.costs
    ]
    indexes = facts.methods.indexes
    builds = [
        [name, f"{facts.methods.seconds[name]:.3g}", f"{indexes[name].explain()['index_bytes_per_key']:.0f}", ""]
        for name in indexes
    ]
    builds += [[name, "", "", reason] for name, reason in facts.methods.refusals.items()]
    return [
        Block(
            "What bounds exclude",
            ("bound", "keys to report", "survive", "per key reported"),
            survival,
            "Means over heads: the share of keys that a bound on the score does not exclude; 1 per key reported is "
            "perfect. Balls and boxes of 16 keys, in the order of the file (tokens) or split by axes (kd).",
        ),
        Block(
            COSTS,
            ("keys to report", "method", "ms a query", "spread", "keys read", "bounds evaluated"),
            costs,
            f"Head {head}, one query a call: the median round, and the distance between the quartiles. Keys read in "
            "full precision and bounds evaluated, over the number of keys; numpy and faiss score every key, in float32",
        ),
        Block("Methods", ("method", "build, s", "bytes per key", "refusal"), builds),
    ]


def shown(block: Block) -> Table:
    """A block in the terminal, cut after LINES heads."""
    title, caption = escape(block.title), escape(block.caption) or None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for i, name in enumerate(block.head):
        table.add_column(escape(name), justify="left" if i == 0 else "right")
    rows = block.rows if block.title not in PER_HEAD else block.rows[:LINES]
    for row in rows:
        table.add_row(*map(Text, row))
    if len(rows) < len(block.rows):
        table.add_row(f"and {len(block.rows) - len(rows)} more")
    return table


def report(folder: Path, file: Path, facts: Facts, blocks: Sequence[Block], seconds: float) -> Path:
    """Write the plots and the page; returns the page's path."""
    from benchmarks.cli import key_figures

    drawn = {
        "Keys": ("spectrum", key_figures.spectrum(facts.shapes)),
        "Attention": ("mass", key_figures.mass(facts.concentrations)),
        COSTS: ("pruning", key_figures.pruning(facts.costs)),
    }
    sections = []
    for block in blocks:
        body = f"{page.table(block.head, block.rows)}<p>{html.escape(block.caption)}</p>"
        if block.title in drawn:
            name, figure = drawn[block.title]
            image = page.png(figure)
            (folder / f"{name}.png").write_bytes(image)
            body = page.image(name, image) + body
        sections.append((block.title, body))
    command = shlex.join(["hsr", *sys.argv[1:]])
    sections.append((page.MADE, page.made(provenance(command), f"{seconds:.0f} s")))
    lead = "".join(f"<p>{html.escape(line)}</p>" for line in (*facts.said, *facts.advice))
    path = folder / "index.html"
    page.write(path, page.page(f"The keys of {file.name}", lead, sections))
    return path
