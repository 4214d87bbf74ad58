"""The page of a report: one self-contained HTML file, its figures inside; the demo and the command line share it."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1f24; max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .9rem; text-align: right; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #57606a; }
.facts td { text-align: left; }
img { width: 100%; height: auto; } code { background: #eef1f4; padding: .1rem .3rem; border-radius: .2rem; }
.verdict { font-weight: 600; padding: .7rem 1rem; border-left: .4rem solid; white-space: pre-wrap; }
.yes { border-color: #0072b2; background: #eaf4fa; } .no { border-color: #d55e00; background: #fdf0e7; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem 1rem; background: #f6f8fa; }
.scroll { overflow-x: auto; }
"""
MADE = "How this page was made"


def png(figure: Figure) -> bytes:
    """The figure as it is shown."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    return drawn.getvalue()


def image(title: str, drawn: bytes) -> str:
    """A PNG inside the page."""
    return f"<img alt='{html.escape(title)}' src='data:image/png;base64,{base64.b64encode(drawn).decode()}'>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text, row by row."""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"


def made(facts: Mapping[str, Any], time: str) -> str:
    """Where a page's figures come from: what `benchmarks.run.provenance` found, and the time in words."""
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items())
    where = {
        "command": f"<code>{html.escape(facts['command'])}</code>",
        "date": facts["date"],
        "commit": facts["commit"],
        "machine": f"{html.escape(facts['cpu'])}, {facts['threads']} threads",
        "versions": html.escape(versions),
        "time": html.escape(time),
    }
    rows = "".join(f"<tr><td>{name}</td><td>{text}</td></tr>" for name, text in where.items())
    return f"<div class='scroll'><table class='facts'>{rows}</table></div>"


def page(title: str, lead: str, sections: Iterable[tuple[str, str]]) -> str:
    """The whole file; ``lead`` and the sections, heading and body, are HTML but for the headings."""
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{text}" for heading, text in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{lead}
{body}
</body></html>
"""


def unwritable(option: str, path: Path, *, folder: bool = False) -> str | None:
    """Why nothing can be written to a file, or a folder, that is asked for; None where its folders are made.

    To be asked before the work that is to be written there.
    """
    wanted = f"{option} must name a {'folder' if folder else 'file'}; {path}"
    if path.exists() and path.is_dir() != folder:
        return f"{wanted} is a {'file' if folder else 'folder'}"
    where = path if folder else path.parent
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        return f"{wanted} cannot be made: {fault.strerror}"
    return None if os.access(where, os.W_OK) else f"{wanted} may not be written to"


def write(path: Path, text: str) -> None:
    """Write a page, with the folder that it is to lie in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
