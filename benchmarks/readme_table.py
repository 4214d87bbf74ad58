"""Write the README's generated blocks: the methods from the dispatch table, the speeds from the committed measurements.

``python -m benchmarks.readme_table`` replaces what stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from hsr.backend import ROWS, methods

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
INDEX, DECODE_CPU, DECODE_GPU, PREFILL_GPU = (
    RESULTS / f"{case}.json" for case in ("index", "decode-cpu", "decode-gpu", "prefill-gpu")
)
SETTING = ("n", "d", "reported")
SHAPE, SAMPLED = "llama-3.1-8b", ("sampled-48B+append", "sampled-32B+append", "sampled-16B+append")
GPU_POLICIES = ("fast", "quality")
GPU_LENGTHS = (8192, 32768, 131072, 1048576)
PREFILL_LENGTHS = (8192, 32768, 131072, 524288)
CERTAIN = 68  # sinks and recent keys beside the GPU's list


def main() -> None:
    """Refresh the README."""
    README.write_text(inserted(README.read_text(), blocks()))


def blocks() -> dict[str, str]:
    """Name of a block -> what belongs in it."""
    index, cpu, gpu, prompts = (json.loads(path.read_text()) for path in (INDEX, DECODE_CPU, DECODE_GPU, PREFILL_GPU))
    return {
        "methods": methods_table(),
        "performance": performance(index),
        "decode": decode(cpu, gpu),
        "prefill": prefill(prompts),
    }


def inserted(text: str, contents: Mapping[str, str]) -> str:
    """The text with each block between its two markers.

    Raises:
        ValueError: a marker is missing, repeated, or after its partner.
    """
    for name, content in contents.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"the README must have {begin} and then {end}, once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    return text


def methods_table() -> str:
    """Every row of the dispatch table."""
    cells = ((row.op, f"`{row.method}`", row.device, row.serves, row.work) for row in ROWS)
    return markdown(("operation", "method", "device", "serves", "work of a query"), cells)


def performance(measured: Mapping[str, Any]) -> str:
    """Best dense baseline and best method of each setting; one line per size and threshold, all batches in it."""
    head: list[str] = list(SETTING)
    lines: list[list[str]] = []
    for setting, found in groupby(measured["rows"], key=lambda row: [row[name] for name in SETTING]):
        batches = [(m, list(rows)) for m, rows in groupby(found, key=lambda row: row["m"])]
        if not lines:
            head += [title for m, _ in batches for title in (f"dense, m = {m}", f"HSR, m = {m}", "speed-up")]
        lines.append([*(f"{value:,}" for value in setting), *(cell for _, rows in batches for cell in _race(rows))])
    return (
        markdown(head, lines)
        + f"\n\nMilliseconds per query, `m` queries a call; the faster of numpy and faiss, and our fastest method.  "
        f"{measured['cpu']}, {measured['threads']} threads, commit {measured['commit'][:10]}, `{measured['command']}`."
    )


def decode(cpu: Mapping[str, Any], gpu: Mapping[str, Any]) -> str:
    """A decode step of Llama-3.1-8B's attention shape beside the fastest dense one, on the CPU and on a GPU."""
    lines = []
    for (n, dtype), found in groupby(cpu["rows"], key=lambda row: (row["n"], row["dtype"])):
        ours = [row for row in found if row["shape"] == SHAPE and row["policy"] in SAMPLED]
        if ours:
            best = min(ours, key=lambda row: row["ms"])
            times = f"{best['dense_best_ms']:.3g} ms", f"{best['ms']:.3g} ms"
            keys = f"{best['keys_per_head']:,.0f}"
            lines.append(("CPU", f"{n:,}", dtype, *times, f"{best['speedup']:.1f}x", f"{best['rel_err']:.2%}", keys))
    for row in gpu["rows"]:
        if row["B"] == 1 and row["d"] == 128 and row["n"] in GPU_LENGTHS and row["policy"] in GPU_POLICIES:
            times = f"{row['dense_best_us']:.3g} us", f"{row['us']:.3g} us"
            ends = f"{row['speedup']:.1f}x", f"{row['rel_err']:.2%}", f"{row['union_keys'] + CERTAIN:,.0f}"
            lines.append((f"GPU, {row['policy']}", f"{row['n']:,}", "bfloat16", *times, *ends))
    return (
        markdown(("device", "n", "dtype", "dense", "sampled", "speed-up", "error", "keys per list"), lines)
        + "\n\nOne decode step, an append and an attend, 8 key-value heads of 4 query heads, d = 128.  "
        f"CPU: {cpu['cpu']}, {cpu['threads']} threads, real heads, the cheapest setting within 1 %, torch's "
        f"faster form, commit {cpu['commit'][:10]}, `{cpu['command']}`.  "
        f"GPU: {gpu['device']}, synthetic heads, the fastest of cuDNN and FlashAttention 2 and 3, commit "
        f"{gpu['commit'][:10]}, `{gpu['command']}`.  Errors are means, relative to the output.  "
        f"Other shapes gain less: down to {_least(cpu):.1f}x on the CPU (d = 64) and {_least(gpu):.1f}x on the GPU."
    )


