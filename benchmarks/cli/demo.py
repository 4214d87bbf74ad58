"""``hsr demo``: the main job, as ``make demo`` runs it."""

from __future__ import annotations

from pathlib import Path

from benchmarks import demo
from hsr.errors import BackendUnavailable


def run(tokens: int, steps: int, out: Path, json: Path | None) -> int:
    """See `benchmarks.demo`; its exit status."""
    lacking = demo.missing("the demo")
    if lacking:
        raise BackendUnavailable(f"{lacking}; in a clone of the repository, make demo does both")
    arguments = ["--tokens", str(tokens), "--steps", str(steps), "--out", str(out)]
    return demo.main(arguments + (["--json", str(json)] if json else []))
