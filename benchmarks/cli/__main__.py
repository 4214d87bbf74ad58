"""Entry point of ``hsr`` and of ``python -m benchmarks.cli``: says what is not installed, or hands over."""

from __future__ import annotations

import importlib.util
import sys

from benchmarks.cli import startup

NEEDED = ("typer", "rich")


def main() -> int:
    """Run the command line; returns the exit status where there is none to run."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"hsr: not installed: {', '.join(missing)}; run: pip install '.[cli]'\n")
        return 2
    startup.prepare(sys.argv[1:])
    from benchmarks.cli.app import app

    app(prog_name="hsr")
    return 0


if __name__ == "__main__":
    sys.exit(main())
