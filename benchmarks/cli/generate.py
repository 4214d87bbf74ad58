"""``hsr generate``: a language model writes, each step attending to a part of the keys, and says what it knows."""

from __future__ import annotations

import dataclasses
import html as markup
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from attention.integrations.transformers import HSRCache
from benchmarks import page
from benchmarks.cli import decoding, language_model, policies, reading, terminal
from benchmarks.cli.decoding import Step
from benchmarks.cli.reading import Setting
from benchmarks.run import provenance
from hsr import checks
from hsr.errors import ArgumentError

FRAMES = 8  # a second
STOPPED = 130  # exit status of a text that Ctrl-C ended


def run(
    model: str | None,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    policy: str,
    prefill: str,
    options: dict[str, str | None],
    settings: Sequence[str],
    prefill_settings: Sequence[str],
    tokens: int,
    temperature: float,
    seed: int,
    dense_below: str,
    dense_layers: Sequence[int],
    device: str,
    dtype: str,
    gguf: str | None,
    stretch: bool,
    listed: bool,
    html: Path | None,
) -> int:
    """Generate text, or list the policies; status 0, or STOPPED where the user ended the text."""
    console = terminal.results()
    if listed:
        console.print(listing())
        return 0
    if model is None:
        raise ArgumentError("MODEL must be given: smollm2, a folder, a name that transformers knows or a GGUF file")
    reason = None if html is None else page.unwritable("--html", html)
    if reason:
        raise ArgumentError(reason)
    start = time.perf_counter()
    text = written(prompt, prompt_file)
    steps = policies.policy("decode", policy, given(options, settings, seed, policy))
    rows = policies.policy("prefill", prefill, given({}, prefill_settings, seed, prefill))
    below = least(dense_below)
    with terminal.spinner() as bar:
        bar.add_task(f"loading {model}")
        reader = language_model.tokenizer(model, gguf)
        ids = language_model.encoded(reader, text, chat)
        network = language_model.loaded(model, gguf, device, dtype, len(ids) + tokens, stretch)
        cache = HSRCache(network.config, decode=steps, prefill=rows, dense_layers=dense_layers, dense_below=below)
    setting = Setting(model, described(steps), described(rows), len(ids), tokens)
    made: list[Step] = []
    with prompt_bar(network, len(ids)) as advance:
        coming = decoding.steps(network, ids, cache, tokens, temperature, seed, advance)
        made.append(next(coming))
    answer, ended = shown(setting, reader, made, coming)
    found = reading.rows(setting, made)
    console.print(reading.summary(found))
    if html:
        page.write(html, report(setting, text, answer, found, made, time.perf_counter() - start))
        console.print(f"report: {html}", soft_wrap=True, markup=False)
    return 0 if ended else STOPPED


def written(prompt: str | None, file: Path | None) -> str:
    """The prompt; with a file, its text before it."""
    parts = []
    if file is not None:
        try:
            parts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as fault:
            raise ArgumentError(f"--prompt-file must be a text file that can be read; {file}: {fault}") from fault
    parts += [] if prompt is None else [prompt]
    if not parts:
        raise ArgumentError("PROMPT or --prompt-file must be given")
    return "\n\n".join(parts)


def given(options: dict[str, str | None], settings: Iterable[str], seed: int, policy: str) -> dict[str, str]:
    """A policy's options by name: those of the command line, NAME=VALUE pairs, and the seed if it has one."""
    found = {name: text for name, text in options.items() if text is not None}
    for pair in settings:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ArgumentError(f"--set and --prefill-set must be NAME=VALUE; got {pair!r}")
        found[name.replace("-", "_")] = text
    entry = policies.table().get(policy.lower())
    return ({"seed": str(seed)} if entry and "seed" in entry.options else {}) | found


def least(text: str) -> int | str:
    """The number of tokens below which attention is dense."""
    if text == "auto":
        return text
    if not text.isdecimal():
        raise ArgumentError(f"--dense-below must be a number of tokens or auto; got {text!r}")
    return checks.whole("--dense-below", int(text), 0)


def described(policy: Any) -> str:
    """A policy in words, with the options that differ from its defaults."""
    if policy is None:
        return "dense"
    values = {field.name: (getattr(policy, field.name), field.default) for field in dataclasses.fields(policy)}
    told = (f"{name}={value!r}" for name, (value, default) in values.items() if value != default)
    return f"{type(policy).__name__}({', '.join(told)})"


@contextmanager
def prompt_bar(network: Any, tokens: int) -> Iterator[Any]:
    """A bar over the layers that have read the prompt."""
    with terminal.progress() as bar:
        task = bar.add_task(f"reading {tokens:,} tokens", total=len(decoding.attention_layers(network)))
        yield lambda: bar.advance(task)


def shown(setting: Setting, reader: Any, made: list[Step], coming: Iterator[Step]) -> tuple[str, bool]:
    """Take the steps as they come and show them, live in a terminal, as plain text elsewhere.

    Returns the text, and whether it came to its end: Ctrl-C keeps what there is.
    """
    console = terminal.results()
    text, ended = "", False
    live = Live(console=console, refresh_per_second=FRAMES, transient=True) if console.is_terminal else None
    try:
        with live or nullcontext():
            for longer in texts(reader, made, coming):
                if live:
                    live.update(reading.view(longer, reading.rows(setting, made), console.width, console.height))
                else:
                    console.out(longer[len(text) :], end="", highlight=False)
                text = longer
        ended = True
    except KeyboardInterrupt:
        pass  # the text ends here
    console.print(Text(text) if live else "")
    return text, ended


def texts(reader: Any, made: list[Step], coming: Iterator[Step]) -> Iterator[str]:
    """The text so far, after each step; a character whose last bytes are to come is kept back."""
    while True:
        text = reader.decode([step.token for step in made], skip_special_tokens=True)
        yield text.rstrip("\N{REPLACEMENT CHARACTER}")
        step = next(coming, None)
        if step is None:
            return
        made.append(step)


def listing() -> Table:
    """The policies and their options."""
    table = Table("policy", "serves", "options")
    for row in policies.listing():
        table.add_row(*map(Text, row))
    return table


def report(
    setting: Setting, prompt: str, answer: str, found: Sequence[tuple[str, str]], made: Sequence[Step], seconds: float
) -> str:
    """The page: the text, the figures, their curves, and where they come from."""
    lead = f"<p>{markup.escape(setting.model)} wrote {len(made)} tokens by {markup.escape(setting.decode)}.</p>"
    image = page.image("Step by step", page.png(reading.curves(made)))
    sections = [
        ("Prompt", f"<p class='text'>{markup.escape(abridged(prompt))}</p>"),
        ("Text", f"<p class='text'>{markup.escape(answer)}</p>"),
        ("Attention", page.table(("", ""), found) + f"<p>{reading.LEGEND}</p>" + image),
        (page.MADE, page.made(provenance(shlex.join(["hsr", *sys.argv[1:]])), f"{seconds:.0f} s")),
    ]
    return page.page("Text by half-space reporting attention", lead, sections)


def abridged(text: str, most: int = 1200) -> str:
    """A long text without its middle."""
    return text if len(text) <= most else f"{text[: most // 2]}\n[...]\n{text[-most // 2 :]}"
