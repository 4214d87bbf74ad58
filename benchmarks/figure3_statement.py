"""Say in Markdown what the case ``figure3`` found of the paper's claim, from its committed measurements alone.

python -m benchmarks.figure3_statement benchmarks/results/figure3.json    # writes figure3.md beside it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.figure3_figures import CLAIMED
from benchmarks.readme_table import markdown, written_beside

NO_LOSS = 1.01  # largest ratio of perplexities that counts as none
HALVES = {"ratio": "over the whole text", "late_ratio": "over its second half"}
COLUMNS: Mapping[str, Callable[[Any], str]] = {
    "method": str,
    "setting": lambda text: f"`{text}`" if text else "default",
    "reported": "{:,.1f}".format,
    "perplexity": "{:.3f}".format,
    "ratio": "{:.4f}".format,
    "late_ratio": "{:.4f}".format,
    "kl": "{:.2g}".format,
}
LEGEND = (
    "`reported` is the mean number of keys a row, `benchmarks/figure3_case.py` says what the others are; a loss is a "
    "perplexity above that of dense attention."
)
ORACLE = (
    "Top-r is an oracle: it knows every score, so this says what r keys can hold, not what finding them costs.  What "
    "exact reporting and sampled steps cost is measured by `index`, `decode-cpu`, `decode-gpu` and `leaderboard`."
)

Row = Mapping[str, Any]


def claims(rows: Sequence[Row]) -> list[str]:
    """Sentences; a loss is a perplexity above that of dense attention, none one of less than 1 %."""
    tops = sorted((row for row in rows if row["r"]), key=lambda row: row["r"])
    said = [_first(tops, column, where) for column, where in HALVES.items()]
    for row in tops:
        if row["r"] in (CLAIMED // 4, CLAIMED, 4 * CLAIMED, 16 * CLAIMED):
            said.append(f"{_named(row)}: {_losses(row)}.")
    at = next((row for row in tops if row["r"] == CLAIMED), None)
    if at:
        held = at["ratio"] < NO_LOSS
        said.append(
            f'The paper\'s "no loss until r < 2^4" {"holds" if held else "does not hold"} for this model and text: at '
            f"{_named(at)} the loss is {_losses(at)}."
        )
    for method in ("Sampled", "Certified"):
        for column, where in HALVES.items():
            found = [row for row in rows if row["method"] == method and row[column] < NO_LOSS]
            if found:
                least = min(found, key=lambda row: row["reported"])
                said.append(
                    f"{method} loses less than 1 % {where} with {least['reported']:.0f} keys a row "
                    f"({COLUMNS['setting'](least['setting'])}): {_losses(least)}; {_beside(tops, least['reported'])}"
                )
            elif any(row["method"] == method for row in rows):
                said.append(f"{method} loses more {where}.")
    return said


def _first(tops: Sequence[Row], column: str, where: str) -> str:
    """From which r on no loss is left."""
    lossy = [row["r"] for row in tops if not row[column] < NO_LOSS]
    free = [row for row in tops if row["r"] > max(lossy, default=0)]
    return f"Top-r loses less than 1 % {where} from {_named(free[0])} on." if free else f"Top-r loses more {where}."


def _beside(tops: Sequence[Row], keys: float) -> str:
    """What top-r of about as many keys a row does, the next above."""
    row = next((row for row in tops if row["reported"] >= keys), tops[-1])
    return f"top-r with {_named(row)}: {_losses(row)}."


def _named(top: Row) -> str:
    return f"r = {top['r']} ({top['reported']:.0f} keys a row)"


def _losses(row: Row) -> str:
    return f"{_loss(row['ratio'])}, {_loss(row['late_ratio'])} in the second half"


def _loss(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


def text(measured: Mapping[str, Any]) -> str:
    """Sentences, then the table."""
    rows = measured["rows"]
    where = f"{measured['device']}; {measured['cpu']}, {measured['threads']} threads, commit {measured['commit'][:10]}"
    lines = [[cell(row[name]) for name, cell in COLUMNS.items()] for row in rows]
    return (
        f"# Figure 3 of arXiv 2410.10165, repeated\n\n{where}, `{measured['command']}`; "
        f"{'; '.join(measured['notes'])}; "
        f"{rows[0]['tokens']:,} tokens of Paul Graham's essays.  {LEGEND}\n\n"
        + "".join(f"- {sentence}\n" for sentence in claims(rows))
        + f"\n{ORACLE}\n\n{markdown(COLUMNS, lines)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sentences of the file named on the command line."""
    written_beside("figure3_statement", "figure3", text, arguments)


if __name__ == "__main__":
    main()
