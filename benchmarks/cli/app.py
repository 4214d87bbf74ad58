"""The commands of ``hsr`` and their options; what a command does is in the module of its name."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.cli import terminal
from benchmarks.demo import CONTEXT, LEAST_TOKENS

WRONG, REFUSED = 1, 2  # exit status of a wrong answer; of bad input, as that of a bad option

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Half-space reporting attention: look at keys, generate text, check theorems, run benchmarks.",
)

Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a self-contained report there.")]


def run(command: str, **options: Any) -> None:
    """Run a command's module and end with its status; what it refuses is one line and status 2."""
    try:
        status: int = importlib.import_module(f"benchmarks.cli.{command}").run(**options)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] in ("hsr", "attention", "gpu", "proofs_checks", "benchmarks"):
            raise
        refuse(command, f"needs the package {missing.name}: pip install '.[demo]'")
    except KeyboardInterrupt as stop:
        for note in getattr(stop, "__notes__", ()):
            tell(command, note)
        raise
    except BrokenPipeError:  # who reads our output has read enough
        raise
    except OSError as fault:
        refuse(command, str(fault))
    except Exception as fault:
        from benchmarks.gate import WrongAnswer
        from benchmarks.run import told
        from hsr.errors import HsrError

        if not isinstance(fault, HsrError | WrongAnswer):
            raise
        refuse(command, told(fault), WRONG if isinstance(fault, WrongAnswer) else REFUSED)
    raise typer.Exit(status)


def refuse(command: str, reason: str, status: int = REFUSED) -> None:
    """End with one line on stderr and that status."""
    tell(command, reason)
    raise typer.Exit(status)


def tell(command: str, what: str) -> None:
    """Say something in one line on stderr."""
    terminal.aside().print(f"hsr {command}: {' '.join(what.split())}", markup=False, soft_wrap=True)


def show_version(asked: bool) -> None:
    """Print the version and end."""
    if asked:
        terminal.results().print(f"hsr {metadata.version('hsr-attention')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before any command."""


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=LEAST_TOKENS, max=CONTEXT, help="Prompt tokens to read.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, max=CONTEXT - LEAST_TOKENS, help="Tokens to decode.")] = 128,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the report.")] = Path("demo_report"),
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures there.")] = None,
) -> None:
    """A small real model reads real essays, with and without half-space reporting; every certificate is checked."""
    run("demo", tokens=tokens, steps=steps, out=out, json=json)


@app.command()
def bench(
    case: Annotated[str | None, typer.Argument(metavar="CASE", help="None lists the cases.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTION...]", help="The case's own options; CASE -- --help lists them."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: checks that it works, measures nothing.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the measurements there.")] = None,
    plots: Annotated[
        bool | None, typer.Option(help="Write the case's figures as PNG beside FILE; by default where it has any.")
    ] = None,
    html: Html = None,
) -> None:
    """Run a benchmark case: first the gate, then the clock, beside the best dense baseline."""
    run("bench", name=case, more=more or [], quick=quick, json=json, plots=plots, html=html)


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Statements; none means all.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="Random inputs per check, in place of its own.")] = None,
    constants: Annotated[bool, typer.Option("--constants", help="Show the largest constants that were met.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Only list the statements.")] = False,
) -> None:
    """Check the theorems against the library; exit status 1 if one fails."""
    run("check", names=names or [], examples=examples, constants=constants, listed=listed)


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE.npz", help="Arrays of keys, and of queries and values if any.")],
    keys: Annotated[str | None, typer.Option(metavar="NAME", help="Array of the keys; by default k or keys.")] = None,
    queries: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the queries; by default q or queries.")
    ] = None,
    values: Annotated[str | None, typer.Option(metavar="NAME", help="Of the values; by default v or values.")] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Of arrays with four axes, which of the first to take; by default 0.")
    ] = None,
    head: Annotated[int, typer.Option(min=0, help="Key-value head that index methods are measured on.")] = 0,
    causal: Annotated[
        bool, typer.Option("--causal", help="Queries are the last positions; none sees later keys.")
    ] = False,
    scale: Annotated[float | None, typer.Option(help="Of the scores; by default 1 / sqrt(d).")] = None,
    probes: Annotated[int, typer.Option(min=1, help="Most queries a head to look at.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the queries that are made where none are given.")] = 0,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write plots and index.html there.")] = None,
) -> None:
    """What a set of keys looks like, which index method suits it, and what that costs."""
    run(
        "explain", file=file, keys=keys, queries=queries, values=values, layer=layer, head=head, causal=causal,
        scale=scale, probes=probes, seed=seed, save=save,
    )  # fmt: skip


@app.command()
def generate(
    model: Annotated[
        str | None,
        typer.Argument(help="smollm2 (packaged), a folder, a name that transformers knows, or a .gguf file."),
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help="What the text begins with; after --prompt-file's.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Text of a long prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn, by the model's template.")] = False,
    policy: Annotated[str, typer.Option(metavar="NAME", help="What a step attends to; see --list.")] = "sampled",
    eps: Annotated[str | None, typer.Option(metavar="X", help="Error that the policy may make.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="N", help="Keys of a step.")] = None,
    r: Annotated[str | None, typer.Option("--r", metavar="N", help="Keys of topr and top-oracle.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any option of the policy; see --list.")
    ] = None,
    prefill: Annotated[str, typer.Option(metavar="NAME", help="What the prompt attends to; see --list.")] = "dense",
    prefill_settings: Annotated[
        list[str] | None, typer.Option("--prefill-set", metavar="NAME=VALUE", help="Any option of that one.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to make at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the text; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the text's draws and the policies'.")] = 0,
    dense_below: Annotated[
        str, typer.Option(metavar="N", help="Tokens below which attention is dense; auto: until it is slower.")
    ] = "0",
    dense_layers: Annotated[
        list[int] | None, typer.Option("--dense-layer", min=0, help="A layer that is always dense.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    gguf: Annotated[str | None, typer.Option(metavar="FILE", help="GGUF file in MODEL's folder or repository.")] = None,
    stretch: Annotated[
        bool, typer.Option("--stretch", help="Scale rotary embeddings (YaRN) where the text exceeds the context.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="Only list the policies and their options.")] = False,
    html: Html = None,
) -> None:
    """A language model writes; beside the text, what share of the keys it attends to and what is sure of its error."""
    run(
        "generate",
        model=model,
        prompt=prompt,
        prompt_file=prompt_file,
        chat=chat,
        policy=policy,
        prefill=prefill,
        options={"eps": eps, "budget": budget, "r": r},
        settings=settings or [],
        prefill_settings=prefill_settings or [],
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        dense_below=dense_below,
        dense_layers=dense_layers or [],
        device=device,
        dtype=dtype,
        gguf=gguf,
        stretch=stretch,
        listed=listed,
        html=html,
    )
