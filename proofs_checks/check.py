"""What the file of a statement provides: one record that binds the statement to the code that must obey it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, given, settings, target
from hypothesis.strategies import SearchStrategy

PAPER = "arXiv 2410.10165"
OURS = "this library"
Case = TypeVar("Case")


@dataclass(frozen=True)
class Check:
    """A statement, the operations that must obey it, and faulty operations that must be caught.

    Args:
        statement: its number or name, and what it is about.
        source: PAPER or OURS.
        evidence: how strong a pass is: exact rationals, 60 digits, floats with a bound, Monte Carlo with its rate of
            false alarms, or measured cost.
        conclude: (operation, examples) -> measured constants; raises AssertionError where the conclusion fails.
        operations: by name, the library's own implementations, all of one signature.
        faults: by name, implementations of the same signature with a mistake planted in each.
        examples: how many random inputs a full run draws.
        pending: why there is no operation yet, if there is none.
    """

    statement: str
    source: str
    evidence: str
    conclude: Callable[[Any, int], dict[str, float]]
    operations: Mapping[str, Callable[..., Any]]
    faults: Mapping[str, Callable[..., Any]]
    examples: int = 500
    pending: str = ""

    def __call__(self, operation: Callable[..., Any] | None = None, examples: int | None = None) -> dict[str, float]:
        """Check one operation, by default the library's first: the measured constants, or AssertionError."""
        chosen = next(iter(self.operations.values())) if operation is None else operation
        return self.conclude(chosen, self.examples if examples is None else examples)


class Extremes(dict[str, float]):
    """The largest or smallest value met under each name."""

    def largest(self, name: str, value: Any) -> None:
        """Keep the value if it is the largest so far."""
        self[name] = max(self.get(name, -float("inf")), float(value))

    def smallest(self, name: str, value: Any) -> None:
        """Keep the value if it is the smallest so far."""
        self[name] = min(self.get(name, float("inf")), float(value))


def for_all(inputs: SearchStrategy[Case], conclusion: Callable[[Case], float | None], examples: int) -> None:
    """Assert a conclusion for drawn inputs, the same ones in every run; a failing input is shrunk and shown.

    Where the conclusion returns a number, how nearly a bound is attained, the search goes for larger ones.
    """

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def concluded(case: Case) -> None:
        attained = conclusion(case)
        if attained is not None:
            target(attained)

    concluded()


def discover() -> dict[str, Check]:
    """The CHECK of every module of this package that has one, by module name: the paper's first, then our own."""
    names = [entry.name for entry in pkgutil.iter_modules([str(Path(__file__).parent)]) if entry.name != "__main__"]
    modules = {name: importlib.import_module(f"proofs_checks.{name}") for name in names}
    checks = {name: module.CHECK for name, module in modules.items() if hasattr(module, "CHECK")}
    return dict(sorted(checks.items(), key=lambda item: (item[1].source != PAPER, item[0])))