def prefill(gpu: Mapping[str, Any]) -> str:
    """A prompt's attention at Llama-3.1-8B's shape on a GPU, over sampled keys and dense."""
    sampled = [row for row in gpu["rows"] if row["method"].startswith("sampled") and row["speedup"]]
    lines = [
        (
            f"{row['n']:,}", f"{row['density']:.0%}", _ms(row["dense_best_ms"]), _ms(row["total_ms"]),
            f"{row['select_ms'] / row['total_ms']:.0%}", f"{row['speedup']:.1f}x", f"{row['rel_err']:.1%}",
        )
        for row in sampled
        if row["d"] == 128 and row["n"] in PREFILL_LENGTHS and row["method"] == "sampled-1"
    ]  # fmt: skip
    least = min(sampled, key=lambda row: row["speedup"])
    return (
        markdown(("n", "density", "dense", "sampled", "of it selection", "speed-up", "error"), lines)
        + "\n\nA prompt's causal attention, 32 query heads over 8 key-value heads, d = 128, bfloat16, one "
        "representative a block (`rows=1`), replayed from CUDA graphs, so without the calls' time on the host, which "
        f"short prompts wait for.  {gpu['device']}, synthetic heads, the fastest of cuDNN and "
        f"FlashAttention 2 and 3, commit {gpu['commit'][:10]}, `{gpu['command']}`.  The least gain there is "
        f"{least['speedup']:.2f}x (d = {least['d']}, {least['n']:,} tokens, {least['method']}); shorter prompts gain "
        "less, and where rates that are measured say that nothing is gained, a dense kernel serves."
    )


def _ms(time: float) -> str:
    return f"{time:,.0f} ms" if time >= 100 else f"{time:.3g} ms"


def _least(measured: Mapping[str, Any]) -> float:
    """The smallest speed-up of a sampled step, over all shapes and sizes."""
    sampled = (row for row in measured["rows"] if row["policy"] in (*SAMPLED, "fast", "quality"))
    return min(row["speedup"] for row in sampled)


def _race(rows: list[Mapping[str, Any]]) -> list[str]:
    ours = methods("build")
    dense = min((row for row in rows if row["method"] not in ours), key=lambda row: row["ms"])
    best = min((row for row in rows if row["method"] in ours), key=lambda row: row["ms"])
    return [
        f"{dense['ms']:.3g} ({dense['method']})",
        f"{best['ms']:.3g} ({best['method']})",
        f"{best['speedup_vs_best_baseline']:.1f}x",
    ]


def written_beside(
    program: str, case: str, text: Callable[[dict[str, Any]], str], arguments: Sequence[str] | None
) -> None:
    """The command line of a module that says what a case found: text of the measurements in FILE, beside it as .md."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description="What was found.")
    parser.add_argument("file", type=Path, metavar="FILE", help=f"measurements of the case {case}")
    file = parser.parse_args(arguments).file
    file.with_suffix(".md").write_text(text(json.loads(file.read_text())))


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table."""
    head = list(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


if __name__ == "__main__":
    main()
