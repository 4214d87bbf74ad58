"""What a command's own process is set up with before numpy, numba or torch are imported."""

from __future__ import annotations

import os
from collections.abc import Sequence

from benchmarks.demo import SETTINGS

TORCH = ("demo", "generate")  # commands that run a model beside our kernels
TIMED = ("bench", "explain")  # commands that print times
HELP = {"-h", "--help"}


def prepare(arguments: Sequence[str]) -> None:
    """Set variables for the command that these arguments begin with; one that times begins anew without overrides."""
    command = arguments[0] if arguments else ""
    if command in TORCH:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
    if command in TIMED and HELP.isdisjoint(arguments):
        from benchmarks.run import restart_without_overrides

        restart_without_overrides("benchmarks.cli")
