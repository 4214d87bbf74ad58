"""Write what the case ``retrieval`` found as Markdown, from its committed measurements alone.

python -m benchmarks.retrieval_table benchmarks/results/retrieval.json    # writes retrieval.md beside it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.readme_table import markdown, written_beside

PARTS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "exact": ("Replies that are right to the token, those of common-words in any order", "{:.0%}".format),
    "found": ("Share of the answers in the greedy reply", "{:.0%}".format),
    "logprob": ("Mean log-probability of a token of the right reply, of common-words in one order", "{:.3f}".format),
    "share": ("Share of the keys attended to", "{:.1%}".format),
}
LEGEND = (
    "The context is read densely, question and reply are served by the policy in all layers; "
    "`benchmarks/retrieval_case.py` and `benchmarks/retrieval_tasks.py` say what is measured.  "
    "What is read to choose keys, as codes or all scores are, does not count as attended to."
)

Row = Mapping[str, Any]


def table(measured: Mapping[str, Any]) -> str:
    """A table for each figure: a line per policy, a column per task and length."""
    where = f"{measured['device']}; {measured['cpu']}, {measured['threads']} threads, commit {measured['commit'][:10]}"
    return (
        f"# Retrieval with sparse decode steps\n\n{where}, `{measured['command']}`.  {LEGEND}\n\n"
        + "".join(f"- {note}\n" for note in measured["notes"])
        + "".join(f"\n## {title}\n\n{_part(measured['rows'], name, form)}\n" for name, (title, form) in PARTS.items())
    )


def _part(rows: Sequence[Row], name: str, form: Callable[[Any], str]) -> str:
    found = {((row["method"], row["setting"]), (row["task"], row["tokens"])): row[name] for row in rows}
    policies, columns = (list(dict.fromkeys(pair[place] for pair in found)) for place in (0, 1))
    lines = [
        [
            method,
            f"`{setting}`" if setting else "",
            *(_cell(found.get(((method, setting), at)), form) for at in columns),
        ]
        for method, setting in policies
    ]
    return markdown(("method", "setting", *(f"{task} {tokens:,}" for task, tokens in columns)), lines)


def _cell(value: Any, form: Callable[[Any], str]) -> str:
    return "" if value is None else form(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables of the file named on the command line."""
    written_beside("retrieval_table", "retrieval", table, arguments)


if __name__ == "__main__":
    main()
